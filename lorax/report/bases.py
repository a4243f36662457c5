"""The base model's kernels, for comparing updates with them. The rest of the report needs no model
code and no JAX."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

import lorax
from lorax import outside

Kernels = Mapping[str, np.ndarray]  # frozen (in, out) matrices by path ("h/0/attn/q")


def of_config(config: dict[str, Any]) -> tuple[Kernels | None, str]:
    """The kernels of the base that a run's config.json names, or None and the reason."""
    name = config.get("config", {}).get("base")
    if not name:
        return None, "config.json names no base model"
    function = outside.base_name(name)
    if function is not None and not outside.is_known(function.function):
        return (
            None,
            f"{name} is a function of yours, which the report only calls if --base names it",
        )
    try:
        return load(name), ""
    except Exception as error:  # whatever the error, the rest of the report needs no base
        return None, f"the base model {name} could not be loaded: {type(error).__name__}: {error}"


def load(name: str) -> Kernels:
    """Kernels of a shipped model, a directory or a Hub id. Raises what `models.load` raises."""
    from lorax.models import kernels, unread

    return kernels(unread(name))


def with_sources(name: str) -> tuple[Kernels, dict[str, Any]]:
    """`load`, and where in Hugging Face's tensors the model's parameters are (`Base.sources`)."""
    from lorax import models

    base = models.unread(name)
    return models.kernels(base), base.sources


def here(name: str) -> str | None:
    """What to pass to `load` to get a model without network access: the name of a shipped model, a
    directory, or the path of the Hub's cached copy. None if it is in none of these places."""
    if (pathlib.Path(lorax.__file__).parent / "assets" / name / "config.json").exists():
        return name
    if pathlib.Path(name).expanduser().is_dir():
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, local_files_only=True)
    except Exception:  # not a Hub id, no cache, or not in the cache: not on this machine
        return None
