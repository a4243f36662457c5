"""Parameters of a base that is still in its files, with other numbers in some of their layers."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from lorax import gather, ops


def is_unread(leaf) -> bool:
    """Whether a leaf's arrays are still to be read (`lorax.models.unread`)."""
    return any(hasattr(x, "read") for x in jax.tree.leaves(leaf))


@dataclasses.dataclass(frozen=True, eq=False)
class Altered:
    """A plain parameter that is read layer by layer: a `lorax.models.streaming.Readable`.

    leaf: of the base. site: of a kernel, or None. layers: {index along the layer axes: function
    that returns the layer's array} of those that are not the base's; all indices are equally long.
    """

    leaf: object
    site: ops.Site | None
    dtype: np.dtype
    layers: Mapping[tuple[int, ...], Callable]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A block of the parameter. index: a slice for each axis."""
        stacked = len(next(iter(self.layers)))
        at = [range(n)[part] for n, part in zip(self.shape, index, strict=True)]
        block = np.empty(tuple(map(len, at)), self.dtype)
        for place in np.ndindex(*block.shape[:stacked]):
            layer = tuple(each[i] for each, i in zip(at[:stacked], place, strict=True))
            block[place] = np.asarray(self._layer(layer))[tuple(index[stacked:])]
        return block

    def _layer(self, layer: tuple[int, ...]):
        if layer in self.layers:
            return self.layers[layer]()
        return gather.decoded(self.leaf, self.site, layer)


def with_matrices(leaf, site: ops.Site, dtype, matrices: Mapping[tuple, Callable]) -> Altered:
    """A kernel with other matrices (in, out) in some layers: {index: function that returns it}."""
    alone, kernel = site._replace(stack=0), leaf.shape[site.stack :]
    layer = lambda matrix: lambda: alone.from_matrix(matrix(), kernel)
    return Altered(leaf, site, dtype, {index: layer(make) for index, make in matrices.items()})
