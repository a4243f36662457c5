"""Products of rows with one matrix per group of rows: the experts of a mixture.

    y[i] = x[i] w[e(i)]    x (rows, in), sorted by expert; w (E, in, out); e(i): the row's expert

Every row is multiplied once, by its own expert: none is dropped, and no expert has a limit. A GPU
or TPU computes this with `jax.lax.ragged_dot`. On a CPU that multiplies every row by every expert,
so there blocks of a few rows are multiplied one after the other. `jax.vmap` works in every
argument: members of a sweep that share w become more groups of one product (JAX has no rule for
that). Where a mesh divides experts and rows (`lorax.divided`), x is (devices, rows, in): each
device sorts and multiplies its own rows.

Axes: m rows, G groups, E experts. G is E, or a multiple of it if members were joined; group g has
the weights of expert g mod E.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P

from lorax import divided

#: Checkpoint name for products that remat policies can't see as `dot_general` (`models.layers`).
PRODUCT = "product"


class GroupedDense(nn.Module):
    """`nn.Dense` with a kernel (E, in, features) and a bias (E, features) for each of E experts.

    x: (rows, in) sorted by expert. sizes: (E,) int32, rows of each expert; their sum is the number
    of rows. Returns (rows, features).
    """

    experts: int
    features: int
    use_bias: bool = False
    dtype: jnp.dtype | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal(batch_axis=0)

    @nn.compact
    def __call__(self, x, sizes):
        shape = self.experts, x.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        y = product(x.astype(dtype), kernel.astype(dtype), sizes)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, shape[::2], jnp.float32)
        return y + of_rows(bias.astype(dtype), sizes, len(x))


def of_rows(values, sizes, rows: int):
    """values (E, ...) of experts, for each row: (rows, ...)."""
    return jnp.repeat(values, sizes, axis=0, total_repeat_length=rows)


def product(x, stack, sizes, by: tuple = (None, None)):
    """x (m, in), experts (E, in, out), sizes (E,) int32 -> (m, out) in x's dtype.

    stack: an array, or a `lorax.leaves.FrozenWeight` with the experts' axis first, of which each
    expert that has rows is decoded, without a gradient. The sum of sizes must be m: rows beyond it
    belong to no expert, and what they become is undefined. Sums are in float32. by: axes of a mesh
    that divide the experts' inputs and outputs.
    """
    return checkpoint_name(_product(x, stack, sizes, by), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x, stack, sizes, by):
    return _joined(False, by)(x, stack, sizes)


def _forward(x, stack, sizes, by):
    return _product(x, stack, sizes, by), (x, stack, sizes)


def _backward(by, saved, dy):
    x, stack, sizes = saved
    dx = _joined(True, by)(dy, stack, sizes)
    if not isinstance(stack, jax.Array):
        return dx, None, None
    each = _outer(x, dy, sizes)  # the compiler drops it if the experts are frozen
    return dx, each.astype(stack.dtype), None


_product.defvjp(_forward, _backward)


# ----------------------------------------------------------------------------------------- members


@functools.cache
def _joined(turned: bool, by: tuple):
    """The product with w, or w^T if `turned`, whose batching rule makes members groups."""

    @custom_vmap
    def joined(x, stack, sizes):
        # Without the barrier XLA decodes before a loop over micro-batches and keeps everything.
        x, stack, sizes = jax.lax.optimization_barrier((x, stack, sizes))
        if divided.divides_base():
            return _on_devices(x, stack, sizes, turned, by)
        return _alone(x, stack, sizes, turned)

    @joined.def_vmap
    def members(size, batched, x, stack, sizes):
        x, sizes = _each(size, batched[0], x), _each(size, batched[2], sizes)
        own = any(jax.tree.leaves(batched[1]))
        if own and not isinstance(stack, jax.Array):  # of each member's own: one after the other
            stack = jax.tree.map(functools.partial(_each, size), batched[1], stack)
            return jax.lax.map(lambda member: joined(*member), (x, stack, sizes)), True
        if divided.divides_base():
            return joined(x, stack, sizes), True
        if own:
            turns = sizes.shape[1] // stack.shape[1]
            stack = jnp.tile(stack, (1, turns, 1, 1)).reshape(-1, *stack.shape[2:])
        y = joined(x.reshape(-1, x.shape[-1]), stack, sizes.reshape(-1))
        return y.reshape(size, -1, y.shape[-1]), True

    return joined


@custom_vmap
def _outer(x, dy, sizes):
    """The sum of x[i]^T dy[i] over each group's rows: (m, in), (m, out) -> (G, in, out) float32."""
    if divided.divides_base():
        return _outer_on_devices(x, dy, sizes)
    return _outer_alone(x, dy, sizes)


