"""s = alpha / r, from the fields of a config."""

from collections.abc import Mapping
from typing import Any

from lorax.interop.formats.opened import Opened
from lorax.interop.peft.config import NUMBER


def alpha_over_rank(
    opened: Opened,
    rank: int,
    config: Mapping[str, Any] | None = None,
    names: tuple[str, str] = ("lora_alpha", "r"),
) -> tuple[float, str, tuple[str, ...]]:
    """(s, where it is from, warnings) of a layer with this rank in the file.

    config: has alpha and the rank that was trained by `names`; by default adapter_config.json. The
    trained rank counts, if it is there: it may differ from a file's.
    Raises ValueError that names the field for values that are no numbers.
    """
    config = opened.config if config is None else config
    values = {name: config.get(name) for name in names}
    for name, value in values.items():
        least = 1 if name == names[1] else None
        if value is not None and not (NUMBER.fits(value) and (least is None or value >= least)):
            words = NUMBER.words if least is None else "a number of at least 1"
            raise ValueError(f"{opened.path}: {name}: {value!r} given; it should be {words}")
    alpha, trained = values.values()
    if alpha is None:
        lost = f"{names[0]} is not known: if it was not the rank, dW is larger or smaller"
        return 1.0, "default 1: the file has none", (lost,)
    warnings = ()
    if trained not in (None, rank):
        warnings = (f"rank {rank} in the file, {trained} in the config, by which alpha is divided",)
    return alpha / (trained or rank or 1), f"config {names[0]} / {names[1]}", warnings
