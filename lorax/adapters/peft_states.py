"""Builds a method and its state from the arrays in PEFT's files."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lorax import methods, tree
from lorax.interop.peft import matrices
from lorax.interop.peft.modules import Arrays
from lorax.models import Base


def build(
    name: str, hp: dict, arrays: Mapping[str, dict], weights: Arrays, base: Base
) -> tuple[methods.Method, methods.State]:
    """The method of that name, and its state with these arrays.

    arrays: {path of a leaf, or its end: {index in its stack: its first rows and columns}}, zero
    elsewhere. weights: {parameter with its layer: value} of what was trained in full.
    """
    method = _method(name, hp, weights, base)
    state = method.init(jax.random.key(0), base.params, base.sites)
    trainable, constants = ({p: np.array(x) for p, x in tree.flatten(t).items()} for t in state)
    unset = {path for path in trainable if not path.endswith("/w")}
    for end, values in arrays.items():
        known = (*trainable, *constants)
        paths = [end] if end in known else [path for path in known if path.endswith(f"/{end}")]
        if len(paths) != 1:
            raise ValueError(f"{end}: {name} has {', '.join(paths) or 'no such array'} here")
        (path,) = paths
        leaf = trainable.get(path, constants.get(path))
        _fill(leaf, values, end, padded=name in matrices.KINDS)
        unset.discard(path)
    if unset:
        raise ValueError(f"{', '.join(sorted(unset))}: {name} needs them")
    for parameter, value in weights.items():
        path, index = base.parts[parameter]
        trainable[f"{path}/w"][index] = value
    jax_tree = lambda flat: tree.unflatten({path: jnp.asarray(x) for path, x in flat.items()})
    return method, methods.State(jax_tree(trainable), jax_tree(constants))


def _method(name: str, hp: dict, weights: Arrays, base: Base) -> methods.Method:
    """The method, which also trains the parameters of `weights` in full."""
    full = dict.fromkeys(base.parts[parameter].path for parameter in weights)
    if name == "ln-tuning":  # which trains norms itself
        flat = tree.flatten(base.params)
        norm = lambda path: f"{path.rpartition('/')[0]}/scale" in flat
        full = [path for path in full if not norm(path)]
    words = tuple(f"re:{re.escape(path)}" for path in full)
    return methods.method(name, **hp | ({"full": words} if words else {}))


def _fill(leaf: np.ndarray, values: dict, name: str, padded: bool) -> None:
    """Write the values {index: array} into a leaf and zero elsewhere. padded: whether an array may
    be smaller than its place."""
    leaf[...] = 0
    for index, value in values.items():
        shape, room = np.shape(value), leaf.shape[len(index) :]
        if shape != room and not (padded and np.less_equal(shape, room).all()):
            raise ValueError(f"{name}: {shape} given, the base's is {room}")
        leaf[(*index, *map(slice, shape))] = value
