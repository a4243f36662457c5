"""Adapter files of other programs for tests: random arrays, a file of them, and what it means."""

import numpy as np
import safetensors.numpy

from lorax.interop.adapter import Factors

RNG = np.random.default_rng(0)


def draw(*shape, dtype=np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def written(path, tensors, name="some lora.safetensors", **metadata):
    """A safetensors file of arrays and numbers in the folder `path`."""
    arrays = {key: np.ascontiguousarray(x) for key, x in tensors.items()}
    arrays = {key: x.reshape(np.shape(tensors[key])) for key, x in arrays.items()}
    safetensors.numpy.save_file(arrays, path / name, metadata or None)
    return path / name


def dense(update) -> np.ndarray:
    """dW (in, out) float64 of an update, without DoRA's lengths."""
    x = update.read()
    return x.s * x.a.astype(np.float64) @ x.b if isinstance(x, Factors) else x


def as_matrix(weight) -> np.ndarray:
    """(in kh kw, out) of a weight (out, in, kh, kw)."""
    return weight.reshape(len(weight), -1).T
