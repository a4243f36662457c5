"""A function of one member, run for many: over the member axis M, and over devices.

`width` members run side by side (vmapped: a product with a frozen weight sees all their rows as one
batch), and such groups run one after another under `lax.map`. With several devices, each takes a
part of the members or of every batch.
"""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey, tree_map_with_path

from lorax import sharding, tree
from lorax.models import Base
from lorax.train.layouts import Layout


class Placement(NamedTuple):
    """How arrays are placed on the devices of a layout.

    base: the tree of the base's parameters. shared: other arrays that all members read. members:
    trees with a leading axis M (but see `of_members`). batches: leaves (M, K, A, B, ...).
    evaluated: leaves (N, B, ...), that all members read (but see `of_rows`).
    """

    base: dict
    shared: NamedSharding
    members: NamedSharding
    batches: NamedSharding
    evaluated: NamedSharding

    def of_members(self, stacked):
        """The shardings of a tree with a leading axis M: a parameter that is trained in full is
        divided as the base's, and so is what an optimiser keeps of it; all else is whole."""
        bases = tree.flatten(self.base)

        def place(path, x):
            keys = [key.key for key in path if isinstance(key, DictKey)]
            of_base = bases.get("/".join(keys[:-1])) if keys and keys[-1] == "w" else None
            if not isinstance(of_base, NamedSharding) or len(of_base.spec) >= x.ndim:
                return self.members
            return NamedSharding(of_base.mesh, P("member", *of_base.spec))

        return tree_map_with_path(place, stacked)

    def of_rows(self, batches) -> NamedSharding:
        """The sharding of leaves (N, B, ...): whole if the mesh does not divide their B."""
        leaf = jax.tree.leaves(batches)[0]
        divides = leaf.shape[1] % self.evaluated.mesh.shape["fsdp"] == 0
        return self.evaluated if divides else self.shared


def placement(layout: Layout, base: Base) -> Placement:
    """The shardings of a layout."""
    mesh = layout.mesh
    named = lambda *spec: NamedSharding(mesh, P(*spec))
    if layout.mode == "mesh":
        params, evaluated = sharding.shardings(base.params, base.sites, mesh), (None, "fsdp")
    else:
        params, evaluated = jax.tree.map(lambda _: named(), base.params), ()
    batches = named("member", None, None, "fsdp")
    return Placement(params, named(), named("member"), batches, named(*evaluated))


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
    if layout.mode in ("none", "batch"):
        return f
    specs = tuple(P() if axis is None else P("member") for axis in axes)
    return jax.shard_map(
        f,
        mesh=layout.mesh,
        in_specs=specs,
        out_specs=P("member"),
        axis_names={"member"},
        check_vma=False,
    )


def filled(tree, size: int):
    """A stacked tree, padded to `size` members with copies of the last one; as it is where it has
    so many."""
    fill = lambda x: x[np.minimum(np.arange(size), len(x) - 1)]
    return jax.tree.map(lambda x: x if len(x) == size else fill(x), tree)


def _pmapped(f, devices, axes, donate):
    n = len(devices)
    mapped = jax.pmap(f, in_axes=axes, devices=devices, donate_argnums=donate)
    split = lambda tree: jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), tree)
    join = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
    parts = lambda args: [split(a) if axis == 0 else a for a, axis in zip(args, axes, strict=True)]
    return lambda *args: join(mapped(*parts(args)))
