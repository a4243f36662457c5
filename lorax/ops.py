"""What a layer computes with its kernel, which is an array or an operator leaf.

`method.bind` replaces kernels by operator leaves (`Leaf`). `linear`, `ragged`, `embed`, `attend`
and `convolve` are the only way to compute with one; `dense` and `matrix` return the plain kernel
that it represents. lorax's own leaves are in `lorax.leaves`; a user's leaf extends `Leaf` in the
same way, and nothing else needs to know it. `lorax.intercept` makes Linen layers call these
functions.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import grouped, tree

Array = jax.Array


class Site(NamedTuple):
    """The meaning of a kernel's axes, not counting layer axes.

    kind: "linear", "conv" or "embed"; "experts" for linear kernels of which each row of the input
        takes one; "other" for a kernel of an NNX module that no product reads as it is, and whose
        leaf is made a plain kernel.
    stack: number of leading layer axes (`nn.scan`), with the axis of the experts.
    ins, outs: kernel axes that are contracted with the input, and that the layer produces.
    word: the canonical target ("q") that a user's model assigns to it; "" if the name says it.
    """

    kind: str
    stack: int
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    word: str = ""

    def matrix_shape(self, shape) -> tuple[tuple[int, ...], int, int]:
        """(layer axes, in, out) of a kernel of the given full shape."""
        kernel = shape[self.stack :]
        size = lambda axes: int(np.prod([kernel[i] for i in axes], dtype=np.int64))
        return tuple(shape[: self.stack]), size(self.ins), size(self.outs)

    def to_matrix(self, w) -> Array:
        """A kernel as (layers..., in, out)."""
        layers, n_in, n_out = self.matrix_shape(w.shape)
        order = (*range(self.stack), *(self.stack + i for i in self.ins + self.outs))
        return jnp.transpose(w, order).reshape(*layers, n_in, n_out)

    def from_matrix(self, m, shape) -> Array:
        """(layers..., in, out) as a kernel of the given full shape; inverse of `to_matrix`."""
        axes = (*range(self.stack), *(self.stack + i for i in self.ins + self.outs))
        moved = m.reshape(*(shape[i] for i in axes))
        return jnp.transpose(moved, np.argsort(axes))


class Leaf:
    """An operator leaf, which replaces a kernel in a tree of parameters.

    A subclass is a frozen dataclass, registered with JAX. Its field `w` is the kernel in its
    module's own shape, an array or another leaf. Its other fields have the kernel's layer axes
    first; `linear`, `embed`, `attend` and `convolve` see one layer, without these axes. It has

    linear(x): x @ dense(leaf), (..., in) -> (..., out), both in the compute dtype. `self.w` is
        then (in, out), an array or another leaf: multiply by it with `ops.linear(x, self.w)`, or
        get its entries with `ops.matrix(self.w)`.
    dense(w, site): the kernel that the leaf represents, in the shape and dtype of w. w is the
        kernel that `self.w` represents, an array in float32 or float64. `site.to_matrix` and
        `site.from_matrix` convert between the kernel's shape and (layers..., in, out).

    `embed`, `attend` and `convolve` are for embeddings and convolutions; the base class raises
    ValueError. `ragged` is for experts; the base class computes dense(leaf) for all of them, at the
    cost of E in out numbers and their gradient for every layer and member. Override it if `linear`
    does anything that `dense` leaves out, such as dropout.
    """

    def linear(self, x):
        raise ValueError(f"a linear layer with a {type(self).__name__} leaf is not supported")

    def affine(self, x, bias):
        """`linear` plus a bias, (out,) or None; for leaves that do more with a bias than add it."""
        return add_bias(self.linear(x), bias)

    def ragged(self, x, sizes):
        """x[i] @ dense(leaf)[e] for each row of x (rows, in) sorted by expert e: (rows, out).
        sizes: (E,) int32, rows of each expert. The leaf's arrays have the experts' axis first."""
        return grouped.product(x, self.plain(EXPERTS, x.dtype), sizes)

    def embed(self, ids, dtype=None):
        """Rows `ids` of a kernel (V, features): (...,) integers -> (..., features)."""
        raise ValueError(f"an embedding with a {type(self).__name__} leaf is not supported")

    def attend(self, x):
        """x @ dense(leaf)^T of a kernel (V, features): (..., features) -> (..., V)."""
        raise ValueError(f"an embedding with a {type(self).__name__} leaf is not supported")

    def convolve(self, module, x):
        """The output of `module`, a `flax.linen.Conv` without bias, for x; see `ops.convolve`."""
        raise ValueError(f"a convolution with a {type(self).__name__} leaf is not supported")

    def dense(self, w, site: Site):
        raise ValueError(f"a {type(self).__name__} leaf is not a single kernel")

    def frozen(self):
        """The weight at the bottom, an array or a `lorax.leaves.FrozenWeight`."""
        return frozen(self.w)

    def plain(self, site: Site, dtype):
        """The kernel that the leaf represents, computed in `dtype`."""
        return self.dense(_plain(self.w, site, dtype), site)

    def on_frozen(self, function: Callable):
        """The leaf with function(array) in place of the array at the bottom."""
        return dataclasses.replace(self, w=on_frozen(self.w, function))

    def as_matrix(self, site: Site):
        """The leaf with the weight at the bottom as (in, out)."""
        return dataclasses.replace(self, w=as_matrix(self.w, site))

    def __jax_array__(self):
        raise TypeError(
            f"a {type(self).__name__} leaf is not an array: call a model with bound parameters by "
            "lorax.apply(module, params, ...), or by module.apply inside "
            "lorax.intercept.interceptor()"
        )

    def __repr__(self):  # short, because it appears in errors of Flax and JAX
        return f"<{type(self).__name__} leaf, for lorax.apply>"


#: A stack of experts' kernels (E, in, out), of one layer.
EXPERTS = Site("experts", 1, (0,), (1,))


def is_operator(leaf) -> bool:
    """True for leaves that only the functions of this module can compute with."""
    return isinstance(leaf, Leaf)


def frozen(leaf):
    """The weight at the bottom of a leaf, in its module's own shape: an array, or a
    `lorax.leaves.FrozenWeight`, which has a shape and a dtype as well."""
    return leaf.frozen() if is_operator(leaf) else leaf


def on_frozen(leaf, function: Callable):
    """The leaf with function(array) in place of the array at its bottom; a
    `lorax.leaves.FrozenWeight` stays."""
    return leaf.on_frozen(function) if is_operator(leaf) else function(leaf)


# ---------------------------------------------------------------------------------------- products


def linear(x, leaf, bias=None):
    """y = x @ dense(leaf) + bias, with dense(leaf) seen as (in, out).

    x: (..., in) in the compute dtype. Returns (..., out) in that dtype, to which the adapter is
    cast. leaf: an (in, out) array or operator leaf.
    """
    return leaf.affine(x, bias) if is_operator(leaf) else add_bias(x @ leaf.astype(x.dtype), bias)


def ragged(x, leaf, sizes, bias=None):
    """y[i] = x[i] @ dense(leaf)[e] + bias[e], e the expert of row i.

    x: (rows, in) in the compute dtype, sorted by expert. leaf: an (E, in, out) array or operator
    leaf. sizes: (E,) int32, rows of each expert, all rows in all. bias: (E, out) or None. Returns
    (rows, out) in x's dtype. x and sizes may have an axis in front, of devices that each have rows.
    """
    if x.ndim == 3:
        return jax.vmap(lambda x, sizes: ragged(x, leaf, sizes, bias))(x, sizes)
    if is_operator(leaf):
        y = leaf.ragged(x, sizes)
    else:
        y = grouped.product(x, leaf.astype(x.dtype), sizes)
    return y if bias is None else y + grouped.of_rows(bias.astype(y.dtype), sizes, len(y))


def matrix(leaf):
    """The (in, out) array that a linear layer's leaf represents, in the dtype of its weight."""
    return dense(leaf, Site("linear", 0, (0,), (1,)))


