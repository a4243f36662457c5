"""Layers that the models share, with backward passes that keep no more than they need.

Each has the parameters of its Flax counterpart. Axes: B batch, T positions (queries), S positions
(keys), H heads, K heads of keys and values, G = H / K queries that share one, D features of a head.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from lorax import fields, leaves
from lorax.errors import nearest

# --------------------------------------------------------------------------------------- attention


KEEP = 256 * 256  # queries x keys up to which a layer keeps its probabilities (measured on a CPU)
BLOCKS = 4  # of queries in causal attention; 8 are slower below 1024 tokens (measured on a CPU)


def _probabilities(q, k, mask, scale):
    """Masked softmax of q (B, K, G * T, D) with k (B, K, S, D): (B, K, G * T, S) float32."""
    scores = scale * jnp.einsum("bkmd,bksd->bkms", q, k, preferred_element_type=jnp.float32)
    apart = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])  # (B, K, G, T, S)
    apart = jnp.where(mask[:, None, None], apart, jnp.finfo(jnp.float32).min)
    p = jnp.exp(apart - jnp.max(apart, axis=-1, keepdims=True))
    return (p / jnp.sum(p, axis=-1, keepdims=True)).reshape(scores.shape)


def attention(q, k, v, mask, scale):
    """Scaled dot-product attention (arXiv:1706.03762, equation 1), grouped-query where K < H
    (arXiv:2305.13245).

    q: (B, T, H, D); k, v: (B, S, K, D), K a divisor of H; one floating dtype. mask: (B or 1, T, S)
    bool, True where a query may look (a row without any looks everywhere alike). scale: float.
    Returns (B, T, H, D) in that dtype; the softmax is in float32.

    The backward pass of a long sequence makes the probabilities again from q and k, as
    FlashAttention does (arXiv:2205.14135, section 3.1); a short one's are cheaper kept.
    """
    # Queries that share keys are rows of one product: every product has one axis to contract.
    t, heads = q.shape[1], k.shape[2]
    q = rearrange(q, "b t (k g) d -> b k (g t) d", k=heads)
    k, v = (rearrange(x, "b s k d -> b k s d") for x in (k, v))
    o = _attention(q, k, v, mask, scale)
    return rearrange(o, "b k (g t) d -> b t (k g) d", t=t)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, mask, scale):
    return _attention_forward(q, k, v, mask, scale)[0]


def _attention_forward(q, k, v, mask, scale):
    p = _probabilities(q, k, mask, scale)
    o = jnp.einsum("bkms,bksd->bkmd", p.astype(v.dtype), v)
    kept = p if mask.shape[-2] * mask.shape[-1] <= KEEP else None
    return o, (q, k, v, mask, o, kept)


def _attention_backward(scale, saved, do):
    q, k, v, mask, o, p = saved
    p = _probabilities(q, k, mask, scale) if p is None else p
    dv = jnp.einsum("bkms,bkmd->bksd", p.astype(do.dtype), do)
    dp = jnp.einsum("bkmd,bksd->bkms", do, v, preferred_element_type=jnp.float32)
    row = jnp.einsum("bkmd,bkmd->bkm", do, o, preferred_element_type=jnp.float32)
    ds = (scale * p * (dp - row[..., None])).astype(q.dtype)
    dq = jnp.einsum("bkms,bksd->bkmd", ds, k)
    return dq, jnp.einsum("bkms,bkmd->bksd", ds, q), dv, None


_attention.defvjp(_attention_forward, _attention_backward)


def causal_attention(q, k, v, mask, scale):
    """`attention` of tokens among themselves (S = T) where the mask lets none see what comes later.

    Queries go in `BLOCKS` blocks, each with the keys up to its last: of the products with the upper
    half of (T, T) three quarters are never made.
    """
    t = q.shape[1]
    size = max(1, -(-t // BLOCKS))
    ends = [(start, min(start + size, t)) for start in range(0, t, size)]
    blocks = [
        attention(q[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end], scale)
        for start, end in ends
    ]
    return jnp.concatenate(blocks, axis=1)


class Cache(NamedTuple):
    """Keys and values of what a causal model has read.

    k, v: (L, B, S, K, D), S the room there is. real: (B, S) bool, False for padding and for what
    is still empty. length: () int32, columns written so far, the same for all rows.
    """

    k: jax.Array
    v: jax.Array
    real: jax.Array
    length: jax.Array


def empty_cache(layers: int, batch: int, room: int, heads: int, features: int, dtype) -> Cache:
    """A cache of `room` columns with nothing in it."""
    kv = jnp.zeros((layers, batch, room, heads, features), dtype)
    return Cache(kv, kv, jnp.zeros((batch, room), bool), jnp.int32(0))


def cached_attention(q, k, v, mask, scale, kv, at):
    """Causal attention, to what a layer has read before as well: (o (B, T, H, D), kv with k and v
    in it); shapes as in `attention`.

    kv: (k, v) of a `Cache`, of all layers, or None for no cache. at: (layer, column) () int32 each,
    where k and v (B, T, K, D) go.
    """
    if kv is None:
        return causal_attention(q, k, v, mask, scale), None
    k, v, kv = remember(k, v, kv, at)
    return attention(q, k, v, mask, scale), kv


def remember(k, v, kv, at):
    """(k, v, kv): keys and values (B, S, K, D) of all that a layer has read, and `kv` with the new
    ones in it; without a cache they are what is given. Arguments as in `cached_attention`."""
    if kv is None:
        return k, v, None
    where = (at[0], 0, at[1], 0, 0)
    put = lambda all_, new: jax.lax.dynamic_update_slice(all_, new[None].astype(all_.dtype), where)
    kv = (put(kv[0], k), put(kv[1], v))
    own = lambda all_, new: jax.lax.dynamic_index_in_dim(all_, at[0], keepdims=False).astype(
        new.dtype
    )
    return own(kv[0], k), own(kv[1], v), kv


class Attend(nn.Module):
    """Attention between a layer's projections as a module of its own, without parameters: (o, kv)
    of `cached_attention`, or where it is not causal (an encoder) of `attention` and None."""

    causal: bool = True

    def __call__(self, q, k, v, mask, scale, kv=None, at=None):
        if self.causal:
            return cached_attention(q, k, v, mask, scale, kv, at)
        return attention(q, k, v, mask, scale), None


class Context(NamedTuple):
    """Who stands where and sees whom, the same for every layer.

    positions: (B or 1, T) int32, from 0 at the start of each text. mask: (B or 1, T, S) bool.
    cache: the `Cache` with `real` and `length` as they are after this call, or None.
    """

    positions: jax.Array
    mask: jax.Array
    cache: Cache | None


def causal_context(
    tokens,
    segments=None,
    cache: Cache | None = None,
    window: int | None = None,
    first: int = 0,
):
    """The `Context` of a model in which a token sees itself and what came before in its text.

    tokens: (B, T). segments: (B, T) int32 or None; tokens of one text share a number above 0,
    0 is padding, on either side; a negative one stands at the head of a row for what begins each of
    its texts. With a cache the new tokens continue the text of their row (any number but 0 will
    do). window: a token sees only the last `window` tokens (Mistral). first: position of a text's
    first token.
    """
    b, t = tokens.shape
    if cache is None:
        at = jnp.arange(t)[None]
        mask = at[:, :, None] >= at[:, None, :]  # (1, T, T)
        positions = at
        if segments is not None:
            begins = jnp.concatenate(
                [jnp.ones((b, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1
            )
            start = jax.lax.cummax(jnp.where(begins, at, 0), axis=1)
            common = segments < 0
            positions = at - start
            positions += jnp.where(common, 0, jnp.sum(common, axis=1, keepdims=True))
            mask = mask & padding_mask(tokens, segments)
    else:
        own = jnp.ones((b, t), bool) if segments is None else segments != 0
        real = jax.lax.dynamic_update_slice_in_dim(cache.real, own, cache.length, axis=1)
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)  # (B, S)
        columns = cache.length + jnp.arange(t)
        positions = jnp.maximum(jnp.take(count, columns, axis=1) - 1, 0)  # (B, T)
        mask = (jnp.arange(real.shape[1])[None, None] <= columns[None, :, None]) & real[:, None]
        cache = cache._replace(real=real, length=cache.length + t)
    if window is not None:
        everyone = positions if cache is None else jnp.maximum(count - 1, 0)
        mask = mask & (positions[:, :, None] - everyone[:, None, :] < window)
    return Context(positions.astype(jnp.int32) + first, mask, cache)


def padding_mask(tokens, segments=None):
    """(B or 1, T, T) bool: who sees whom in an encoder; `segments` as in `causal_context`."""
    if segments is None:
        return jnp.ones((1, tokens.shape[1], tokens.shape[1]), bool)
    mine, other = segments[:, :, None], segments[:, None, :]
    return (mine == other) | (other < 0) | ((mine < 0) & (other != 0))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, scale, epsilon):
    """Root-mean-square normalisation over the last axis (arXiv:1910.07467, equation 4); keeps only
    x for its gradient.

    x: (..., D); scale: (D,); epsilon: float, added to the mean square. In x's dtype.
    """
    return x * _inverse_rms(x, epsilon) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def _inverse_rms(x, epsilon):
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def _rms_norm_forward(x, scale, epsilon):
    return rms_norm(x, scale, epsilon), (x, scale)


def _rms_norm_backward(epsilon, saved, dy):
    x, scale = saved
    rstd = _inverse_rms(x, epsilon)
    normal = x * rstd
    dn = dy * scale.reshape((1,) * (x.ndim - 1) + (-1,))
    dx = rstd * (dn - normal * jnp.mean(dn * normal, axis=-1, keepdims=True))
    return dx, jnp.sum(dy * normal, axis=tuple(range(x.ndim - 1)))


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RMSNorm(nn.Module):
    """`nn.RMSNorm` with the same parameter ("scale"), computed in float32."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        wide = (t.astype(jnp.float32) for t in (x, scale))
        return rms_norm(*wide, self.epsilon).astype(x.dtype)


