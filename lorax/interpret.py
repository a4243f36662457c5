"""Computes any JAX function with operator leaves in place of arrays, and finds its kernels.

`lorax.intercept` knows layers of Linen by their classes. Here a function is traced to a jaxpr, and
what the jaxpr does with a kernel says what it is: a matrix product, a look-up of rows or a
convolution is computed by the functions of `lorax.ops`, whoever wrote the layer. Whatever else
reads a kernel gets the plain array (`ops.dense`), which is correct but stores a whole kernel.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from lorax import ops
from lorax.ops import Site


class Use(NamedTuple):
    """How one operation reads a kernel. kind: that of `Site`, or "other" for an operation that
    needs the plain array; scans: numbers of the scans that have taken layers out of it, outermost
    first; ins, outs: as in `Site`, () for "other"."""

    kind: str
    scans: tuple[int, ...]
    ins: tuple[int, ...] = ()
    outs: tuple[int, ...] = ()


class Found(NamedTuple):
    """What a jaxpr does with one argument. uses: without repetitions, none for a bias. bias:
    position of the argument that it adds to the product, None if there is none. scans: as in `Use`,
    the most."""

    uses: tuple[Use, ...]
    bias: int | None
    scans: tuple[int, ...]

    def site(self, ndim: int) -> Site | None:
        """The site of the argument, None if it is no matrix. ndim: of the whole argument.

        A table in which rows are looked up is an embedding, even if it is also multiplied by. A
        matrix that no product reads as it is has kind "other"; its last axis is the output.
        """
        if not self.uses:
            return None
        stack = len(self.uses[0].scans)
        for kind in ("embed", "conv", "linear"):
            if use := next((use for use in self.uses if use.kind == kind), None):
                return Site(kind, len(use.scans), use.ins, use.outs)
        if ndim - stack < 2:
            return None
        return Site("other", stack, tuple(range(ndim - stack - 1)), (ndim - stack - 1,))

    def is_whole(self, site: Site) -> bool:
        """Whether an operation needs the plain array of a leaf at this site."""
        axes = (site.ins, site.outs)
        return any((use.ins, use.outs) not in (axes, axes[::-1]) for use in self.uses)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """An argument that is an operator leaf, on its way through a jaxpr.

    leaf: the leaf, or an array during the search for sites. order: the kernel's axes in the order
    in which the jaxpr has them here. dtype: in which it has them. site: the meaning of the axes,
    None during the search. biased: whether a bias is added to the product. scans: as in `Use`.
    notes: of the search, None in a computation.
    """

    leaf: object
    order: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: object = dataclasses.field(metadata={"static": True})
    site: Site | None = dataclasses.field(default=None, metadata={"static": True})
    biased: bool = dataclasses.field(default=False, metadata={"static": True})
    scans: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    notes: "_Notes | None" = dataclasses.field(default=None, metadata={"static": True})

    def plain(self):
        """The array that the jaxpr would have here."""
        return jnp.transpose(ops.dense(self.leaf, self.site), self.order).astype(self.dtype)

    @property
    def waits(self) -> bool:
        """Whether its product has to wait for a bias."""
        return self.notes is not None or type(self.leaf).affine is not ops.Leaf.affine

    def note(self, kind: str, ins=(), outs=()) -> None:
        """Record a use during the search."""
        if self.notes is not None:
            self.notes.uses.append(Use(kind, self.scans, ins, outs))


@dataclasses.dataclass(eq=False)
class _Notes:
    """What the search has found about the argument at a position; see `Found`."""

    position: int
    uses: list[Use] = dataclasses.field(default_factory=list)
    bias: int | None = None
    scans: tuple[int, ...] = ()


class _Bias(NamedTuple):
    """An argument that may be a bias: its value here, as it was given, and its position. kernel:
    during the search, what it is if it is no bias."""

    value: object
    given: object
    position: int
    kernel: Kernel | None = None


class _Product(NamedTuple):
    """A product to which a bias may yet be added. compute(bias or None) -> its value; axes: those
    of the value that the kernel's outputs have become; ndim: of the value."""

    compute: Callable
    kernel: Kernel
    axes: tuple[int, ...]
    ndim: int


_SPECIAL = Kernel, _Bias, _Product

