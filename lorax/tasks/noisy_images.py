"""Images to be denoised by a diffusion model, each of a class, scikit-learn's digits or MNIST, or
each with a caption (`captioned_images`), as the base reads it.

Pixels are uint8 and scaled to [-1, 1] on the device. `task.classes` keeps the images of some
classes, for training and for evaluation. Images that a trained model makes are scored by the five
nearest training images of all classes (`accuracy_of`); images of captions have no score.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lorax import denoising, diffusion
from lorax.models import Base
from lorax.tasks import captioned_images, kinds, splits, vision
from lorax.tasks.data import Data, DataError
from lorax.tasks.rows import Pictures, Task, check_n_train, count

KEYS = ("classes", "prediction", "min_snr", "class_dropout", "text_encoder")
NEIGHBOURS = 5
CAPTIONS = 8  # of which members make images


def load(config: Mapping[str, Any]) -> Data:
    """Images to be denoised; rows as in `Task`.

    config: `path`: MNIST as an .npz file (`vision.mnist`), or None for scikit-learn's digits
        (`vision.digits`); for a base of texts, a folder of images with captions. `text_encoder`:
        the folder of the model that reads them. `classes`: numbers of the classes to keep; (): all.
        `prediction`: "epsilon" or "v", None: as the base's scheduler_config.json says, or
        "epsilon". `min_snr`:
        gamma of the weights in training, 0 for equal ones. `class_dropout`: share of the training
        rows whose class is dropped, if the base knows the class "none", or whose caption is empty.
    """

    def build(config, vocabulary, seq_len, base, apart=False):
        settings = _settings(config, base)
        if base.traits.condition.shape:
            return _captioned(config, settings, base, apart)
        if config.get("text_encoder"):
            raise ValueError(
                f"task.text_encoder: {config['text_encoder']!r} given, but base {base.name} has "
                "classes, not texts"
            )
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
        parts["train"] = tuple(part[:n] for part in parts["train"])
        parts = {name: (x, y.astype(np.int32)) for name, (x, y) in parts.items()}
        classes = tuple(config.get("classes") or np.unique(parts["train"][1]).tolist())
        none = base.traits.no_class
        none = None if none is None else np.int32(none)
        asked = Pictures(classes, np.int32(classes), none, settings.schedule, score)
        words = f"{source}, classes {', '.join(map(str, classes))}"
        return _task(config, settings, base, parts, asked, words)

    return Data(kinds.NOISY, build, shapes)


def _captioned(config: Mapping[str, Any], settings, base: Base, apart: bool) -> Task:
    """The task of a base that reads texts."""
    if config.get("classes"):
        raise ValueError(f"task.classes: {config['classes']} given, but base {base.name} has texts")
    seed, folder = splits.seed_of(config), captioned_images.encoder(config, base)
    images, captions = captioned_images.read(config, base.input_shape)
    distinct, index = np.unique(captions, return_inverse=True)
    held = captioned_images.held_out(images, seed)
    n = check_n_train(config.get("n_train"), int(np.sum(~held)))
    states = captioned_images.states(distinct, folder)
    parts = {"train": (images[~held][:n], index[~held][:n]), "eval": (images[held], index[held])}
    if apart:
        both = splits.labelled(*parts["eval"], np.ndarray.tobytes, seed)
        parts["eval"], parts["test"] = both
    shown = np.unique(parts["eval"][1])
    shown = shown[np.linspace(0, len(shown) - 1, min(CAPTIONS, len(shown))).astype(int)]
    asked = Pictures(
        tuple(distinct[shown].tolist()), states.captions[shown], states.empty, settings.schedule,
        score=lambda images, asked: {},
    )  # fmt: skip
    words = f"{config['path']}, {count(len(distinct))} different captions"
    words += f" ({count(states.cut)} cut at {len(states.empty)} tokens)" * bool(states.cut)
    parts = {name: (x, states.captions[i]) for name, (x, i) in parts.items()}
    return _task(config, settings, base, parts, asked, words)


def _task(config, settings, base: Base, parts, asked: Pictures, words: str) -> Task:
    """The task of images and their conditions; parts: {set: (images, conditions)}."""
    rows = {
        name: {
            "inputs": x.reshape(len(x), *base.input_shape),
            "condition": conditions,
            "weight": np.ones(len(x), np.float32),
            **denoising.fixed(settings, len(x), splits.seed_of(config)),
        }
        for name, (x, conditions) in parts.items()
    }
    sizes = [f"{count(len(part['weight']))} {name}" for name, part in rows.items()]
    return Task(
        config["name"],
        note=f"{', '.join(sizes[:-1])} and {sizes[-1]} images of {words}; {_in_words(settings)}",
        kind=kinds.noisy(settings, asked.none if settings.dropout else None),
        pictures=asked,
        **rows,
    )


def shapes(config, lead, seq_len, base):
    """Shapes of batches; see `Data`."""
    image = jax.ShapeDtypeStruct(base.input_shape, np.uint8)
    return kinds.noisy_shapes(lead, image, base.traits.condition)


def check_base(base: Base) -> None:
    """Raises ValueError if a base is no diffusion model, or one of texts that has no pixels."""
    named, condition = f"base: {base.name} ({base.family})", base.traits.condition
    if condition is None:
        raise ValueError(
            f"{named} is no diffusion model, which task 'diffusion' needs: one like dit-digits"
        )
    channels = base.input_shape[-1]
    if condition.shape and channels not in captioned_images.MODES:
        raise ValueError(
            f"{named} has {channels} in_channels, such as latents of an autoencoder, which is not "
            "computed here; images of task 'diffusion' are pixels: in_channels must be 1 or 3"
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
    schedule = diffusion.of_model(base.directory)
    if config.get("prediction"):
        schedule = schedule._replace(prediction=config["prediction"])
    weights, dropout = config.get("min_snr") or 0.0, config.get("class_dropout") or 0.0
    return denoising.Settings(schedule, weights, dropout)


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