@_outer.def_vmap
def _outer_of_members(size, batched, x, dy, sizes):
    x, dy, sizes = (_each(size, b, t) for b, t in zip(batched, (x, dy, sizes), strict=True))
    if divided.divides_base():
        return _outer(x, dy, sizes), True
    flat = lambda t: t.reshape(-1, t.shape[-1])
    each = _outer(flat(x), flat(dy), sizes.reshape(-1))
    return each.reshape(size, -1, *each.shape[1:]), True


def _each(size: int, batched: bool, x):
    return x if batched else jnp.broadcast_to(x[None], (size, *x.shape))


# ------------------------------------------------------------------------------------------ devices


def _on_devices(x, stack, sizes, turned: bool, by: tuple):
    """The product where a mesh divides it: each device multiplies its own rows. It gathers the
    experts' parts along "fsdp", and takes of them its own part along "tensor".

    x: (..., m, in), sizes (..., E): in front are the axis of members, if there is one, and that of
    the devices. stack: (..., E, in, out), with the axis of members or without it.
    """
    if isinstance(stack, jax.Array):
        axes = divided.fitting(stack.shape[-2:], [a if a == "tensor" else None for a in by])
        specs = P(*(None,) * (stack.ndim - 2), *axes)
    else:
        stack, specs, axes = stack.tensor_parts()
    contracted, made = axes[::-1] if turned else axes

    def of_device(x, stack, sizes):
        w = stack.reshape(-1, *stack.shape[-2:]) if isinstance(stack, jax.Array) else stack
        y = _alone(x.reshape(-1, x.shape[-1]), w, sizes.reshape(-1), turned)
        return divided.summed(y.reshape(*x.shape[:-1], -1), contracted)

    rows = _rows_spec(x)
    specs = P(*rows, None, contracted), specs, P(*rows, None)
    return divided.on_each(of_device, specs, P(*rows, None, made))(x, stack, sizes)


def _outer_on_devices(x, dy, sizes):
    """(..., m, in), (..., m, out), (..., E) -> (..., E, in, out), as in `_on_devices`."""

    def of_device(x, dy, sizes):
        flat = lambda t: t.reshape(-1, t.shape[-1])
        each = _outer_alone(flat(x), flat(dy), sizes.reshape(-1))
        return each.reshape(*sizes.shape, *each.shape[1:])

    rows = _rows_spec(x)
    specs = P(*rows, None, None), P(*rows, None, None), P(*rows, None)
    return divided.on_each(of_device, specs, P(*rows, None, None, None))(x, dy, sizes)


def _rows_spec(x) -> list:
    """How the axes before (m, n) are divided: the last one, of the devices, over "fsdp"."""
    lead = x.shape[:-2]
    divides = bool(lead) and lead[-1] % divided.here().fsdp == 0
    return [None] * (len(lead) - 1) + ["fsdp" if divides else None] * bool(lead)


# -------------------------------------------------------------------------------------- one program


def _alone(x, stack, sizes, turned: bool):
    """The product on one device."""
    one = functools.partial(_in_blocks, turned=turned)
    whole = functools.partial(_whole, turned=turned)
    return jax.lax.platform_dependent(x, stack, sizes, cpu=one, default=whole)


