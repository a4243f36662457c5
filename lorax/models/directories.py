"""Finds the files of a model: a shipped directory, the user's own, or the Hub's cache."""

from pathlib import Path

from lorax import vocabulary
from lorax.errors import nearest
from lorax.interop import hf, hub

ASSETS = Path(__file__).parent.parent / "assets"


def find(name: str, weights: bool = True) -> Path:
    """The directory of a shipped model, a local path or a Hub id (downloaded or cached)."""
    shipped = sorted(p.name for p in ASSETS.iterdir() if (p / "config.json").exists())
    if name in shipped:
        return ASSETS / name
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"base: {path} is a directory without config.json")
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"base: no directory {name}")
    return _from_hub(name, weights, shipped)


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
