"""Iterates over the matrices that a method adapts, and fills arrays of one shape for all members.

Members of a sweep share one program, so their trees have the same paths and shapes: `init` makes
arrays for every matrix that some member adapts, as wide as the widest member needs, with zeros
where this member adapts nothing.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import gather, ops, tree


class Matrix(NamedTuple):
    """A matrix of the base, or a stack of them, that a method has arrays for.

    path, site: of its kernel. axes: sizes of its layer axes, () if it is not stacked. n_in, n_out:
    size of one layer's matrix. active: numpy array over `axes`: whether each layer is adapted, or
    its rank, as passed to `matrices`. key: for this matrix, None if `matrices` got none.
    """

    path: str
    site: ops.Site
    axes: tuple[int, ...]
    n_in: int
    n_out: int
    active: np.ndarray
    key: jax.Array | None = None

    def fill(self, shapes: Mapping[str, tuple], draw: Callable, dtype=np.float32) -> dict:
        """{name: array (*axes, *shape)}, drawn for active layers; see `fill` below."""
        return fill(self.key, self.axes, self.active > 0, shapes, draw, dtype)

    def full(self, value, dtype=jnp.float32) -> jax.Array:
        """An array over the layer axes that holds `value` in each."""
        return jnp.full(self.axes, value, dtype)


def matrices(
    params: dict,
    adapted: Mapping,
    targets: Mapping | None = None,
    key=None,
    rank: int | None = None,
) -> Iterator[Matrix]:
    """The matrices to make arrays for, in order.

    adapted: {path: (Site, active)} of the adapted matrices, as from `adapted_matrices`.
    targets: {path: Site} of the matrices to make arrays for; None for the adapted ones.
    key: of the member. rank: if given, keys differ between ranks. Otherwise members of one seed and
    different ranks would share their first columns, and the similarity of their subspaces would
    start above chance.
    """
    flat = tree.flatten(params)
    targets = targets or {path: site for path, (site, _) in adapted.items()}
    for path, site in targets.items():
        axes, n_in, n_out = site.matrix_shape(flat[path].shape)
        active = adapted[path][1] if path in adapted else np.zeros(axes, bool)
        matrix_key = None if key is None else key_for(key, path)
        if matrix_key is not None and rank is not None:
            matrix_key = jax.random.fold_in(matrix_key, rank)
        yield Matrix(path, site, axes, n_in, n_out, np.asarray(active), matrix_key)


def key_for(key: jax.Array, path: str) -> jax.Array:
    """The key of a path, which does not depend on the other paths."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def fill(key, axes, active, shapes: Mapping[str, tuple], draw: Callable, dtype=np.float32) -> dict:
    """{name: array (*axes, *shape) of the dtype}, drawn for active layers and zero elsewhere.

    axes: sizes of the layer axes, () for a weight that is not stacked. active: boolean numpy array
    over them. draw(key, index) -> {name: array at most as large as shapes[name]}, written into the
    first rows and columns; the rest is padding. index: of the layer, a tuple. A layer's key does
    not depend on how many layers are active. Can be traced.
    """
    indices = list(np.ndindex(*axes))
    drawn = [{} for _ in indices]
    if np.any(active):
        keys = jax.random.split(key, len(indices))
        drawn = [draw(keys[n], i) if active[i] else {} for n, i in enumerate(indices)]
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(drawn))
    array = jnp if traced else np  # numpy is quicker

    def padded(layer, name, shape):
        value = layer.get(name, np.zeros((0,) * len(shape), dtype))
        after = [(0, most - n) for most, n in zip(shape, np.shape(value), strict=True)]
        return array.pad(array.asarray(value, dtype), after or 0)

    def stacked(name, shape):
        layers = [padded(layer, name, shape) for layer in drawn]
        return jnp.asarray(array.stack(layers).reshape((*axes, *shape)))

    return {name: stacked(name, shape) for name, shape in shapes.items()}


def shared(
    seed: int, rank: int, draw: Callable, drawn: Mapping[str, tuple], padded: Mapping[str, tuple]
) -> dict:
    """{name: float32 array} that all matrices of a method share, the same for every `seed` of a
    run; each rank has its own.

    drawn: {name: shape}. draw(key, shape) -> array of that shape. padded: {name: shape to fill up
    to with zeros}.
    """
    key = jax.random.fold_in(jax.random.key(seed), rank)
    start = lambda key, index: {name: draw(key_for(key, name), drawn[name]) for name in drawn}
    return fill(key, (), np.array(True), padded, start)


def updates(bind: Callable, trainable, constants, params, sites=None) -> dict:
    """{path: dW in the kernel's shape, float32} of a method that binds to leaves with a `delta`
    (`leaves.Added`); divided like the base's over its mesh."""
    sites = sites or ops.sites_from_shapes(params)
    bound, deltas = tree.flatten(bind(trainable, constants, params, sites=sites)), {}
    for path in joined(trainable):
        leaf, site = bound[path], sites[path]
        change = lambda leaf, site=site: leaf.delta(ops.wide(leaf.w, site), site)
        deltas[path] = gather.divided(change, gather.mesh_of(leaf.w), leaf).astype(jnp.float32)
    return deltas


def joined(*trees: dict) -> dict[str, dict]:
    """{path: {name: leaf}} of trees whose leaves are at path/name: joins a method's trainable and
    constants."""
    leaves: dict[str, dict] = {}
    for flat in map(tree.flatten, trees):
        for path, leaf in flat.items():
            parent, _, name = path.rpartition("/")
            leaves.setdefault(parent, {})[name] = leaf
    return leaves
