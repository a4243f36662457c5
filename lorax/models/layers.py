"""Layers shared by the models, with backward passes that store no more than they need.

Each has the parameters of its Flax counterpart. Axes: B batch, T positions (queries), S positions
(keys), H heads, K heads of keys and values, G = H / K queries that share one, D features of a head.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax.core.scope import Scope

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens that a causal model has read.

    k, v: an array (B, K, S, D) for each layer, with S columns. length: () int32, columns written so
    far, the same for all rows. real: (B, S) bool, False for padding and for empty columns; or
    (B, N, S) if every row has N texts that share columns (the beams of a prompt): those of each.
    room: (static) the most tokens of one text.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    real: jax.Array
    length: jax.Array
    room: int = dataclasses.field(metadata={"static": True})

    def shared(self, texts: int, tokens: int) -> "Cache":
        """The cache for so many texts a row, each of which begins with what the row has and may
        grow by so many tokens."""
        more = (texts - 1) * tokens
        wider = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))
        real = jnp.pad(self.real, ((0, 0), (0, more)))
        real = jnp.broadcast_to(real[:, None], (len(real), texts, real.shape[1]))
        k, v = (tuple(map(wider, x)) for x in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v, real=real)


def empty_cache(layers: int, batch: int, room: int, heads: int, features: int, dtype) -> Cache:
    """An empty cache with `room` columns."""
    k, v = (
        tuple(jnp.zeros((batch, heads, room, features), dtype) for _ in range(layers))
        for _ in range(2)
    )
    return Cache(k, v, jnp.zeros((batch, room), bool), jnp.int32(0), room)


def cached_attention(q, k, v, mask, scale, kv, column, cap=None, sinks=None):
    """Causal attention that also sees the cached tokens: (o (B, T, H, D), kv with k and v added);
    shapes as in `attention`.

    kv: (k, v) of one layer of a `Cache`, or None for no cache. column: () int32, where k and v
    (B, T, K, D) are written.
    """
    if kv is None:
        return causal_attention(q, k, v, mask, scale, cap, sinks), None
    k, v, kv = remember(k, v, kv, column)
    return attention(q, k, v, mask, scale, cap, sinks), kv


def remember(k, v, kv, column):
    """(k, v, kv): keys and values (B, S, K, D) of all tokens that the layer has read, and `kv` with
    the new ones added; without a cache, (k, v, None). Arguments as in `cached_attention`."""
    if kv is None:
        return k, v, None
    dtype, by_head = k.dtype, lambda x: rearrange(x, "b t k d -> b k t d")
    pairs = zip(kv, (k, v), strict=True)
    kv = tuple(put(x, by_head(new).astype(x.dtype), column) for x, new in pairs)
    return *(rearrange(x, "b k s d -> b s k d").astype(dtype) for x in kv), kv


@jax.custom_batching.custom_vmap
def put(x, new, column):
    """x (..., S, D) with new (..., T, D) written from a column () on, in place where XLA can."""
    return jax.lax.dynamic_update_slice_in_dim(x, new, column, axis=x.ndim - 2)


@put.def_vmap
def _put_of_each(size, batched, x, new, column):
    # JAX's own rule makes a scatter of it, which writes the whole cache anew.
    if batched[2]:
        raise ValueError("column: all members of a batch write the same one")
    x, new = (
        y if has_axis else jnp.broadcast_to(y, (size, *y.shape))
        for y, has_axis in ((x, batched[0]), (new, batched[1]))
    )
    return put(x, new, column), True


class Attend(nn.Module):
    """The attention of a layer, without the projections, as a module without parameters. Returns
    (o, kv) of `cached_attention`, or, if not causal (an encoder), (o of `attention`, None).

    cap, sinks: as in `attention`."""

    causal: bool = True
    cap: float | None = None

    def __call__(self, q, k, v, mask, scale, kv=None, column=None, sinks=None):
        if self.causal:
            return cached_attention(q, k, v, mask, scale, kv, column, self.cap, sinks)
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
    return hidden, dataclasses.replace(context.cache, k=kv[0], v=kv[1])


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
    number except 0 works); if a row of the cache has N texts, T is N, a token for each. window: a
    token sees only the last `window` tokens (Mistral). first: position of a text's first token.
    """
    if cache is not None and cache.real.ndim == 3:
        return _context_of_each(cache, window, first)
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
        columns = cache.length + jnp.arange(t)
        new = jnp.ones((b, t), bool) if segments is None else segments != 0
        written = _written(cache, t)[None] & new[:, :, None]
        real = cache.real | jnp.any(written, axis=1)
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)  # (B, S)
        positions = jnp.maximum(jnp.take(count, columns, axis=1) - 1, 0)  # (B, T)
        queries = _places(columns[None], jnp.ones((1, t)), positions)
        keys = _places(jnp.arange(real.shape[1])[None], real, jnp.maximum(count - 1, 0))
        cache = dataclasses.replace(cache, real=real, length=cache.length + t)
    mask = masks.mask_of(queries, keys, window, alone=cache is None and segments is None)
    return Context(positions.astype(jnp.int32) + first, mask, cache)


