"""Layers shared by the models, with backward passes that store no more than they need.

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

from lorax import fields, grouped
from lorax.errors import nearest
from lorax.models import blockwise, cudnn, masks
from lorax.models.masks import Mask, Places

# --------------------------------------------------------------------------------------- attention


KEEP = 256 * 256  # queries x keys up to which a layer stores its probabilities (measured on a CPU)
BLOCKS = 4  # of queries in causal attention; 8 are slower below 1024 tokens (measured on a CPU)


def _probabilities(q, k, mask, sinks, scale, cap):
    """Masked softmax of q (B, K, G * T, D) with k (B, K, S, D), (B, K, G * T, S) float32, and the
    slope of `soft_cap` at the scores, None without a cap. sinks: (K, G) or None."""
    scores = scale * jnp.einsum("bkmd,bksd->bkms", q, k, preferred_element_type=jnp.float32)
    slope = None
    if cap is not None:
        scores = soft_cap(scores, cap)
        slope = 1 - jnp.square(scores / cap)
    grouped = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])  # (B, K, G, T, S)
    grouped = jnp.where(mask[:, None, None], grouped, jnp.finfo(jnp.float32).min)
    most = jnp.max(grouped, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)[None, :, :, None, None]
        most = jnp.maximum(most, sinks)
    p = jnp.exp(grouped - most)
    total = jnp.sum(p, axis=-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - most)
    return (p / total).reshape(scores.shape), slope


def soft_cap(x, cap):
    """x squeezed into (-cap, cap): cap tanh(x / cap) (Gemma 2, arXiv:2408.00118, section 2)."""
    return cap * jnp.tanh(x / cap)


def attention(q, k, v, mask, scale, cap=None, sinks=None, causal=False):
    """Scaled dot-product attention (arXiv:1706.03762, equation 1), grouped-query where K < H
    (arXiv:2305.13245).

    q: (B, T, H, D); k, v: (B, S, K, D), K a divisor of H; one floating dtype. mask: (B or 1, T, S)
    bool, True where a query may attend (a query with no True attends to all keys equally), or a
    `masks.Mask`. scale: float. cap: of the scaled scores before the mask (`soft_cap`), None for
    none. sinks: (H,), for each head one more score of every query, whose value is zero
    (arXiv:2309.17453, section 3.3); None for none. causal: as in `blockwise.attention`, which
    computes it if the mask is a `Mask` and `cudnn` can't. Returns (B, T, H, D) in that dtype; the
    softmax is in float32.

    For long sequences the backward pass recomputes the probabilities from q and k, as
    FlashAttention does (arXiv:2205.14135, section 3.1); for short ones storing them is cheaper.
    """
    if cudnn.computes(q, mask, cap, sinks):
        return cudnn.attention(q, k, v, mask, scale)
    # Queries that share keys become rows of one product, which contracts a single axis.
    t, heads = q.shape[1], k.shape[2]
    k, v = (rearrange(x, "b s k d -> b k s d") for x in (k, v))
    sinks = None if sinks is None else sinks.reshape(heads, -1)
    if isinstance(mask, Mask):
        q = rearrange(q, "b t (k g) d -> b k g t d", k=heads)
        o = blockwise.attention(q, k, v, mask, sinks, scale, cap, causal)
        return rearrange(o, "b k g t d -> b t (k g) d")
    q = rearrange(q, "b t (k g) d -> b k (g t) d", k=heads)
    o = _attention(q, k, v, mask, sinks, scale, cap)
    return rearrange(o, "b k (g t) d -> b t (k g) d", t=t)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, mask, sinks, scale, cap):
    return _attention_forward(q, k, v, mask, sinks, scale, cap)[0]


def _attention_forward(q, k, v, mask, sinks, scale, cap):
    p, slope = _probabilities(q, k, mask, sinks, scale, cap)
    o = jnp.einsum("bkms,bksd->bkmd", p.astype(v.dtype), v)
    keep = mask.shape[-2] * mask.shape[-1] <= KEEP
    return o, (q, k, v, mask, sinks, o, (p, slope) if keep else None)


def _attention_backward(scale, cap, saved, do):
    q, k, v, mask, sinks, o, kept = saved
    p, slope = _probabilities(q, k, mask, sinks, scale, cap) if kept is None else kept
    dv = jnp.einsum("bkms,bkmd->bksd", p.astype(do.dtype), do)
    dp = jnp.einsum("bkmd,bksd->bkms", do, v, preferred_element_type=jnp.float32)
    row = jnp.einsum("bkmd,bkmd->bkm", do, o, preferred_element_type=jnp.float32)
    ds = scale * p * (dp - row[..., None])
    ds = (ds if slope is None else ds * slope).astype(q.dtype)
    dq = jnp.einsum("bkms,bksd->bkmd", ds, k)
    dsinks = None
    if sinks is not None:  # a sink's own share of the softmax is what the keys have left
        left = (1 - jnp.sum(p, axis=-1)) * row
        left = left.reshape(*row.shape[:2], -1, mask.shape[1])  # (B, K, G, T)
        dsinks = -jnp.sum(left, axis=(0, 3)).astype(sinks.dtype)
    return dq, jnp.einsum("bkms,bkmd->bksd", ds, q), dv, None, dsinks


_attention.defvjp(_attention_forward, _attention_backward)


def causal_attention(q, k, v, mask, scale, cap=None, sinks=None):
    """Self-attention in which no token sees later ones; `mask` must say so. The queries are the
    last T of the S tokens, or of these and keys in front of them.

    Queries are split into `BLOCKS` blocks, each multiplied only with the keys up to its last query:
    this skips three quarters of the products in the upper half of (T, T).
    """
    settings = scale, cap, sinks
    if isinstance(mask, Mask):
        return attention(q, k, v, mask, *settings, causal=True)
    t, before = q.shape[1], k.shape[1] - q.shape[1]
    size = max(1, -(-t // BLOCKS))
    blocks = []
    for start in range(0, t, size):
        rows, keys = slice(start, min(start + size, t)), slice(before + min(start + size, t))
        blocks.append(attention(q[:, rows], k[:, keys], v[:, keys], mask[:, rows, keys], *settings))
    return jnp.concatenate(blocks, axis=1)


class Cache(NamedTuple):
    """Keys and values of the tokens that a causal model has read.

    k, v: (L, B, S, K, D), with room for S tokens. real: (B, S) bool, False for padding and for
    empty columns. length: () int32, columns written so far, the same for all rows.
    """

    k: jax.Array
    v: jax.Array
    real: jax.Array
    length: jax.Array


def empty_cache(layers: int, batch: int, room: int, heads: int, features: int, dtype) -> Cache:
    """An empty cache with `room` columns."""
    kv = jnp.zeros((layers, batch, room, heads, features), dtype)
    return Cache(kv, kv, jnp.zeros((batch, room), bool), jnp.int32(0))


def of_layers(cache: Cache | None, layers: int):
    """What the layers of a causal model take of a cache: (their numbers (layers,) int32, (k, v),
    the column to write), each None without a cache."""
    if cache is None:
        return None, None, None
    return jnp.arange(layers), (cache.k, cache.v), cache.length


def cached_attention(q, k, v, mask, scale, kv, at, cap=None, sinks=None):
    """Causal attention that also sees the cached tokens: (o (B, T, H, D), kv with k and v added);
    shapes as in `attention`.

    kv: (k, v) of a `Cache`, for all layers, or None for no cache. at: (layer, column), () int32
    each, where k and v (B, T, K, D) are written.
    """
    if kv is None:
        return causal_attention(q, k, v, mask, scale, cap, sinks), None
    k, v, kv = remember(k, v, kv, at)
    return attention(q, k, v, mask, scale, cap, sinks), kv


def remember(k, v, kv, at):
    """(k, v, kv): keys and values (B, S, K, D) of all tokens that the layer has read, and `kv` with
    the new ones added; without a cache, (k, v, None). Arguments as in `cached_attention`."""
    if kv is None:
        return k, v, None
    where = (at[0], 0, at[1], 0, 0)
    put = lambda stack, new: jax.lax.dynamic_update_slice(
        stack, new[None].astype(stack.dtype), where
    )
    kv = (put(kv[0], k), put(kv[1], v))
    layer_of = lambda stack, new: jax.lax.dynamic_index_in_dim(stack, at[0], keepdims=False).astype(
        new.dtype
    )
    return layer_of(kv[0], k), layer_of(kv[1], v), kv


class Attend(nn.Module):
    """The attention of a layer, without the projections, as a module without parameters. Returns
    (o, kv) of `cached_attention`, or, if not causal (an encoder), (o of `attention`, None).

    cap, sinks: as in `attention`."""

    causal: bool = True
    cap: float | None = None

    def __call__(self, q, k, v, mask, scale, kv=None, at=None, sinks=None):
        if self.causal:
            return cached_attention(q, k, v, mask, scale, kv, at, self.cap, sinks)
        return attention(q, k, v, mask, scale, self.cap, sinks), None


class Context(NamedTuple):
    """Positions and attention mask, the same for every layer.

    positions: (B or 1, T) int32, from 0 at the start of each text. mask: (B or 1, T, S) bool, or a
    `masks.Mask` of long sequences.
    cache: the `Cache` with `real` and `length` updated to after this call, or None.
    """

    positions: jax.Array
    mask: jax.Array
    cache: Cache | None


def returned(hidden, context: Context, kv):
    """What a causal model's `hidden` returns: the hidden states; with a cache, the pair (hidden,
    cache with kv, the keys and values of all layers)."""
    if context.cache is None:
        return hidden
    return hidden, context.cache._replace(k=kv[0], v=kv[1])


def causal_context(
    tokens,
    segments=None,
    cache: Cache | None = None,
    window: int | None = None,
    first: int = 0,
):
    """The `Context` of a model in which a token sees itself and the earlier tokens of its text.

    tokens: (B, T). segments: (B, T) int32 or None; tokens of one text share a number above 0, 0 is
    padding, on either side; tokens with a negative number, at the start of a row, are a prefix that
    all texts of the row share. With a cache the new tokens continue the text of their row (any
    number except 0 works). window: a token sees only the last `window` tokens (Mistral). first:
    position of a text's first token.
    """
    b, t = tokens.shape
    if cache is None:
        at, texts = jnp.arange(t)[None], jnp.ones((1, t), jnp.int32)
        positions = at
        if segments is not None:
            begins = jnp.concatenate(
                [jnp.ones((b, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1
            )
            start = jax.lax.cummax(jnp.where(begins, at, 0), axis=1)
            common, texts = segments < 0, segments
            positions = at - start
            positions += jnp.where(common, 0, jnp.sum(common, axis=1, keepdims=True))
        queries = keys = _places(at, texts, positions)
    else:
        written = jnp.ones((b, t), bool) if segments is None else segments != 0
        real = jax.lax.dynamic_update_slice_in_dim(cache.real, written, cache.length, axis=1)
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)  # (B, S)
        columns = cache.length + jnp.arange(t)
        positions = jnp.maximum(jnp.take(count, columns, axis=1) - 1, 0)  # (B, T)
        queries = _places(columns[None], jnp.ones((1, t)), positions)
        keys = _places(jnp.arange(real.shape[1])[None], real, jnp.maximum(count - 1, 0))
        cache = cache._replace(real=real, length=cache.length + t)
    mask = masks.mask_of(queries, keys, window, alone=cache is None and segments is None)
    return Context(positions.astype(jnp.int32) + first, mask, cache)


def _places(*of_tokens) -> Places:
    return Places(*(x.astype(jnp.int32) for x in of_tokens))


def padding_mask(tokens, segments=None):
    """Which tokens see which in an encoder, as in `Context`; `segments` as in `causal_context`."""
    t = tokens.shape[1]
    if segments is None:
        return masks.everyone(t, t)
    nowhere = jnp.zeros((1, t), jnp.int32)  # no token is after another
    places = _places(nowhere, segments, nowhere)
    return masks.mask_of(places, places)


# ------------------------------------------------------------------------------------------- norms


def _standardise(x, epsilon):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + epsilon)
    return (x - mean) * rstd, rstd


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, epsilon):
    """Layer normalisation over the last axis (arXiv:1607.06450); stores only x for the gradient.

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
    """Root-mean-square normalisation over the last axis (arXiv:1910.07467, equation 4); stores
    only x for the gradient.

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
    """`nn.RMSNorm` with the same parameter ("scale"), computed in float32. offset: added to the
    parameter, which starts at 1 - offset (Gemma's is 1)."""

    epsilon: float = 1e-6
    offset: float = 0.0

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.constant(1 - self.offset)
        scale = self.param("scale", start, x.shape[-1:], jnp.float32)
        wide, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
        scale = scale + self.offset if self.offset else scale
        return rms_norm(wide, scale, self.epsilon).astype(x.dtype)


# ------------------------------------------------------------------------------------- activations

_GELU = math.sqrt(2 / math.pi)


@jax.custom_vjp
def gelu_tanh(x):
    """GELU, tanh approximation (arXiv:1606.08415, section 2); stores only x for the gradient."""
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
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # GELU by a sigmoid (CLIP)
}
#: The activations that a config.json may name.
ACTIVATION = fields.one_of(ACTIVATIONS)


