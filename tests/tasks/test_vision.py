"""Images as tasks: the rows, the split, the order of the pixels, and what does not fit."""

import math
import zipfile

import numpy as np
import pytest
from support import data

from lorax import tasks
from lorax.models.load import skeleton
from lorax.tasks import kinds, vision

DIGITS = {"name": "digits"}


def base(name="mlp-64-10"):
    return skeleton(f"random:{name}")


def build(config, name="mlp-64-10", eval_examples=None):
    return tasks.build(config, None, 128, eval_examples, base(name))


def small(path, n=(12, 5), seed=0, **changes):
    """A file of MNIST's shapes with a few random images; arrays replaced, or left out if None."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, k in zip(("train", "test"), n, strict=True):
        arrays[f"x_{part}"] = rng.integers(0, 256, (k, 28, 28)).astype(np.uint8)
        arrays[f"y_{part}"] = (np.arange(k) % 10).astype(np.uint8)
    arrays |= changes
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return {"name": "mnist", "path": str(path)}


# ------------------------------------------------------------------------------------------- rows


def test_digits_are_scikit_learns_and_split_into_equal_shares():
    from sklearn.datasets import load_digits

    task, theirs = build(DIGITS), load_digits()
    assert (tasks.size(task.train), tasks.size(task.eval)) == (1437, 360)
    assert task.note == "digits: 1,437 train and 360 eval images of scikit-learn's digits"
    both = {k: np.concatenate([task.train[k], task.eval[k]]) for k in task.train}
    assert both["inputs"].shape == (1797, 8, 8, 1) and both["inputs"].dtype == np.uint8
    assert both["label"].dtype == np.int32 and both["weight"].dtype == np.float32
    assert (both["weight"] == 1).all() and both["inputs"].max() == 255
    # Every image is there once, with its own label, and the scaling loses nothing.
    values = np.round(both["inputs"][..., 0] * (16 / 255)).reshape(1797, -1)
    ours = np.column_stack([values, both["label"]])
    want = np.column_stack([theirs.data, theirs.target])
    np.testing.assert_array_equal(np.unique(ours, axis=0), np.unique(want, axis=0))
    shares = np.bincount(task.train["label"]) / np.bincount(both["label"])
    np.testing.assert_allclose(shares, 1437 / 1797, atol=0.005)


def test_the_split_is_always_the_same():
    """Numbers from runs years apart are of the same images."""
    task = build(DIGITS | {"seed": 5})
    assert task.train["label"][:12].tolist() == [3, 9, 1, 3, 1, 9, 4, 4, 2, 8, 3, 5]
    np.testing.assert_array_equal(task.eval["inputs"], build(DIGITS).eval["inputs"])


def test_n_train_takes_the_first():
    whole, part = build(DIGITS), build(DIGITS | {"n_train": 100})
    for name, x in part.train.items():
        np.testing.assert_array_equal(x, whole.train[name][:100])
    assert tasks.size(part.eval) == 360 and "100 train" in part.note
    with pytest.raises(ValueError, match=r"task.n_train: 1438 was given; .* 1,437 examples"):
        build(DIGITS | {"n_train": 1438})


def test_evaluation_rows_are_evenly_spaced():
    whole, part = build(DIGITS), build(DIGITS, eval_examples=90)
    np.testing.assert_array_equal(part.eval["inputs"], whole.eval["inputs"][::4])
    assert part.note.endswith("; evaluates on 90 of these, evenly spaced")


def test_rows_of_arrays_have_no_columns(tmp_path):
    task = build(DIGITS)
    assert kinds.columns(task.kind, task.train) is None and tasks.widths(task) == (None,)
    assert kinds.columns(kinds.LABELLED, {"tokens": np.zeros((3, 7)), "label": np.zeros(3)}) == 7


def test_mnist_is_the_files_arrays(tmp_path):
    config = small(tmp_path / "mnist.npz")
    task = build(config, "mnist-lenet")
    with np.load(config["path"]) as stored:
        np.testing.assert_array_equal(task.train["inputs"][..., 0], stored["x_train"])
        np.testing.assert_array_equal(task.eval["label"], stored["y_test"])
    assert task.train["inputs"].shape == (12, 28, 28, 1) and task.outputs == 10
    assert task.note == "mnist: 12 train and 5 eval images of mnist.npz"
    assert tasks.size(build(config | {"n_train": 7}, "mnist-fc").train) == 7


def test_real_mnist():
    task = build({"name": "mnist", "path": data("mnist/mnist.npz")}, "mnist-fc")
    assert task.train["inputs"].shape == (60_000, 28, 28, 1)
    assert task.eval["inputs"].shape == (10_000, 28, 28, 1)
    assert task.train["label"][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert np.bincount(task.eval["label"]).tolist()[:3] == [980, 1135, 1032]


# ------------------------------------------------------------------------------ order of pixels


def test_shuffled_pixels_are_one_permutation_of_all_images():
    plain, mixed = build(DIGITS), build(DIGITS | {"shuffle": True})
    assert mixed.note.endswith("scikit-learn's digits, pixels shuffled")
    order = vision.permutation(64, seed=0)
    assert sorted(order) == [*range(64)] and (order != np.arange(64)).sum() > 50
    for ours, other in ((mixed.train, plain.train), (mixed.eval, plain.eval)):
        flat = other["inputs"].reshape(-1, 64)
        np.testing.assert_array_equal(ours["inputs"].reshape(-1, 64), flat[:, order])
        np.testing.assert_array_equal(ours["label"], other["label"])


def test_the_permutation_is_a_function_of_the_tasks_seed():
    pixels = lambda **changes: build(DIGITS | changes).eval["inputs"]
    shuffled = pixels(shuffle=True, seed=3)
    np.testing.assert_array_equal(shuffled, pixels(shuffle=True, seed=3))
    assert (shuffled != pixels(shuffle=True, seed=4)).any()
    np.testing.assert_array_equal(pixels(shuffle=False, seed=3), pixels())


# ------------------------------------------------------------------------------------------ scores


def test_the_score_is_the_share_of_right_answers():
    outputs, score = np.eye(10)[[3, 1, 4, 1]], build(DIGITS).scores
    assert score(outputs, np.array([3, 1, 4, 5])) == {"accuracy": 0.75}
    outputs[2, 7] = math.nan
    assert math.isnan(score(outputs, np.array([3, 1, 4, 5]))["accuracy"])
    with pytest.raises(ValueError, match=r"predictions \(4,\) and labels \(3,\) were given"):
        score(np.eye(10)[[3, 1, 4, 1]], np.arange(3))


# ------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mnist-lenet",
            r"base: random:mnist-lenet \(lenet\) reads images of 28 x 28 x 1; task 'digits' has "
            r"images of 8 x 8 x 1, 64 values",
        ),
        ("mnist-fc", r"base: random:mnist-fc \(mlp\) reads 784 values; task 'digits' has .* 64"),
        ("mlp-64-32-7", r"random:mlp-64-32-7 \(mlp\) has 7 outputs; task 'digits' has 10 classes"),
    ],
)
def test_a_base_of_other_images(name, message):
    with pytest.raises(ValueError, match=message):
        build(DIGITS, name)


FILES = {
    "missing": (lambda path: None, FileNotFoundError, r"task.path: '.*mnist.npz' does not exist"),
    "folder": (
        lambda path: path.mkdir(),
        ValueError,
        r"task.path: .*mnist.npz: not a readable .npz file .*; expected MNIST",
    ),
    "empty": (
        lambda path: path.write_bytes(b""),
        ValueError,
        "not a readable .npz file .*; expected MNIST",
    ),
    "text": (lambda path: path.write_text("hello"), ValueError, "not a readable .npz file"),
    "pickle": (
        lambda path: path.write_bytes(b"\x80\x04N."),
        ValueError,
        "not a readable .npz file",
    ),
    "one array": (
        lambda path: one_array(path),
        ValueError,
        "not a readable .npz file .*; expected MNIST as Keras has it",
    ),
    "objects": (
        lambda path: small(path, y_train=np.array([None] * 12)),
        ValueError,
        "not a readable .npz file .*pickle",
    ),
    "other names": (lambda path: small(path, y_test=None), ValueError, "y_test"),
    "truncated": (lambda path: truncate(path), ValueError, "not a readable .npz file"),
    "damaged": (lambda path: damage(path), ValueError, "not a readable .npz file"),
    "cut header": (
        lambda path: member(path, b"\x93NUMPY\x01\x00\x0a\x00{'descr': "),
        ValueError,
        "not a readable .npz file .*; expected MNIST",
    ),
    "larger than memory": (
        lambda path: member(path, huge()),
        ValueError,
        "not a readable .npz file .*; expected MNIST",
    ),
    "no array": (lambda path: member(path, b"text"), ValueError, "x_train is no array"),
    "pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        ValueError,
        "a Git LFS pointer",
    ),
    "size": (
        lambda path: small(path, x_train=np.zeros((12, 32, 32), np.uint8)),
        ValueError,
        r"x_train is uint8 of shape \(12, 32, 32\); expected uint8 of \(N, 28, 28\)",
    ),
    "scaled": (
        lambda path: small(path, x_test=np.zeros((5, 28, 28), np.float32)),
        ValueError,
        "x_test is float32",
    ),
    "count": (
        lambda path: small(path, y_test=np.zeros(4, np.uint8)),
        ValueError,
        r"y_test is uint8 of shape \(4,\); expected 5 integers from 0 to 9",
    ),
    "class": (
        lambda path: small(path, y_test=np.full(5, 10)),
        ValueError,
        "expected 5 integers from 0 to 9",
    ),
    "none": (
        lambda path: small(path, x_train=np.zeros((0, 28, 28), np.uint8)),
        ValueError,
        r"x_train is uint8 of shape \(0, 28, 28\)",
    ),
}


def one_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def member(path, content):
    """An archive with something else under the name of an array."""
    small(path, x_train=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", content)


def huge():
    """The beginning of an array of 10^15 bytes."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,)}\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def truncate(path):
    small(path)
    path.write_bytes(path.read_bytes()[:-100])


def damage(path):
    small(path)
    content = bytearray(path.read_bytes())
    content[3000] ^= 0xFF  # an image's pixel, which the archive has a checksum of
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_one_clear_error(name, tmp_path):
    spoil, error, message = FILES[name]
    path = tmp_path / "mnist.npz"
    spoil(path)
    with pytest.raises(error, match=message) as caught:
        build({"name": "mnist", "path": str(path)}, "mnist-fc")
    assert str(path) in str(caught.value)


def test_mnist_says_which_file_it_needs():
    with pytest.raises(ValueError, match=r"task.path: task 'mnist' needs MNIST .* none was given"):
        build({"name": "mnist", "path": None}, "mnist-fc")


@pytest.mark.parametrize(
    ("field", "value"),
    [("packing", True), ("group_by_length", True), ("template", "{{ x }}"), ("subset", "cola")],
)
def test_settings_of_texts(field, value):
    with pytest.raises(ValueError, match=rf"task\.{field}: .* task 'digits' has no use for it"):
        build(DIGITS | {field: value})
    assert build(DIGITS | {field: False if value is True else None}).name == "digits"