def _whole(x, stack, sizes, turned: bool):
    """The product by `jax.lax.ragged_dot`, with all experts decoded."""
    w = _decoded(stack).astype(x.dtype)
    w = jnp.swapaxes(w, 1, 2) if turned else w
    dot = functools.partial(jax.lax.ragged_dot, preferred_element_type=jnp.float32)
    if len(sizes) == len(w):
        return dot(x, w, sizes).astype(x.dtype)
    # The rows of all members that belong to one expert become neighbours.
    expert = of_rows(jnp.arange(len(sizes)) % len(w), sizes, len(x))
    order = jnp.argsort(expert, stable=True)
    y = dot(jnp.take(x, order, axis=0), w, jnp.sum(sizes.reshape(-1, len(w)), axis=0))
    return jnp.zeros_like(y).at[order].set(y, unique_indices=True).astype(x.dtype)


def _outer_alone(x, dy, sizes):
    return jax.lax.platform_dependent(x, dy, sizes, cpu=_outer_in_blocks, default=_outer_whole)


def _outer_whole(x, dy, sizes):
    dimensions = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(x, dy, sizes, dimensions, preferred_element_type=jnp.float32)


def _in_blocks(x, stack, sizes, turned: bool):
    """The product, a block of rows of one group at a time."""
    plain, experts = isinstance(stack, jax.Array), jax.tree.leaves(stack)[0].shape[0]
    rows = _block_rows(len(x), len(sizes), 64 if plain else 1024)  # decodes each expert once
    group, start, number = _blocks(sizes, len(x), rows)
    x = jnp.pad(x, ((0, rows), (0, 0)))

    def multiply(i, y):
        w = _decoded(_at(stack, group[i] % experts)).astype(x.dtype)
        part = jax.lax.dynamic_slice_in_dim(x, start[i], rows)
        dimensions = (((1,), (1 if turned else 0,)), ((), ()))
        part = jax.lax.dot_general(part, w, dimensions, preferred_element_type=jnp.float32)
        # Rows beyond the group's end are overwritten by the blocks after this one.
        return jax.lax.dynamic_update_slice_in_dim(y, part.astype(y.dtype), start[i], axis=0)

    shape = jax.eval_shape(_decoded, stack).shape
    y = jnp.zeros((len(x), shape[1 if turned else 2]), x.dtype)
    return jax.lax.fori_loop(0, number, multiply, y)[:-rows]


def _outer_in_blocks(x, dy, sizes):
    rows = _block_rows(len(x), len(sizes))
    group, start, number = _blocks(sizes, len(x), rows)
    ends = jnp.cumsum(sizes)
    x, dy = (jnp.pad(t, ((0, rows), (0, 0))) for t in (x, dy))

    def add(i, total):
        part, dpart = (jax.lax.dynamic_slice_in_dim(t, start[i], rows) for t in (x, dy))
        inside = start[i] + jnp.arange(rows) < ends[group[i]]
        part = jnp.where(inside[:, None], part, 0)
        dimensions = (((0,), (0,)), ((), ()))
        more = jax.lax.dot_general(part, dpart, dimensions, preferred_element_type=jnp.float32)
        return total.at[group[i]].add(more)

    zeros = jnp.zeros((len(sizes), x.shape[1], dy.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, number, add, zeros)


def _blocks(sizes, m: int, rows: int):
    """(group of each block, its first row, number of blocks): blocks of `rows` rows of one group,
    in order, the last of a group reaching into the next one."""
    ends, blocks = jnp.cumsum(sizes), -(-sizes // rows)
    last = jnp.cumsum(blocks)
    index = jnp.arange(m // rows + min(m, len(sizes)))  # as many as there can be
    group = jnp.minimum(jnp.searchsorted(last, index, side="right"), len(sizes) - 1)
    start = (ends - sizes)[group] + rows * (index - (last - blocks)[group])
    return group, start, last[-1]


def _block_rows(m: int, groups: int, most: int = 64) -> int:
    """Rows of a block: near the mean of a group, at most `most` (64: measured on a CPU)."""
    return min(most, 1 << max(0, round(math.log2(max(1, m / groups)))))


def _at(stack, expert):
    take = lambda x: jax.lax.dynamic_index_in_dim(x, expert, keepdims=False)
    return jax.tree.map(take, stack)


def _decoded(stack):
    return stack if isinstance(stack, jax.Array) else stack.decoded()
