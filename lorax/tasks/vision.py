"""Images to classify: MNIST, and the digits that scikit-learn ships.

Pixels are uint8 and scaled to [0, 1] when the loss is computed. With `task.shuffle` the pixels of
all images, train and evaluation alike, are permuted by one permutation: what a fully connected
network can learn stays the same, what a convolution gains from neighbours is gone (Li et al. 2018,
arXiv:1804.08838, section 3.2).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorax.interop.tensors import read_npz
from lorax.tasks import kinds
from lorax.tasks.data import Data, accuracy, arrays
from lorax.tasks.rows import check_path, count

CLASSES = 10
EXPECTED = "MNIST as Keras has it, mnist.npz with x_train, y_train, x_test and y_test"
DIGITS_EVAL = 360  # of 1,797


def mnist(config: Mapping[str, Any]) -> Data:
    """Handwritten digits of 28 x 28 pixels (LeCun et al. 1998): 50,000 to train on, of which the
    first n_train, the 10,000 after them for validation, and the file's 10,000 test images for test.
    Without test rows (`eval.test` 0): 60,000 to train on, and the test images for validation.

    config: `path` is an .npz file of x_train (N, 28, 28) uint8, y_train (N,) integers from 0 to 9,
        x_test and y_test; other images of these shapes and classes work too.
    Raises FileNotFoundError; ValueError naming the field, or the file.
    """
    whole = _arrays(config, *mnist_sets(config, apart=False))

    def build(*arguments, apart=False):
        data = _arrays(config, *mnist_sets(config, apart=True)) if apart else whole
        return data.build(*arguments, apart=apart)

    return whole._replace(build=build)


def mnist_sets(config: Mapping[str, Any], apart: bool):
    """(train set, evaluation set, name of the file, test set), each set (images (N, 28, 28) uint8,
    labels (N,)); see `mnist`. apart: whether there are test rows; without, the last is None."""
    file = check_path(config, EXPECTED)
    x_train, y_train, x_test, y_test = read(file)
    test, held_out = (x_test, y_test), len(x_train) // 6
    if not apart:
        return (x_train, y_train), test, file.name, None
    if not held_out:
        raise ValueError(
            f"task.path: {file} has {len(x_train)} train images, and one in six of them is for "
            "validation; give at least 6, or set eval.test to 0"
        )
    train, evaluation = (
        (x_train[i], y_train[i]) for i in (slice(None, -held_out), slice(-held_out, None))
    )
    return train, evaluation, file.name, test


def digits(config: Mapping[str, Any]) -> Data:
    """The 1,797 digits of 8 x 8 pixels of scikit-learn (a part of UCI's "Optical Recognition of
    Handwritten Digits"): 1,437 to train on, of which the first n_train, and 360 to evaluate.

    Half of the 360 are for test. Pixels of 0 to 16 are scaled to 0 to 255. The split into 1,437 and
    360 is always the same: `train_test_split` with random_state 0, stratified, so that both parts
    have all classes in equal shares; train images are in its random order.
    """
    return _arrays(config, *digit_sets(), "scikit-learn's digits")


def digit_sets():
    """(train set, evaluation set), each (images (N, 8, 8) uint8, labels (N,)); see `digits`."""
    from sklearn.datasets import load_digits  # a second of imports
    from sklearn.model_selection import train_test_split

    dataset = load_digits()
    images, labels = np.round(dataset.images * (255 / 16)).astype(np.uint8), dataset.target
    split = dict(test_size=DIGITS_EVAL, stratify=labels, random_state=0)
    train, evaluation = train_test_split(np.arange(len(labels)), **split)
    return tuple((images[index], labels[index]) for index in (train, evaluation))


def permutation(pixels: int, seed: int) -> np.ndarray:
    """The order of `task.shuffle`: (pixels,) int64; pixel i of a shuffled image is pixel
    permutation[i] of the original. A function of `task.seed` alone."""
    return np.random.default_rng(seed).permutation(pixels)


def read(file: Path) -> tuple[np.ndarray, ...]:
    """x_train, y_train, x_test, y_test of an .npz file. Raises ValueError that names the file if it
    is not an .npz file, damaged, or has other contents; pickles in it are not opened."""
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        by_name = read_npz(file, names)
    except ValueError as error:
        raise ValueError(f"task.path: {error}; expected {EXPECTED}") from None
    arrays = tuple(by_name[name] for name in names)
    for (x, y), part in zip((arrays[:2], arrays[2:]), ("train", "test"), strict=True):
        if x.dtype != np.uint8 or x.ndim != 3 or x.shape[1:] != (28, 28) or not len(x):
            raise ValueError(
                f"task.path: {file}: x_{part} is {x.dtype} of shape {x.shape}; expected uint8 of "
                "(N, 28, 28)"
            )
        whole = np.issubdtype(y.dtype, np.integer) and y.shape == (len(x),)
        if not whole or not 0 <= y.min() <= y.max() < CLASSES:
            raise ValueError(
                f"task.path: {file}: y_{part} is {y.dtype} of shape {y.shape}; expected "
                f"{count(len(x))} integers from 0 to {CLASSES - 1}"
            )
    return arrays


def _arrays(config, train, evaluation, source: str, test=None) -> Data:
    """The data from sets of (images (N, height, width) uint8, labels (N,) integers). test: None: to
    be cut from `evaluation`."""
    sets = [train, evaluation] + ([] if test is None else [test])
    note = f" of {source}"
    if config.get("shuffle"):
        order = permutation(math.prod(train[0].shape[1:]), config.get("seed") or 0)
        shuffled = lambda x: x.reshape(len(x), -1)[:, order].reshape(x.shape)
        sets = [(shuffled(x), y) for x, y in sets]
        note += ", pixels shuffled"
    train, evaluation, *tests = ((x[..., None], y) for x, y in sets)
    settings = dict(note=note, what="images", test=tests[0] if tests else None)
    return arrays(train, evaluation, CLASSES, accuracy, **settings)


def shapes(config, lead, seq_len, base):
    """Shapes of batches; see `Data`."""
    image = jax.ShapeDtypeStruct(base.input_shape, np.uint8)
    return kinds.array_shapes(lead, image, jax.ShapeDtypeStruct((), np.int32))