# ----------------------------------------------------------------------------------------- calling


def evaluate(jaxpr: core.ClosedJaxpr, arguments: Sequence, sites: Mapping, biases: Mapping) -> list:
    """The outputs of a jaxpr for arguments of which some are operator leaves.

    sites: {position of an argument: its Site}; biases: {position: that of the bias that is added to
    its product}, both from `search`. Raises ValueError for a leaf that computes with the bias if
    the jaxpr does not add it right after the product.
    """
    values = list(arguments)
    if not any(map(ops.is_operator, values)):
        return core.jaxpr_as_fun(jaxpr)(*values)
    for i, site in sites.items():
        leaf = arguments[i]
        if ops.is_operator(leaf):
            weight = ops.frozen(leaf)
            order = tuple(range(len(weight.shape)))
            values[i] = Kernel(leaf, order, weight.dtype, site, i in biases)
            if i in biases and values[i].waits:
                values[biases[i]] = _Bias(arguments[biases[i]], arguments[biases[i]], biases[i])
    return [_settled(x) for x in _run(jaxpr.jaxpr, jaxpr.consts, values)]


def search(jaxpr: core.ClosedJaxpr, positions: Sequence[int]) -> dict[int, Found]:
    """What a jaxpr does with the arguments at these positions. Nothing is computed."""
    notes = {i: _Notes(i) for i in positions}

    def trace(*arrays):
        order = lambda x: tuple(range(x.ndim))
        values = [
            Kernel(x, order(x), x.dtype, notes=notes[i]) if i in notes else _Bias(x, x, i)
            for i, x in enumerate(arrays)
        ]
        return [_settled(x) for x in _run(jaxpr.jaxpr, jaxpr.consts, values)]

    jax.eval_shape(trace, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jaxpr.in_avals))
    unique = lambda uses: tuple(dict.fromkeys(uses))
    return {i: Found(unique(note.uses), note.bias, note.scans) for i, note in notes.items()}


def needed(jaxpr: core.ClosedJaxpr, n: int) -> tuple[core.ClosedJaxpr, list[bool]]:
    """(the jaxpr with only its first n outputs and what they need, which arguments they need)."""
    keep = [i < n for i in range(len(jaxpr.out_avals))]
    _, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, keep)
    smaller, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, keep, instantiate=True)
    return core.ClosedJaxpr(smaller, jaxpr.consts), used


def passed_on(jaxpr: core.Jaxpr) -> list[int | None]:
    """For each output of a jaxpr the position of the argument that it is, None if it is another."""
    came_from = {var: i for i, var in enumerate(jaxpr.invars)}
    source = lambda atom: None if isinstance(atom, core.Literal) else came_from.get(atom)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in _INSIDE:
            continue
        inner = eqn.params["jaxpr"]
        inside = passed_on(getattr(inner, "jaxpr", inner))
        if eqn.primitive.name == "scan":  # a carry must stay where it is, as must a scanned array
            n, m = _bounds(eqn)
            carries = [i if i == n + j else None for j, i in enumerate(inside[: m - n])]
            inside = carries + [i if i is not None and i >= m else None for i in inside[m - n :]]
        for var, i in zip(eqn.outvars, inside, strict=True):
            if i is not None and source(eqn.invars[i]) is not None:
                came_from[var] = source(eqn.invars[i])
    return [source(atom) for atom in jaxpr.outvars]


# ------------------------------------------------------------------------------------ the equations


