"""Parameters trained in full: full fine-tuning of all or the last layers, BitFit, LN-tuning, and
parameters trained along with any other method (a classifier's head).

    theta = w        w (the parameter's shape), or only the trained layers of a stack

BitFit (Ben Zaken et al. 2021, arXiv:2106.10199) trains the biases, LN-tuning (Qi et al. 2022,
arXiv:2211.08682) the norms' scales and biases. Training the last layers alone is the baseline
"FT-Top2" of the LoRA paper (arXiv:2106.09685, table 3).
"""

import jax.numpy as jnp
import numpy as np

from lorax import ops, tree
from lorax.methods.arrays import joined
from lorax.methods.contract import Method, State
from lorax.methods.targets import (
    Default,
    layer_of,
    layers_from_0,
    resolve_full,
    stack_depths,
    words_of,
)


def full(
    parameters: tuple[str, ...] = ("all",),
    layers: tuple[int, ...] | None = None,
    full: tuple[str, ...] = (),
) -> Method:
    """Train the parameters that the words `parameters` name (`lorax.methods.resolve_full`).

    layers: indices of the layers whose parameters are trained, negative ones from the end;
    parameters outside the layers (embeddings, the last norm) are then left out. None for all
    parameters. full: words for additional parameters to train in any layer, as in other methods.
    Raises ValueError for a word that matches nothing and a layer that does not exist.
    """
    words = words_of(parameters)
    besides = words_of(full)

    def chosen(params, sites):
        """{path: trained layers of a stacked parameter, (n,) integers, or None for all of it}."""
        paths = resolve_full(words, params, "method.parameters")
        trained = dict.fromkeys(paths)
        if layers is not None:
            trained = _in_layers(paths, layers, words, params, sites)
        trained |= dict.fromkeys(resolve_full(besides, params))
        flat = tree.flatten(params)
        coded = [path for path in trained if ops.is_operator(flat[path])]
        if coded:
            raise ValueError(
                f"quant: {', '.join(coded)} would be trained in full, but are quantised; leave "
                "quant at None or name other parameters"
            )
        return {path: trained[path] for path in flat if path in trained}

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        flat, trainable, constants = tree.flatten(params), {}, {}
        for path, index in chosen(params, sites).items():
            w = flat[path].astype(jnp.float32)
            trainable[path] = {"w": w if index is None else w[index]}
            if index is not None:
                constants[path] = {"layers": jnp.asarray(index, jnp.int32)}
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        flat = tree.flatten(params)
        size = lambda leaf, index: leaf.size // len(leaf) * len(index)
        trained = chosen(params, sites).items()
        return sum(flat[p].size if index is None else size(flat[p], index) for p, index in trained)

    hp = dict(parameters=words, layers=layers, full=besides)
    return Method("full", hp, init, bind, delta, count)


def _in_layers(paths, layers, words, params, sites) -> dict:
    """{path: as `chosen` in `full`} of the parameters among `paths` that are in the layers."""
    stacks = stack_depths(params, sites or ops.sites_from_shapes(params))
    numbers = {path: layer_of(path) for path in paths if path not in stacks}
    depth = max([*stacks.values(), *(n + 1 for n in numbers.values())], default=0)
    indices = sorted(layers_from_0(layers, depth, "the base has"))
    trained = {path: np.array(indices) for path in paths if path in stacks}
    trained |= {path: None for path in paths if numbers.get(path, -1) in indices}
    if not trained:
        raise ValueError(f"method.layers: {indices} leave nothing of {', '.join(words)}")
    return trained


def bitfit(layers: tuple[int, ...] | None = None, full: tuple[str, ...] = ()) -> Method:
    """BitFit: every bias, including those of norms, in the given layers (None: in all)."""
    return _full(Default(("biases",)), layers, full)


def ln_tuning(layers: tuple[int, ...] | None = None, full: tuple[str, ...] = ()) -> Method:
    """LN-tuning: scale and bias of every norm. (PEFT's trains the modules that it is given.)"""
    return _full(Default(("norms",)), layers, full)


_full = full  # `full` is also an argument's name


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with the trained values in place of the base's, in the base's dtype."""
    flat = tree.flatten(params)
    for path, x in joined(trainable, constants).items():
        w = x["w"].astype(flat[path].dtype)
        flat[path] = flat[path].at[x["layers"]].set(w) if "layers" in x else w
    return tree.unflatten(flat)


def delta(trainable, constants, params, sites=None):
    """{path: the parameter's change, float32}."""
    flat = tree.flatten(params)
    bound = tree.flatten(bind(trainable, constants, params))
    paths = joined(trainable)
    return {p: bound[p].astype(jnp.float32) - flat[p].astype(jnp.float32) for p in paths}


# ---------------------------------------------------------------------------- beside another method


def beside(method: Method, words: tuple[str, ...], dtype: str) -> Method:
    """The method, with the parameters that `words` name also trained in full, all in `dtype`.

    Raises ValueError for an unknown dtype. The method's `init` and `count` raise for words that
    match nothing or name parameters that the method adapts itself.
    """
    words = words_of(words)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"method.dtype: {dtype!r} is not one of float32, bfloat16")
    method = method._replace(hp={"full": words} | method.hp | {"dtype": dtype})
    if words:
        method = _both(method, _full((), full=words))

    def init(key, params, *args, **kwargs):
        trainable, constants = method.init(key, ops.inner(params), *args, **kwargs)
        cast = {path: leaf.astype(dtype) for path, leaf in tree.flatten(trainable).items()}
        return State(tree.unflatten(cast), constants)

    return method._replace(init=init)


def _both(method: Method, whole: Method) -> Method:
    """The method, with the parameters that `whole` (a `full`) trains added to its trees.

    The method's functions see only their own leaves, and as base the parameters as trained by
    `whole`: (IA)3 may scale a trained bias.
    """

    def init(key, params, *args, **kwargs):
        trainable, constants = method.init(key, params, *args, **kwargs)
        whole_trained = whole.init(key, params).trainable
        twice = joined(trainable).keys() & joined(whole_trained).keys()
        if twice:
            raise ValueError(
                f"method.full: {', '.join(sorted(twice))} are in method.targets as well"
            )
        return State(
            tree.unflatten(tree.flatten(trainable) | tree.flatten(whole_trained)), constants
        )

    def on_trained(function):
        """The method's function of (trainable, constants, params, ...), for the joint trees."""

        def of_both(trainable, constants, params, *args, **kwargs):
            leaves, whole_trained = apart(trainable)
            return function(leaves, constants, bind(whole_trained, {}, params), *args, **kwargs)

        return function and of_both

    def delta_of_both(trainable, constants, params, sites=None):
        updates = on_trained(method.delta)(trainable, constants, params, sites)
        moved = delta(apart(trainable)[1], {}, params)
        return updates | {path: dw + updates.get(path, 0) for path, dw in moved.items()}

    def penalty(trainable, constants):
        return method.penalty(apart(trainable)[0], constants)

    def count(params, sites=None):
        return method.count(params, sites) + whole.count(params)

    return method._replace(
        init=init,
        bind=on_trained(method.bind),
        delta=method.delta and delta_of_both,
        count=count,
        factors=on_trained(method.factors),
        penalty=method.penalty and penalty,
    )


def apart(trainable) -> tuple[dict, dict]:
    """(the method's own leaves, those of parameters trained in full, named w)."""
    flat = tree.flatten(trainable)
    part = lambda yes: tree.unflatten({p: x for p, x in flat.items() if p.endswith("/w") == yes})
    return part(False), part(True)
