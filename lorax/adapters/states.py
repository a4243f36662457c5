"""Trained methods of any kind in lorax's own format (files: `lorax.interop.states`).

The arrays of a sweep's member are padded to the widest. A user's method can only be read after its
file has run, because lorax never runs a file that is only named in data.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from lorax import catalogue, gather, hosts, methods, tree
from lorax.errors import nearest
from lorax.files import write_json
from lorax.interop import tensors
from lorax.interop.adapter import Dense
from lorax.interop.states import DELTA, METHOD, STATE, about
from lorax.interop.tensors import read_arrays
from lorax.models import Base


def save(
    directory: str | os.PathLike, method: methods.Method, state: methods.State, base: Base
) -> None:
    """Write a trained method."""
    directory = Path(directory)
    arrays = {
        f"{kind}/{path}": x
        for kind, arrays_of in state._asdict().items()
        for path, x in tree.flatten(arrays_of).items()
    }
    tensors.write(directory / STATE, arrays)
    fields = {"name": method.name, "hp": method.hp}
    file = catalogue.row(method.name).file
    if file is not None:
        fields["file"] = Path(file).name
    write_json(directory / METHOD, fields)
    if method.delta is not None and method.stores_delta:
        tensors.write(directory / DELTA, dense(base, method, state).updates)


def dense(base: Base, method: methods.Method, state: methods.State) -> Dense:
    """The updates of a trained method by layer; layers that it does not change are left out. Those
    to a base that a mesh divides stay on its devices."""
    if method.delta is None:
        return Dense(method.name, method.hp, {}, tree.flatten(state.trainable), False)
    updates, beside = {}, {}
    for path, update in method.delta(*state, base.params, base.sites).items():
        if path not in base.sites:
            beside[path] = update
            continue
        matrices = base.sites[path].to_matrix(update)
        if gather.mesh_of(matrices) is None:
            matrices = hosts.whole(matrices)
        for layer, index in base.layers_of(path).items():
            if matrices[index].any():
                updates[layer] = matrices[index]
    return Dense(method.name, method.hp, updates, beside)


def load(directory: str | os.PathLike, base: Base) -> tuple[methods.Method, methods.State]:
    """Read a trained method.

    Raises FileNotFoundError, or ValueError that names the file for a damaged one, a method that is
    not registered, hyperparameters that it does not have, and arrays that do not fit the base.
    """
    directory = Path(directory)
    method = _method(directory)
    file, trees = directory / STATE, {"trainable": {}, "constants": {}}
    for key, value in read_arrays(file).items():
        kind, _, path = key.partition("/")
        if kind not in trees or not path:
            raise ValueError(f"{file}: {key} is neither trainable/... nor constants/...")
        trees[kind][path] = jnp.asarray(value)
    state = methods.State(*map(tree.unflatten, trees.values()))
    _check(file, method, state, base)
    return method, state


def _method(directory: Path) -> methods.Method:
    """The method that method.json describes."""
    fields, file = about(directory), directory / METHOD
    name, code = fields["name"], fields.get("file")
    if name not in catalogue.ROWS:
        given = f"{file}: method {name!r} is not registered"
        if code is not None:
            raise ValueError(f"{given}; give --method FILE that registers it, as {code} did")
        raise ValueError(f"{given}{nearest(name, catalogue.ROWS)}")
    tupled = lambda value: tuple(map(tupled, value)) if isinstance(value, list) else value
    hp = methods.given(name, fields["hp"])  # without what methods add, such as the scale
    try:
        return methods.method(name, **{key: tupled(value) for key, value in hp.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def _check(file: Path, method: methods.Method, state: methods.State, base: Base) -> None:
    """Raises ValueError for arrays that don't fit the base's parameters."""
    bound = lambda *state: method.bind(*state, base.params, sites=base.sites)
    try:
        changed = tree.flatten(jax.eval_shape(bound, *state))
        if method.delta is not None:
            delta = lambda *state: method.delta(*state, base.params, base.sites)
            changed |= jax.eval_shape(delta, *state)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: does not fit {base.name} ({error})") from None
    shapes = {path: leaf.shape for path, leaf in tree.flatten(base.params).items()}
    for path, leaf in changed.items():
        shape = getattr(leaf, "shape", shapes.get(path))
        if path in shapes and shape != shapes[path]:
            raise ValueError(
                f"{file}: its {path} is {shape}, but {base.name} has {shapes[path]} there"
            )