# --------------------------------------------------------------------------------------- positions


def rope_frequencies(features: int, theta: float) -> np.ndarray:
    """(features / 2,) radians that each pair of features turns in one position: theta^(-2i /
    features) for i = 0, 1... (RoPE, arXiv:2104.09864, section 3.2.2)."""
    return theta ** (-np.arange(0, features, 2) / features)


def rope(positions, frequencies, scale: float = 1.0):
    """(cos, sin) of every position, each (B, T, 1, features / 2) float32, for `rotate`.

    positions: (B, T) int32. frequencies: (features / 2,), or (B, T, features / 2) where they
    depend on the text. scale: of both (YaRN's attention factor).
    """
    frequencies = jnp.asarray(frequencies, jnp.float32)
    frequencies = jnp.broadcast_to(frequencies, (*positions.shape, frequencies.shape[-1]))
    angles = (positions[..., None].astype(jnp.float32) * frequencies)[:, :, None]
    return scale * jnp.cos(angles), scale * jnp.sin(angles)


def rotate(x, cos, sin):
    """Rotary embedding of queries or keys x (B, T, H, D): feature i turns with feature i + D / 2,
    as Hugging Face stores them (the paper pairs neighbours); in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


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
#: What a config.json may name.
ACTIVATION = fields.one_of(ACTIVATIONS)


# ---------------------------------------------------------------------------- the loop over layers

_policies = jax.checkpoint_policies
#: What the backward pass keeps of a layer beside its input: nothing, or the products that have no
#: batch axes, those with weights held in another form among them. Attention's have some, so "dots"
#: grows with the length of a text, not its square.
POLICIES = {
    "full": _policies.nothing_saveable,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(leaves.PRODUCT)
    ),
}


def over_layers(block, config, layers: int, features: int, in_axes=0):
    """`block(config)` as many times as there are layers, each with parameters of its own: a module
    whose parameters have the layers as a leading axis. in_axes: `nn.scan`'s, of what it is given.

    config.remat: whether a layer's activations are kept for the backward pass ("none"), made again
    ("full": Chen et al. 2016, arXiv:1604.06174, a layer a segment), or made again but for the
    outputs of its products ("dots": what is cheap is done twice). config.unroll: layers in one turn
    of the loop; 0 for 4 where layers are small, whose copies cost more than a few layers'
    compilation, and 1 where they are not or are made again: in a turn of all layers XLA finds the
    second computation equal to the first, and keeps the first.

    A frozen weight that is held in another form (`leaves.FrozenWeight`) is decoded inside its
    product, which no policy looks into: "dots" keeps what the product gives, and not the decoded
    weight.

    Raises ValueError for another remat.
    """
    remat = config.remat
    if remat == "none":
        turn = config.unroll or (min(4, layers) if features <= 256 else 1)
    elif isinstance(remat, str) and remat in POLICIES:
        turn = config.unroll or 1
        block = nn.remat(block, prevent_cse=False, policy=POLICIES[remat])
    else:
        meant = {True: '; did you mean "full"?', False: '; did you mean "none"?'}
        hint = meant[remat] if isinstance(remat, bool) else nearest(str(remat), POLICIES)
        known = ", ".join(("none", *POLICIES))
        raise ValueError(f"remat: {remat!r} given, must be one of {known}{hint}")
    return nn.scan(
        block,
        # A layer's output, where a caller asks to see it (`capture_intermediates`).
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=layers,
        unroll=turn,
    )(config)
