"""One layer of a weight on one device, also if the devices of a mesh hold parts of the weight.

What reads a base's numbers outside of a compiled model, such as a start that decomposes a matrix,
reads them by layer: no device and no host ever has more than one layer's matrix whole. With several
processes, each gathers the same layers in the same order.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax import hosts, ops

ROWS = ("member", "fsdp")  # axes of a mesh that rows are divided over where no member is trained


def mesh_of(tree) -> Mesh | None:
    """The mesh of devices that hold parts of a tree's arrays; None if each array is whole on one
    device, is no array yet (a shape, or while JAX traces), or all devices have copies of it."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            if isinstance(x.sharding, NamedSharding) and not x.is_fully_replicated:
                return x.sharding.mesh
    return None


def is_divided(x) -> bool:
    """Whether several devices hold parts of each member's array of x (M, ...)."""
    place = getattr(x, "sharding", None)
    return isinstance(place, NamedSharding) and any(place.spec[1:])


def here(x):
    """An array whole on this process's first device; itself if it is on one device already. All
    processes must call it together."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return x
    alone = len(x.sharding.device_set) == 1 and x.is_fully_addressable
    return x if alone else jnp.asarray(hosts.whole(x))


def is_here(tree) -> bool:
    """Whether this process's devices have all of a tree's arrays."""
    arrays = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return all(x.is_fully_addressable for x in arrays)


def layer(leaf, index: tuple[int, ...]):
    """One layer of a stacked leaf, an array or operator leaf of a base: `index` along the layer
    axes, () for a leaf that is not stacked."""
    return jax.tree.map(lambda x: _of_layer(x, index), leaf)


def _of_layer(x, index: tuple[int, ...]):
    if hasattr(x, "read"):  # a `lorax.models.streaming.Readable`: still in its file
        rest = x.shape[len(index) :]
        block = x.read((*(slice(i, i + 1) for i in index), *(slice(None),) * len(rest)))
        return jnp.asarray(block.reshape(rest))
    return here(x[index]) if index else here(x)


def decoded(leaf, site: ops.Site | None, index: tuple[int, ...]):
    """One layer of a leaf as a plain array, decoded if it is quantised. site: None if no operator
    leaf can be there. index: along the leading axes, () for all of it."""
    alone = site and site._replace(stack=site.stack - len(index))
    return ops.dense(layer(leaf, index), alone)


def matrix(leaf, site: ops.Site, index: tuple[int, ...]) -> jax.Array:
    """One layer's kernel as (in, out), decoded if it is quantised, in the dtype of its weight."""
    alone = site._replace(stack=0)
    return alone.to_matrix(ops.dense(layer(leaf, index), alone))


def by_layer(function: Callable, leaf, site: ops.Site) -> jax.Array:
    """function(leaf, site), an array with the layer axes first; of a leaf that several devices hold
    parts of, computed for each layer alone."""
    if mesh_of(leaf) is None:
        return function(leaf, site)
    axes, alone = site.matrix_shape(leaf.shape)[0], site._replace(stack=0)
    each = [function(layer(leaf, index), alone) for index in np.ndindex(*axes)]
    return jnp.stack(each).reshape((*axes, *each[0].shape))


def fitting(mesh: Mesh, shape, *axes) -> NamedSharding:
    """How an array of this shape is divided over a mesh. axes: for each dimension the axis of the
    mesh, several of them or None; one that doesn't divide its dimension is left out."""
    sizes = [math.prod(mesh.shape[name] for name in _named(axis)) for axis in axes]
    divides = [n % size == 0 for n, size in zip(shape, sizes, strict=True)]
    return NamedSharding(mesh, P(*(a if ok else None for a, ok in zip(axes, divides, strict=True))))


def _named(axis) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def division(shape, mesh: Mesh) -> NamedSharding:
    """How matrices (layers..., n, m) that are computed from a base's are divided over its mesh."""
    return fitting(mesh, shape, *(None,) * (len(shape) - 2), "fsdp", "tensor")


def divided(function: Callable, mesh: Mesh | None, *arguments):
    """function(*arguments), one stack of matrices, compiled with the result's `division` over the
    mesh; as it is without a mesh."""
    if mesh is None:
        return function(*arguments)
    shape = jax.eval_shape(function, *arguments).shape
    return jax.jit(function, out_shardings=division(shape, mesh))(*arguments)


def side_by_side(batches, mesh: Mesh | None, axis: int):
    """A tree of batches on the devices that compute with a base: their rows, along `axis`, divided
    over the mesh if their number allows it. Without a mesh as they are."""
    if mesh is None:
        return batches
    rows = lambda x: fitting(mesh, x.shape[: axis + 1], *(None,) * axis, ROWS)
    return hosts.place(batches, jax.tree.map(rows, batches))
