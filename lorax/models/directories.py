"""Finds the files of a model: a shipped directory, the user's own, or the Hub's cache.

A pipeline of diffusers is a directory of models (model_index.json, unet/, text_encoder/...); its
name means the model that is trained.
"""

from pathlib import Path

from lorax import vocabulary
from lorax.errors import nearest
from lorax.interop import hf, hub

#: Files with which diffusers describes a pipeline, and the model of it that denoises.
PIPELINE, DENOISERS = "model_index.json", ("unet", "transformer")
ASSETS = Path(__file__).parent.parent / "assets"


def find(name: str, weights: bool = True) -> Path:
    """The directory of a shipped model, a local path or a Hub id (downloaded or cached). Raises
    FileNotFoundError that says what is missing."""
    shipped = sorted(p.name for p in ASSETS.iterdir() if (p / "config.json").exists())
    if name in shipped:
        return ASSETS / name
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_directory(path)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"base: no directory {name}")
    return _from_hub(name, weights, shipped)


def _in_directory(path: Path) -> Path:
    """The directory of the model that a local directory means."""
    if (path / "config.json").exists():
        return path
    if not (path / PIPELINE).exists():
        raise FileNotFoundError(f"base: {path} is a directory without config.json")
    for part in DENOISERS:
        if (path / part / "config.json").exists():
            return path / part
    parts = ", ".join(sorted(file.parent.name for file in path.glob("*/config.json")))
    raise FileNotFoundError(
        f"base: {path} is a pipeline without {' or '.join(DENOISERS)}; name one of its models: "
        f"{path.name}/ followed by {parts or 'none is there'}"
    )


def _from_hub(name: str, weights: bool, shipped: list[str]) -> Path:
    files = [*vocabulary.FILES, *hf.SIDE] + ["*.safetensors*"] * weights
    try:
        return hub.snapshot(name, files)
    except FileNotFoundError as error:
        hint = nearest(name, shipped)
        raise FileNotFoundError(
            f"base: {name!r} is neither shipped ({', '.join(shipped)}), nor a directory, and "
            f"downloading it from the Hub failed ({error}){hint}. "
            f"Download https://huggingface.co/{name} (config.json, model.safetensors, "
            f"tokenizer.json) and pass that directory."
        ) from None
