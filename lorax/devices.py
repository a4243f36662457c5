"""The devices that plans cover, and the links between them. Nothing here imports JAX."""

import os
from collections.abc import Iterable
from typing import NamedTuple

from lorax.errors import nearest


class Device(NamedTuple):
    """memory: bytes. half, full: FLOP/s of products of bfloat16 and of float32 as JAX multiplies
    them by default. bandwidth: of the memory, bytes/s. source: of these figures.

    per_host: devices of one host. linked: devices that fast links join, those of a host or of a
    TPU slice. link, network: bytes/s that a device sends, and as many that it receives, over these
    links and over the network between hosts. links: source of these figures.
    """

    memory: float
    half: float
    full: float
    bandwidth: float
    source: str
    per_host: int
    linked: int
    link: float
    network: float
    links: str


def cores() -> int:
    """CPU cores that this process may use, at least 1: fewer than the machine has under taskset, in
    a job of SLURM, or in a container that is given some."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_CORES = cores()
_SXM = "NVLink {} GB/s both ways, a {} Gbit/s network card for each GPU"

#: Peaks from the makers' data sheets, for dense matrices (the sheets of H100 and H200 give twice
#: that, for sparse ones). Links in one direction: half of what the sheets add up.
DEVICES = {
    "h200": Device(
        141e9, 1979e12 / 2, 989e12 / 2, 4.8e12, "NVIDIA H200 SXM data sheet; float32 as TF32",
        8, 8, 450e9, 400e9 / 8, f"DGX H200 data sheet: {_SXM.format(900, 400)}",
    ),
    "h100": Device(
        80e9, 1979e12 / 2, 989e12 / 2, 3.35e12, "NVIDIA H100 SXM data sheet; float32 as TF32",
        8, 8, 450e9, 400e9 / 8, f"DGX H100 data sheet: {_SXM.format(900, 400)}",
    ),
    "a100": Device(
        80e9, 312e12, 156e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet; float32 as TF32",
        8, 8, 300e9, 200e9 / 8, f"DGX A100 data sheet: {_SXM.format(600, 200)}",
    ),
    "tpu-v5p": Device(
        95e9, 459e12, 459e12, 2.765e12, "cloud.google.com/tpu/docs/v5p; float32 as bfloat16",
        4, 6144, 600e9, 50e9 / 8,
        "cloud.google.com/tpu/docs/v5p: 1,200 GB/s both ways within a slice of up to 6,144 chips, "
        "50 Gbit/s between slices",
    ),
    "tpu-v5e": Device(
        16e9, 197e12, 197e12, 0.819e12, "cloud.google.com/tpu/docs/v5e; float32 as bfloat16",
        8, 256, 200e9, 25e9 / 8,
        "cloud.google.com/tpu/docs/v5e: 400 GB/s both ways within a slice of up to 256 chips, two "
        "network cards of 100 Gbit/s for 8 chips",
    ),
    # 2.4 GHz, two 256-bit fused multiply-adds a cycle, and a 96th of twelve channels of DDR5-4800.
    "cpu": Device(
        0,  # this machine's, see `planning.roofline.memory_of`
        _CORES * 2.4e9 * 64, _CORES * 2.4e9 * 32, _CORES * 460.8e9 / 96,
        f"AMD EPYC 9654 data sheet, {_CORES} of its 96 cores",
        1, 1, 10e9 / 8, 10e9 / 8, "machines on an Ethernet of 10 Gbit/s",
    ),
}  # fmt: skip

SHARE = 0.9  # of an accelerator's memory that a program may take, as `fitting.memory_limit`

#: Parts of JAX's `device_kind` -> name. What is in none is taken for an H100.
_KINDS = {"h200": "h200", "a100": "a100", "v5 lite": "tpu-v5e", "v5e": "tpu-v5e", "v5": "tpu-v5p"}
_KINDS |= {"cpu": "cpu"}


def check_devices(names: Iterable[str]) -> None:
    """Raises ValueError for a name that is not in `DEVICES`."""
    for name in names:
        if name not in DEVICES:
            raise ValueError(
                f"--device: {name!r} is not one of {', '.join(DEVICES)}{nearest(name, DEVICES)}"
            )


def of_kind(kind: str) -> Device:
    """The figures of a device that JAX names so ("NVIDIA H200", "TPU v5 lite"); an H100's where
    the name says nothing."""
    return DEVICES[next((name for part, name in _KINDS.items() if part in kind.lower()), "h100")]
