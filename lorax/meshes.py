"""The shape of a mesh of devices, as a config writes it; `lorax.sharding` says what it does."""

import math
from typing import NamedTuple

from lorax.devices import Device

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


def devices_of(device: Device, mesh: str | None, hosts: int | None) -> int:
    """How many devices `--mesh` and `--hosts` mean: those of the hosts, or of a mesh that is named;
    one without either.

    Raises ValueError for a mesh of more devices than the hosts have, and for no hosts.
    """
    if hosts is not None and hosts < 1:
        raise ValueError(f"--hosts: {hosts} given, must be at least 1")
    named = parse(mesh).size if mesh not in (None, "auto") else 0
    there = (hosts or 1) * device.per_host
    if hosts and named > there:
        have = "host has" if hosts == 1 else "hosts have"
        raise ValueError(f"--mesh: {mesh} needs {named} devices, and {hosts} {have} {there}")
    if named:
        return there if hosts else named
    return there if hosts or mesh else 1