def _run(jaxpr: core.Jaxpr, consts, arguments) -> list:
    """The outputs of a jaxpr. Values may be `Kernel`, `_Bias` or `_Product`."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
    for eqn in jaxpr.eqns:
        outputs = _outputs(jaxpr, eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(jaxpr, eqn, inputs) -> list:
    """The outputs of one equation: by its rule, or computed from plain arrays."""
    name, special = eqn.primitive.name, any(isinstance(x, _SPECIAL) for x in inputs)
    if special and name in _INSIDE:
        return _INSIDE[name](eqn, inputs)
    if special and name in _RULES:
        output = _RULES[name](eqn, *inputs)
        if output is not None:
            return [output]
    return _computed(jaxpr, eqn, [_whole(x) for x in inputs])


def _computed(jaxpr, eqn, inputs) -> list:
    """The outputs of one equation for plain arrays."""
    pairs = zip(eqn.invars, inputs, strict=True)
    given = {atom: x for atom, x in pairs if not isinstance(atom, core.Literal)}
    kept = [var for var in eqn.outvars if not isinstance(var, core.DropVar)]
    parts = {"constvars": [], "invars": [*given], "outvars": kept, "eqns": [eqn]}
    one = core.ClosedJaxpr(jaxpr.replace(**parts, effects=eqn.effects), [])
    made = dict(zip(kept, core.jaxpr_as_fun(one)(*given.values()), strict=True))
    return [made.get(var) for var in eqn.outvars]


def _settled(x):
    """The plain array of a value."""
    if isinstance(x, Kernel):
        return x.plain()
    if isinstance(x, _Bias):
        return x.value
    if not isinstance(x, _Product):
        return x
    if x.kernel.biased:
        raise ValueError(
            f"a {type(x.kernel.leaf).__name__} leaf computes with its layer's bias, and the module "
            "does not add that right after the product"
        )
    return x.compute(None)


def _whole(x):
    """The plain array of a value, for an operation without a rule."""
    kernel = x.kernel if isinstance(x, _Bias) else x
    if isinstance(kernel, Kernel):
        kernel.note("other")
    return _settled(x)


# ---------------------------------------------------------------------- equations that hold a jaxpr


def _jit(eqn, inputs) -> list:
    inner = eqn.params["jaxpr"]
    return _run(inner.jaxpr, inner.consts, inputs)


def _remat(eqn, inputs) -> list:
    inner = eqn.params["jaxpr"]
    options = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
    run = lambda *inputs: [_settled(x) for x in _run(inner, (), inputs)]
    inputs = [x if isinstance(x, Kernel) else _settled(x) for x in inputs]
    return jax.checkpoint(run, **options)(*inputs)


def _scan(eqn, inputs) -> list:
    """A scan over a kernel takes its layers one by one: every array of its leaf has the layer axis
    first."""
    inner, (n, m) = eqn.params["jaxpr"], _bounds(eqn)
    consts, layers = [x if isinstance(x, Kernel) else _whole(x) for x in inputs[:n]], inputs[m:]
    stacked = [x if _is_stack(x) else _whole(x) for x in layers]

    def body(carry, layer):
        layer = [_of_layer(*pair, id(eqn)) for pair in zip(layers, layer, strict=True)]
        outs = _run(inner.jaxpr, inner.consts, [*consts, *carry, *layer])
        outs = [_settled(x) for x in outs]
        return outs[: m - n], outs[m - n :]

    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, made = jax.lax.scan(body, [_whole(x) for x in inputs[n:m]], stacked, **options)
    return [*carry, *made]


def _bounds(eqn) -> tuple[int, int]:
    """Positions of the first carry and of the first scanned array among a scan's inputs, which are
    constants, carries and scanned arrays. Only the last lose an axis inside; the equation's own
    account of their numbers differs between versions of JAX."""
    inner = eqn.params["jaxpr"]
    same = lambda atoms, avals: sum(
        atom.aval.shape == aval.shape for atom, aval in zip(atoms, avals, strict=True)
    )
    m = same(eqn.invars, inner.in_avals)
    return m - same(eqn.outvars, inner.out_avals), m


def _is_stack(x) -> bool:
    """Whether a scanned value is a kernel whose axes are as in its leaf."""
    return isinstance(x, Kernel) and len(x.order) > 1 and x.order == tuple(range(len(x.order)))


def _of_layer(before, layer, scan: int):
    """One layer of a scanned value. before: what was scanned; layer: what `jax.lax.scan` has made
    of it, where the leaf of a kernel is sliced."""
    if isinstance(before, _Bias):
        return _Bias(layer, layer, before.position)
    if not isinstance(layer, Kernel):
        return layer
    site = layer.site and layer.site._replace(stack=layer.site.stack - 1)
    scans = (*layer.scans, scan)
    kernel = dataclasses.replace(layer, order=layer.order[:-1], site=site, scans=scans)
    if kernel.notes is None:
        return kernel
    kernel.notes.scans = max(kernel.notes.scans, scans, key=len)
    if len(kernel.order) > 1:
        return kernel
    return _Bias(kernel.leaf, kernel.leaf, kernel.notes.position, kernel)


_INSIDE = {"jit": _jit, "pjit": _jit, "checkpoint": _remat, "remat2": _remat, "scan": _scan}


# ------------------------------------------------------------------ equations that change no number


def _transpose(eqn, x):
    permutation = eqn.params["permutation"]
    if isinstance(x, Kernel):
        return dataclasses.replace(x, order=tuple(x.order[i] for i in permutation))
    if isinstance(x, _Product):
        axes = tuple(permutation.index(axis) for axis in x.axes)
        compute = lambda bias: jnp.transpose(x.compute(bias), permutation)
        return x._replace(compute=compute, axes=axes)
    return None


def _convert(eqn, x):
    dtype = eqn.outvars[0].aval.dtype
    if isinstance(x, _Bias):
        return x._replace(value=x.value.astype(dtype))
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    if isinstance(x, Kernel):
        return dataclasses.replace(x, dtype=dtype)
    return x._replace(compute=lambda bias: x.compute(bias).astype(dtype))


def _reshape(eqn, x, *sizes):
    """A kernel that keeps its shape, or a bias with further axes before its own."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    n = len(after) - len(before)
    places = eqn.params.get("broadcast_dimensions", range(n, len(after)))
    if n < 0 or after[n:] != before or tuple(places) != tuple(range(n, len(after))):
        return None
    if isinstance(x, Kernel) and n and x.notes is not None:
        x = _Bias(x.plain(), x.leaf, x.notes.position, x)
    if isinstance(x, _Bias):
        return x._replace(value=jnp.broadcast_to(x.value, after))
    return x if isinstance(x, Kernel) and not n else None


