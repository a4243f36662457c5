"""Layers that the models share, with backward passes that keep no more than they need.

Each has the parameters of its Flax counterpart. Axes: B batch, T positions (queries), S positions
(keys), H heads, D features of one head.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

# --------------------------------------------------------------------------------------- attention


KEEP = 256 * 256  # queries x keys up to which a layer keeps its probabilities (measured on a CPU)


def _probabilities(q, k, scale):
    """Causal softmax of the scores: (B, H, T, S) float32."""
    scores = scale * jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    t, s = scores.shape[-2:]
    future = jnp.arange(s)[None, :] > jnp.arange(t)[:, None] + (s - t)
    scores = jnp.where(future, jnp.finfo(jnp.float32).min, scores)
    p = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return p / jnp.sum(p, axis=-1, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def causal_attention(q, k, v, scale):
    """Scaled dot-product attention in which a position sees itself and what came before.

    q: (B, T, H, D); k, v: (B, S, H, D) with S >= T (the queries are the last T positions); one
    floating dtype. scale: float. Returns (B, T, H, D) in that dtype; the softmax is in float32.

    The backward pass of a long sequence makes the probabilities again from q and k, as
    FlashAttention does (arXiv:2205.14135, section 3.1); a short one's are cheaper kept.
    """
    return _attention_forward(q, k, v, scale)[0]


def _attention_forward(q, k, v, scale):
    p = _probabilities(q, k, scale)
    o = jnp.einsum("bhts,bshd->bthd", p.astype(v.dtype), v)
    kept = p if p.shape[-2] * p.shape[-1] <= KEEP else None
    return o, (q, k, v, o, kept)


def _attention_backward(scale, saved, do):
    q, k, v, o, p = saved
    p = _probabilities(q, k, scale) if p is None else p
    dv = jnp.einsum("bhts,bthd->bshd", p.astype(do.dtype), do)
    dp = jnp.einsum("bthd,bshd->bhts", do, v, preferred_element_type=jnp.float32)
    row = jnp.einsum("bthd,bthd->bht", do, o, preferred_element_type=jnp.float32)
    ds = (scale * p * (dp - row[..., None])).astype(q.dtype)
    return jnp.einsum("bhts,bshd->bthd", ds, k), jnp.einsum("bhts,bthd->bshd", ds, q), dv


causal_attention.defvjp(_attention_forward, _attention_backward)

# ------------------------------------------------------------------------------------------- norms


def _standardise(x, epsilon):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + epsilon)
    return (x - mean) * rstd, rstd


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, epsilon):
    """Layer normalisation over the last axis (arXiv:1607.06450); keeps only x for its gradient.

    x: (..., D); scale, bias: (D,); epsilon: float. Statistics in x's dtype.
    """
    wide = (1,) * (x.ndim - 1) + (-1,)
    return _standardise(x, epsilon)[0] * scale.reshape(wide) + bias.reshape(wide)


def _layer_norm_forward(x, scale, bias, epsilon):
    return layer_norm(x, scale, bias, epsilon), (x, scale)


def _layer_norm_backward(epsilon, saved, dy):
    x, scale = saved
    normal, rstd = _standardise(x, epsilon)
    dn = dy * scale.reshape((1,) * (x.ndim - 1) + (-1,))
    along = jnp.mean(dn * normal, axis=-1, keepdims=True)
    dx = rstd * (dn - jnp.mean(dn, axis=-1, keepdims=True) - normal * along)
    rows = tuple(range(x.ndim - 1))
    return dx, jnp.sum(dy * normal, axis=rows), jnp.sum(dy, axis=rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """`nn.LayerNorm` with the same parameters ("scale", "bias"), computed in float32."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        wide = (t.astype(jnp.float32) for t in (x, scale, bias))
        return layer_norm(*wide, self.epsilon).astype(x.dtype)


# ------------------------------------------------------------------------------------- activations

_GELU = math.sqrt(2 / math.pi)


@jax.custom_vjp
def gelu_tanh(x):
    """GELU by its tanh approximation (arXiv:1606.08415, section 2); keeps only x."""
    return 0.5 * x * (1 + jnp.tanh(_GELU * (x + 0.044715 * x * x * x)))


def _gelu_backward(x, dy):
    square = x * x
    t = jnp.tanh(_GELU * x * (1 + 0.044715 * square))
    slope = 0.5 * x * (1 - t * t) * _GELU * (1 + 3 * 0.044715 * square)
    return (dy * (0.5 * (1 + t) + slope),)


gelu_tanh.defvjp(lambda x: (gelu_tanh(x), x), _gelu_backward)

# Hugging Face's names.
ACTIVATIONS = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