def _context_of_each(cache: Cache, window: int | None, first: int) -> Context:
    """`causal_context` of one more token of each of the N texts that share a row of the cache."""
    texts = cache.real.shape[1]
    real = cache.real | _written(cache, texts)[None]  # (B, N, S), also the mask
    count = jnp.cumsum(real, axis=2, dtype=jnp.int32)
    positions, mask = count[:, :, -1] - 1, real
    if window is not None:
        mask = mask & (count[:, :, -1:] - count < window)
    cache = dataclasses.replace(cache, real=real, length=cache.length + texts)
    return Context(positions + first, mask, cache)


def _written(cache: Cache, tokens: int):
    """(T, S) bool: the column of the cache that each of T new tokens takes."""
    columns = cache.length + jnp.arange(tokens)
    return jnp.arange(cache.real.shape[-1])[None] == columns[:, None]


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


def through(stack, block, x, cache: Cache | None, each=(), shared=()):
    """x through a stack of layers, `stack` = `over_layers(block, ...)`: (x, (k, v) of the layers or
    None, what else they return, with a leading layer axis).

    each: inputs with a layer axis, shared: inputs of all layers; a block takes (x, its (k, v)),
    these, and the column to write. With a cache, a prompt goes through a loop over layers, of which
    XLA compiles one. New tokens go through the layers one by one, as a loop would copy the keys and
    values of each; parameters are then sliced from the stack, which copies them for every call,
    unless they are `apart`.
    """
    if cache is None:
        (x, _), out = stack((x, None), *each, *shared, None)
        return x, None, out
    params = stack.variables["params"]

    def layer(x, inputs, *number):
        own, kv, own_inputs = inputs
        module = block(stack.config, parent=Scope({"params": own}, path=(*stack.path, *number)))
        (x, kv), out = module((x, kv), *own_inputs, *shared, cache.length)
        return x, (kv, out)

    are_apart, is_prompt = "0" in params, x.shape[1] > 1 and cache.real.ndim == 2
    if is_prompt and not are_apart:
        kv = jnp.stack(cache.k), jnp.stack(cache.v)
        x, (kv, out) = jax.lax.scan(layer, x, (params, kv, each))
        return x, tuple(map(tuple, kv)), out
    results = []
    for i, kv in enumerate(zip(cache.k, cache.v, strict=True)):
        own = params[str(i)] if are_apart else jax.tree.map(lambda y, i=i: y[i], params)
        own_inputs = jax.tree.map(lambda y, i=i: y[i], each)
        x, result = layer(x, (own, kv, own_inputs), *[str(i)] * are_apart)
        results.append(result)
    kv, out = zip(*results, strict=True)
    return x, tuple(zip(*kv, strict=True)), jax.tree.map(lambda *y: jnp.stack(y), *out)


def apart(params: dict, layers: int, axes=None) -> dict:
    """The parameters of a stack as {"0": those of the first layer, ...}, for `through`. axes: a
    tree of the layer axis of each array, 0 if it is None."""
    axes = jax.tree.map(lambda _: 0, params) if axes is None else axes
    of_layer = lambda i: jax.tree.map(
        lambda x, axis: jax.lax.index_in_dim(x, i, axis, keepdims=False), params, axes
    )
    return {str(i): of_layer(i) for i in range(layers)}


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