def _same(eqn, x):
    return x


# ---------------------------------------------------------------------------------------- products


def _dot(eqn, x, y):
    """`jax.lax.dot_general` of a kernel, on either side, and an array, without batch axes."""
    contracted, batch = eqn.params["dimension_numbers"]
    if any(batch) or isinstance(x, Kernel) == isinstance(y, Kernel):
        return None
    first = isinstance(x, Kernel)
    (kernel, theirs), (ours, rows) = ((x, y), contracted) if first else ((y, x), contracted[::-1])
    sizes = dict(zip(kernel.order, eqn.invars[0 if first else 1].aval.shape, strict=True))
    pairs = sorted((kernel.order[i], j) for i, j in zip(ours, rows, strict=True))
    ins = tuple(axis for axis, _ in pairs)
    free = [axis for i, axis in enumerate(kernel.order) if i not in ours]
    outs = tuple(sorted(free))
    multiply = _multiply(kernel, ins, outs)
    if multiply is None:
        return None
    theirs = _settled(theirs)
    n = theirs.ndim - len(rows)
    order = (*(j for j in range(theirs.ndim) if j not in rows), *(j for _, j in pairs))
    inputs = jnp.transpose(theirs, order)
    inputs = inputs.reshape(*inputs.shape[:n], -1)
    made = [n + outs.index(axis) for axis in free]  # the outputs in the order of the equation
    order = (*made, *range(n)) if first else (*range(n), *made)

    def compute(bias):
        with jax.default_matmul_precision(_precision(eqn)):
            y = multiply(inputs, bias).reshape(*inputs.shape[:-1], *(sizes[axis] for axis in outs))
        return jnp.transpose(y, order).astype(eqn.outvars[0].aval.dtype)

    axes = tuple(order.index(n + i) for i in range(len(outs)))
    return _Product(compute, kernel, axes, len(order)) if kernel.waits else compute(None)


def _multiply(kernel: Kernel, ins, outs) -> Callable | None:
    """The function (x, bias) -> x times the kernel with these axes contracted and produced; None if
    the leaf can't compute it."""
    if not ins or not outs:
        return None
    if kernel.site is None:
        kernel.note("linear", ins, outs)
        w = Site("linear", 0, ins, outs).to_matrix(kernel.leaf)
        return lambda x, bias: ops.linear(x, w, bias)
    if kernel.site.stack or (ins, outs) not in (_axes(kernel), _axes(kernel)[::-1]):
        return None
    leaf = ops.as_matrix(kernel.leaf, kernel.site)
    if (ins, outs) == _axes(kernel):
        return lambda x, bias: ops.linear(x, leaf, bias)
    return lambda x, bias: ops.add_bias(ops.attend(x, leaf), bias)


