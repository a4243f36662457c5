"""The files of lorax's own format, which works for any method.

state.safetensors    its arrays, at trainable/path/name and constants/path/name
method.json          its name and hyperparameters; for a user's method the file that registered it
delta.safetensors    for methods that change weights: {layer: dW (in, out) float32}

Reading here needs neither the base nor the method; `lorax.adapters.states` uses both.
"""

import os
from pathlib import Path

import numpy as np

from lorax.files import read_json
from lorax.interop.adapter import Dense
from lorax.interop.tensors import opened, read_arrays

STATE, METHOD, DELTA = "state.safetensors", "method.json", "delta.safetensors"


def is_here(directory: str | os.PathLike) -> bool:
    """Whether a directory holds a trained method in this format."""
    return (Path(directory) / METHOD).exists()


def about(directory: str | os.PathLike) -> dict:
    """method.json: name, hp {hyperparameter: value}, and file for a user's method.

    Raises FileNotFoundError, ValueError that names the file for one that is damaged.
    """
    file = Path(directory) / METHOD
    fields = read_json(file)
    if not isinstance(fields.get("name"), str) or not isinstance(fields.get("hp"), dict):
        raise ValueError(f"{file}: must have the name and the hyperparameters (hp) of a method")
    return fields


def deltas(directory: str | os.PathLike) -> dict[str, np.ndarray]:
    """{layer: dW (in, out) float32} of every matrix that was changed.

    Raises FileNotFoundError if there are none because the method does not change weights,
    ValueError that names a damaged file.
    """
    return read_arrays(Path(directory) / DELTA)


def read(directory: str | os.PathLike) -> Dense:
    """The dense updates that were stored. Raises as `about` and `deltas`."""
    fields = about(directory)
    return Dense(fields["name"], fields["hp"], deltas(directory))


def classes(directory: str | os.PathLike) -> int | None:
    """Number of classes of a trained classifier's head, None if there is none."""
    with opened(Path(directory) / STATE) as stored:
        name = "trainable/head/out/kernel/w"
        return stored.get_slice(name).get_shape()[-1] if name in stored.keys() else None
