"""The shape of a mesh of devices, as a config writes it; `lorax.sharding` says what it does."""

import math
from typing import NamedTuple

AXES = ("member", "fsdp", "tensor")


class Shape(NamedTuple):
    """Devices along each axis of a mesh."""

    member: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Devices in all."""
        return math.prod(self)

    def __str__(self):
        axes = [f"{axis}={n}" for axis, n in zip(AXES, self, strict=True) if n > 1]
        return ",".join(axes) or "fsdp=1"


def parse(text: str) -> Shape:
    """The shape that "fsdp=4,tensor=2" names; an axis that is not named is 1.

    Raises ValueError for anything but names of `AXES`, each once, with integers above 0.
    """
    axes = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in axes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"train.mesh: {text!r} given, must be auto or sizes of {', '.join(AXES)}, each at "
                "most once, such as fsdp=4,tensor=2"
            )
        axes[name] = int(size)
    return Shape(**axes)
