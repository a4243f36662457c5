"""The base model's kernels, which updates are compared with. The rest of the report needs no model
code and no JAX."""

import pathlib
from typing import Any

import numpy as np

import lorax
from lorax import outside

Kernels = dict[str, np.ndarray]  # frozen (in, out) matrices by path ("h/0/attn/q")


def of_config(config: dict[str, Any]) -> tuple[Kernels | None, str]:
    """The kernels of the base that a run's config.json names, or None and the reason."""
    name = config.get("config", {}).get("base")
    if not name:
        return None, "config.json names no base model"
    own = outside.base_name(name)
    if own is not None and not outside.is_known(own.function):
        return (
            None,
            f"{name} is a function of yours, which a report runs where --base names it",
        )
    try:
        return load(name), ""
    except Exception as error:  # whatever it is, the rest of the report stands without
        return None, f"the base model {name} could not be loaded: {type(error).__name__}: {error}"


def load(name: str) -> Kernels:
    """Kernels of a shipped model, a directory or a Hub id. Raises what `models.load` raises."""
    from lorax.models import kernels, load

    return {path: np.asarray(w) for path, w in kernels(load(name)).items()}


def with_sources(name: str) -> tuple[Kernels, dict[str, Any]]:
    """`load`, and where the model's parameters lie in Hugging Face's tensors (`Base.sources`)."""
    from lorax import models

    base = models.load(name)
    return {path: np.asarray(w) for path, w in models.kernels(base).items()}, base.sources


def here(name: str) -> str | None:
    """What `load` finds a model by without any network: a shipped one, a directory, the Hub's
    cache. None where it is in none of them."""
    if (pathlib.Path(lorax.__file__).parent / "assets" / name / "config.json").exists():
        return name
    if pathlib.Path(name).expanduser().is_dir():
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, local_files_only=True)
    except Exception:  # not a Hub id, no cache, not in it: all mean "not here"
        return None
