"""An NNX module as a base: a Linen module whose parameters are the NNX module's.

The module is split into its graph, its parameters (`nnx.Param` of floats) and the rest of its
state, which stays as it is. A call puts them together again, in evaluation mode, and calls the
module itself: nothing in it is replaced. `lorax.interpret` computes with operator leaves.
"""

import collections
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from lorax import interpret, ops, tree
from lorax.models.base import Base

#: Attributes of layers that make them deterministic, as `nnx.Module.eval` sets them.
EVALUATION = {"deterministic": True, "use_running_average": True}


class NNXModule(linen.Module):
    """The call of an NNX module with its parameters as the collection "params"."""

    split: "Split"

    def __call__(self, *inputs):
        return self.split.call(dict(self.variables["params"]), *inputs)


class Traced(NamedTuple):
    """A call as a jaxpr of the parameters, the other state and the inputs."""

    jaxpr: object
    outputs: object  # the tree of its outputs


class Split:
    """An NNX module taken apart. Two of them are equal only if they are the same.

    variables: {path: the Variable} of the parameters in the order of the graph. With the paths that
    the bases of lorax use: a layer's only kernel is "kernel" or "embedding". sites: {path:
    `ops.Site`}. stacks: {path: (number of leading layer axes, words of the path before the layer
    number)}. whole: paths of kernels that the module also reads in a way for which an operator leaf
    has to be made a plain kernel.
    """

    def __init__(self, module: nnx.Module, *inputs):
        """inputs: examples, arrays or shapes. Raises ValueError for a module without parameters,
        and for one whose call changes its state."""
        self.original = nnx.split(module, _is_parameter, ...)
        copy = nnx.merge(*self.original)
        copy.set_attributes(**EVALUATION, raise_if_not_found=False)
        self.graph, parameters, rest = nnx.split(copy, _is_parameter, ...)
        self.variables = dict(nnx.to_flat_state(parameters))
        self.rest = dict(nnx.to_flat_state(rest))
        if not self.variables:
            raise ValueError(
                f"{type(module).__name__} has no nnx.Param of floats; a module that is initialised "
                "by its first call (nnx.bridge.ToNNX) needs lazy_init with an example"
            )
        self.jaxprs = {}
        shapes = [_shape(x) for x in self.variables.values()]
        traced = self.trace(shapes, *inputs)
        keys = [*self.variables]
        matrices = [i for i, key in enumerate(keys) if len(self.variables[key].shape) > 1]
        found = interpret.search(traced.jaxpr, matrices)
        sites = {i: found[i].site(len(self.variables[keys[i]].shape)) for i in matrices}
        sites = {i: site for i, site in sites.items() if site is not None}
        paths = _paths(keys, {keys[i]: site for i, site in sites.items()})
        self.positions = {path: i for i, path in enumerate(paths)}
        self.sites = {paths[i]: site for i, site in sites.items()}
        self.biases = {i: found[i].bias for i in sites if found[i].bias is not None}
        self.whole = tuple(paths[i] for i, site in sites.items() if found[i].is_whole(site))
        self.stacks = _stacks(paths, found)

    @property
    def params(self) -> dict:
        """The parameters as a tree, in the module's own dtypes."""
        values = [_value(variable) for variable in self.variables.values()]
        return tree.unflatten(dict(zip(self.positions, values, strict=True)))

    @property
    def frozen(self) -> dict[str, list[str]]:
        """{kind of variable: its paths} of the variables that are neither parameters nor random
        numbers."""
        kinds = collections.defaultdict(list)
        for path, x in self.rest.items():
            if isinstance(x, nnx.Variable) and not isinstance(x, nnx.RngState):
                kinds[type(x).__name__].append(_name(path))
        return dict(kinds)

    def call(self, params: Mapping, *inputs):
        """The module's outputs. params: a tree of arrays or operator leaves."""
        flat = tree.flatten(params)
        for path in flat:
            if path not in self.positions:
                raise ValueError(
                    f"the NNX module has no parameter {path!r}; methods that read the inputs of "
                    "layers (init 'eva', 'corda') need a Linen module"
                )
        leaves = [flat[path] for path in self.positions]
        rest = jax.tree.map(_array, [_value(x) for x in self.rest.values()])
        traced = self.trace([_shape(ops.frozen(leaf)) for leaf in leaves], *inputs)
        sites = {self.positions[path]: site for path, site in self.sites.items()}
        arguments = [*leaves, *jax.tree.leaves(rest), *inputs]
        outputs = interpret.evaluate(traced.jaxpr, arguments, sites, self.biases)
        return jax.tree.unflatten(traced.outputs, outputs)

    def trace(self, shapes: list, *inputs) -> Traced:
        """The call as a jaxpr, kept by the shapes of its arguments. Raises ValueError if it changes
        the module's state or if its outputs depend on random numbers."""
        inputs = [_shape(x) for x in inputs]
        key = tuple((x.shape, x.dtype) for x in (*shapes, *inputs))
        if key not in self.jaxprs:
            rest = jax.tree.map(_shape, [_value(x) for x in self.rest.values()])
            trace = jax.make_jaxpr(self._forward, return_shape=True)
            whole, (outputs, state) = trace(shapes, rest, *inputs)
            n = len(jax.tree.leaves(outputs))
            jaxpr, used = interpret.needed(whole, n)
            self._check_state(state, interpret.passed_on(whole.jaxpr)[n:], used)
            self.jaxprs[key] = Traced(jaxpr, jax.tree.structure(outputs))
        return self.jaxprs[key]

    def _forward(self, values: list, rest: list, *inputs):
        """(outputs of the module's own call, {path: value} of its state after it)."""
        pairs = zip(self.variables.items(), values, strict=True)
        parameters = [(path, variable.replace(value)) for (path, variable), value in pairs]
        pairs = zip(self.rest.items(), rest, strict=True)
        with_value = lambda x, value: x.replace(value) if isinstance(x, nnx.Variable) else value
        others = [(path, with_value(x, value)) for (path, x), value in pairs]
        module = nnx.merge(self.graph, *map(nnx.from_flat_state, (parameters, others)))
        outputs = module(*inputs)
        return outputs, {_name(path): _value(x) for path, x in nnx.to_flat_state(nnx.state(module))}

    def _check_state(self, state: dict, sources: list[int | None], used: list[bool]) -> None:
        """Raises ValueError as `trace` does. state: after the call; sources: the positions of the
        arguments that its values are; used: whether the outputs need each argument."""
        arguments = (self.variables | self.rest).items()
        before = [_name(path) for path, x in arguments for _ in jax.tree.leaves(_value(x))]
        after = [path for path in sorted(state) for _ in jax.tree.leaves(state[path])]
        random = {_name(path) for path, x in self.rest.items() if isinstance(x, nnx.RngState)}
        same = "a base must compute the same each time"
        for path, source in zip(after, sources, strict=True):
            kept = source is not None and source < len(before) and before[source] == path
            if not kept and path not in random:
                what = "changes" if path in before else "makes"
                raise ValueError(
                    f"the module's call {what} its state {path}; {same}: without nnx.sow, caches "
                    "or counters in its call"
                )
        for path, is_used in zip(before, used, strict=False):
            if is_used and path in random:
                raise ValueError(
                    f"the module's outputs depend on random numbers, {path}; {same}: set "
                    "deterministic in its layers"
                )

    def merged(self, params: Mapping) -> nnx.Module:
        """A new NNX module as the original, with these parameters, plain arrays, in its dtypes."""
        graph, _, rest = self.original
        flat = tree.flatten(params)
        pairs = zip(self.variables.items(), self.positions, strict=True)
        values = [
            (key, variable.replace(jnp.asarray(flat[path]).astype(_value(variable).dtype)))
            for (key, variable), path in pairs
        ]
        return nnx.merge(graph, nnx.from_flat_state(values), rest)