# ---------------------------------------------------------------------------- the loop over layers

_policies = jax.checkpoint_policies
#: What the backward pass stores of a layer besides its input: nothing ("full"), or the outputs of
#: products without batch axes ("dots"), including products with weights in a compressed form.
#: Attention's products have batch axes, so "dots" grows with the length of a text, not its square.
POLICIES = {
    "full": _policies.nothing_saveable,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(grouped.PRODUCT)
    ),
}


def over_layers(block, config, layers: int, features: int, in_axes=0):
    """A stack of `layers` copies of `block(config)`, each with its own parameters, as one module
    whose parameters have a leading layer axis. in_axes: passed to `nn.scan`, for the block's
    inputs.

    config.remat: whether a layer's activations are stored for the backward pass ("none"),
    recomputed ("full": Chen et al. 2016, arXiv:1604.06174, one segment per layer), or recomputed
    except for the outputs of matrix products ("dots": only cheap operations run twice).
    config.unroll: layers per loop iteration. 0 chooses 4 for small layers, where the loop's copies
    cost more than compiling a few layers, and otherwise, or with recomputation, 1: if one iteration
    held all layers, XLA would merge the recomputation with the first computation and store it.

    A frozen weight in a compressed form (`leaves.FrozenWeight`) is decoded inside its product,
    which no policy sees into: "dots" stores the output of the product, not the decoded weight.

    Raises ValueError for any other remat.
    """
    few = min(4, layers) if features <= 256 and config.remat == "none" else 1
    return nn.scan(
        recomputed(block, config.remat, prevent_cse=False),
        # The layers' outputs, if a caller asks for them (`capture_intermediates`).
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=layers,
        unroll=config.unroll or few,
    )(config)


