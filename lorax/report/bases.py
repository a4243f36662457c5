"""The base model's kernels, for what compares an update with them. The rest of the report needs no
model code and no JAX."""

from typing import Any

import numpy as np

Kernels = dict[str, np.ndarray]  # frozen (in, out) matrices by path ("h/0/attn/q")


def of_config(config: dict[str, Any]) -> tuple[Kernels | None, str]:
    """The kernels of the base that a run's config.json names, or None and the reason."""
    name = config.get("config", {}).get("base")
    if not name:
        return None, "config.json names no base model"
    try:
        return load(name), ""
    except Exception as error:  # whatever it is, the rest of the report stands without
        return None, f"the base model {name} could not be loaded: {type(error).__name__}: {error}"


def load(name: str) -> Kernels:
    """Kernels of a shipped model, a directory or a Hub id. Raises what `models.load` raises."""
    from lorax.models import kernels, load

    return {path: np.asarray(w) for path, w in kernels(load(name)).items()}
