"""Makes Linen layers compute with operator leaves, and finds a model's adaptable kernels.

`apply` runs a module under an interceptor. Where the kernel of a `Dense`, `DenseGeneral`, `Einsum`,
`Embed`, `Conv` or `lorax.grouped.GroupedDense` is an operator leaf, the layer's output is computed
by the functions of `lorax.ops`. A call without the interceptor fails: Flax can't multiply by a
`LowRank`.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorax import divided, leaves, tree
from lorax.grouped import GroupedDense
from lorax.ops import (
    Site,
    add_bias,
    as_matrix,
    attend,
    convolve,
    embed,
    frozen,
    inner,
    is_operator,
    linear,
    on_frozen,
    ragged,
)


def apply(module: nn.Module, params: dict, *inputs, **kwargs):
    """`module.apply` on parameters whose leaves may be operators.

    params: the "params" collection itself. Other keywords (`method`, `rngs`) go to `module.apply`.
    Raises ValueError for a leaf that the module does not use, such as virtual tokens in a model
    that is not from `lorax.models`.
    """
    params = inner(params)
    with interceptor():
        return module.apply({"params": params}, *inputs, **kwargs)


def interceptor() -> contextlib.AbstractContextManager:
    """Context in which Linen layers compute with operator leaves, for calls of `module.apply` that
    `apply` does not cover (mutable collections, several methods)."""
    return nn.intercept_methods(functools.partial(_intercept, set()))


#: Name of a leaf among a module's parameters that replaces one of the module's methods. `method` of
#: the leaf is the name of that method. The leaf is called as leaf(module, call, *args, **kwargs),
#: where call(*args, **kwargs) is the original method, with operator leaves.
AROUND = "around"


def _intercept(called: set, next_fun, args, kwargs, context):
    """called: paths of the modules whose `AROUND` leaf has been called."""
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
    """Raises ValueError if the model never called a method that a leaf replaces."""
    for path in tree.flatten(module.variables["params"]):
        *parent, name = path.split("/")
        if name == AROUND and tuple(parent) not in called:
            raise ValueError(
                f"method.name: {type(module).__name__} makes no call that takes virtual tokens at "
                f"{'/'.join(parent) or 'its `hidden`'}; causal models and BERT of lorax.models do"
            )


def _computed(next_fun, context, *args, **kwargs):
    """A layer's output: by its rule if its kernel is an operator leaf, else by the layer itself."""
    rule = _rule(context)
    if rule is None:
        return next_fun(*args, **kwargs)
    module = context.module
    name = "embedding" if isinstance(module, nn.Embed) else "kernel"
    leaf = module.get_variable("params", name)
    if divided.divides_base() and rule.kind != "conv":
        by = divided.axes_of("/".join((*module.path, name)), rule.kind)
        leaf = on_frozen(leaf, lambda w: leaves.Divided(w, by))
    if not is_operator(leaf):
        return next_fun(*args, **kwargs)
    bias = module.get_variable("params", "bias") if getattr(module, "use_bias", False) else None
    return rule.call(module, leaf, bias, *args, **kwargs)


class _Rule(NamedTuple):
    """One kind of layer call: the axes of its `Site`, and how it computes with a leaf."""

    kind: str
    axes: Callable  # (module, *args) -> (ins, outs), or None if it can't be adapted
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


def _grouped(module, leaf, bias, x, sizes):
    return ragged(x.astype(_compute_dtype(module, x, leaf)), leaf, sizes, bias)


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
    y = linear(x, as_matrix(leaf, Site("linear", 0, ins, outs)), bias)
    return y.reshape(*y.shape[:-1], *features)


def _einsum_letters(module, x, einsum_str):
    """Letters of input, kernel and output, with '...' expanded."""
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
        return None  # a batch axis in the kernel (one matrix per index), or a sum over one operand
    ins = tuple(i for i, c in enumerate(kernel) if c in left)
    return ins, tuple(i for i, c in enumerate(kernel) if c in out)


def _einsum(module, leaf, bias, x, einsum_str=None):
    left, kernel, out = _einsum_letters(module, x, einsum_str)
    ins, outs = _einsum_axes(module, x, einsum_str)
    free = [c for c in left if c not in kernel]
    order = [left.index(c) for c in free] + [left.index(kernel[i]) for i in ins]
    sizes = tuple(x.shape[left.index(c)] for c in free)
    x = jnp.transpose(x, order).reshape(*sizes, -1).astype(_compute_dtype(module, x, leaf))
    made = [kernel[i] for i in outs]
    if bias is not None:  # its axes are in the order of the output
        bias_axes = [c for c in out if c in kernel]
        bias = jnp.transpose(bias, [bias_axes.index(c) for c in made]).reshape(-1)
    y = linear(x, as_matrix(leaf, Site("linear", 0, ins, outs)), bias)
    y = y.reshape(*sizes, *(frozen(leaf).shape[i] for i in outs))
    return jnp.transpose(y, [(free + made).index(c) for c in out])


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
    (GroupedDense, "__call__"): _Rule("experts", lambda module, x, sizes: ((0,), (1,)), _grouped),
    (nn.DenseGeneral, "__call__"): _Rule("linear", _dense_general_axes, _dense_general),
    (nn.Einsum, "__call__"): _Rule("linear", _einsum_axes, _einsum),
    (nn.Embed, "__call__"): _Rule("embed", lambda module, ids: ((0,), (1,)), _embed),
    (nn.Embed, "attend"): _Rule("embed", lambda module, x: ((0,), (1,)), _attend),
    (nn.Conv, "__call__"): _Rule("conv", _conv_axes, _conv),
}


# ------------------------------------------------------------------------------------------- sites


def sites(module: nn.Module, params: dict, *inputs, **kwargs) -> dict[str, Site]:
    """{path: Site} of every kernel that can be adapted, found by tracing one call.

    params: as for `apply`. Nothing is computed: the call runs under `jax.eval_shape`. Layers with
    batch axes in their kernel (`DenseGeneral.batch_dims`, expert einsums) and grouped convolutions
    are left out.
    """
    shapes = {path: leaf.shape for path, leaf in tree.flatten(inner(params)).items()}
    traced: dict[str, Site] = {}

    def record(next_fun, args, call_kwargs, context):
        rule = _rule(context)
        if rule is not None:
            name = "embedding" if isinstance(context.module, nn.Embed) else "kernel"
            axes = rule.axes(context.module, *args, **call_kwargs)
            path = "/".join((*context.module.path, name))
            if axes is not None and path in shapes:
                stack = len(shapes[path]) - len(axes[0]) - len(axes[1])
                traced[path] = Site(rule.kind, stack, *axes)
        return next_fun(*args, **call_kwargs)

    def trace(params, *inputs):
        with nn.intercept_methods(record):
            return module.apply({"params": params}, *inputs, **kwargs)

    jax.eval_shape(trace, params, *inputs)
    return traced