def recomputed(block, remat: str, prevent_cse: bool = True):
    """A class of modules whose activations are recomputed in the backward pass, as `over_layers`
    says. prevent_cse: as in `jax.checkpoint`; False inside a loop. Raises ValueError for a remat
    that does not exist."""
    if remat == "none":
        return block
    if isinstance(remat, str) and remat in POLICIES:
        return nn.remat(block, prevent_cse=prevent_cse, policy=POLICIES[remat])
    meant = {True: '; did you mean "full"?', False: '; did you mean "none"?'}
    hint = meant[remat] if isinstance(remat, bool) else nearest(str(remat), POLICIES)
    known = ", ".join(("none", *POLICIES))
    raise ValueError(f"remat: {remat!r} given, must be one of {known}{hint}")


# ------------------------------------------------------------------------------- diffusion models


def sines_of(t, features: int, cosines_first: bool = True, shift: float = 0.0):
    """Sinusoidal embedding of timesteps (arXiv:1706.03762, section 3.5): t (B,) -> (B, features)
    float32, for half = features / 2 frequencies 10,000^(-i / (half - shift)), i = 0 to half - 1.

    features: even. cosines_first, shift: diffusers' `flip_sin_to_cos` and `freq_shift`.
    """
    half = features // 2
    frequencies = np.exp(-math.log(1e4) * np.arange(half) / (half - shift)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    pair = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate(pair[::-1] if cosines_first else pair, axis=-1)
