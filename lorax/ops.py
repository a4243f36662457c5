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
    """Base of what stands where a kernel was, and is none to Flax."""

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Scaled(Leaf):
    """A weight whose output columns are scaled: dense(leaf) = dense(w) * g; a bias is not scaled.

    w: a kernel or another operator leaf. g: (out,) float32, layer axes in front.
    """

    w: object
    g: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ScaledInput(Leaf):
    """A weight whose input rows are scaled: dense(leaf) = g[:, None] * dense(w).

    w: a kernel, no convolution's, or another operator leaf. g: (in,) float32, layer axes in front.
    """

    w: object
    g: Array


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Untied(Leaf):
    """An embedding (V, features) that looks tokens up in `w` and reads out with `head`, where an
    update of one of the two is none of the other. Both are arrays or operator leaves."""

    w: object
    head: object


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


class Stored(Leaf):
    """A frozen weight that is held in another form than an array. Subclasses have

    shape, dtype: of the kernel that it stands for, in its module's own shape.
    product(x, axis): x (..., n) times the kernel's axis `axis`, in x's dtype; no gradient to the
        weight. That of a linear kernel (in, out) or an embedding (V, features).
    rows(ids): the kernel's rows, (...,) integers -> (..., columns).
    decoded(): the kernel as an array.
    """


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
    """The same parameters, with leaves that may take the merged forward pass (see `linear`)."""

    def allow(leaf):
        if isinstance(leaf, Scaled | ScaledInput | Follow):
            return dataclasses.replace(leaf, w=allow(leaf.w))
        return dataclasses.replace(leaf, merge=True) if isinstance(leaf, LowRank) else leaf

    return jax.tree.map(allow, params, is_leaf=is_operator)


# ---------------------------------------------------------------------------------------- products


def linear(x, leaf, bias=None):
    """y = x @ dense(leaf) + bias, with dense(leaf) seen as (in, out).

    x: (..., in) in the compute dtype. Returns (..., out) in that dtype; the adapter's own dtype is
    cast to it. leaf: an (in, out) array or operator leaf.

    A `LowRank` leaf takes one of two ways that agree to rounding: x w + s (x a) b, or, where that
    costs more than making w + s a b and the leaf allows it, the merged product with a factored
    backward pass. Merging is for float32 only: in bfloat16 it would round small updates away.
    """
    if isinstance(leaf, LowRank):
        y = _low_rank_linear(x, leaf)
    elif isinstance(leaf, Kronecker):
        w1, w2, s = (t.astype(x.dtype) for t in (leaf.w1, leaf.w2, leaf.s))
        y = linear(x, leaf.w) + s * kron_product(dropout(x, leaf.dropout), w1, w2)
    elif isinstance(leaf, Scaled):
        y = _over_last(linear(x, leaf.w), leaf.g)
    elif isinstance(leaf, ScaledInput):
        y = linear(_over_last(x, leaf.g), leaf.w)
    elif isinstance(leaf, Follow):
        y = linear(x, leaf.w, bias)
        return y + linear(leaf.f(linear(y, leaf.down, leaf.down_bias)), leaf.up, leaf.up_bias)
    elif isinstance(leaf, Mixed):
        a, b, s = _chosen(leaf, x)
        y = linear(x, leaf.w) + s * _batched(_batched(x, a), b)
    elif isinstance(leaf, Stored):
        y = checkpoint_name(leaf.product(x, 0), PRODUCT)
    else:
        y = x @ leaf.astype(x.dtype)
    return _add_bias(y, bias)


def _add_bias(y, bias):
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


def _chosen(leaf: Mixed, x):
    """Each row's own factors in x's dtype: a (B, in, r), b (B, r, out), s (B, 1...) like x."""
    if x.shape[0] != leaf.rows.shape[0]:
        raise ValueError(f"a batch of {x.shape[0]} rows, but adapters for {leaf.rows.shape[0]}")
    a, b, s = (jnp.take(t, leaf.rows, axis=0).astype(x.dtype) for t in (leaf.a, leaf.b, leaf.s))
    return a, b, s.reshape((-1,) + (1,) * (x.ndim - 1))


