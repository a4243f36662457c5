"""The operator leaves of lorax's own methods and frozen weights; see `lorax.ops.Leaf`.

A leaf that only one method has may be in that method's file.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lorax import divided, grouped, tree
from lorax.grouped import PRODUCT
from lorax.ops import (
    EXPERTS,
    Leaf,
    Site,
    as_matrix,
    attend,
    column_squares,
    convolve,
    dense,
    embed,
    frozen,
    is_operator,
    linear,
    matrix,
    on_frozen,
    over_layers,
    ragged,
    wide,
)

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Inverted dropout of an adapter's input: rate () float32, key () typed PRNG key."""

    rate: Array
    key: Array


def dropout(x, settings: Dropout | None):
    """x with each entry zeroed with probability `rate` and the rest divided by 1 - rate."""
    if settings is None:
        return x
    keep = jax.random.uniform(settings.key, x.shape) >= settings.rate
    return jnp.where(keep, x / (1 - settings.rate).astype(x.dtype), jnp.zeros((), x.dtype))


def ragged_dropout(x, settings: Dropout | None):
    """`dropout` of rows of several experts, which share the rate: by the first one's key."""
    if settings is None:
        return x
    return dropout(x, Dropout(settings.rate[0], settings.key[0]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(Leaf):
    """A frozen weight plus a low-rank update: dense(leaf) = w + s * reshape(a @ b, w.shape).

    w: the kernel in its module's own shape, an array or another operator leaf.
    a: (in, r) and b: (r, out) in the adapter's dtype; `in` and `out` are the products of the
       kernel's contracted and produced axes, in kernel order.
    s: () float32, the scale. dropout: on the input of `a`, None at evaluation.
    merge: (static) whether a forward pass may compute w + s a b instead of two thin products.
    In a module under `nn.scan`, every array has the kernel's layer axes first.
    """

    w: object
    a: Array
    b: Array
    s: Array
    dropout: Dropout | None = None
    merge: bool = dataclasses.field(default=False, metadata={"static": True})

    def linear(self, x):
        """x w + s (x a) b, or x (w + s a b) with a factored backward pass if that is cheaper and
        `merge` allows it. The two agree up to rounding. Only float32 is merged: bfloat16 would
        round small updates away."""
        a, b, s = (t.astype(x.dtype) for t in (self.a, self.b, self.s))
        rows, n_in, n_out = x.size // x.shape[-1], a.shape[0], b.shape[-1]
        worthwhile = rows * (n_in + n_out) > 2 * n_in * n_out
        plain = isinstance(self.w, jax.Array) and self.dropout is None and x.dtype == jnp.float32
        if self.merge and plain and worthwhile:
            return merged_linear(x, self.w.astype(x.dtype), a, b, s)
        return linear(x, self.w) + s * out_of_rank(dropout(x, self.dropout) @ a, b)

    def ragged(self, x, sizes):
        a, b, s = (t.astype(x.dtype) for t in (self.a, self.b, self.s))
        ins, outs = axes_of(self.w)
        z = grouped.product(ragged_dropout(x, self.dropout), a, sizes, (ins, None))
        update = grouped.product(z, s[:, None, None] * b, sizes, (None, outs))
        return ragged(x, self.w, sizes) + update

    def embed(self, ids, dtype=None):
        rows = embed(ids, self.w, dtype)
        a, b = self.a.astype(rows.dtype), self.b.astype(rows.dtype)
        return rows + self.s.astype(rows.dtype) * (jnp.take(a, ids, axis=0) @ b)

    def attend(self, x):
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        return attend(x, self.w) + self.s.astype(x.dtype) * out_of_rank(x @ b.T, a.T)

    def convolve(self, module, x):
        """conv(x, w) + s conv(x, a) b: a as a kernel with r output channels, b as a 1 x 1 one."""
        y = convolve(module, self.w, x)
        down = module.clone(features=self.a.shape[-1])
        a = self.a.astype(y.dtype).reshape(*frozen(self).shape[:-1], -1)
        z = down.apply({"params": {"kernel": a}}, dropout(x, self.dropout))
        return y + self.s.astype(y.dtype) * out_of_rank(z, self.b.astype(y.dtype))

    def dense(self, w, site):
        a, b, s = (t.astype(w.dtype) for t in (self.a, self.b, self.s))
        return w + site.from_matrix(s[..., None, None] * jnp.matmul(a, b), w.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Scaled(Leaf):
    """A weight whose output columns are scaled: dense(leaf) = dense(w) * g; a bias is not scaled.

    w: a kernel or another operator leaf. g: (out,) float32, layer axes first.
    """

    w: object
    g: Array

    def linear(self, x):
        return _over_last(linear(x, self.w), self.g)

    def ragged(self, x, sizes):
        return _over_last(ragged(x, self.w, sizes), grouped.of_rows(self.g, sizes, len(x)))

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

    w: a kernel, but not a convolution's, or another operator leaf. g: (in,) float32, layer axes
    first.
    """

    w: object
    g: Array

    def linear(self, x):
        return linear(_over_last(x, self.g), self.w)

    def ragged(self, x, sizes):
        return ragged(_over_last(x, grouped.of_rows(self.g, sizes, len(x))), self.w, sizes)

    def dense(self, w, site):
        g = self.g[..., None].astype(w.dtype)
        return site.from_matrix(site.to_matrix(w) * g, w.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Bottleneck(Leaf):
    """A weight followed by a bottleneck adapter, which reads the layer's output including its bias:
    h = x w + bias, y = h + f(h down + down_bias) up + up_bias. There is no equivalent kernel.

    w: a linear layer's kernel or another operator leaf. down: (out, m), down_bias: (m,),
    up: (m, out), up_bias: (out,), each with the layer axes first. f: (static) elementwise.
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
    """A frozen weight with n low-rank updates; row i of a batch uses update rows[i]:
    y[i] = x[i] w + s[rows[i]] (x[i] a[rows[i]]) b[rows[i]].

    w: a kernel or another operator leaf. a: (n, in, r), b: (n, r, out), s: (n,) float32, rows: (B,)
    int32, each with the layer axes first (rows repeated). B is the first axis of the layer's input.
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
        ids = jnp.broadcast_to(ids, (rows.shape[0], *ids.shape[1:]))
        a = self.a[self.rows.reshape((-1,) + (1,) * (ids.ndim - 1)), ids].astype(rows.dtype)
        return rows + s * _batched(a, b)

    def attend(self, x):
        a, b, s = self._chosen(x)
        transposed = lambda m: jnp.swapaxes(m, 1, 2)
        return attend(x, self.w) + s * _batched(_batched(x, transposed(b)), transposed(a))

    def _chosen(self, x):
        """Each row's factors in x's dtype: a (B, in, r), b (B, r, out), s (B, 1...) like x."""
        if x.shape[0] != self.rows.shape[0]:
            raise ValueError(f"a batch of {x.shape[0]} rows, but adapters for {self.rows.shape[0]}")
        a, b, s = (jnp.take(t, self.rows, axis=0).astype(x.dtype) for t in (self.a, self.b, self.s))
        return a, b, s.reshape((-1,) + (1,) * (x.ndim - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Untied(Leaf):
    """An embedding (V, features) that looks tokens up in `w` and computes logits with `head`, so
    that an update of one does not change the other. Both are arrays or operator leaves."""

    w: object
    head: object

    def embed(self, ids, dtype=None):
        return embed(ids, self.w, dtype)

    def attend(self, x):
        return attend(x, self.head)

    def on_frozen(self, function):
        w, head = (on_frozen(x, function) for x in (self.w, self.head))
        return Untied(w, head)


class Added(Leaf):
    """A frozen weight plus an update: dense(leaf) = w + dW. Subclasses have a method
    delta(w, site): dW of all layers in the shape and dtype of w, the kernel that `self.w`
    represents."""

    def dense(self, w, site):
        return w + self.delta(w, site)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Kronecker(Added):
    """A frozen weight plus a Kronecker product: dense(leaf) = w + s * reshape(kron(w1, w2)).

    w: a kernel or another operator leaf. w1: (m, l), w2: (n, k) with in = m n and out = l k.
    s: () float32. dropout: on the input of the product. Each has the layer axes first.
    """

    w: object
    w1: Array
    w2: Array
    s: Array
    dropout: Dropout | None = None

    def linear(self, x):
        w1, w2, s = self._as(x.dtype)
        return linear(x, self.w) + s * kron_product(dropout(x, self.dropout), w1, w2)

    def ragged(self, x, sizes):  # kron(w1, w2) of all experts
        w1, w2, s = self._as(x.dtype)
        update = s[:, None, None] * kron(w1, w2)
        x_update = ragged_dropout(x, self.dropout)
        return ragged(x, self.w, sizes) + grouped.product(x_update, update, sizes)

    def embed(self, ids, dtype=None):
        rows = embed(ids, self.w, dtype)
        w1, w2, s = self._as(rows.dtype)
        first, second = jnp.take(w1, ids // len(w2), axis=0), jnp.take(w2, ids % len(w2), axis=0)
        return rows + s * (first[..., :, None] * second[..., None, :]).reshape(rows.shape)

    def attend(self, x):
        w1, w2, s = self._as(x.dtype)
        return attend(x, self.w) + s * kron_product(x, w1.T, w2.T)

    def delta(self, w, site):
        w1, w2, s = self._as(w.dtype)
        return site.from_matrix(s[..., None, None] * kron(w1, w2), w.shape)

    def _as(self, dtype):
        return self.w1.astype(dtype), self.w2.astype(dtype), self.s.astype(dtype)


def kron(w1, w2):
    """(..., m, l), (..., n, k) -> (..., m n, l k): blocks w1[i, j] w2."""
    blocks = jnp.einsum("...ml,...nk->...mnlk", w1, w2)
    return blocks.reshape(*w1.shape[:-2], w1.shape[-2] * w2.shape[-2], -1)


def kron_product(x, w1, w2):
    """x @ kron(w1, w2) without the Kronecker product: (..., m n), (m, l), (n, k) -> (..., l k)."""
    y = x.reshape(*x.shape[:-1], w1.shape[0], w2.shape[0]) @ w2  # (..., m, k)
    return jnp.einsum("...mk,ml->...lk", y, w1).reshape(*x.shape[:-1], -1)


class Updated(Added):
    """A frozen weight plus an update that is computed whole: dense(leaf) = w + dW.

    Subclasses are dataclasses with the fields w, a kernel or another operator leaf, and dropout, on
    the update's input (None at evaluation), and with a method
    update(w): dW of one layer, (in, out), from the layer's matrix w and in its dtype.
    The backward pass computes dW again: otherwise a scan over layers would keep one for each layer.
    """

    def linear(self, x):
        return jax.checkpoint(_updated_linear)(self, x)

    def ragged(self, x, sizes):
        update = self.delta(dense(self.w, EXPERTS).astype(x.dtype), EXPERTS)
        x_update = ragged_dropout(x, self.dropout)
        return ragged(x, self.w, sizes) + grouped.product(x_update, update, sizes)

    def embed(self, ids, dtype=None):
        rows = embed(ids, self.w, dtype)
        return rows + jnp.take(self.update(matrix(self.w).astype(rows.dtype)), ids, axis=0)

    def attend(self, x):
        return attend(x, self.w) + x @ self.update(matrix(self.w).astype(x.dtype)).T

    def convolve(self, module, x):
        ndim = len(frozen(self).shape)
        site = Site("conv", 0, tuple(range(ndim - 1)), (ndim - 1,))
        kernel = {"kernel": self.delta(wide(self.w, site), site)}
        update = module.apply({"params": kernel}, dropout(x, self.dropout))
        return convolve(module, self.w, x) + update

    def delta(self, w, site):
        update = over_layers(lambda leaf, w: leaf.update(w), site.stack)
        arrays = dataclasses.replace(self, w=None, dropout=None)
        return site.from_matrix(update(arrays, site.to_matrix(w)), w.shape)


def _updated_linear(leaf: Updated, x):
    """x w + dropout(x) dW; x (w + dW) in float32 without dropout. bfloat16 would round a small
    update away in the sum."""
    w = matrix(leaf.w).astype(x.dtype)
    if leaf.dropout is None and x.dtype != jnp.bfloat16:
        return x @ (w + leaf.update(w))
    return linear(x, leaf.w) + dropout(x, leaf.dropout) @ leaf.update(w)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Same(Leaf):
    """`w` unchanged, an array or another leaf. It makes a plain `module.apply` fail, which would
    ignore the leaves around modules (`lorax.intercept.AROUND`)."""

    w: object

    def linear(self, x):
        return linear(x, self.w)

    def affine(self, x, bias):
        return linear(x, self.w, bias)

    def ragged(self, x, sizes):
        return ragged(x, self.w, sizes)

    def embed(self, ids, dtype=None):
        return embed(ids, self.w, dtype)

    def attend(self, x):
        return attend(x, self.w)

    def convolve(self, module, x):
        return convolve(module, self.w, x)

    def dense(self, w, site):
        return w


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Divided(Leaf):
    """A plain kernel while a layer computes with it that a mesh divides (`lorax.divided`).

    w: (in, out), an embedding (V, features), or experts' (E, in, out). by: (static) axes of the
    mesh that divide its last two axes.
    """

    w: Array
    by: tuple[str, str] = dataclasses.field(metadata={"static": True})

    def linear(self, x):
        return checkpoint_name(divided.product(x, self.w, self.by, 0), PRODUCT)

    def ragged(self, x, sizes):
        return grouped.product(x, self.w.astype(x.dtype), sizes, self.by)

    def embed(self, ids, dtype=None):
        rows = divided.rows(self.w, ids)
        return rows if dtype is None else rows.astype(dtype)

    def attend(self, x):
        return divided.product(x, self.w, self.by, 1)

    def plain(self, site, dtype):
        return self.w.astype(dtype)


def axes_of(leaf) -> tuple[str | None, str | None]:
    """Axes of the mesh that divide (inputs, outputs) of the weight at a leaf's bottom."""
    while not hasattr(leaf, "by"):
        if not is_operator(leaf):
            return None, None
        leaf = leaf.w
    return leaf.by


class FrozenWeight(Leaf):
    """A frozen weight that is not stored as an array of its values. Subclasses have

    shape, dtype: of the kernel that it represents, in its module's own shape.
    product(x, axis): the product of x (..., n) with axis `axis` of a linear kernel (in, out) or an
        embedding (V, features), in x's dtype, without a gradient for the weight.
    rows(ids): the kernel's rows, (...,) integers -> (..., columns).
    decoded(): the kernel as an array.
    by: axes of a mesh that divide a linear kernel's (inputs, outputs).
    tensor_parts(): for experts that a mesh divides, (a leaf of the part that a device has once it
        has gathered those along "fsdp", but with the whole arrays, how they are divided, which of
        the kernel's inputs and outputs are divided over "tensor" as (axis or None, axis or None)).
    specs(by, sizes): the leaf with a `PartitionSpec` for each array (`lorax.sharding`). by: axes of
        the mesh for the kernel's (inputs, outputs). sizes: {axis of the mesh: devices}.
    """

    by = divided.LINEAR

    def linear(self, x):
        return checkpoint_name(self.product(x, 0), PRODUCT)

    def ragged(self, x, sizes):  # of the experts that have rows, each is decoded
        return grouped.product(x, self, sizes, self.by)

    def embed(self, ids, dtype=None):
        rows = self.rows(ids)
        return rows if dtype is None else rows.astype(dtype)

    def attend(self, x):
        return self.product(x, 1)

    def frozen(self):
        return self

    def on_frozen(self, function):
        return self

    def plain(self, site, dtype):
        return self.decoded().astype(dtype)

    def as_matrix(self, site):  # it is one already
        return self

    def tensor_parts(self):
        return self, jax.tree.map(lambda _: P(), self), (None, None)

    def specs(self, by, sizes):
        raise ValueError(f"train.mesh: a {type(self).__name__} weight can't be divided")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BFloat16Weight(FrozenWeight):
    """A frozen weight that multiplies in bfloat16 with float32 sums: y = bf16(x) @ w.

    bits: uint16, those of w in bfloat16, (in, out), or an embedding (V, features), layer axes
    first. Sliced as bfloat16 by a loop over layers, it would become float32 on a CPU before the
    loop, and bfloat16 again for each layer. by: (static) axes of a mesh that divide it.
    """

    bits: Array
    by: tuple[str, str] = dataclasses.field(default=divided.LINEAR, metadata={"static": True})

    @staticmethod
    def of(w: Array, by: tuple[str, str] = divided.LINEAR) -> "BFloat16Weight":
        """The leaf of an array, which is rounded if it is wider."""
        return BFloat16Weight(jax.lax.bitcast_convert_type(w.astype(jnp.bfloat16), jnp.uint16), by)

    @property
    def shape(self):
        return self.bits.shape

    @property
    def dtype(self):
        return jnp.dtype(jnp.bfloat16)

    def product(self, x, axis: int):
        return bfloat16_product(x, self.bits, axis, self.by)

    def ragged(self, x, sizes):
        w = self.decoded()
        return grouped.product(x.astype(jnp.bfloat16), w, sizes, self.by).astype(x.dtype)

    def rows(self, ids):
        return _from_bits(divided.rows(self.bits, ids))

    def decoded(self):
        return _from_bits(self.bits)

    def as_matrix(self, site):
        return dataclasses.replace(self, bits=site.to_matrix(self.bits))


def _from_bits(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def to_bfloat16(params, sites: Mapping[str, Site]):
    """The parameters with the linear and embedding kernels of `sites` as `BFloat16Weight`s."""
    flat = tree.flatten(params)
    for path, site in sites.items():
        if site.kind in ("linear", "experts", "embed") and not isinstance(flat[path], FrozenWeight):
            by = divided.axes_of(path, site.kind)
            flat[path] = BFloat16Weight.of(flat[path], by)
    return tree.unflatten(flat)


def allow_merge(params):
    """The parameters with `LowRank` leaves that may use the merged forward pass."""

    def allow(leaf):
        if isinstance(leaf, LowRank):
            return dataclasses.replace(leaf, merge=True)
        within = is_operator(leaf) and not isinstance(leaf, FrozenWeight)
        return dataclasses.replace(leaf, w=allow(leaf.w)) if within else leaf

    return jax.tree.map(allow, params, is_leaf=is_operator)


# ---------------------------------------------------------------------------------------- products


def _over_last(y, g):
    """y times g along its last axis or axes, in y's dtype, computed in the wider dtype of the two:
    bfloat16 would round a g near 1 to 1."""
    wide = np.promote_types(y.dtype, g.dtype)
    g = g.astype(wide).reshape((1,) * (y.ndim - g.ndim) + g.shape)
    return (y.astype(wide) * g).astype(y.dtype)


def _batched(x, m):
    """x[i] @ m[i]: (B, ..., in), (B, in, out) -> (B, ..., out)."""
    return jnp.einsum("b...i,bio->b...o", x, m)


@jax.custom_vjp
def out_of_rank(z, b):
    """z @ b for a narrow z: (..., r), (r, out) -> (..., out).

    Its own derivative computes (dy^T z)^T for db: on a CPU, dy (..., out) is then written a second
    time, transposed, together with all elementwise operations that it comes from, read against the
    order of memory. z^T dy transposes z alone.
    """
    return z @ b


def _out_of_rank_backward(saved, dy):
    z, b = saved
    rows = tuple(range(z.ndim - 1))
    return dy @ b.T, jax.lax.dot_general(z, dy, ((rows, rows), ((), ())))


# Not through `out_of_rank`: remat policies that save products would not see the one inside.
out_of_rank.defvjp(lambda z, b: (z @ b, (z, b)), _out_of_rank_backward)


@jax.custom_vjp
def merged_linear(x, w, a, b, s):
    """x @ (w + s a b): one product forward, thin products for the gradients of a and b.

    x: (..., in); w: (in, out); a: (in, r); b: (r, out); s: (). The backward pass recomputes
    w + s a b instead of keeping it: da = x^T (s dy b^T), db = s (x a)^T dy, dx = dy (w + s a b)^T.
    """
    return x @ (w + s * (a @ b))


def _merged_linear_forward(x, w, a, b, s):
    # Doesn't call `merged_linear`: remat policies that save products would not see the one inside.
    return x @ (w + s * (a @ b)), (x, w, a, b, s)


def _merged_linear_backward(saved, dy):
    x, w, a, b, s = saved
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = dy @ (w + s * (a @ b)).T
    t = dy_rows @ b.T  # (rows, r)
    xa = rows @ a  # (rows, r)
    da = s * (rows.T @ t)
    db = s * (xa.T @ dy_rows)
    # w and s are frozen everywhere in lorax, so the compiler drops this.
    dw, ds = rows.T @ dy_rows, jnp.sum(xa * t)
    return dx, dw, da, db, ds


merged_linear.defvjp(_merged_linear_forward, _merged_linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def bfloat16_product(x, bits, axis: int, by=divided.LINEAR):
    """The product of x (..., n) with axis `axis` of a matrix of the bits (uint16) of bfloat16
    numbers: operands in bfloat16, sums in float32, in both directions. Returns x's dtype. The
    matrix gets no gradient. by: axes of a mesh that divide it."""
    x, bits = divided.gathered_for(x, bits, by)
    dimensions = (((x.ndim - 1,), (axis,)), ((), ()))
    y = jax.lax.dot_general(
        x.astype(jnp.bfloat16), _from_bits(bits), dimensions, preferred_element_type=jnp.float32
    )
    return y.astype(x.dtype)


bfloat16_product.defvjp(
    lambda x, bits, axis, by: (bfloat16_product(x, bits, axis, by), bits),
    lambda axis, by, bits, dy: (bfloat16_product(dy, bits, 1 - axis, by), None),
)


def column_norms(leaf: LowRank, site: Site, squares=None) -> Array:
    """Euclidean lengths of the columns of w + s a b, (layers..., out) float32, without computing
    a b: their squares are ||w||^2 + 2 s <a^T w, b> + s^2 <(a^T a) b, b>.

    squares: `column_squares` of w, if they are known.
    """
    squares = column_squares(leaf.w, site) if squares is None else squares

    def lengths(w, a, b, s, squares):
        a, b, s = (x.astype(squares.dtype) for x in (a, b, s))
        cross = jnp.sum(linear(a.T, w) * b, axis=0)
        update = jnp.sum(((a.T @ a) @ b) * b, axis=0)
        return jnp.sqrt(jnp.maximum(squares + 2 * s * cross + s * s * update, 0))

    w = as_matrix(leaf.w, site)
    return over_layers(lengths, site.stack)(w, leaf.a, leaf.b, leaf.s, squares)


def dora(leaf: LowRank, m, site: Site, squares=None, on=None) -> Scaled:
    """DoRA (arXiv:2402.09353, equation 5): w + s a b with columns of length m (layers..., out).

    The lengths that m is divided by are constants for the gradient (section 4.3). A column that is
    zero stays zero. on: (layers...,), 0 for layers whose columns are not rescaled; None: all are.
    squares: `column_squares` of w, if they are known.
    """
    norms = jax.lax.stop_gradient(column_norms(leaf, site, squares))
    g = jnp.where(norms > 0, m / jnp.where(norms > 0, norms, 1), 1)
    return Scaled(leaf, g if on is None else jnp.where(on.astype(bool)[..., None], g, 1))