def to_nnx(base: Base, params: Mapping | None = None) -> nnx.Module:
    """A new NNX module like the one that a base was made of, with `params`.

    params: plain or quantised parameters of the base, such as those of `lorax.merge` or
    `Trained.merge`; None: the base's own. They are rounded to the dtypes of the module.
    `nnx.update(mine, nnx.state(to_nnx(base, params)))` puts them into a module that exists.
    Raises ValueError for a base that is not made of an NNX module.
    """
    module = getattr(base.module, "model", base.module)
    if not isinstance(module, NNXModule):
        raise ValueError(f"base: {base.name} is {base.family}, not made of an NNX module")
    flat = tree.flatten(base.params if params is None else params)
    return module.split.merged({p: ops.dense(x, base.sites.get(p)) for p, x in flat.items()})


def of_shapes(make: Callable):
    """make(), a `lorax.models.Model` with an NNX module, with shapes in place of arrays, so that
    nothing is allocated. None if its module is no NNX module, or if make() reads numbers."""
    made = []

    def module():
        made.append(make())
        return made[-1].module

    try:
        shapes = nnx.eval_shape(module)
    except Exception:
        return None  # make() itself will say what is wrong, if anything is
    if not isinstance(shapes, nnx.Module):
        return None
    inputs = made[-1].inputs  # an array made by JAX has no numbers here
    if isinstance(inputs, jax.Array):
        inputs = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
    return made[-1]._replace(module=shapes, inputs=inputs)


