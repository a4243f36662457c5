"""Computing on a base that a mesh of devices divides (`lorax.sharding`).

`jit` divides a program by itself, from where its arguments are. Products and losses ask here for
what it would not do alone: to gather codes rather than decoded weights, and rows of a batch where
they are. Without a mesh all of this is the identity.
"""

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lorax.meshes import AXES, Shape


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


def gathered(x, spec):
    """x, divided by these axes of the mesh, with its parts along "fsdp" gathered."""
    return constrained(x, *(axis if axis == "tensor" else None for axis in spec))


def constrained(x, *axes: str | None):
    """x divided over the mesh by these axes, one for each of its own; None: not divided."""
    if not divides_base():
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))
