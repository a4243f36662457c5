"""The contract between a method and the code that trains, counts, merges, exports and plans it.

A method is a few pure functions and a formula:

    init(key, params, ...) -> State(trainable, constants)  arrays to train, arrays to store
    bind(trainable, constants, params, ...) -> params      the model's parameters, with leaves
    delta(trainable, constants, params) -> {path: dW}      the update, if it can be merged
    count(params, ...) -> int                              trainable parameters, by the formula
"""

from collections.abc import Callable
from typing import NamedTuple


class State(NamedTuple):
    """trainable: the tree that the optimiser updates. constants: stored arrays, never updated.

    An array has the path of its parameter and a name, path/name; no path is in both trees. The name
    w is reserved for parameters that are trained in full.
    """

    trainable: dict
    constants: dict


def _unchanged(inner, constants, train):
    return inner


def _as_stored(constants, params, sites=None):
    return constants


class Method(NamedTuple):
    """A method with its hyperparameters.

    Members of a sweep that share a program have trees of equal shapes, and the program uses the
    functions of one of them. So all functions except `init` and `count` must read from the trees
    whatever may differ between members. All except `count` can be traced; a plan traces `init` for
    its shapes.

    name, hp: as given to `lorax.method`, defaults filled in.
    init(key, params, sites=None, targets=None, pad=None, evidence=None) -> State. targets: {path:
        Site} to make arrays for (default: the adapted ones), pad: width to pad to (default: no
        padding); a sweep passes the union and the maximum. evidence: {path: {kind: array}} for
        initialisations that read data.
    bind(trainable, constants, params, key=None, sites=None) -> params for `lorax.apply`. key: for
        dropout, in training.
    delta(trainable, constants, params, sites=None) -> {path: dW in the kernel's shape, float32};
        None if the method does not change weights.
    count(params, sites=None) -> number of trainable parameters, padding not counted.
    factors(trainable, constants, params, sites=None) -> {path: (a, b, s, m)} with dW = s a b, a
        (layers..., in, r), b (layers..., r, out), s (layers...), padding included; m: None, or
        DoRA's trained column lengths (layers..., out). None if the update is not of low rank.
    optimizer(inner, constants, train) -> the `optax.GradientTransformation` that trains it, wrapped
        around `inner`, the configured one. train: the section of the config.
    penalty(trainable, constants) -> () float32, added to the training loss; None for no penalty.
    expand(constants, params, sites=None) -> constants plus arrays that are computed from them once
        for many steps instead of being stored (`lorax.methods.subspace`). `bind` takes constants
        with and without them.
    adapts(params, sites=None) -> {path: (Site, active)}, as from `methods.adapted_matrices`, if
        `init` takes targets; None if it does not.
    width: the `pad` that this member needs, such as its rank; None if nothing is padded.
    needs: the kind of evidence that `init` reads (`lorax.methods.starts.NEEDS`), None for none.
    stores_delta: whether an export includes dW, which may be far larger than the state.
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
