"""The product with a quantised weight: decoded a tile at a time, for all members at once.

    y = x w    w (in, out) held as codes of W (out, in), `lorax.quant.nf4`

The decoded w is not stored and gets no gradient: the backward pass decodes it again. Members of a
sweep that share w become rows of one product (`custom_vmap`), so w is decoded once for all of them.

On a CPU, a tile of outputs that fits in the cache is decoded and used before the next one. A byte
holds one or two neighbouring inputs, which stay separate: with the weights w_0 of the even and w_1
of the odd inputs, y = x[0::2] w_0 + x[1::2] w_1. A 4-bit value is looked up by a tree of 15
selections, which compiles to vector instructions, unlike a table look-up. On other devices w is
decoded as a whole and multiplied by the library's product (`lorax.quant.packed` has kernels).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from lorax import divided

TILE = 512  # outputs decoded at a time on a CPU
FUSED, TWO_PASSES = "fused", "two passes"
#: How w in a kernel's order is multiplied with up to so many rows, those of all members together;
#: the first line that holds them. `python -m lorax.bench gpu` measures both paths for each line.
PATHS = (
    (1, FUSED),
    (64, FUSED),
    (512, FUSED),
    (1024, TWO_PASSES),
    (math.inf, TWO_PASSES),
)


def path(rows: int) -> str:
    """The path in `PATHS` for a product with so many rows."""
    return next(path for most, path in PATHS if rows <= most)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x, leaf, axis: int):
    """x @ w for axis 0, x @ w^T for axis 1: (..., n) -> (..., the other), in x's dtype.

    leaf: a single matrix, with methods of_rows(x (rows, n), axis) and, for its product where a mesh
    divides it (`lorax.divided`), on_mesh(x (..., n), axis). Operands have x's dtype, sums are in
    float32. Only x gets a gradient.
    """
    return _folded(axis)(x, leaf)


product.defvjp(
    lambda x, leaf, axis: (product(x, leaf, axis), leaf),
    lambda axis, leaf, dy: (product(dy, leaf, 1 - axis), None),
)


@functools.cache
def _folded(axis: int):
    """The product whose batching rule turns members into rows."""

    @custom_vmap
    def folded(x, leaf):
        # Without the barrier XLA decodes before a loop over micro-batches and keeps everything.
        x, leaf = jax.lax.optimization_barrier((x, leaf))
        if divided.divides_base():
            return leaf.on_mesh(x, axis)
        y = leaf.of_rows(x.reshape(-1, x.shape[-1]), axis)
        return y.reshape(*x.shape[:-1], -1)

    @folded.def_vmap
    def members(size, batched, x, leaf):
        x_batched, leaf_batched = batched
        if not any(jax.tree.leaves(leaf_batched)):
            return folded(x, leaf), True
        # Each member has its own weights: decode and multiply one member after the other.
        each = lambda member: folded(member[0] if x_batched else x, member[1])
        return jax.lax.map(each, (x if x_batched else jnp.zeros(size), leaf)), True

    return folded


def on_mesh(x, leaf, axis: int):
    """The product with a `nf4.Quantised` where a mesh divides w. x keeps its axes: the rows of
    several members, each of which is divided, are not one axis that is divided."""
    outputs = leaf.n_in if axis else leaf.n_out
    sends = divided.sends_rows(x, outputs, leaf.codes.size)
    w = leaf.parts_of_outputs(gather=not sends).astype(x.dtype)
    if sends:
        return divided.sent(x, w, leaf.by[::-1], 1 - axis)
    return dot(x, w, (x.ndim - 1, 1 - axis))


def of_rows(x, leaf, axis: int):
    """(rows, n) -> (rows, the other) for a `nf4.Quantised` of one matrix."""
    whole = functools.partial(_whole, axis=axis)
    tiled = functools.partial(_tiled, axis=axis) if leaf.in_rows else whole
    return jax.lax.platform_dependent(x, leaf, cpu=tiled, default=whole)


def dot(x, w, axes):
    """The product over axis axes[0] of x and axes[1] of w: sums in float32, in x's dtype."""
    return _dot(x, w, axes).astype(x.dtype)


def _dot(x, w, axes):
    dimensions = ((axes[:1], axes[1:]), ((), ()))
    return jax.lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)


def _whole(x, leaf, axis: int):
    """(rows, n) -> (rows, the other): w decoded, then multiplied."""
    w = leaf.rows_of_outputs().astype(x.dtype)  # (out, in)
    return dot(x, w, (1, 1 - axis))


def _tiled(x, leaf, axis: int):
    """`_whole`, some outputs at a time."""
    n_in, n_out, per_byte = leaf.n_in, leaf.n_out, leaf.code.per_byte
    tile = _divisor(n_out, TILE)
    tiles = leaf.codes.reshape(-1, tile, n_in // per_byte)
    scales = leaf.scales().reshape(-1, tile, n_in // leaf.block)

    def decode(codes, scales):
        """[(tile, in / per_byte) for each code of a byte] in x's dtype."""
        each = jnp.repeat(scales, leaf.block // per_byte, axis=1)
        rounded = lambda values: (values * each).astype(leaf.dtype).astype(x.dtype)
        return [rounded(values) for values in _values(codes, leaf.code)]

    if axis == 0:
        parts = [x[:, i::per_byte] for i in range(per_byte)]

        def outputs(coded):
            # (tile, rows), not (rows, tile): with one row it is a matrix-vector product.
            pairs = zip(decode(*coded), parts, strict=True)
            return sum(_dot(w, part, (1, 1)) for w, part in pairs)

        y = jax.lax.map(outputs, (tiles, scales))
        return y.reshape(n_out, len(x)).T.astype(x.dtype)

    def add(sums, coded):
        dy, *coded = coded
        return [s + _dot(dy, w, (1, 0)) for s, w in zip(sums, decode(*coded), strict=True)], None

    zeros = [jnp.zeros((len(x), n_in // per_byte), jnp.float32)] * per_byte
    dy = jnp.moveaxis(x.reshape(len(x), -1, tile), 1, 0)
    parts, _ = jax.lax.scan(add, zeros, (dy, tiles, scales))
    return jnp.stack(parts, axis=-1).reshape(len(x), n_in).astype(x.dtype)


def _values(codes, code) -> list:
    """The values that bytes stand for, float32: [those of the high halves, those of the low]."""
    if code.per_byte == 1:
        return [jnp.take(jnp.asarray(code.values), codes, mode="clip")]
    return [_select(codes >> 4, code.values), _select(codes, code.values)]


def _select(codes, values):
    """values[codes & 15] by a tree of selections on one bit after the other."""
    values = [jnp.float32(v) for v in values]
    for bit in range(4):
        on = (codes & (1 << bit)) != 0
        values = [jnp.where(on, values[i + 1], values[i]) for i in range(0, len(values), 2)]
    return values[0]


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`, or n itself if that is small."""
    largest = max(d for d in range(1, most + 1) if n % d == 0)
    return largest if largest >= min(n, 64) else n
