"""Updates for formats that have one scale and one rank for all matrices."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lorax.interop.formats import factored
from lorax.interop.formats.contract import Update
from lorax.interop.formats.factored import Tensors


def one_scale(
    by_name: Mapping[str, Update], refused: Callable[[str], ValueError]
) -> tuple[float, int]:
    """(the scale, the largest rank) of updates. Raises ValueError that names two matrices with
    different scales."""
    scales = {update.scale: name for name, update in by_name.items()}
    if len(scales) > 1:
        (s, name), (t, other) = [*scales.items()][:2]
        raise refused(
            f"it has one scale for all matrices; given {s:g} in {name}, {t:g} in {other}; "
            "python -m lorax.convert shrink makes all 1"
        )
    return next(iter(scales)), max(update.rank for update in by_name.values())


def padded(update: Update, rank: int) -> Tensors:
    """The numbers of an update of a larger rank with the same dW: zeros are added."""
    down, up, m = factored.tensors(update)
    more = rank - len(down)
    return Tensors(np.pad(down, ((0, more), (0, 0))), np.pad(up, ((0, 0), (0, more))), m)


def base_name(config: Mapping[str, Any]) -> str | None:
    """The base that a file's config names, None if it does not."""
    for field in ("base_model_name_or_path", "model"):
        if isinstance(name := config.get(field), str) and name:
            return name
    return None