def _batched(x, m):
    """x[i] @ m[i]: (B, ..., in), (B, in, out) -> (B, ..., out)."""
    return jnp.einsum("b...i,bio->b...o", x, m)


def _low_rank_linear(x, leaf):
    a, b = leaf.a.astype(x.dtype), leaf.b.astype(x.dtype)
    s = leaf.s.astype(x.dtype)
    rows, n_in, n_out = x.size // x.shape[-1], a.shape[0], b.shape[-1]
    worthwhile = rows * (n_in + n_out) > 2 * n_in * n_out
    plain = isinstance(leaf.w, jax.Array) and leaf.dropout is None and x.dtype == jnp.float32
    if leaf.merge and plain and worthwhile:
        return merged_linear(x, leaf.w.astype(x.dtype), a, b, s)
    return linear(x, leaf.w) + s * ((dropout(x, leaf.dropout) @ a) @ b)


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
    if isinstance(leaf, LowRank):
        rows = embed(ids, leaf.w, dtype)
        a, b = leaf.a.astype(rows.dtype), leaf.b.astype(rows.dtype)
        return rows + leaf.s.astype(rows.dtype) * (jnp.take(a, ids, axis=0) @ b)
    if isinstance(leaf, Kronecker):
        rows = embed(ids, leaf.w, dtype)
        w1, w2, s = (t.astype(rows.dtype) for t in (leaf.w1, leaf.w2, leaf.s))
        first, second = jnp.take(w1, ids // len(w2), axis=0), jnp.take(w2, ids % len(w2), axis=0)
        return rows + s * (first[..., :, None] * second[..., None, :]).reshape(rows.shape)
    if isinstance(leaf, Scaled):
        return _over_last(embed(ids, leaf.w, dtype), leaf.g)
    if isinstance(leaf, ScaledInput | Follow):
        raise _no_embedding(leaf)
    if isinstance(leaf, Mixed):
        rows = embed(ids, leaf.w, dtype)  # (B or 1, ..., features): positions are the same for all
        rows = jnp.broadcast_to(rows, (leaf.rows.shape[0], *rows.shape[1:]))
        _, b, s = _chosen(leaf, rows)
        own = jnp.broadcast_to(ids, (rows.shape[0], *ids.shape[1:]))
        a = leaf.a[leaf.rows.reshape((-1,) + (1,) * (ids.ndim - 1)), own].astype(rows.dtype)
        return rows + s * _batched(a, b)
    if isinstance(leaf, Untied):
        return embed(ids, leaf.w, dtype)
    rows = leaf.rows(ids) if isinstance(leaf, Stored) else jnp.take(leaf, ids, axis=0)
    return rows if dtype is None else rows.astype(dtype)


def attend(x, leaf):
    """x @ dense(leaf)^T for an embedding leaf (V, features): (..., features) -> (..., V)."""
    if isinstance(leaf, LowRank):
        a, b = leaf.a.astype(x.dtype), leaf.b.astype(x.dtype)
        return attend(x, leaf.w) + leaf.s.astype(x.dtype) * ((x @ b.T) @ a.T)
    if isinstance(leaf, Kronecker):
        w1, w2, s = (t.astype(x.dtype) for t in (leaf.w1, leaf.w2, leaf.s))
        return attend(x, leaf.w) + s * kron_product(x, w1.T, w2.T)
    if isinstance(leaf, Scaled):
        return attend(_over_last(x, leaf.g), leaf.w)
    if isinstance(leaf, ScaledInput | Follow):
        raise _no_embedding(leaf)
    if isinstance(leaf, Mixed):
        a, b, s = _chosen(leaf, x)
        turned = lambda m: jnp.swapaxes(m, 1, 2)
        return attend(x, leaf.w) + s * _batched(_batched(x, turned(b)), turned(a))
    if isinstance(leaf, Untied):
        return attend(x, leaf.head)
    if isinstance(leaf, Stored):
        return leaf.product(x, 1)
    return x @ leaf.astype(x.dtype).T


def _no_embedding(leaf) -> ValueError:
    return ValueError(f"an embedding with a {type(leaf).__name__} leaf is not supported")


def dense(leaf, site: "Site"):
    """The plain kernel that a leaf stands for, in the shape and dtype of its frozen weight.

    It is computed in float32 and rounded once. Raises ValueError for a leaf that is more than one
    kernel (`Mixed`, `Untied`, `Follow`).
    """
    return _wide(leaf, site).astype(frozen(leaf).dtype) if is_operator(leaf) else leaf


def _wide(leaf, site: "Site") -> Array:
    """`dense` in float32, or float64 where the weight is."""
    dtype = jnp.float64 if frozen(leaf).dtype == jnp.float64 else jnp.float32
    wide = lambda x: x.astype(dtype)
    if not is_operator(leaf):
        return wide(leaf)
    if isinstance(leaf, Stored):
        return wide(leaf.decoded())
    if isinstance(leaf, Mixed | Untied | Follow):
        raise ValueError(f"a {type(leaf).__name__} leaf is no single kernel")
    w = _wide(leaf.w, site)
    if isinstance(leaf, Same):
        return w
    if isinstance(leaf, Scaled):
        g = wide(leaf.g[..., None, :])
        return site.from_matrix(site.to_matrix(w) * g, w.shape)
    if isinstance(leaf, ScaledInput):
        g = wide(leaf.g[..., None])
        return site.from_matrix(site.to_matrix(w) * g, w.shape)
    if isinstance(leaf, Kronecker):
        w1, w2, s = (wide(t) for t in (leaf.w1, leaf.w2, leaf.s))
        return w + site.from_matrix(s[..., None, None] * kron(w1, w2), w.shape)
    update = wide(leaf.s[..., None, None]) * jnp.matmul(wide(leaf.a), wide(leaf.b))
    return w + site.from_matrix(update, w.shape)


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
    if isinstance(leaf, Follow) and bias is not None:
        raise ValueError("an einsum with a bias and a Follow leaf is not supported")
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
    return _add_bias(_convolve(module.clone(parent=None, use_bias=False), leaf, x), bias)


def _convolve(module, leaf, x):
    """conv(x, w) + s conv(x, a) b: a as a kernel with r output channels, b a 1 x 1 convolution."""
    if isinstance(leaf, Scaled):
        return _over_last(_convolve(module, leaf.w, x), leaf.g)
    if not is_operator(leaf):
        return module.apply({"params": {"kernel": leaf}}, x)
    if not isinstance(leaf, LowRank):
        raise ValueError(f"a convolution with a {type(leaf).__name__} leaf is not supported")
    y = _convolve(module, leaf.w, x)
    down = module.clone(features=leaf.a.shape[-1])
    a = leaf.a.astype(y.dtype).reshape(*frozen(leaf).shape[:-1], -1)
    z = down.apply({"params": {"kernel": a}}, dropout(x, leaf.dropout))
    return y + leaf.s.astype(y.dtype) * (z @ leaf.b.astype(y.dtype))


_RULES = {
    (nn.Dense, "__call__"): _Rule("linear", lambda module, x: ((0,), (1,)), _dense),
    (nn.DenseGeneral, "__call__"): _Rule("linear", _dense_general_axes, _dense_general),
    (nn.Einsum, "__call__"): _Rule("linear", _einsum_axes, _einsum),
    (nn.Embed, "__call__"): _Rule("embed", lambda module, ids: ((0,), (1,)), _embed),
    (nn.Embed, "attend"): _Rule("embed", lambda module, x: ((0,), (1,)), _attend),
    (nn.Conv, "__call__"): _Rule("conv", _conv_axes, _conv),
}
