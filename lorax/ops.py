"""Operator leaves, what a layer does with one, and the interceptor that brings the two together.

A model is a plain Linen module. `method.bind` puts an operator leaf where a kernel was, and
`apply` runs the module under an interceptor that computes every `Dense`, `DenseGeneral`, `Einsum`,
`Embed` and `Conv` whose kernel is such a leaf by the functions here. A call without the
interceptor fails: Flax cannot multiply by a `LowRank`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lorax import tree

Array = jax.Array

#: What remat policies know a product by that is no `dot_general` to them (see `models.layers`).
PRODUCT = "product"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Inverted dropout of an adapter's input: rate () float32, key () typed PRNG key."""

    rate: Array
    key: Array


class Leaf:
    """What stands where a kernel was, and is none to Flax.

    A subclass is a frozen dataclass, registered with JAX, whose field `w` is the kernel in its
    module's own shape, an array or another leaf; its other fields have the kernel's layer axes in
    front, which are gone where `linear`, `embed`, `attend` and `convolve` see them. It has

    linear(x): x @ dense(leaf), (..., in) in the compute dtype -> (..., out) in that dtype; w is
        then (in, out), an array, a `Stored` or another leaf: for `ops.linear(x, self.w)`, or
        `ops.matrix(self.w)` where its entries are needed.
    dense(w, site): the kernel that it stands for, in the shape and dtype of w, an array: what
        `self.w` stands for, in float32 or float64. `site.to_matrix` and `from_matrix` go between
        the kernel's shape and (layers..., in, out).

    and, where it can, what is said to be missing here: `embed`, `attend`, `convolve`.
    """

    def linear(self, x):
        raise ValueError(f"a linear layer with a {type(self).__name__} leaf is not supported")

    def affine(self, x, bias):
        """`linear` plus a bias (out,), or None; for leaves whose bias is more than a sum."""
        return add_bias(self.linear(x), bias)

    def embed(self, ids, dtype=None):
        """Rows `ids` of a kernel (V, features): (...,) integers -> (..., features)."""
        raise ValueError(f"an embedding with a {type(self).__name__} leaf is not supported")

    def attend(self, x):
        """x @ dense(leaf)^T of a kernel (V, features): (..., features) -> (..., V)."""
        raise ValueError(f"an embedding with a {type(self).__name__} leaf is not supported")

    def convolve(self, module, x):
        """What a `flax.linen.Conv` without bias gives for x; see `convolve`."""
        raise ValueError(f"a convolution with a {type(self).__name__} leaf is not supported")

    def dense(self, w, site: "Site"):
        raise ValueError(f"a {type(self).__name__} leaf is no single kernel")

    def __jax_array__(self):
        raise TypeError(
            f"a {type(self).__name__} leaf is no array: parameters that a method or an adapter is "
            "bound to are for lorax.apply(module, params, ...), or module.apply inside "
            "lorax.ops.interceptor()"
        )

    def __repr__(self):  # Flax and JAX put it into their errors, and arrays would fill a screen
        return f"<{type(self).__name__} leaf, for lorax.apply>"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(Leaf):
    """A frozen weight plus a low-rank update: dense(leaf) = w + s * reshape(a @ b, w.shape).

    w: the kernel in its module's own shape, an array or another operator leaf.
    a: (in, r) and b: (r, out) in the adapter's dtype; `in` and `out` are the products of the
       kernel's contracted and produced axes, in kernel order.
    s: () float32, the scale. dropout: on the input of `a`, None at evaluation.
    merge: (static) whether a forward pass may make w + s a b instead of two thin products.
    Every array has the kernel's leading layer axes in front where the module is `nn.scan`ned.
    """

    w: object
    a: Array
    b: Array
    s: Array
    dropout: Dropout | None = None
    merge: bool = dataclasses.field(default=False, metadata={"static": True})

    def linear(self, x):
        """One of two ways that agree to rounding: x w + s (x a) b, or, where that costs more than
        making w + s a b and `merge` allows it, the merged product with a factored backward pass.
        Merging is for float32 only: in bfloat16 it would round small updates away."""
        a, b, s = (t.astype(x.dtype) for t in (self.a, self.b, self.s))
        rows, n_in, n_out = x.size // x.shape[-1], a.shape[0], b.shape[-1]
        worthwhile = rows * (n_in + n_out) > 2 * n_in * n_out
        plain = isinstance(self.w, jax.Array) and self.dropout is None and x.dtype == jnp.float32
        if self.merge and plain and worthwhile:
            return merged_linear(x, self.w.astype(x.dtype), a, b, s)
        return linear(x, self.w) + s * ((dropout(x, self.dropout) @ a) @ b)

    def embed(self, ids, dtype=None):
        rows = embed(ids, self.w, dtype)
        a, b = self.a.astype(rows.dtype), self.b.astype(rows.dtype)
        return rows + self.s.astype(rows.dtype) * (jnp.take(a, ids, axis=0) @ b)

    def attend(self, x):
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        return attend(x, self.w) + self.s.astype(x.dtype) * ((x @ b.T) @ a.T)

    def convolve(self, module, x):
        """conv(x, w) + s conv(x, a) b: a as a kernel with r output channels, b a 1 x 1 one."""
        y = convolve(module, self.w, x)
        down = module.clone(features=self.a.shape[-1])
        a = self.a.astype(y.dtype).reshape(*frozen(self).shape[:-1], -1)
        z = down.apply({"params": {"kernel": a}}, dropout(x, self.dropout))
        return y + self.s.astype(y.dtype) * (z @ self.b.astype(y.dtype))

    def dense(self, w, site):
        a, b, s = (t.astype(w.dtype) for t in (self.a, self.b, self.s))
        return w + site.from_matrix(s[..., None, None] * jnp.matmul(a, b), w.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Scaled(Leaf):
    """A weight whose output columns are scaled: dense(leaf) = dense(w) * g; a bias is not scaled.

    w: a kernel or another operator leaf. g: (out,) float32, layer axes in front.
    """

    w: object
    g: Array

    def linear(self, x):
        return _over_last(linear(x, self.w), self.g)

    def embed(self, ids, dtype=None):
        return _over_last(embed(ids, self.w, dtype), self.g)

    def attend(self, x):
        return attend(_over_last(x, self.g), self.w)

    def convolve(self, module, x):
        return _over_last(convolve(module, self.w, x), self.g)

    def dense(self, w, site):
        g = self.g[..., None, :].astype(w.dtype)
        return site.from_matrix(site.to_matrix(w) * g, w.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ScaledInput(Leaf):
    """A weight whose input rows are scaled: dense(leaf) = g[:, None] * dense(w).

    w: a kernel, no convolution's, or another operator leaf. g: (in,) float32, layer axes in front.
    """

    w: object
    g: Array

    def linear(self, x):
        return linear(_over_last(x, self.g), self.w)

    def dense(self, w, site):
        g = self.g[..., None].astype(w.dtype)
        return site.from_matrix(site.to_matrix(w) * g, w.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Follow(Leaf):
    """A weight with a bottleneck adapter behind its layer, whose bias is part of what it reads:
    h = x w + bias, y = h + f(h down + down_bias) up + up_bias. No single kernel.

    w: a kernel, of a linear layer, or another operator leaf. down: (out, m), down_bias: (m,),
    up: (m, out), up_bias: (out,), layer axes in front of each. f: (static) elementwise.
    """

    w: object
    down: Array
    down_bias: Array
    up: Array
    up_bias: Array
    f: Callable = dataclasses.field(metadata={"static": True})

    def affine(self, x, bias):
        y = linear(x, self.w, bias)
        return y + linear(self.f(linear(y, self.down, self.down_bias)), self.up, self.up_bias)

    def linear(self, x):
        return self.affine(x, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Mixed(Leaf):
    """A frozen weight with n low-rank updates, row i of a batch seeing update rows[i]:
    y[i] = x[i] w + s[rows[i]] (x[i] a[rows[i]]) b[rows[i]].

    w: a kernel or another operator leaf. a: (n, in, r), b: (n, r, out), s: (n,) float32, rows: (B,)
    int32, layer axes in front of each (rows repeated). B is the first axis of the layer's input.
    """

    w: object
    a: Array
    b: Array
    s: Array
    rows: Array

    def linear(self, x):
        a, b, s = self._chosen(x)
        return linear(x, self.w) + s * _batched(_batched(x, a), b)

    def embed(self, ids, dtype=None):
        rows = embed(ids, self.w, dtype)  # (B or 1, ..., features): positions are the same for all
        rows = jnp.broadcast_to(rows, (self.rows.shape[0], *rows.shape[1:]))
        _, b, s = self._chosen(rows)
        own = jnp.broadcast_to(ids, (rows.shape[0], *ids.shape[1:]))
        a = self.a[self.rows.reshape((-1,) + (1,) * (ids.ndim - 1)), own].astype(rows.dtype)
        return rows + s * _batched(a, b)

    def attend(self, x):
        a, b, s = self._chosen(x)
        turned = lambda m: jnp.swapaxes(m, 1, 2)
        return attend(x, self.w) + s * _batched(_batched(x, turned(b)), turned(a))

    def _chosen(self, x):
        """Each row's factors in x's dtype: a (B, in, r), b (B, r, out), s (B, 1...) like x."""
        if x.shape[0] != self.rows.shape[0]:
            raise ValueError(f"a batch of {x.shape[0]} rows, but adapters for {self.rows.shape[0]}")
        a, b, s = (jnp.take(t, self.rows, axis=0).astype(x.dtype) for t in (self.a, self.b, self.s))
        return a, b, s.reshape((-1,) + (1,) * (x.ndim - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Untied(Leaf):
    """An embedding (V, features) that looks tokens up in `w` and reads out with `head`, where an
    update of one of the two is none of the other. Both are arrays or operator leaves."""

    w: object
    head: object

    def embed(self, ids, dtype=None):
        return embed(ids, self.w, dtype)

    def attend(self, x):
        return attend(x, self.head)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Kronecker(Leaf):
    """A frozen weight plus a Kronecker product: dense(leaf) = w + s * reshape(kron(w1, w2)).

    w: a kernel or another operator leaf. w1: (m, l), w2: (n, k) with in = m n and out = l k.
    s: () float32. dropout: on the input of the product. Layer axes in front of each.
    """

    w: object
    w1: Array
    w2: Array
    s: Array
    dropout: Dropout | None = None

    def linear(self, x):
        w1, w2, s = self._as(x.dtype)
        return linear(x, self.w) + s * kron_product(dropout(x, self.dropout), w1, w2)

    def embed(self, ids, dtype=None):
        rows = embed(ids, self.w, dtype)
        w1, w2, s = self._as(rows.dtype)
        first, second = jnp.take(w1, ids // len(w2), axis=0), jnp.take(w2, ids % len(w2), axis=0)
        return rows + s * (first[..., :, None] * second[..., None, :]).reshape(rows.shape)

    def attend(self, x):
        w1, w2, s = self._as(x.dtype)
        return attend(x, self.w) + s * kron_product(x, w1.T, w2.T)

    def dense(self, w, site):
        w1, w2, s = self._as(w.dtype)
        return w + site.from_matrix(s[..., None, None] * kron(w1, w2), w.shape)

    def _as(self, dtype):
        return self.w1.astype(dtype), self.w2.astype(dtype), self.s.astype(dtype)


def kron(w1, w2):
    """(..., m, l), (..., n, k) -> (..., m n, l k): blocks w1[i, j] w2."""
    blocks = jnp.einsum("...ml,...nk->...mnlk", w1, w2)
    return blocks.reshape(*w1.shape[:-2], w1.shape[-2] * w2.shape[-2], -1)


def kron_product(x, w1, w2):
    """x @ kron(w1, w2), which is not made: (..., m n), (m, l), (n, k) -> (..., l k)."""
    y = x.reshape(*x.shape[:-1], w1.shape[0], w2.shape[0]) @ w2  # (..., m, k)
    return jnp.einsum("...mk,ml->...lk", y, w1).reshape(*x.shape[:-1], -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Same(Leaf):
    """`w` as it is, an array or another leaf. It makes a call fail that is not `apply`'s, where one
    would go past what stands around modules (`AROUND`)."""

    w: object

    def linear(self, x):
        return linear(x, self.w)

    def affine(self, x, bias):
        return linear(x, self.w, bias)

    def embed(self, ids, dtype=None):
        return embed(ids, self.w, dtype)

    def attend(self, x):
        return attend(x, self.w)

    def convolve(self, module, x):
        return convolve(module, self.w, x)

    def dense(self, w, site):
        return w


class Stored(Leaf):
    """A frozen weight that is held in another form than an array. Subclasses have

    shape, dtype: of the kernel that it stands for, in its module's own shape.
    product(x, axis): x (..., n) times the kernel's axis `axis`, in x's dtype; no gradient to the
        weight. That of a linear kernel (in, out) or an embedding (V, features).
    rows(ids): the kernel's rows, (...,) integers -> (..., columns).
    decoded(): the kernel as an array.
    """

    def linear(self, x):
        return checkpoint_name(self.product(x, 0), PRODUCT)

    def embed(self, ids, dtype=None):
        rows = self.rows(ids)
        return rows if dtype is None else rows.astype(dtype)

    def attend(self, x):
        return self.product(x, 1)

    def dense(self, w, site):
        return w


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Half(Stored):
    """A frozen weight that multiplies in bfloat16 with float32 sums: y = bf16(x) @ w.

    w: bfloat16, (in, out), or an embedding (V, features), layer axes in front.
    """

    w: Array

    @property
    def shape(self):
        return self.w.shape

    @property
    def dtype(self):
        return self.w.dtype

    def product(self, x, axis: int):
        return half_product(x, self.w, axis)

    def rows(self, ids):
        return jnp.take(self.w, ids, axis=0)

    def decoded(self):
        return self.w


def is_operator(leaf) -> bool:
    """True for leaves that only the functions of this module can compute with."""
    return isinstance(leaf, Leaf)


def halve(params, sites: "Mapping[str, Site]"):
    """The same parameters, with `Half` leaves for the linear and embedding kernels of `sites`."""
    flat = tree.flatten(params)
    for path, site in sites.items():
        if site.kind in ("linear", "embed") and not isinstance(flat[path], Stored):
            flat[path] = Half(flat[path].astype(jnp.bfloat16))
    return tree.unflatten(flat)


def frozen(leaf):
    """The weight at the bottom of a leaf, an array or `Stored`, in its module's own shape."""
    while is_operator(leaf) and not isinstance(leaf, Stored):
        leaf = leaf.w
    return leaf


def allow_merge(params):
    """The same parameters, with `LowRank` leaves that may take the merged forward pass."""

    def allow(leaf):
        if isinstance(leaf, LowRank):
            return dataclasses.replace(leaf, merge=True)
        within = is_operator(leaf) and not isinstance(leaf, Stored)
        return dataclasses.replace(leaf, w=allow(leaf.w)) if within else leaf

    return jax.tree.map(allow, params, is_leaf=is_operator)


# ---------------------------------------------------------------------------------------- products


def linear(x, leaf, bias=None):
    """y = x @ dense(leaf) + bias, with dense(leaf) seen as (in, out).

    x: (..., in) in the compute dtype. Returns (..., out) in that dtype; the adapter's own dtype is
    cast to it. leaf: an (in, out) array or operator leaf.
    """
    return leaf.affine(x, bias) if is_operator(leaf) else add_bias(x @ leaf.astype(x.dtype), bias)


def matrix(leaf):
    """The (in, out) array that a linear layer's leaf stands for, in the dtype of its weight."""
    return dense(leaf, Site("linear", 0, (0,), (1,)))


def add_bias(y, bias):
    """y plus a bias over its last axes, or y where there is none."""
    if bias is None:
        return y
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def _over_last(y, g):
    """y times g over its last axis, in the wider of their dtypes: bfloat16 would round a g near 1
    to 1. Returns y's dtype."""
    wide = np.promote_types(y.dtype, g.dtype)
    g = g.astype(wide).reshape((1,) * (y.ndim - 1) + (-1,))
    return (y.astype(wide) * g).astype(y.dtype)


def _batched(x, m):
    """x[i] @ m[i]: (B, ..., in), (B, in, out) -> (B, ..., out)."""
    return jnp.einsum("b...i,bio->b...o", x, m)


@jax.custom_vjp
def merged_linear(x, w, a, b, s):
    """x @ (w + s a b): one product forward, thin ones for the gradients of a and b.

    x: (..., in); w: (in, out); a: (in, r); b: (r, out); s: (). The backward pass makes w + s a b
    again rather than keep it: da = x^T (s dy b^T), db = s (x a)^T dy, dx = dy (w + s a b)^T.
    """
    return x @ (w + s * (a @ b))


def _merged_linear_forward(x, w, a, b, s):
    # Not by `merged_linear`: a remat policy that keeps products would not see the one inside.
    return x @ (w + s * (a @ b)), (x, w, a, b, s)


def _merged_linear_backward(saved, dy):
    x, w, a, b, s = saved
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = dy @ (w + s * (a @ b)).T
    t = dy_rows @ b.T  # (rows, r)
    xa = rows @ a  # (rows, r)
    da = s * (rows.T @ t)
    db = s * (xa.T @ dy_rows)
    # Dead code, and so free, wherever w and s are frozen, which is where this is used.
    dw, ds = rows.T @ dy_rows, jnp.sum(xa * t)
    return dx, dw, da, db, ds


merged_linear.defvjp(_merged_linear_forward, _merged_linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def half_product(x, w, axis: int):
    """The product of x (..., n) with axis `axis` of a bfloat16 matrix w: operands in bfloat16, sums
    in float32, in both directions. Returns x's dtype. w gets no gradient."""
    dimensions = (((x.ndim - 1,), (axis,)), ((), ()))
    y = jax.lax.dot_general(
        x.astype(jnp.bfloat16), w, dimensions, preferred_element_type=jnp.float32
    )
    return y.astype(x.dtype)


half_product.defvjp(
    lambda x, w, axis: (half_product(x, w, axis), w),
    lambda axis, w, dy: (half_product(dy, w, 1 - axis), None),
)


def dropout(x, how: Dropout | None):
    """x with each entry zeroed at `how.rate` and the rest scaled by 1 / (1 - rate)."""
    if how is None:
        return x
    keep = jax.random.uniform(how.key, x.shape) >= how.rate
    return jnp.where(keep, x / (1 - how.rate).astype(x.dtype), jnp.zeros((), x.dtype))


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
    """What `module`, a `flax.linen.Conv` without bias, gives for x with dense(leaf) as kernel."""
    if is_operator(leaf):
        return leaf.convolve(module, x)
    return module.apply({"params": {"kernel": leaf}}, x)


def dense(leaf, site: "Site"):
    """The plain kernel that a leaf stands for, in the shape and dtype of its frozen weight.

    It is computed in float32 and rounded once. Raises ValueError for a leaf that is more than one
    kernel (`Mixed`, `Untied`, `Follow`).
    """
    return _wide(leaf, site).astype(frozen(leaf).dtype) if is_operator(leaf) else leaf


def _wide(leaf, site: "Site") -> Array:
    """`dense` in float32, or float64 where the weight is."""
    dtype = jnp.float64 if frozen(leaf).dtype == jnp.float64 else jnp.float32
    if not is_operator(leaf):
        return leaf.astype(dtype)
    w = leaf.decoded().astype(dtype) if isinstance(leaf, Stored) else _wide(leaf.w, site)
    return leaf.dense(w, site)


def column_squares(leaf, site: "Site") -> Array:
    """Squared Euclidean lengths of the columns of dense(leaf), (layers..., out) float32."""
    return jnp.sum(jnp.square(site.to_matrix(_wide(leaf, site))), axis=-2)


def column_norms(leaf: LowRank, site: "Site", squares=None) -> Array:
    """Euclidean lengths of the columns of w + s a b, (layers..., out) float32, without making a b:
    their squares are ||w||^2 + 2 s <a^T w, b> + s^2 <(a^T a) b, b>.

    squares: `column_squares` of w, where they are at hand.
    """
    squares = column_squares(leaf.w, site) if squares is None else squares

    def one(w, a, b, s, squares):
        a, b, s = (x.astype(squares.dtype) for x in (a, b, s))
        cross = jnp.sum(linear(a.T, w) * b, axis=0)
        own = jnp.sum(((a.T @ a) @ b) * b, axis=0)
        return jnp.sqrt(jnp.maximum(squares + 2 * s * cross + s * s * own, 0))

    for _ in range(site.stack):
        one = jax.vmap(one)
    return one(_as_matrix(leaf.w, site), leaf.a, leaf.b, leaf.s, squares)


def dora(leaf: LowRank, m, site: "Site", squares=None) -> Scaled:
    """DoRA (arXiv:2402.09353, equation 5): w + s a b with columns of length m (layers..., out).

    The lengths that m is divided by are constants to the gradient (section 4.3). A column that is
    zero stays zero. squares: `column_squares` of w, where they are at hand.
    """
    norms = jax.lax.stop_gradient(column_norms(leaf, site, squares))
    return Scaled(leaf, jnp.where(norms > 0, m / jnp.where(norms > 0, norms, 1), 1))


# ------------------------------------------------------------------------------------------- sites


class Site(NamedTuple):
    """What the axes of one kernel mean, layer axes not counted.

    kind: "linear", "conv" or "embed". stack: number of leading layer axes (`nn.scan`).
    ins, outs: kernel axes that are contracted with the input, and that the layer produces.
    """

    kind: str
    stack: int
    ins: tuple[int, ...]
    outs: tuple[int, ...]

    def matrix_shape(self, shape) -> tuple[tuple[int, ...], int, int]:
        """(layer axes, in, out) of a kernel of the given full shape."""
        own = shape[self.stack :]
        size = lambda axes: int(np.prod([own[i] for i in axes], dtype=np.int64))
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


def sites(module: nn.Module, params: dict, *inputs, **kwargs) -> dict[str, Site]:
    """{path: Site} of every kernel that `apply` knows how to adapt, found by tracing one call.

    params: as for `apply`. Nothing is computed: the call runs under `jax.eval_shape`. Layers with
    batch axes in their kernel (`DenseGeneral.batch_dims`, expert einsums) and grouped convolutions
    are left out.
    """
    shapes = {path: leaf.shape for path, leaf in tree.flatten(inner(params)).items()}
    found: dict[str, Site] = {}

    def record(next_fun, args, call_kwargs, context):
        rule = _rule(context)
        if rule is not None:
            name = "embedding" if isinstance(context.module, nn.Embed) else "kernel"
            axes = rule.axes(context.module, *args, **call_kwargs)
            path = "/".join((*context.module.path, name))
            if axes is not None and path in shapes:
                own = context.module.get_variable("params", name)
                found[path] = Site(rule.kind, len(shapes[path]) - own.ndim, *axes)
        return next_fun(*args, **call_kwargs)

    def trace(params, *inputs):
        with nn.intercept_methods(record):
            return module.apply({"params": params}, *inputs, **kwargs)

    jax.eval_shape(trace, params, *inputs)
    return found


def sites_from_shapes(params: dict) -> dict[str, Site]:
    """{path: Site} by the rule that holds for every model in `lorax.models`.

    A kernel of two axes is (in, out), of three (layers, in, out), an embedding is (V, features).
    For other models, whose kernels may have head or window axes, trace them with `sites`.
    """
    found = {}
    for path, leaf in tree.flatten(inner(params)).items():
        name, ndim = path.rsplit("/", 1)[-1], len(leaf.shape)
        if name == "kernel" and ndim in (2, 3):
            found[path] = Site("linear", ndim - 2, (0,), (1,))
        elif name == "embedding" and ndim == 2:
            found[path] = Site("embed", 0, (0,), (1,))
    return found


# ------------------------------------------------------------------------------------- interceptor


def apply(module: nn.Module, params: dict, *inputs, **kwargs):
    """`module.apply` on parameters whose leaves may be operators.

    params: the "params" collection itself. Other keywords go to `module.apply`: `method`, `rngs`.
    Raises ValueError for parameters with a leaf that the module has no use for: virtual tokens of a
    model that is not of `lorax.models`.
    """
    params = inner(params)
    with interceptor():
        return module.apply({"params": params}, *inputs, **kwargs)


def inner(params: dict) -> dict:
    """The same. Raises ValueError for {"params": ...}, as `module.init` returns it."""
    if {*params} == {"params"}:
        raise ValueError(
            'params: {"params": ...} given, must be the tree inside: variables["params"]'
        )
    return params


def interceptor() -> contextlib.AbstractContextManager:
    """Context in which Linen layers compute with operator leaves; for calls that need their own
    `module.apply` (mutable collections, several methods)."""
    return nn.intercept_methods(functools.partial(_intercept, set()))


#: Name of a leaf that stands beside a module's parameters and takes a call of it over. It has
#: `method`, the name of what it takes over, and is called as leaf(module, call, *args, **kwargs),
#: where call(*args, **kwargs) is what the module would have given, operator leaves included.
AROUND = "around"


def _intercept(called: set, next_fun, args, kwargs, context):
    """called: paths of the modules whose `AROUND` leaf has been."""
    call = functools.partial(_computed, next_fun, context)
    module = context.module
    if module.scope is None or not module.has_variable("params", AROUND):
        return call(*args, **kwargs)
    leaf = module.get_variable("params", AROUND)
    if leaf.method == context.method_name:
        called.add(module.path)
        y = leaf(module, call, *args, **kwargs)
    else:
        y = call(*args, **kwargs)
    last = context.method_name in ("__call__", leaf.method) or not hasattr(module, leaf.method)
    if last and not module.path:
        _check_called(module, called)
    return y


def _check_called(module: nn.Module, called: set) -> None:
    """ValueError where a model has gone past a leaf that should have taken a call over."""
    for path in tree.flatten(module.variables["params"]):
        *parent, name = path.split("/")
        if name == AROUND and tuple(parent) not in called:
            raise ValueError(
                f"method.name: {type(module).__name__} makes no call that virtual tokens could go "
                f"into at {'/'.join(parent) or 'its `hidden`'}; causal models and BERT of "
                "lorax.models do"
            )


def _computed(next_fun, context, *args, **kwargs):
    """What a layer gives: by its rule where its kernel is an operator leaf, else its own call."""
    rule = _rule(context)
    if rule is None:
        return next_fun(*args, **kwargs)
    module = context.module
    name = "embedding" if isinstance(module, nn.Embed) else "kernel"
    leaf = module.get_variable("params", name)
    if not is_operator(leaf):
        return next_fun(*args, **kwargs)
    leaf = leaf.w if isinstance(leaf, Same) else leaf
    bias = module.get_variable("params", "bias") if getattr(module, "use_bias", False) else None
    return rule.call(module, leaf, bias, *args, **kwargs)


class _Rule(NamedTuple):
    """How one kind of layer call is understood: its Site's axes, and its product with a leaf."""

    kind: str
    axes: Callable  # (module, *args) -> (ins, outs) or None where it can't be adapted
    call: Callable  # (module, leaf, bias, *args) -> y


def _rule(context) -> _Rule | None:
    for (layer, method), rule in _RULES.items():
        if isinstance(context.module, layer) and context.method_name == method:
            return rule
    return None


def _compute_dtype(module, x, leaf):
    """What Flax's promote_dtype would choose for the input and the frozen weight."""
    return module.dtype or jnp.promote_types(x.dtype, frozen(leaf).dtype)


def _dense(module, leaf, bias, x):
    return linear(x.astype(_compute_dtype(module, x, leaf)), leaf, bias)


def _as_matrix(leaf, site: Site):
    """The leaf with the weight at its bottom as (in, out)."""
    if is_operator(leaf) and hasattr(leaf, "w"):
        return dataclasses.replace(leaf, w=_as_matrix(leaf.w, site))
    if isinstance(leaf, Stored):  # a matrix already
        return leaf
    return site.to_matrix(leaf)


def _canonical(axis, ndim) -> tuple[int, ...]:
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    return tuple(sorted(i % ndim for i in axes))


def _dense_general_axes(module, x):
    if module.batch_dims:
        return None
    n_in, n_out = len(_canonical(module.axis, x.ndim)), len(np.atleast_1d(module.features))
    return tuple(range(n_in)), tuple(range(n_in, n_in + n_out))


def _dense_general(module, leaf, bias, x):
    axes = _canonical(module.axis, x.ndim)
    ins, outs = _dense_general_axes(module, x)
    features = frozen(leaf).shape[len(ins) :]
    x = jnp.moveaxis(x, axes, tuple(range(-len(axes), 0)))  # (..., *in)
    x = x.reshape(*x.shape[: x.ndim - len(axes)], -1).astype(_compute_dtype(module, x, leaf))
    bias = None if bias is None else bias.reshape(-1)
    y = linear(x, _as_matrix(leaf, Site("linear", 0, ins, outs)), bias)
    return y.reshape(*y.shape[:-1], *features)


def _einsum_letters(module, x, einsum_str):
    """Letters of input, kernel and output, with '...' spelt out."""
    text = (einsum_str or module.einsum_str).replace(" ", "")
    operands, out = text.split("->")
    left, kernel = operands.split(",")
    extra = "".join(c for c in "zyxwvutsrqponm" if c not in text)[: x.ndim - len(left) + 3]
    extra = extra if "..." in left else ""
    return left.replace("...", extra), kernel, out.replace("...", extra)


def _einsum_axes(module, x, einsum_str=None):
    left, kernel, out = _einsum_letters(module, x, einsum_str)
    letters = left + kernel + out
    if any(letters.count(c) != 2 for c in letters):
        return None  # a batch axis in the kernel (one matrix an index), or a sum over one operand
    ins = tuple(i for i, c in enumerate(kernel) if c in left)
    return ins, tuple(i for i, c in enumerate(kernel) if c in out)


def _einsum(module, leaf, bias, x, einsum_str=None):
    if bias is not None and type(leaf).affine is not Leaf.affine:
        raise ValueError(f"an einsum with a bias and a {type(leaf).__name__} leaf is not supported")
    left, kernel, out = _einsum_letters(module, x, einsum_str)
    ins, outs = _einsum_axes(module, x, einsum_str)
    free = [c for c in left if c not in kernel]
    order = [left.index(c) for c in free] + [left.index(kernel[i]) for i in ins]
    sizes = tuple(x.shape[left.index(c)] for c in free)
    x = jnp.transpose(x, order).reshape(*sizes, -1).astype(_compute_dtype(module, x, leaf))
    y = linear(x, _as_matrix(leaf, Site("linear", 0, ins, outs)))
    shape = frozen(leaf).shape
    y = y.reshape(*sizes, *(shape[i] for i in outs))
    have = free + [kernel[i] for i in outs]
    y = jnp.transpose(y, [have.index(c) for c in out])
    if bias is None:
        return y
    like_y = [shape[kernel.index(c)] if c in kernel else 1 for c in out]
    return y + bias.astype(y.dtype).reshape(like_y)


def _embed(module, leaf, bias, ids):
    return embed(ids, leaf, module.dtype)


def _attend(module, leaf, bias, x):
    return attend(x.astype(_compute_dtype(module, x, leaf)), leaf)


def _conv_axes(module, x):
    if module.feature_group_count != 1:
        return None
    n = np.size(module.kernel_size)  # an int is one axis
    return tuple(range(n + 1)), (n + 1,)


def _conv(module, leaf, bias, x):
    return add_bias(convolve(module.clone(parent=None, use_bias=False), leaf, x), bias)


_RULES = {
    (nn.Dense, "__call__"): _Rule("linear", lambda module, x: ((0,), (1,)), _dense),
    (nn.DenseGeneral, "__call__"): _Rule("linear", _dense_general_axes, _dense_general),
    (nn.Einsum, "__call__"): _Rule("linear", _einsum_axes, _einsum),
    (nn.Embed, "__call__"): _Rule("embed", lambda module, ids: ((0,), (1,)), _embed),
    (nn.Embed, "attend"): _Rule("embed", lambda module, x: ((0,), (1,)), _attend),
    (nn.Conv, "__call__"): _Rule("conv", _conv_axes, _conv),
}
