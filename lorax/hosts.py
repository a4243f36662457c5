"""Many processes that run one program together (`jax.distributed`), each with its own devices.

All processes run the same control flow on the same values; the first one writes the run directory
and the terminal. With a single process everything here is the identity. JAX is imported only where
it is needed: `first` answers before that.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

SECONDS = 300  # within which all processes must have started


class Coordinator(NamedTuple):
    """Where process 0 listens ("HOST:PORT"), the number of processes, and the number of this one;
    None for what the cluster says itself."""

    address: str | None = None
    processes: int | None = None
    process: int | None = None


#: The command line's flags for a `Coordinator`.
FLAGS = {
    "coordinator": "Many hosts: HOST:PORT where process 0 listens, if the cluster does not say it.",
    "processes": "Many hosts: number of processes; 1 stays alone on a cluster of several.",
    "process": "Many hosts: number of this process, from 0 on.",
}


def flags(argv: list[str]) -> tuple[Coordinator, list[str]]:
    """The coordinator of a command line, and the command line without it. Raises ValueError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, kind in zip(FLAGS, (str, int, int), strict=True):
        parser.add_argument(f"--{name}", type=kind)
    try:
        given, rest = parser.parse_known_args(argv[1:])
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from None
    if given.coordinator is not None and not re.fullmatch(r".+:\d+", given.coordinator):
        raise ValueError(f"--coordinator: {given.coordinator!r} given, must be HOST:PORT")
    return Coordinator(given.coordinator, given.processes, given.process), [*argv[:1], *rest]


def start(coordinator: Coordinator | None = None) -> None:
    """Join the processes of this program, before JAX's first computation.

    SLURM (srun), Open MPI, Kubernetes (indexed jobs) and Cloud TPU say who the others are;
    elsewhere `coordinator` does. A program that none of them has started in several processes stays
    alone, as it does with `processes` 1.

    Raises ValueError for a coordinator that is not whole. If not all processes have started within
    `SECONDS`, JAX ends this one.
    """
    given, expected = coordinator or Coordinator(), _expected()
    if given.processes == 1 or (given == Coordinator() and not expected):
        return
    if given.address and "OMPI_COMM_WORLD_SIZE" in os.environ:  # JAX does not know Open MPI 5
        size, rank = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK"))
        given = Coordinator(given.address, given.processes or size, given.process or rank)
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    late = last_words(f"the processes of this program have not all started within {SECONDS} s")
    try:
        with warnings.catch_warnings(action="ignore"):  # `_expected` says what Kubernetes lacks
            jax.distributed.initialize(
                *given,
                local_device_ids=[] if _has_all_devices() else None,
                initialization_timeout=SECONDS,
            )
    except ValueError as error:
        if given == Coordinator() and expected == "a TPU":
            return  # libtpu without a TPU
        asked = "give --coordinator=HOST:PORT --processes=N --process=I, or --processes=1"
        raise ValueError(f"--coordinator: {error} ({expected or 'no cluster'}); {asked}") from None
    finally:
        late.communicate(b"joined\n")


def last_words(line: str) -> subprocess.Popen:
    """A process that prints a line to stderr if this one ends before it has written one to its
    stdin: JAX aborts a process in the middle of its own threads."""
    wait = 'read said || printf "%s\\n" "$0" >&2'
    words = ["sh", "-c", wait, f"lorax: {line}"]
    return subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)


def _expected() -> str:
    """What may have started this program in several processes; "" if nothing has."""
    here = os.environ
    if int(here.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # SLURM_NTASKS is also set where srun is not
        return "SLURM"
    if int(here.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in here and "JOB_COMPLETION_INDEX" in here:
        return "an indexed job of Kubernetes; JAX needs pip install 'jax[k8s]'"
    if "JAX_COORDINATOR_ADDRESS" in here:
        return "JAX_COORDINATOR_ADDRESS"
    return "a TPU" if importlib.util.find_spec("libtpu") else ""


def _has_all_devices() -> bool:
    """Whether this process takes all GPUs that it sees: it is the only one on its machine, or sees
    only its own. Otherwise JAX gives the processes of a machine one each."""
    here = os.environ
    on_machine = here.get("OMPI_COMM_WORLD_LOCAL_SIZE", here.get("SLURM_STEP_TASKS_PER_NODE", ""))
    seen = [gpu for gpu in here.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return re.fullmatch(r"1(\(x\d+\))?", on_machine) is not None or len(seen) == 1


def are_many() -> bool:
    """Whether this program has several processes. Unlike the numbers below, it starts no device."""
    jax = sys.modules.get("jax")  # if it is not imported, nothing was started
    return jax is not None and jax.distributed.is_initialized()


def count() -> int:
    """The number of processes."""
    return sys.modules["jax"].process_count() if are_many() else 1


def process() -> int:
    """The number of this process, from 0 on."""
    return sys.modules["jax"].process_index() if are_many() else 0


def first() -> bool:
    """Whether this process writes the run directory and the terminal: process 0."""
    return process() == 0


def whole(tree):
    """A tree of arrays as NumPy arrays, on every process, whatever their shardings; one leaf after
    the other is gathered. All processes must call it together."""
    import jax

    if count() == 1:
        return jax.device_get(tree)
    import numpy as np
    from jax.experimental import multihost_utils

    def gathered(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gathered, tree)


def place(tree, shardings):
    """Arrays that every process has, on the devices. shardings: one for all or a tree of them."""
    import jax
    import numpy as np

    if count() == 1:
        return jax.device_put(tree, shardings)

    def placed(x, sharding):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = placed(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(placed, tree, shardings)


def part(shape: tuple[int, ...], sharding) -> tuple[slice, ...]:
    """The smallest part of an array that has all that is on this process's devices."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    ends = [[s.indices(n)[:2] for s, n in zip(index, shape, strict=True)] for index in indices]
    return tuple(slice(min(a)[0], max(b for _, b in a)) for a in zip(*ends, strict=True))


def agreed(value):
    """Process 0's value, anything that JSON holds, on every process."""
    if count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode() if first() else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = multihost_utils.broadcast_one_to_all(data if first() else np.zeros(size, np.uint8))
    return json.loads(data.tobytes())


def of_first(function: Callable, *arguments):
    """function(*arguments) as process 0 computes it, anything that JSON holds, on every process."""
    return agreed(function(*arguments) if first() else None)


def least(number: int) -> int:
    """The smallest of the numbers (int64) that the processes give, on every process."""
    if count() == 1:
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    mine = np.frombuffer(np.int64(number).tobytes(), np.uint8)  # JAX's own integers have 32 bits
    return int(np.ascontiguousarray(multihost_utils.process_allgather(mine)).view(np.int64).min())


def meet(name: str) -> None:
    """Wait until all processes are here. name: the same on all of them."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