def add_bias(y, bias):
    """y plus a bias along its last axes, or y if the bias is None."""
    if bias is None:
        return y
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def embed(ids, leaf, dtype=None):
    """Rows `ids` of dense(leaf) seen as (V, features): (...,) integers -> (..., features)."""
    if is_operator(leaf):
        return leaf.embed(ids, dtype)
    rows = jnp.take(leaf, ids, axis=0)
    return rows if dtype is None else rows.astype(dtype)


def attend(x, leaf):
    """x @ dense(leaf)^T for an embedding leaf (V, features): (..., features) -> (..., V)."""
    return leaf.attend(x) if is_operator(leaf) else x @ leaf.astype(x.dtype).T


def convolve(module, leaf, x):
    """The output of `module`, a `flax.linen.Conv` without bias, for x with kernel dense(leaf)."""
    if is_operator(leaf):
        return leaf.convolve(module, x)
    return module.apply({"params": {"kernel": leaf}}, x)


def dense(leaf, site: Site):
    """The plain kernel that a leaf represents, in the shape and dtype of its frozen weight.

    It is computed in float32 and rounded once. Raises ValueError for a leaf that has no single
    equivalent kernel (`Mixed`, `Untied`, `Bottleneck`).
    """
    return wide(leaf, site).astype(frozen(leaf).dtype) if is_operator(leaf) else leaf


