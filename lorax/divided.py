"""Computing on a base that a mesh of devices divides (`lorax.sharding`).

`jit` divides a program by itself, from where its arguments are. Layers and losses say here what it
would not do alone: keep the rows of a batch where they are and gather the weights of one layer at
a time, or send the rows to the weights if that is less. Without a mesh this is the identity.
"""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lorax.meshes import AXES, Shape

#: Axes that divide the (inputs, outputs) of a linear layer, and of those whose inputs are divided
#: already: the outputs of the layers before them.
LINEAR = ("fsdp", "tensor")
AFTER = ("tensor", "fsdp")
#: Of an embedding's (tokens, features). A head, features by tokens, is as `LINEAR` the same.
EMBEDDING = ("tensor", "fsdp")


def axes_of(path: str, kind: str = "linear") -> tuple[str, str]:
    """Axes of the mesh for a kernel's (inputs, outputs), by its name in the models of lorax."""
    if kind == "embed":
        return EMBEDDING
    return AFTER if re.fullmatch(r"(.*/)?(o|down)/kernel", path) else LINEAR


def here() -> Shape:
    """The mesh that the program is traced for (`jax.set_mesh`, or inside `jax.shard_map`): the
    devices along each axis that `jit` divides arrays over, 1 along any other."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_types or (), strict=True)
    automatic = [axis for axis, kind in axes if kind == AxisType.Auto]
    return Shape(**{axis: mesh.shape[axis] for axis in AXES if axis in automatic})


def divides_base() -> bool:
    """Whether the program is traced for a mesh that may divide the base."""
    mesh = here()
    return mesh.fsdp * mesh.tensor > 1


def constrained(x, *axes: str | None):
    """x divided over the mesh by these axes, one for each of its first axes; None: not divided. An
    axis that does not divide x is left out."""
    if not divides_base():
        return x
    sizes = here()._asdict()
    fits = lambda n, axis: axis is not None and n % sizes[axis] == 0
    spec = [axis if fits(n, axis) else None for n, axis in zip(x.shape, axes)]  # noqa: B905
    return jax.lax.with_sharding_constraint(x, P(*spec))


def gathered(x, axes):
    """x, divided by these axes of the mesh, with its parts along "fsdp" gathered."""
    return constrained(x, *(axis if axis == "tensor" else None for axis in axes))


def gathered_for(x, w, axes):
    """x, and w gathered when x is there. Otherwise XLA may gather all layers before a loop over
    steps, and keep them."""
    if not divides_base():
        return x, w
    x, w = jax.lax.optimization_barrier((x, w))
    return x, gathered(w, axes)


def whole(x):
    """x, whole on each device."""
    return constrained(x)


def batch(x):
    """x, with its first axis, the rows of a batch, divided over "fsdp"."""
    return constrained(x, "fsdp")


def of_devices(n: int) -> Callable:
    """A function of arrays (n, ...), the rows of a batch: the same array, or (devices, n / devices,
    ...) where a mesh divides n."""
    devices = here().fsdp
    if devices == 1 or n % devices:
        return lambda x: x
    return lambda x: batch(x.reshape(devices, n // devices, *x.shape[1:]))


def sends_rows(x, outputs: int, nbytes: int) -> bool:
    """Whether x (..., in) and its products with a weight of so many outputs and bytes are less than
    the weight: then the weight stays where it is, as for the few tokens of a step of decoding."""
    rows = x.size // x.shape[-1]
    return rows * (x.shape[-1] + outputs) * x.dtype.itemsize < nbytes


def on_each(function, in_specs, out_specs):
    """function of what each device has of the arguments: `jax.shard_map` over the mesh."""
    axes = {"fsdp", "tensor"}
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )


def summed(y, axis: str | None):
    """The sum over the devices along an axis, computed in float32; inside `on_each`."""
    return y if axis is None else jax.lax.psum(y.astype(jnp.float32), axis).astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x, w, by: tuple[str, str], axis: int):
    """The product of x (..., n) with axis `axis` of a matrix w that the axes `by` of the mesh
    divide, in x's dtype. Its gradient is that of a plain product; it gathers w again."""
    if sends_rows(x, w.shape[1 - axis], w.size * w.dtype.itemsize):
        x, w = whole(x), constrained(w, *by)
    else:
        x, w = gathered_for(x, w, by)
    return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (axis,)), ((), ())))


def _product_forward(x, w, by, axis):
    return product(x, w, by, axis), (x, w)


def _product_backward(by, axis, saved, dy):
    x, w = saved
    rows = tuple(range(x.ndim - 1))
    of_axis = (x, dy) if axis == 0 else (dy, x)
    dw = jnp.tensordot(*of_axis, (rows, rows)).astype(w.dtype)  # dropped if w is frozen
    return product(dy, w, by, 1 - axis), constrained(dw, *by)


product.defvjp(_product_forward, _product_backward)


def rows(table, ids):
    """Rows `ids` of an embedding (V, features): each device looks up the part that it has of all
    rows, and gets the features of its own part of the batch."""
    if not divides_base():
        return jnp.take(table, ids, axis=0)
    sizes = here()._asdict()
    tokens, features = (
        axis if n % sizes[axis] == 0 else None
        for n, axis in zip(table.shape, EMBEDDING, strict=True)
    )

    def found(table, ids):  # by hand: XLA fails on a look-up that three axes of a mesh divide
        if tokens is None:
            return jnp.take(table, ids, axis=0)
        at = ids - jax.lax.axis_index(tokens) * len(table)
        mine = (at >= 0) & (at < len(table))
        part = jnp.take(table, jnp.clip(at, 0, len(table) - 1), axis=0)
        return jax.lax.psum(jnp.where(mine[..., None], part, 0), tokens)

    looked_up = jax.shard_map(
        found,
        in_specs=(P(tokens, features), P()),
        out_specs=P(*(None,) * ids.ndim, features),
        axis_names={"fsdp", "tensor"},
        check_vma=False,
    )(table, ids)
    return batch(looked_up) if ids.ndim > 1 else whole(looked_up)


def entries(x, index):
    """x[..., index], (..., n) and (...) int32: as `jnp.take_along_axis`, on which XLA fails where
    three axes of a mesh divide it."""
    if not divides_base():
        return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]
    chosen = jax.lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1) == index[..., None]
    return jnp.sum(jnp.where(chosen, x, 0), axis=-1)
