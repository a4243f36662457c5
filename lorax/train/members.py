"""A function of one member, run for many: over the member axis M, and over devices.

`width` members run side by side (vmapped: a product with a frozen weight sees all their rows as one
batch), and such groups run one after another under `lax.map`. With several devices, each takes a
part of the members or of every batch.
"""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax.train.layouts import Layout


class Placement(NamedTuple):
    """How arrays are placed on the devices of a layout.

    shared: for arrays that all members read, such as the base. members: trees with a leading axis
    M. batches: leaves (M, K, A, B, ...).
    """

    shared: NamedSharding
    members: NamedSharding
    batches: NamedSharding


def placement(layout: Layout) -> Placement:
    """The shardings of a layout."""
    mesh = Mesh(np.array(layout.devices), ("devices",))
    members = P("devices") if layout.mode in ("members", "pmap") else P()
    batches = P(None, None, None, "devices") if layout.mode == "batch" else members
    return Placement(*(NamedSharding(mesh, spec) for spec in (P(), members, batches)))


def over_members(f, width: int):
    """f on each index of a leading axis: `width` at a time vmapped, the rest under `lax.map`."""
    if width == 1:
        return lambda *trees: jax.lax.map(lambda member: f(*member), trees)
    return lambda *trees: jax.lax.map(lambda member: f(*member), trees, batch_size=width)


def over_devices(f, layout: Layout, axes: tuple[int | None, ...], donate: int | tuple = ()):
    """f with its members spread over the devices, if the layout says so.

    axes: 0 for each argument of f with a member axis, None for one that all members share. donate:
    arguments whose buffers may be reused; only for mode "pmap", which compiles by itself.
    """
    if layout.mode == "pmap":
        return _pmapped(f, layout.devices, axes, donate)
    if layout.mode != "members":
        return f
    shared, members, _ = placement(layout)
    specs = tuple(shared.spec if axis is None else members.spec for axis in axes)
    return jax.shard_map(
        f, mesh=members.mesh, in_specs=specs, out_specs=members.spec, check_vma=False
    )


def filled(tree, size: int):
    """A stacked tree on the host, padded to `size` members with copies of the last one."""
    return jax.tree.map(lambda x: x[np.minimum(np.arange(size), len(x) - 1)], tree)


def _pmapped(f, devices, axes, donate):
    n = len(devices)
    mapped = jax.pmap(f, in_axes=axes, devices=devices, donate_argnums=donate)
    split = lambda tree: jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), tree)
    join = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
    parts = lambda args: [split(a) if axis == 0 else a for a, axis in zip(args, axes, strict=True)]
    return lambda *args: join(mapped(*parts(args)))
