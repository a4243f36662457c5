"""The files of lorax's own format, which any method's training leaves (`lorax.states`).

What can be read here needs neither the base nor the method.
"""

import os
from pathlib import Path

import numpy as np

from lorax.files import read_json
from lorax.interop.tensors import read_arrays

STATE, METHOD, DELTA = "state.safetensors", "method.json", "delta.safetensors"


def about(directory: str | os.PathLike) -> dict:
    """method.json: name, hp {hyperparameter: value}, and of a user's method file.

    Raises FileNotFoundError, ValueError that names the file for one that is damaged.
    """
    file = Path(directory) / METHOD
    found = read_json(file)
    if not isinstance(found.get("name"), str) or not isinstance(found.get("hp"), dict):
        raise ValueError(f"{file}: must have the name and the hyperparameters (hp) of a method")
    return found


def deltas(directory: str | os.PathLike) -> dict[str, np.ndarray]:
    """{layer: dW (in, out) float32} of every matrix that was changed.

    Raises FileNotFoundError where there are none: of methods that are no change of weights.
    ValueError that names a damaged file.
    """
    return read_arrays(Path(directory) / DELTA)
