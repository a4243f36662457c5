"""Computing on a base that a mesh of devices divides (`lorax.sharding`).

`jit` divides a program by itself, from where its arguments are. Layers and losses say here what it
would not do alone: keep the rows of a batch where they are and gather the weights of one layer at
a time, or send the rows to the weights if that is less. Without a mesh this is the identity.
"""

import contextlib
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from lorax.meshes import AXES, Shape

#: Axes that divide the (inputs, outputs) of a linear layer, and of those whose inputs are divided
#: already: the outputs of the layers before them.
LINEAR = ("fsdp", "tensor")
AFTER = ("tensor", "fsdp")
#: Of an embedding's (tokens, features). A head, features by tokens, is as `LINEAR` the same.
EMBEDDING = ("tensor", "fsdp")


#: Rows of x up to which they may be sent to a weight (`sends_rows`).
FEW = 64


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


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Context in which programs are traced for a mesh; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def divides_base() -> bool:
    """Whether the program is traced for a mesh that may divide the base."""
    mesh = here()
    return mesh.fsdp * mesh.tensor > 1


def constrained(x, *axes: str | None):
    """x divided over the mesh by these axes, one for each of its first axes; None: not divided. An
    axis that does not divide x is left out."""
    if not divides_base():
        return x
    return jax.lax.with_sharding_constraint(x, P(*fitting(x.shape, axes)))


def fitting(shape, axes) -> list[str | None]:
    """The axes of the mesh for the first dimensions of a shape, None in place of one that does not
    divide its dimension."""
    sizes = here()._asdict()
    fits = lambda n, axis: axis is not None and n % sizes[axis] == 0
    return [axis if fits(n, axis) else None for n, axis in zip(shape, axes)]  # noqa: B905


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
    """Whether x (..., in) has few rows, and they and their products with a weight of so many
    outputs and bytes are less than the weight: then it stays where it is, as for a step of
    decoding. (The head of a loss reads many rows in parts, and is gathered once for all.)"""
    rows = x.size // x.shape[-1]
    return rows <= FEW and rows * (x.shape[-1] + outputs) * x.dtype.itemsize < nbytes


def sent(x, w, by: tuple[str, str], axis: int):
    """The product of few rows x (..., n) with axis `axis` of a matrix w: each device multiplies all
    rows by the part of w that the axes `by` of the mesh give it."""
    by = tuple(fitting(w.shape, by))
    contracted, made = by if axis == 0 else by[::-1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def of_device(x, w):
        dimensions = ((x.ndim - 1,), (axis,)), ((), ())
        return summed(jax.lax.dot_general(x, w, dimensions, None, dtype), contracted)

    lead = (None,) * (x.ndim - 1)
    y = on_each(of_device, (P(*lead, contracted), P(*by)), P(*lead, made))(x, w)
    return y.astype(x.dtype)


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
        return sent(x, w.astype(x.dtype), by, axis)
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
    tokens, features = fitting(table.shape, EMBEDDING)

    def found(table, ids):  # by hand: XLA fails on a look-up that three axes of a mesh divide
        if tokens is None:
            return jnp.take(table, ids, axis=0)
        at = ids - jax.lax.axis_index(tokens) * len(table)
        mine = (at >= 0) & (at < len(table))
        part = jnp.take(table, jnp.clip(at, 0, len(table) - 1), axis=0)
        return summed(jnp.where(mine[..., None], part, jnp.zeros((), part.dtype)), tokens)

    features_last = P(*(None,) * ids.ndim, features)
    looked_up = on_each(found, (P(tokens, features), P()), features_last)(table, ids)
    return batch(looked_up) if ids.ndim > 1 else whole(looked_up)


def entries(x, index):
    """x[..., index], (..., n) and (...) int32: as `jnp.take_along_axis`, on which XLA fails where
    three axes of a mesh divide it."""
    if not divides_base():
        return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]
    chosen = jax.lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1) == index[..., None]
    return jnp.sum(jnp.where(chosen, x, 0), axis=-1)
