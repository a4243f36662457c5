"""What a trained method leaves in lorax's own format, whatever the method.

state.safetensors    its arrays, at trainable/path/name and constants/path/name (`methods.State`)
method.json          name and hyperparameters; of a user's method the file that registered it
delta.safetensors    where it is a change of weights: {layer: dW (in, out) float32} of the matrices

The arrays of a sweep's member are padded to the widest. Of a user's method nothing but the dense
updates can be read where its file has not run: a file named by data is not run by itself.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lorax import catalogue, methods, tree
from lorax.errors import nearest
from lorax.files import atomically, write_json
from lorax.interop.states import DELTA, METHOD, STATE, about
from lorax.interop.tensors import opened, read_arrays
from lorax.models import Base


def is_here(directory: str | os.PathLike) -> bool:
    """Whether a directory holds a trained method in this format."""
    return (Path(directory) / METHOD).exists()


def save(
    directory: str | os.PathLike, method: methods.Method, state: methods.State, base: Base
) -> None:
    """Write a trained method."""
    directory = Path(directory)
    arrays = {
        f"{kind}/{path}": np.asarray(x)
        for kind, t in state._asdict().items()
        for path, x in tree.flatten(t).items()
    }
    atomically(directory / STATE, lambda file: save_file(arrays, file))
    file = catalogue.row(method.name).file
    what = {"name": method.name, "hp": method.hp} | (
        {} if file is None else {"file": Path(file).name}
    )
    write_json(directory / METHOD, what)
    if method.delta is None or not method.stores_delta:
        return
    matrices = {}
    for path, update in method.delta(*state, base.params, base.sites).items():
        if path in base.sites:
            matrix = np.asarray(base.sites[path].to_matrix(update))
            for name, index in base.layers_of(path).items():
                if matrix[index].any():
                    matrices[name] = matrix[index]
    atomically(directory / DELTA, lambda file: save_file(matrices, file))


def load(directory: str | os.PathLike, base: Base) -> tuple[methods.Method, methods.State]:
    """Read a trained method.

    Raises FileNotFoundError, or ValueError that names the file for a damaged one, a method that is
    not registered, hyperparameters that it does not have, and arrays that do not fit the base.
    """
    directory = Path(directory)
    what = about(directory)
    name, hp, code = what["name"], what["hp"], what.get("file")
    if name not in catalogue.ROWS:
        given = f"{directory / METHOD}: method {name!r} is not registered"
        if code is not None:
            raise ValueError(f"{given}; give --method FILE that registers it, as {code} did")
        raise ValueError(f"{given}{nearest(name, catalogue.ROWS)}")
    known = methods.hyperparameters(name)  # without what methods add, such as the scale
    tupled = lambda value: tuple(map(tupled, value)) if isinstance(value, list) else value
    given = {key: tupled(value) for key, value in hp.items() if key in known and value is not None}
    try:
        method = methods.method(name, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / METHOD}: {error}") from None
    file, found = directory / STATE, {"trainable": {}, "constants": {}}
    for key, value in read_arrays(file).items():
        kind, _, path = key.partition("/")
        if kind not in found or not path:
            raise ValueError(f"{file}: {key} is neither trainable/... nor constants/...")
        found[kind][path] = jnp.asarray(value)
    state = methods.State(*map(tree.unflatten, found.values()))
    _check(file, method, state, base)
    return method, state


def classes(directory: str | os.PathLike) -> int | None:
    """Classes that a trained classifier's head tells apart, None without one."""
    with opened(Path(directory) / STATE) as stored:
        name = "trainable/head/out/kernel/w"
        return stored.get_slice(name).get_shape()[-1] if name in stored.keys() else None


def _check(file: Path, method: methods.Method, state: methods.State, base: Base) -> None:
    """Raises ValueError for arrays that the base's parameters have no place or no room for."""
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
