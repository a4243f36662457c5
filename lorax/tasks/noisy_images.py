"""Images to be denoised by a diffusion model, each of a class: scikit-learn's digits, or MNIST.

Pixels are uint8 and scaled to [-1, 1] on the device. `task.classes` keeps the images of some
classes, for training and for evaluation. Images that a trained model makes are scored by the five
nearest training images of all classes (`accuracy_of`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lorax import denoising, diffusion
from lorax.models import Base
from lorax.tasks import kinds, splits, vision
from lorax.tasks.data import Data, DataError
from lorax.tasks.rows import Pictures, Task, check_n_train, count

KEYS = ("classes", "prediction", "min_snr", "class_dropout")
NEIGHBOURS = 5


def load(config: Mapping[str, Any]) -> Data:
    """Digits to be denoised; rows as in `Task`.

    config: `path`: MNIST as an .npz file (`vision.mnist`), or None for scikit-learn's digits
        (`vision.digits`). `classes`: numbers of the classes to keep; (): all. `prediction`:
        "epsilon" or "v", None: as the base's scheduler_config.json says, or "epsilon". `min_snr`:
        gamma of the weights in training, 0 for equal ones. `class_dropout`: share of the training
        rows whose class is dropped, if the base knows the class "none".
    """

    def build(config, vocabulary, seq_len, base, apart=False):
        settings = _settings(config, base)
        train, evaluation, source, test = _sets(config, apart)
        parts = {"train": train, "eval": evaluation} | ({"test": test} if test else {})
        score = accuracy_of(*train)
        parts = {name: _of_classes(part, config, source) for name, part in parts.items()}
        if apart and not test:
            seed = splits.seed_of(config)
            both = splits.labelled(*parts["eval"], np.ndarray.tobytes, seed)
            parts["eval"], parts["test"] = both
        n = check_n_train(config.get("n_train"), len(train := parts["train"][0]))
        _check_fit(base, train.shape[1:], parts, config["name"])
        rows = {}
        for name, (x, y) in parts.items():
            m = n if name == "train" else len(y)
            rows[name] = {
                "inputs": x[:m].reshape(m, *base.input_shape),
                "condition": y[:m].astype(np.int32),
                "weight": np.ones(m, np.float32),
                **denoising.fixed(settings, m, splits.seed_of(config)),
            }
        sizes = [f"{count(len(part['weight']))} {name}" for name, part in rows.items()]
        classes = tuple(config.get("classes") or np.unique(parts["train"][1]).tolist())
        return Task(
            config["name"],
            note=f"{', '.join(sizes[:-1])} and {sizes[-1]} images of {source}, classes "
            f"{', '.join(map(str, classes))}; {_in_words(settings)}",
            kind=kinds.noisy(settings),
            pictures=Pictures(classes, settings.schedule, score),
            **rows,
        )

    return Data(kinds.NOISY, build, shapes)


def shapes(config, lead, seq_len, base):
    """Shapes of batches; see `Data`."""
    image = jax.ShapeDtypeStruct(base.input_shape, np.uint8)
    return kinds.noisy_shapes(lead, image, base.traits.condition)


def check_base(base: Base) -> None:
    """Raises ValueError if a base is no diffusion model that is conditioned on classes."""
    named, condition = f"base: {base.name} ({base.family})", base.traits.condition
    if condition is None:
        raise ValueError(
            f"{named} is no diffusion model, which task 'diffusion' needs: one like dit-digits"
        )
    if condition.shape:
        raise ValueError(
            f"{named} is conditioned on texts, and the images of task 'diffusion' have classes"
        )


def _sets(config: Mapping[str, Any], apart: bool):
    """(train set, evaluation set, source in words, test set or None) of all classes."""
    if config.get("path"):
        return vision.mnist_sets(config, apart)
    return *vision.digit_sets(), "scikit-learn's digits", None


def _of_classes(part, config: Mapping[str, Any], source: str):
    """The images of `task.classes`, and their classes."""
    (x, y), classes = part, config.get("classes") or ()
    if missing := [c for c in classes if c not in y]:
        raise DataError(
            f"task.classes: {missing[0]} given; {source} has classes {y.min()} to {y.max()}"
        )
    kept = np.isin(y, classes) if classes else np.ones(len(y), bool)
    return x[kept], y[kept]


def _check_fit(base: Base, shape: tuple[int, ...], parts, name: str) -> None:
    """Raises ValueError if images or classes are not those that the base reads."""
    reads, named = base.input_shape, f"base: {base.name} ({base.family})"
    if reads != (*shape, 1):
        given, right = (" x ".join(map(str, sizes)) for sizes in ((*shape, 1), reads))
        raise ValueError(f"{named} reads images of {right}; task {name!r} has images of {given}")
    most, known = max(y.max() for _, y in parts.values()), base.traits.no_class
    if known is not None and most >= known:
        raise ValueError(f"{named} knows classes 0 to {known - 1}; task {name!r} has class {most}")


def _settings(config: Mapping[str, Any], base: Base) -> denoising.Settings:
    schedule = diffusion.read(base.directory) or diffusion.Schedule()
    if config.get("prediction"):
        schedule = schedule._replace(prediction=config["prediction"])
    dropout = config.get("class_dropout") or 0.0
    none = base.traits.no_class if dropout else None
    return denoising.Settings(schedule, config.get("min_snr") or 0.0, dropout, none)


def _in_words(settings: denoising.Settings) -> str:
    schedule = settings.schedule
    words = f"{schedule.steps} timesteps ({schedule.betas}), predicts {schedule.prediction}"
    return words + f", Min-SNR {settings.min_snr:g}" * bool(settings.min_snr)


def accuracy_of(images: np.ndarray, classes: np.ndarray) -> Callable:
    """score(images (N, ...) uint8, classes (N,)) -> {"sample_accuracy": share of the images that
    the nearest of these images, by a vote of five, say are of the class that was asked for}."""

    @functools.cache
    def classifier():
        from sklearn.neighbors import KNeighborsClassifier  # a second of imports

        flat = images.reshape(len(images), -1).astype(np.float32)
        return KNeighborsClassifier(NEIGHBOURS).fit(flat, classes)

    def score(made: np.ndarray, asked: np.ndarray) -> dict[str, float]:
        called = classifier().predict(made.reshape(len(made), -1).astype(np.float32))
        return {"sample_accuracy": float(np.mean(called == asked))}

    return score
