"""A folder of images with captions, for a diffusion model of texts.

Captions are in a file NAME.txt beside each image, or in metadata.jsonl with `file_name` and `text`
(the layout of Hugging Face's imagefolder), which may name an image several times. Images are cut
to the sides' ratio of the model's, around their centre, and resized. What the model reads of a
caption are the hidden states of a frozen text encoder, computed once for every caption.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax import intercept, models
from lorax.models import Base, clip_tokens
from lorax.models.load import skeleton
from lorax.progress import telling
from lorax.tasks import records
from lorax.tasks.rows import check_path, count

ENDINGS = (".png", ".jpg", ".jpeg")
METADATA = "metadata.jsonl"
EXPECTED = f"a folder of PNG or JPEG images, with NAME.txt beside each or a {METADATA}"
MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
FAMILY = "clip_text_model"
BATCH = 64


class States(NamedTuple):
    """Hidden states of captions (N, tokens, features) float32, and those of the empty one (tokens,
    features). cut: captions that were longer than the text encoder reads."""

    captions: np.ndarray
    empty: np.ndarray
    cut: int


def read(config: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    """(images (N, *shape) uint8, their captions) of the folder `task.path`, in the order of the
    names, or of the lines of metadata.jsonl. shape: height, width and channels.

    Raises FileNotFoundError or ValueError that names the file at fault.
    """
    folder = check_path(config, EXPECTED)
    if not folder.is_dir():
        raise ValueError(f"task.path: {str(folder)!r} is no folder; expected {EXPECTED}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)
    described = folder / METADATA
    pairs = _listed(folder, files) if described.is_file() else _beside(folder, files)
    decode = _decoder(shape)
    each = {file: decode(file) for file in _told({f for f, _ in pairs}, "images read")}
    return np.stack([each[file] for file, _ in pairs]), [caption for _, caption in pairs]


def _beside(folder: Path, files: Sequence[Path]) -> list[tuple[Path, str]]:
    """(image, caption) of the text files beside images."""
    if not files:
        raise FileNotFoundError(f"task.path: {str(folder)!r} has no images; expected {EXPECTED}")
    missing = [file for file in files if not file.with_suffix(".txt").is_file()]
    if missing:
        name = missing[0].with_suffix(".txt").name
        raise FileNotFoundError(
            f"task.path: {str(folder)!r} has no {name}, the caption of {missing[0].name} "
            f"({count(len(missing))} of {count(len(files))} images have none)"
        )
    return [(file, records.read_text(file.with_suffix(".txt")).strip()) for file in files]


def _listed(folder: Path, files: Sequence[Path]) -> list[tuple[Path, str]]:
    """(image, caption) of the lines of metadata.jsonl, which names all images of the folder."""
    pairs = []
    for record in records.read(folder / METADATA):
        name = record.get("file_name", str)
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise ValueError(f"{record.place}: file_name: {name!r} is no file in {folder}")
        if file.suffix.lower() not in ENDINGS:
            raise ValueError(f"{record.place}: file_name: {name!r} is no PNG or JPEG file")
        pairs.append((file, record.get("text", str).strip()))
    unnamed = set(files) - {file for file, _ in pairs}
    if unnamed:
        raise ValueError(
            f"task.path: {folder / METADATA} does not name {min(unnamed).name} "
            f"({count(len(unnamed))} images of the folder are not in it)"
        )
    return pairs


def _decoder(shape: tuple[int, ...]):
    """file -> (height, width, channels) uint8, with Pillow."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'task.path: images are read with Pillow, which is missing: pip install "pillow"'
        ) from None
    height, width, channels = shape

    def decode(file: Path) -> np.ndarray:
        try:
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                upright = ImageOps.exif_transpose(image).convert(MODES[channels])
                fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
        except Exception as error:  # Pillow's are many; all mean the file
            raise ValueError(f"{file}: not a readable PNG or JPEG file ({error})") from None
        return np.asarray(fitted, np.uint8).reshape(shape)

    return decode


def encoder(config: Mapping[str, Any], base: Base) -> Path:
    """The folder of the text encoder: `task.text_encoder`, or that of the base's pipeline.

    Raises FileNotFoundError if it isn't there, ValueError for another model than CLIP's text
    encoder, or one of another width than the base reads.
    """
    folder, reads = _encoder(config, base), base.traits.condition.shape[-1]
    model = skeleton(str(folder))
    if model.family != FAMILY:
        raise ValueError(f"task.text_encoder: {folder} is {model.family}, must be {FAMILY}")
    if model.config.hidden_size != reads:
        raise ValueError(
            f"task.text_encoder: {folder} has states of {model.config.hidden_size} features; base "
            f"{base.name} reads {reads}"
        )
    return folder


def _encoder(config: Mapping[str, Any], base: Base) -> Path:
    if config.get("text_encoder"):
        folder = Path(config["text_encoder"]).expanduser()
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"task.text_encoder: {str(folder)!r} has no config.json; expected the folder of "
                "CLIP's text encoder"
            )
        return folder
    folder = base.directory and base.directory.parent / "text_encoder"
    if folder is None or not (folder / "config.json").is_file():
        place = f"{folder} is not there" if folder else "the base has no files"
        raise FileNotFoundError(f"task.text_encoder: {place}; give the folder of the text encoder")
    return folder


def states(captions: Sequence[str], folder: Path) -> States:
    """The hidden states of captions, by the text encoder in a folder (`encoder`), whose tokenizer
    is in it or beside it, in tokenizer/. Raises FileNotFoundError or ValueError that names the
    tokenizer's file at fault."""
    model = models.load(str(folder))
    own = any((folder / name).is_file() for name in clip_tokens.FILES)
    place = folder if own else folder.parent / "tokenizer"
    tokens, cut = clip_tokens.encode(["", *captions], place, model.positions)
    if tokens.max() >= model.config.vocab_size:
        raise ValueError(
            f"{place}: it has the id {tokens.max()}, but vocab_size of the text encoder is "
            f"{model.config.vocab_size}"
        )
    run = jax.jit(functools.partial(intercept.apply, model.module))
    size = min(BATCH, len(tokens))
    made = []
    for first in _told(range(0, len(tokens), size), f"batches of {size} captions encoded"):
        rows = np.minimum(np.arange(first, first + size), len(tokens) - 1)
        made.append(np.asarray(run(model.params, tokens[rows])))
    empty, *rest = np.concatenate(made)[: len(tokens)]
    return States(np.stack(rest), empty, cut)


def held_out(images: np.ndarray, seed: int) -> np.ndarray:
    """(N,) bool: a tenth of the images, at least two, that are not trained on. Equal images stay
    together. Raises ValueError for fewer than three different ones."""
    _, same = np.unique(images.reshape(len(images), -1), axis=0, return_inverse=True)
    same = same.reshape(-1)
    different = same.max() + 1
    if different < 3:
        raise ValueError(
            f"task.path: {different} different images, of which two are to evaluate; give at "
            "least 3"
        )
    order = np.random.default_rng(seed).permutation(different)
    return np.isin(same, order[: max(2, different // 10)])


def _told(items, what: str):
    """The items; on a terminal, how many are done and the time left after some seconds."""
    items = list(items)
    say = lambda line: print(line, file=sys.stderr) if sys.stderr.isatty() else None
    tell = telling(say, what, every=5)
    for done, item in enumerate(items):
        tell(done, len(items))
        yield item
