"""Parameters trained as they are: full fine-tuning, its last layers, BitFit, LN-tuning, and what
any method trains beside its own (a classifier's head).

    theta = w        w (the parameter's shape), or of a stack of layers only those that are trained

BitFit (Ben Zaken et al. 2021, arXiv:2106.10199) trains the biases, LN-tuning (Qi et al. 2022,
arXiv:2211.08682) the norms' scales and biases. Training the last layers alone is the baseline
"FT-Top2" of the LoRA paper (arXiv:2106.09685, table 3).
"""

import jax.numpy as jnp
import numpy as np

from lorax import ops, tree
from lorax.methods.contract import Method, State
from lorax.methods.targets import (
    Default,
    joined,
    layer_of,
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

    layers: indices of the layers whose parameters are trained, negative ones from the end; what
    belongs to no layer (embeddings, the last norm) is then left out. None for all parameters.
    full: words for parameters that are trained in any layer, as beside any other method.
    Raises ValueError for a word that matches nothing and a layer that does not exist.
    """
    words = words_of(parameters)
    besides = (full,) if isinstance(full, str) else tuple(full)

    def chosen(params, sites):
        """{path: trained layers of a stacked parameter, (n,) integers, or None for all of it}."""
        paths = resolve_full(words, params, "method.parameters")
        found = dict.fromkeys(paths) if layers is None else of_layers(paths, params, sites)
        found |= dict.fromkeys(resolve_full(besides, params))
        flat = tree.flatten(params)
        coded = [path for path in found if ops.is_operator(flat[path])]
        if coded:
            raise ValueError(
                f"quant: {', '.join(coded)} would be trained as they are, but are held quantised; "
                "leave quant at None or name other parameters"
            )
        return {path: found[path] for path in flat if path in found}

    def of_layers(paths, params, sites):
        stacks = stack_depths(params, sites or ops.sites_from_shapes(params))
        numbers = {path: layer_of(path) for path in paths if path not in stacks}
        depth = max([*stacks.values(), *(n + 1 for n in numbers.values())], default=0)
        bad = [i for i in layers if not -depth <= i < depth]
        if bad or not layers:
            raise ValueError(f"method.layers: {bad or '()'} given, the base has {depth} layers")
        indices = sorted({i % depth for i in layers})
        found = {path: np.array(indices) for path in paths if path in stacks}
        found |= {path: None for path in paths if numbers.get(path, -1) in indices}
        if not found:
            raise ValueError(f"method.layers: {indices} leave nothing of {', '.join(words)}")
        return found

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
        each = lambda leaf, index: leaf.size // len(leaf) * len(index)
        sizes = {
            path: flat[path].size if index is None else each(flat[path], index)
            for path, index in chosen(params, sites).items()
        }
        return sum(sizes.values())

    hp = dict(parameters=words, layers=layers, full=besides)
    return Method("full", hp, init, bind, delta, count)


def bitfit(layers: tuple[int, ...] | None = None, full: tuple[str, ...] = ()) -> Method:
    """BitFit: every bias, of norms as well, of the layers that are given (None: of all)."""
    return _full(Default(("biases",)), layers, full)


def ln_tuning(layers: tuple[int, ...] | None = None, full: tuple[str, ...] = ()) -> Method:
    """LN-tuning: scale and bias of every norm. PEFT's wraps the modules that it is told to."""
    return _full(Default(("norms",)), layers, full)


_full = full  # whose name the argument takes


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with the trained ones in place of the base's, in the dtype of the base's."""
    flat = tree.flatten(params)
    for path, own in joined(trainable, constants).items():
        w = own["w"].astype(flat[path].dtype)
        flat[path] = flat[path].at[own["layers"]].set(w) if "layers" in own else w
    return tree.unflatten(flat)


def delta(trainable, constants, params, sites=None):
    """{path: how far the parameter has moved, float32}."""
    flat = tree.flatten(params)
    bound = tree.flatten(bind(trainable, constants, params))
    paths = joined(trainable)
    return {p: bound[p].astype(jnp.float32) - flat[p].astype(jnp.float32) for p in paths}


def beside(method: Method, words: tuple[str, ...], dtype: str) -> Method:
    """The method, with the parameters that `words` name trained in full as well, all in `dtype`.

    Raises ValueError for an unknown dtype; the method's `init` and `count` then raise for words
    that match nothing or name what the method adapts itself.
    """
    words = (words,) if isinstance(words, str) else tuple(words)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"method.dtype: {dtype!r} is not one of float32, bfloat16")
    method = method._replace(hp={"full": words} | method.hp | {"dtype": dtype})
    rest = _full((), full=words) if words else None

    def init(key, params, *args, **kwargs):
        trainable, constants = method.init(key, ops.inner(params), *args, **kwargs)
        flat = tree.flatten(trainable)
        if rest is not None:
            more = rest.init(key, params).trainable
            twice = joined(trainable).keys() & joined(more).keys()
            if twice:
                raise ValueError(
                    f"method.full: {', '.join(sorted(twice))} are in method.targets as well"
                )
            flat |= tree.flatten(more)
        cast = {path: leaf.astype(dtype) for path, leaf in flat.items()}
        return State(tree.unflatten(cast), constants)

    if rest is None:
        return method._replace(init=init)

    # The method comes after: it may change what is trained here as well, (IA)3 a trained bias.
    def bind_both(trainable, constants, params, key=None, sites=None):
        own, more = _apart(trainable)
        return method.bind(own, constants, bind(more, {}, params), key, sites)

    def delta_both(trainable, constants, params, sites=None):
        own, more = _apart(trainable)
        moved = delta(more, {}, params)
        then = method.delta(own, constants, bind(more, {}, params), sites)
        return then | {path: dw + then.get(path, 0) for path, dw in moved.items()}

    def count(params, sites=None):
        return method.count(params, sites) + rest.count(params)

    on_own = lambda f: f and (lambda trainable, *args, **kw: f(_apart(trainable)[0], *args, **kw))
    return method._replace(
        init=init,
        bind=bind_both,
        delta=delta_both if method.delta else None,
        count=count,
        factors=on_own(method.factors),
        penalty=on_own(method.penalty),
    )


def _apart(trainable) -> tuple[dict, dict]:
    """The tree without, and with only, what `beside` has added: the leaves called w."""
    flat = tree.flatten(trainable)
    part = lambda yes: tree.unflatten({p: x for p, x in flat.items() if p.endswith("/w") == yes})
    return part(False), part(True)
