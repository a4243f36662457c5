"""Attention in blocks of queries and keys: memory grows with the length of a sequence and not with
its square.

A running maximum and sum make the softmax exact (Rabe and Staats, arXiv:2112.05682, section 2); the
backward pass computes the scores of each block again from the logarithm of the sum (FlashAttention,
Dao et al., arXiv:2205.14135, algorithm 4). Departures: the loop runs over the pairs of blocks that
causality allows, and skips those in which no query sees a key, of a window or of packed texts; the
sums of all blocks stay in memory, so that either block of a pair can be the outer one.

Axes as in `layers`: B batch, T queries, S keys, K heads of keys, G queries that share one, D
features. t, s: positions of a block.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax.models import masks

BLOCK = 128  # queries, and keys, of a block; 256 and 512 are slower (measured on a CPU)
_LEAST = float(np.finfo(np.float32).min)


class How(NamedTuple):
    """What is static. scale, cap: as in `layers.attention`. pairs: of the blocks of queries and
    keys that are multiplied. size: of a block. skips: whether to look for pairs in which nothing is
    seen, which takes a third of the time where there are none (measured on a CPU)."""

    scale: float
    cap: float | None
    pairs: tuple[tuple[int, int], ...]
    size: int
    skips: bool


def attention(q, k, v, mask, sinks, scale: float, cap: float | None, causal: bool):
    """`layers.attention` with the axes (B, K, G, T, D) for q and (B, K, S, D) for k and v, and a
    `masks.Mask`. causal: the queries are the last T of the S tokens, or of these and keys in front.

    Returns (B, K, G, T, D). A query that sees no key gets zeros.
    """
    t, s, size = q.shape[3], k.shape[2], BLOCK
    extra_t, extra_s = -t % size, -s % size
    pad = lambda x, n: jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, n), (0, 0))) if n else x
    padded = mask.queries.padded(extra_t), mask.keys.padded(extra_s)
    mask = dataclasses.replace(mask, queries=padded[0], keys=padded[1])
    last = lambda i: min(s, s - t + (i + 1) * size) if causal else s  # keys that block i may see
    blocks = range((t + extra_t) // size)
    pairs = tuple((i, j) for i in blocks for j in range(-(-last(i) // size)))
    how = How(scale, cap, pairs, size, skips=mask.span != masks.LAST)
    o = _attention(pad(q, extra_t), pad(k, extra_s), pad(v, extra_s), mask, sinks, how)
    return o[..., :t, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, mask, sinks, how):
    return _forward(q, k, v, mask, sinks, how)[0]


def _forward(q, k, v, mask, sinks, how):
    """o, and (q, k, v, mask, sinks, o, logarithms of the sums (B, K, G, T) float32)."""
    mask = _beside(q, mask)

    def add(sums, pair):
        i, j = pair
        seen = mask.block(i * how.size, j * how.size, how.size)

        def visit(o, most, total):
            scores = _product("bkmd,bksd->bkms", _rows(_block(q, i, how)), _block(k, j, how))
            scores = scores.reshape(*o.shape[:-1], how.size)
            scores = jnp.where(seen[:, None, None], _capped(scores, how)[0], _LEAST)
            new = jnp.maximum(most, jnp.max(scores, axis=-1))
            p = jnp.where(seen[:, None, None], jnp.exp(scores - new[..., None]), 0)
            read = _product("bkms,bksd->bkmd", _rows(p.astype(v.dtype)), _block(v, j, how))
            read = read.reshape(o.shape)
            kept = jnp.exp(most - new)
            return o * kept[..., None] + read, new, total * kept + jnp.sum(p, axis=-1)

        before = tuple(_block(x, i, how, axis=3) for x in sums)
        after = _visited(visit, seen, before, how)
        put = functools.partial(_put, i=i, how=how, axis=3)
        return tuple(map(put, sums, after)), None

    if sinks is None:
        most, total = jnp.full(q.shape[:4], _LEAST), jnp.zeros(q.shape[:4])
    else:  # each is a key that all queries see, whose value is zero
        most = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, :, None], q.shape[:4])
        total = jnp.ones(q.shape[:4])
    start = jnp.zeros(q.shape, jnp.float32), most, total
    (o, most, total), _ = jax.lax.scan(add, start, jnp.asarray(how.pairs, jnp.int32))
    o = (o / jnp.where(total > 0, total, 1)[..., None]).astype(q.dtype)
    # Without keys: the probabilities exp(score - log) are zero.
    log = jnp.where(total > 0, most + jnp.log(total), -_LEAST)
    return o, (q, k, v, mask, sinks, o, log)


def _backward(how, saved, do):
    q, k, v, mask, sinks, o, log = saved
    mask = _beside(do, mask)
    row = _product("bkgtd,bkgtd->bkgt", do, o)

    def add(sums, pair):
        i, j = pair
        seen = mask.block(i * how.size, j * how.size, how.size).swapaxes(1, 2)[:, None, :, None]

        # Keys first: a product that sums over the first axis of its left factor is slow on a CPU,
        # and of the five only dq has to.
        def visit(dq, dk, dv):
            qi, kj, doi = _rows(_block(q, i, how)), _block(k, j, how), _rows(_block(do, i, how))
            of_queries = lambda x: _block(x, i, how, axis=3)[:, :, None]  # (B, K, 1, G, t)
            by_query = (*dk.shape[:3], *q.shape[2:3], how.size)  # (B, K, s, G, t)
            products = _product("bksd,bkmd->bksm", kj, qi).reshape(by_query)
            scores, slope = _capped(products, how)
            p = jnp.where(seen, jnp.exp(scores - of_queries(log)), 0)
            dp = _product("bksd,bkmd->bksm", _block(v, j, how), doi).reshape(by_query)
            ds = how.scale * p * (dp - of_queries(row))
            ds = (ds if slope is None else ds * slope).astype(q.dtype)
            ds, p = (x.reshape(*dk.shape[:3], -1) for x in (ds, p.astype(do.dtype)))
            dv = dv + _product("bksm,bkmd->bksd", p, doi)
            dk = dk + _product("bksm,bkmd->bksd", ds, qi)
            return dq + _product("bksm,bksd->bkmd", ds, kj).reshape(dq.shape), dk, dv

        at = i, j, j
        before = tuple(_block(x, n, how) for x, n in zip(sums, at, strict=True))
        after = _visited(visit, seen, before, how)
        return tuple(_put(x, y, n, how) for x, y, n in zip(sums, after, at, strict=True)), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(add, start, jnp.asarray(how.pairs, jnp.int32))
    dsinks = None
    if sinks is not None:  # the gradient of a score is p (dp - row), and here dp is 0
        p = jnp.exp(sinks.astype(jnp.float32)[None, :, :, None] - log)
        dsinks = -jnp.sum(p * row, axis=(0, 3)).astype(sinks.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dsinks


_attention.defvjp(_forward, _backward)


def _beside(x, mask):
    """The mask, once x is there. Otherwise a loop over layers would make the masks of all pairs of
    blocks before it starts, and keep them: (T, S) bools for every head."""
    return jax.lax.optimization_barrier((x, mask))[1]


def _capped(products, how: How):
    """The scores of products q k^T, and the slope of the cap there, None without one."""
    scores = how.scale * products
    if how.cap is None:
        return scores, None
    squeezed = jnp.tanh(scores / how.cap)
    return how.cap * squeezed, 1 - jnp.square(squeezed)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _visited(visit, seen, sums, how: How):
    """visit(*sums), or the sums where nothing is seen."""
    if not how.skips:
        return visit(*sums)
    return jax.lax.cond(jnp.any(seen), visit, lambda *same: same, *sums)


def _rows(x):
    """(B, K, G, t, ...) as (B, K, G t, ...), so that products contract a single axis."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _block(x, i, how: How, axis: int = -2):
    """Block i of an array along an axis."""
    axis %= x.ndim
    return jax.lax.dynamic_slice_in_dim(x, i * how.size, how.size, axis)


def _put(x, new, i, how: How, axis: int = -2):
    """The array with its block i replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, new, i * how.size, axis % x.ndim)