def wide(leaf, site: Site) -> Array:
    """`dense` in float32, or in float64 if the weight is."""
    dtype = jnp.float64 if frozen(leaf).dtype == jnp.float64 else jnp.float32
    return _plain(leaf, site, dtype)


def _plain(leaf, site: Site, dtype) -> Array:
    return leaf.plain(site, dtype) if is_operator(leaf) else leaf.astype(dtype)


def column_squares(leaf, site: Site) -> Array:
    """Squared Euclidean lengths of the columns of dense(leaf), (layers..., out) float32."""
    return jnp.sum(jnp.square(site.to_matrix(wide(leaf, site))), axis=-2)


def as_matrix(leaf, site: Site):
    """The leaf with the weight at its bottom as (in, out)."""
    return leaf.as_matrix(site) if is_operator(leaf) else site.to_matrix(leaf)


def over_layers(function: Callable, stack: int) -> Callable:
    """The function of one layer's arrays, for arrays with `stack` layer axes first."""
    for _ in range(stack):
        function = jax.vmap(function)
    return function


# -------------------------------------------------------------------------------------------- sites


def sites_from_shapes(params: dict) -> dict[str, Site]:
    """{path: Site} by the naming rule of the models in `lorax.models`.

    A kernel with two axes is (in, out), with three (layers, in, out); an embedding (V, features).
    The kernels of "experts/up" and the like are (layers..., experts, in, out). Kernels of other
    models may have head or window axes; `lorax.sites` finds them by tracing.
    """
    sites = {}
    for path, leaf in tree.flatten(inner(params)).items():
        name, ndim = path.rsplit("/", 1)[-1], len(leaf.shape)
        if name == "kernel" and re.fullmatch(r"(.*/)?experts/(gate|up|down)/kernel", path):
            sites[path] = Site("experts", ndim - 2, (0,), (1,))
        elif name == "kernel" and ndim in (2, 3):
            sites[path] = Site("linear", ndim - 2, (0,), (1,))
        elif name == "embedding" and ndim == 2:
            sites[path] = Site("embed", 0, (0,), (1,))
    return sites


def inner(params: dict) -> dict:
    """`params` itself. Raises ValueError for {"params": ...}, as `module.init` returns it."""
    if {*params} == {"params"}:
        raise ValueError(
            'params: {"params": ...} given, must be the tree inside: variables["params"]'
        )
    return params


def __getattr__(name: str):
    """Names that have moved to `lorax.leaves` and `lorax.intercept` since 0.1.0: users' methods may
    say `ops.LowRank`."""
    for module in () if name.startswith("_") else ("lorax.leaves", "lorax.intercept"):
        names = vars(importlib.import_module(module))
        if name in names:
            return names[name]
    raise AttributeError(f"module 'lorax.ops' has no attribute {name!r}")
