"""Reads trained adapters without their base, their method and JAX, as far as possible.

    a directory of PEFT's       factors of LoRA and DoRA, and weights trained in full
    a checkpoint of loralib     the same, except the scale, which is not in the file
    a file of an image model's  factors: diffusers', kohya's and ComfyUI's (`image_files`)
    lorax's own format          dense updates, saved by any other method

`lorax.adapters.load` reads all of these, and PEFT's other methods, onto a base.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax.interop import image_files, loralib, peft, states
from lorax.interop.adapter import Adapter, Dense

if TYPE_CHECKING:
    from lorax.interop.hf import Source

CHECKPOINTS = (".npz", ".safetensors")  # of loralib
#: The last layers of the classifiers that PEFT and loralib store.
_CLASSIFIERS = ("classifier.weight", "classifier.out_proj.weight")


def located(path: str | os.PathLike) -> Path:
    """The file or directory that holds an adapter: for PEFT's tensors file its directory, for a
    directory with only one .npz that checkpoint, for one with diffusers' file that, otherwise the
    path itself."""
    path = Path(path)
    if path.name == peft.WEIGHTS:
        return path.parent
    if path.is_dir() and not (path / peft.CONFIG).exists() and not states.is_here(path):
        if (path / image_files.FILE).is_file():
            return path / image_files.FILE
        checkpoints = sorted(path.glob("*.npz"))
        return checkpoints[0] if len(checkpoints) == 1 else path
    return path


def is_here(path: str | os.PathLike) -> bool:
    """Whether there is something for `read` to read."""
    path = located(path)
    known = path / peft.CONFIG, path / states.DELTA
    return any(file.exists() for file in known) or path.is_file() and path.suffix in CHECKPOINTS


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a path is a checkpoint of loralib, or a directory with one."""
    path = located(path)
    return path.suffix in CHECKPOINTS and not image_files.is_here(path)


def format_of(path: Path) -> str:
    """The format of a path returned by `located`: "loralib", "images" for a file of an image
    model's, PEFT's word for a method ("LORA", "VERA"...), or "lorax" for a directory that is only
    in lorax's own format.

    Raises FileNotFoundError, or ValueError for a config that can't be read.
    """
    return _format_and_config(path)[0]


def _format_and_config(path: Path) -> tuple[str, dict[str, Any]]:
    """(`format_of` the path, the fields of PEFT's config or {})."""
    if path.suffix in CHECKPOINTS:
        return "images" if image_files.is_here(path) else "loralib", {}
    if not (path / peft.CONFIG).exists() and states.is_here(path):
        return "lorax", {}
    config = peft.read_config(path / peft.CONFIG)
    return config["peft_type"], config


def check_alpha(path: Path, alpha: float | None) -> None:
    """Raises ValueError if alpha is missing, or is given but already in the file."""
    if is_checkpoint(path) and alpha is None:
        raise ValueError(
            f"alpha: {path} does not say how its updates are scaled; give the lora_alpha of its "
            "training script (--alpha)"
        )
    if not is_checkpoint(path) and alpha is not None:
        raise ValueError(f"alpha: {path} already has a scale; leave alpha (--alpha) out")


def read(
    path: str | os.PathLike,
    sources: "Mapping[str, Source] | None" = None,
    alpha: float | None = None,
) -> Adapter | Dense:
    """The updates that files hold.

    Args:
      path: a file or a directory of any of the formats above.
      sources: the places of the base's parameters in Hugging Face's tensors. Without them the
        layers of adapters that lorax did not write have the names of their modules.
      alpha: lora_alpha of a checkpoint of loralib, which does not hold it; None: the scale is 1
        (callers that need the true one ask `check_alpha` first).

    Raises FileNotFoundError, and ValueError that names the file if it is damaged, or if the method
    has no updates or none that can be computed without the base.
    """
    path = located(path)
    if is_checkpoint(path):
        return loralib.load(path, alpha, sources)
    if path.suffix in CHECKPOINTS:
        return image_files.load(path, sources)
    if (path / states.DELTA).exists():
        return states.read(path)
    if (kind := format_of(path)) != "LORA":
        kind = states.about(path)["name"] if kind == "lorax" else kind
        raise ValueError(
            f"{path}: {kind}: no update of weights that can be read without its base (--base)"
        )
    return peft.load(path, sources)


def task_type(path: Path) -> str | None:
    """PEFT's word for the kind of model, None if the files don't say it."""
    return _format_and_config(path)[1].get("task_type")


def classes(path: Path) -> int | None:
    """Number of classes of the classifier in the files, None if there is none."""
    match format_of(path):
        case "lorax":
            return states.classes(path)
        case "images":
            return None
        case "loralib":
            weights = loralib.load(path).weights
        case _:
            file = path / peft.WEIGHTS
            weights = peft.own_names(peft.read_tensors(file)[0], file)
    return next((len(weights[name]) for name in _CLASSIFIERS if name in weights), None)
