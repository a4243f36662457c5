"""Adaptation methods behind one contract.

A method is a few pure functions and a formula:

    init(key, params, ...) -> State(trainable, constants)  what is trained, what is only stored
    bind(trainable, constants, params, ...) -> params      the model's parameters, with operators
    delta(trainable, constants, params) -> {path: dW}      the update, where it can be merged
    count(params, ...) -> int                              trainable parameters, by the formula

`lorax.method("lora", rank=8)` gives the method with its hyperparameters filled in. To add one,
write such a function of hyperparameters and enter it in `METHODS`.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

from lorax import ops, tree
from lorax.errors import nearest
from lorax.methods.targets import (  # noqa: F401
    FULL_WORDS,
    GROUPS,
    WORDS,
    Default,
    active_layers,
    fill,
    joined,
    key_for,
    matching,
    own,
    resolve,
    resolve_full,
    words_of,
)


class State(NamedTuple):
    """trainable: what the optimiser sees. constants: arrays that the method stores, untrained.

    Leaves lie at path/name, path that of the parameter they belong to; the two trees have no leaf
    in common.
    """

    trainable: dict
    constants: dict


def _unchanged(inner, constants, train):
    return inner


def _as_stored(constants, params, sites=None):
    return constants


class Method(NamedTuple):
    """A method with its hyperparameters.

    name, hp: as given to `lorax.method`, defaults filled in.
    init(key, params, sites=None, targets=None, pad=None, evidence=None) -> State. targets: {path:
        Site} to have arrays for (default: its own), pad: rank to pad to (default: its own); a sweep
        gives the union and the maximum, so that all its members have trees of one shape. evidence:
        what a start that reads data has seen (`lorax.methods.starts`).
    bind(trainable, constants, params, key=None, sites=None) -> params for `lorax.apply`. key: for
        dropout, in training.
    delta(trainable, constants, params, sites=None) -> {path: dW in the kernel's shape, float32};
        None where the method is no change of weights.
    count(params, sites=None) -> number of trainable parameters, padding not counted.
    factors(trainable, constants, params, sites=None) -> {path: (a, b, s)} with dW = s a b, a
        (layers..., in, r), b (layers..., r, out), s (layers...), padding included; None where the
        update is not of low rank.
    optimizer(inner, constants, train) -> the `optax.GradientTransformation` that trains it, around
        the one that the config asks for. train: the config's section.
    penalty(trainable, constants) -> () float32, added to the loss that is differentiated; None for
        nothing.
    expand(constants, params, sites=None) -> constants, with what is made of them for many steps and
        not worth storing (`lorax.methods.subspace`). `bind` takes either.
    """

    name: str
    hp: dict
    init: Callable
    bind: Callable
    delta: Callable | None
    count: Callable
    factors: Callable | None = None
    optimizer: Callable = _unchanged
    penalty: Callable | None = None
    expand: Callable = _as_stored


from lorax.methods import (  # noqa: E402  (their functions return what stands above)
    adalora,
    bottleneck,
    full,
    kronecker,
    lora,
    prefix,
    scaling,
    subspace,
    vera,
)

#: name -> function of hyperparameters that returns the `Method`.
METHODS: dict[str, Callable[..., Method]] = {
    "lora": lora.lora,
    "rslora": lora.rslora,
    "dora": lora.dora,
    "lora-fa": lora.lora_fa,
    "lora+": lora.lora_plus,
    "adalora": adalora.adalora,
    "loha": kronecker.loha,
    "lokr": kronecker.lokr,
    "vera": vera.vera,
    "full": full.full,
    "bitfit": full.bitfit,
    "ln-tuning": full.ln_tuning,
    "ia3": scaling.ia3,
    "houlsby": bottleneck.houlsby,
    "pfeiffer": bottleneck.pfeiffer,
    "prefix": prefix.prefix,
    "prompt": prefix.prompt,
    "llama-adapter": prefix.llama_adapter,
    "subspace": subspace.subspace,
    "said": subspace.said,
    "lora-subspace": subspace.lora_subspace,
}


def method(name: str, **hp) -> Method:
    """The method of that name, e.g. `method("lora", rank=8, alpha=8, targets=("q", "v"))`.

    Every method takes two more: full, parameters trained as they are beside its own
    (`resolve_full`), such as a classifier's head; dtype, of what is trained.
    Raises ValueError for an unknown name, an unknown hyperparameter or a value out of range.
    """
    known = hyperparameters(name)
    for field in hp:
        if field not in known:
            raise ValueError(
                f"method.{field}: {name} has no such hyperparameter, only {', '.join(known)}"
                f"{nearest(field, known)}"
            )
    dtype = hp.pop("dtype", "float32")
    # Methods of `full` see to such words themselves: what both name is trained once.
    words = () if "full" in inspect.signature(METHODS[name]).parameters else hp.pop("full", ())
    return full.beside(METHODS[name](**hp)._replace(name=name), words, dtype)


def hyperparameters(name: str) -> tuple[str, ...]:
    """The names of the hyperparameters of a method. Raises ValueError for an unknown name."""
    if name not in METHODS:
        raise ValueError(
            f"method.name: {name!r} is not one of {', '.join(METHODS)}{nearest(name, METHODS)}"
        )
    return tuple(dict.fromkeys((*inspect.signature(METHODS[name]).parameters, "full", "dtype")))


def merge(method: Method, state: State, params: dict, sites=None) -> dict:
    """Plain parameters with the update added, in float32 and rounded once to their own dtype.

    Raises ValueError for a method that is no change of weights (prefixes, bottleneck adapters).
    """
    if method.delta is None:
        raise ValueError(f"{method.name}: is no change of weights and can't be merged")
    sites = sites or ops.sites_from_shapes(params)
    flat = tree.flatten(method.bind(*state, params, sites=sites))
    return tree.unflatten({path: ops.dense(leaf, sites.get(path)) for path, leaf in flat.items()})
