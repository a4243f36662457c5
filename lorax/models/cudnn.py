"""Attention to long sequences by cuDNN's fused kernel, as `jax.nn.dot_product_attention` calls it.

It takes 16-bit numbers, and here rows of one text each, with or without a sliding window: padding
at the end of a row is later than what the row's text reads. Packed texts, virtual tokens in front,
caches, caps and sinks go to `blockwise`. It has been compared with its plain form, and has not run
on a GPU yet.
"""

import jax
import jax.numpy as jnp

from lorax.models import masks

FEATURES = 128  # of a head, at most; a multiple of 8


def computes(q, mask, cap, sinks) -> bool:
    """Whether `attention` computes what `layers.attention` is given, on this machine."""
    return on_cuda() and takes(q, mask, cap, sinks)


def takes(q, mask, cap, sinks) -> bool:
    """Whether the kernel has these types, sizes and masks."""
    simple = isinstance(mask, masks.Mask) and mask.span is not None and cap is None
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return simple and sinks is None and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= FEATURES


def on_cuda() -> bool:
    """Whether JAX computes on GPUs of NVIDIA."""
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version


def attention(q, k, v, mask, scale: float, implementation: str = "cudnn"):
    """`layers.attention` for a mask that `takes` accepts."""
    window = None if mask.span == masks.LAST else (mask.span - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=window,
        implementation=implementation,
    )  # fmt: skip