def _axes(kernel: Kernel):
    return kernel.site.ins, kernel.site.outs


def _precision(eqn) -> str | None:
    """The name of an equation's precision, for `jax.default_matmul_precision`."""
    precision = eqn.params["precision"]
    precision = precision[0] if isinstance(precision, tuple) else precision
    return precision.name.lower() if isinstance(precision, jax.lax.Precision) else None


def _add(eqn, x, y):
    """A product and its bias."""
    product, bias = (y, x) if isinstance(x, _Bias) else (x, y)
    if not isinstance(product, _Product) or not isinstance(bias, _Bias):
        return None
    n, shape = len(product.axes), eqn.outvars[0].aval.shape
    last = tuple(range(product.ndim - n, product.ndim))
    if product.axes != last or bias.given.shape != shape[product.ndim - n :]:
        return None
    if product.kernel.notes is None:
        return product.compute(bias.given.reshape(-1))
    product.kernel.notes.bias = bias.position
    return product.compute(None) + bias.value


def _gather(eqn, kernel, ids):
    """Rows of a table (V, features): `jnp.take` along the first axis, or table[ids]."""
    p, out = eqn.params, eqn.outvars[0].aval
    if not isinstance(kernel, Kernel) or kernel.order != (0, 1):
        return None
    rows, features = eqn.invars[0].aval.shape
    numbers = p["dimension_numbers"]
    about = numbers.collapsed_slice_dims, numbers.start_index_map, numbers.offset_dims
    fits = about == ((0,), (0,), (out.ndim - 1,)) and tuple(p["slice_sizes"]) == (1, features)
    fits = fits and (kernel.site is None or kernel.site[:2] == ("embed", 0))
    filled = p["fill_value"] is None or np.isnan(p["fill_value"])
    if not fits or not filled or numbers.operand_batching_dims:
        return None
    kernel.note("embed", (0,), (1,))
    ids, modes = _settled(ids)[..., 0], jax.lax.GatherScatterMode
    if p["mode"] == modes.CLIP:
        ids = jnp.clip(ids, 0, rows - 1)
    elif p["mode"] == modes.FILL_OR_DROP:
        ids = jnp.where(ids < 0, rows, ids)  # `ops.embed` would count from the end
    return ops.embed(ids, kernel.leaf, kernel.dtype)


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """What `ops.convolve` uses of a `flax.linen.Conv`. params: arguments of the convolution."""

    params: Mapping

    def clone(self, **_):
        return self

    def apply(self, variables, x):
        kernel = variables["params"]["kernel"]
        return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), **self.params)


def _convolve(eqn, x, kernel):
    """A convolution without groups, with the channels last."""
    p = eqn.params
    if not isinstance(kernel, Kernel) or isinstance(x, Kernel):
        return None
    n = len(kernel.order) - 1
    window = tuple(range(n - 1))
    lhs, rhs, out = p["dimension_numbers"]
    last = (0, n, *range(1, n))
    plain = (lhs, rhs, out) == (last, (n, n - 1, *window), last)
    plain = plain and p["feature_group_count"] == p["batch_group_count"] == 1
    if not plain or kernel.order != tuple(range(n + 1)):
        return None
    if kernel.site is not None and kernel.site[:2] != ("conv", 0):
        return None
    kernel.note("conv", tuple(range(n)), (n,))
    keys = "window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"
    layer = _Convolution({key: p[key] for key in (*keys, "precision", "preferred_element_type")})
    y = ops.convolve(layer, kernel.leaf, _settled(x))
    return y.astype(eqn.outvars[0].aval.dtype)


_RULES = {
    "transpose": _transpose,
    "convert_element_type": _convert,
    "reshape": _reshape,
    "broadcast_in_dim": _reshape,
    "copy": _same,
    "sharding_constraint": _same,
    "dot_general": _dot,
    "add": _add,
    "gather": _gather,
    "conv_general_dilated": _convolve,
}
