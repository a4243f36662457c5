"""Quantised weights in the order that a GPU's or TPU's kernel reads them.

`placed` reorders a model's leaves once, when its base is put on a device, because the kernels can't
read the order of bitsandbytes. A product with few rows uses the kernel (fused: codes are decoded
just before the matrix unit). A product with many rows, and the backward pass, decode w to bfloat16
once and use the library's product (two passes). Values are bfloat16 in both cases.
"""

import dataclasses
import functools
import math
import warnings
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from lorax import leaves, ops, tree
from lorax.quant import matmul, nf4

FUSED_ROWS = 512  # more rows use two passes
_TRIED = 16  # rows of the product that is compiled to test the kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed(leaves.FrozenWeight):
    """A linear layer's frozen kernel in 4 bits, for products in bfloat16.

    words: int32, scales: float32, layer axes first, as returned by the `repack` of `on`. kernel,
    n_in, kind: (static) as in `nf4.Quantised`. on: (static) "gpu" or "tpu", the kernel.
    """

    words: jax.Array
    scales: jax.Array
    kernel: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    n_in: int = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(metadata={"static": True})
    on: str = dataclasses.field(metadata={"static": True})

    dtype = np.dtype(jnp.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.words.shape[:-2], *self.kernel)

    @property
    def table(self) -> np.ndarray:
        return nf4.CODES[self.kind].values

    def decoded(self):
        weight = lambda words, scales: kernels(self.on).weight(words, scales, self.table)
        weight = ops.over_layers(weight, self.words.ndim - 2)
        return weight(self.words, self.scales).reshape(self.shape)

    def product(self, x, axis: int):
        return matmul.product(x, self, axis)

    def of_rows(self, x, axis: int):
        """(rows, n) -> (rows, the other), in x's dtype."""
        kernel, n_out = kernels(self.on), math.prod(self.kernel) // self.n_in
        small = jnp.bfloat16

        def two_passes(x):
            w = self.decoded().reshape(self.n_in, n_out).astype(x.dtype)
            return matmul.dot(x, w, (1, axis))

        if axis == 0 and len(x) <= FUSED_ROWS and not kernel.can_use(len(x), self.n_in, n_out, 64):
            fused = lambda x: kernel.matmul(
                x.astype(small), self.words, self.scales, self.table, jnp.float32
            ).astype(x.dtype)
            # On another device (a run continued without this one) use the plain product.
            on = {"cuda" if self.on == "gpu" else "tpu": fused}
            return jax.lax.platform_dependent(x, **on, default=two_passes)
        return two_passes(x)


def kernels(on: str) -> ModuleType:
    """The module of a kernel, imported only when needed: it takes a second."""
    if on == "gpu":
        from lorax.quant import mosaic as module
    else:
        from lorax.quant import tpu as module
    return module


def placed(params, device: jax.Device, dtype) -> dict:
    """The parameters for products in `dtype` on a device; leaves that its kernel supports become
    `Packed`. If the kernel does not compile for the device, nothing changes except for a warning.
    """
    on = device.platform
    if jnp.dtype(dtype) != jnp.bfloat16 or on not in ("gpu", "tpu"):
        return params
    if on == "gpu" and not kernels(on).hopper(device):
        return params
    flat = tree.flatten(params)
    for path, leaf in flat.items():
        if not isinstance(leaf, nf4.Quantised) or leaf.code.bits != 4:
            continue
        if kernels(on).can_use(_TRIED, leaf.n_in, leaf.n_out, leaf.block):
            continue
        if why := _fails(on, leaf.n_in, leaf.n_out, leaf.kind, device):
            warnings.warn(f"4-bit products are decoded first, {on} kernel: {why}", stacklevel=2)
            return params
        flat[path] = pack(leaf, on)
    return tree.unflatten(flat)


def pack(leaf: nf4.Quantised, on: str) -> Packed:
    """The leaf in a kernel's order, with double-quantised scales as float32."""

    def repack(codes, scales):
        return kernels(on).repack(codes.reshape(-1), scales.reshape(-1), leaf.n_in, leaf.n_out)

    of_layers = jax.jit(ops.over_layers(repack, leaf.codes.ndim - 2))
    words, scales = of_layers(leaf.codes, leaf.scales())
    return Packed(words, scales, leaf.kernel, leaf.n_in, leaf.kind, on)


@functools.cache
def _fails(on: str, n_in: int, n_out: int, kind: str, device) -> str:
    """Why the kernel does not compile for a device, '' if it does."""
    module, at = kernels(on), jax.sharding.SingleDeviceSharding(device)
    shape = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=at)
    packed = jax.eval_shape(
        functools.partial(module.repack, n_in=n_in, n_out=n_out),
        jax.ShapeDtypeStruct((n_in * n_out // 2,), jnp.uint8),
        jax.ShapeDtypeStruct((n_in * n_out // 64,), jnp.float32),
    )
    words, scales = (shape(x.shape, x.dtype) for x in packed)
    run = lambda x, words, scales: module.matmul(x, words, scales, nf4.CODES[kind].values)
    try:
        jax.jit(run).lower(shape((_TRIED, n_in), jnp.bfloat16), words, scales).compile()
    except Exception as error:  # whatever a compiler raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
