"""The one machine whose numbers a launched run has, and how many workers share its work.

Bits depend on how many devices a program has on a CPU, and on how many members run side by side. So
a run is computed as one machine would compute it: on a CPU, the launcher's; with accelerators, one
with the devices of all workers together. JAX is not imported: the launcher leaves GPUs alone.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from lorax.devices import cores

WORKERS = 8  # of an engine that is not told how many
CORES = 8  # of a CPU that one worker uses
#: Files of machines with GPUs or TPUs.
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio")


class Machine(NamedTuple):
    """platform: "cpu", "gpu" or "tpu". devices: how many. each: how many of them a worker has; on a
    CPU all, which its workers share."""

    platform: str
    devices: int
    each: int


def choose(options) -> tuple[Machine, int]:
    """(the machine, the number of workers) for the options of `lorax.launch`."""
    gpus, asked = getattr(options, "gpus", None), options.workers
    if options.on == "local":
        machine = here()
        return machine, asked or most_here(machine)
    if gpus is None and options.on == "ray" and here().platform == "gpu":
        gpus = 1
    workers = asked or WORKERS
    each = max(1, int(gpus or 0))
    return (Machine("gpu", workers * each, each) if gpus else cpu()), workers


def most_here(machine: Machine) -> int:
    """Workers that share this machine: one for each of its GPUs, or for `CORES` cores."""
    if machine.platform != "cpu":
        return machine.devices // machine.each
    return max(1, cores() // CORES)


def cpu() -> Machine:
    """This machine's CPU in as many devices as `lorax.train.layouts.split_cpu` makes of it."""
    forced = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = int(forced[1]) if forced else min(8, cores())
    return Machine("cpu", devices, devices)


def here() -> Machine:
    """This machine, as `lorax.run` would use it."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if wanted == "cpu" or not (wanted or any(Path(path).exists() for path in ACCELERATORS)):
        return cpu()
    platform, count = _seen_by_jax()
    if platform == "cpu":
        return cpu()
    return Machine(platform, count, 1 if platform == "gpu" else count)


@functools.cache
def _seen_by_jax() -> tuple[str, int]:
    """Platform and number of the devices, asked in a process that gives their memory back."""
    ask = "import jax; x = jax.local_devices(); print(x[0].platform, len(x))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    platform, count = (done.stdout.split() or ["cpu", "1"])[-2:]
    return platform, int(count)
