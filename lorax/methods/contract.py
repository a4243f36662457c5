"""The contract between a method and all that trains, counts, merges, exports and plans it.

A method is a few pure functions and a formula:

    init(key, params, ...) -> State(trainable, constants)  what is trained, what is only stored
    bind(trainable, constants, params, ...) -> params      the model's parameters, with operators
    delta(trainable, constants, params) -> {path: dW}      the update, where it can be merged
    count(params, ...) -> int                              trainable parameters, by the formula
"""

from collections.abc import Callable
from typing import NamedTuple


class State(NamedTuple):
    """trainable: what the optimiser sees. constants: arrays that the method stores, untrained.

    Leaves lie at path/name, path that of the parameter they belong to; the two trees have no leaf
    in common. The name w is for parameters that are trained whole (`full`).
    """

    trainable: dict
    constants: dict


def _unchanged(inner, constants, train):
    return inner


def _as_stored(constants, params, sites=None):
    return constants


class Method(NamedTuple):
    """A method with its hyperparameters.

    Members of a sweep that share a program have trees of one shape, and one of them gives the
    program its functions: all but `init` and `count` read what members may differ in from the
    trees. All but `count` can be traced, `init` for a plan, which asks for shapes alone.

    name, hp: as given to `lorax.method`, defaults filled in.
    init(key, params, sites=None, targets=None, pad=None, evidence=None) -> State. targets: {path:
        Site} to have arrays for (default: its own), pad: width to pad to (default: its own); a
        sweep gives the union and the maximum. evidence: what a start that reads data has seen.
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
    adapts(params, sites=None) -> {path: (Site, active)}, what `methods.adapted_matrices` gives,
        where `init` takes targets; None where it does not.
    width: what `pad` would be for it alone, such as its rank; None where nothing is padded.
    needs: the kind of evidence that `init` reads (`lorax.methods.starts.NEEDS`).
    stores_delta: whether an export holds dW as well, which may be far larger than the state.
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
    adapts: Callable | None = None
    width: int | None = None
    needs: str | None = None
    stores_delta: bool = True
