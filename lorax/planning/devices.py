"""The devices that plans cover."""

import os
from collections.abc import Iterable
from typing import NamedTuple

from lorax.errors import nearest


class Device(NamedTuple):
    """memory: bytes. half, full: FLOP/s of products of bfloat16 and of float32 as JAX multiplies
    them by default. bandwidth: of the memory, bytes/s. source: of these figures."""

    memory: float
    half: float
    full: float
    bandwidth: float
    source: str


_CORES = os.cpu_count() or 1

#: Peaks from the makers' data sheets, for dense matrices (the sheets of H100 and H200 give twice
#: that, for sparse ones).
DEVICES = {
    "h200": Device(
        141e9, 1979e12 / 2, 989e12 / 2, 4.8e12, "NVIDIA H200 SXM data sheet; float32 as TF32"
    ),
    "h100": Device(
        80e9, 1979e12 / 2, 989e12 / 2, 3.35e12, "NVIDIA H100 SXM data sheet; float32 as TF32"
    ),
    "a100": Device(
        80e9, 312e12, 156e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet; float32 as TF32"
    ),
    "tpu-v5p": Device(
        95e9, 459e12, 459e12, 2.765e12, "cloud.google.com/tpu/docs/v5p; float32 as bfloat16"
    ),
    "tpu-v5e": Device(
        16e9, 197e12, 197e12, 0.819e12, "cloud.google.com/tpu/docs/v5e; float32 as bfloat16"
    ),
    # 2.4 GHz, two 256-bit fused multiply-adds a cycle, and a 96th of twelve channels of DDR5-4800.
    "cpu": Device(
        0,  # this machine's, see `memory_of`
        _CORES * 2.4e9 * 64,
        _CORES * 2.4e9 * 32,
        _CORES * 460.8e9 / 96,
        f"AMD EPYC 9654 data sheet, {_CORES} of its 96 cores",
    ),
}

SHARE = 0.9  # of an accelerator's memory that a program may take, as `fitting.memory_limit`


def check_devices(names: Iterable[str]) -> None:
    """Raises ValueError for a name that is not in `DEVICES`."""
    for name in names:
        if name not in DEVICES:
            raise ValueError(
                f"--device: {name!r} is not one of {', '.join(DEVICES)}{nearest(name, DEVICES)}"
            )