# -------------------------------------------------------------------------------------- parameters


def _is_parameter(path, x) -> bool:
    is_array = isinstance(x, nnx.Param) and hasattr(_value(x), "dtype")
    return is_array and jnp.issubdtype(_value(x).dtype, jnp.floating)


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _value(x):
    return x.get_value() if isinstance(x, nnx.Variable) else x


def _shape(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(_value(x).shape, _value(x).dtype)


def _array(x) -> jax.Array:
    """An array of the state; zeros for a shape, in a module that only its costs are asked of."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    return jnp.zeros(x.shape, x.dtype)


def _paths(keys: list[tuple], sites: Mapping[tuple, ops.Site]) -> list[str]:
    """The path of each parameter, in order. A module that holds one kernel and no other module is a
    layer, whose kernel is called "kernel" or "embedding"; any other kernel is a layer of its own,
    called as the parameter is."""
    names, taken = [], {"/".join(map(str, key)) for key in keys}
    below = collections.Counter(key[:i] for key in keys for i in range(len(key) - 1))
    kernels = collections.Counter(key[:-1] for key in sites)
    for key in keys:
        words = [str(word) for word in key]
        if key in sites:
            last = "embedding" if sites[key].kind == "embed" else "kernel"
            alone = len(key) > 1 and kernels[key[:-1]] == 1 and not below[key[:-1]]
            renamed = [*words[:-1], last] if alone else [*words, last]
            clash = "/".join(renamed) in taken - {"/".join(words)}
            words = [*words, last] if clash else renamed
        names.append("/".join(words))
    return names


def _stacks(paths: list[str], found: Mapping[int, interpret.Found]) -> dict[str, tuple[int, int]]:
    """{path: (number of layer axes, words before the layer number)}: the number stands after the
    words that all parameters of a scan have in common."""
    scans = {i: about.scans for i, about in found.items()}
    together = collections.defaultdict(list)
    for i, numbers in scans.items():
        for number in numbers[:1]:
            together[number].append(os.path.dirname(paths[i]).split("/"))
    common = {number: os.path.commonprefix(words) for number, words in together.items()}
    stacks = dict.fromkeys(paths, (0, 0))
    for i, numbers in scans.items():
        if numbers:
            stacks[paths[i]] = len(numbers), len(common[numbers[0]])
    return stacks
