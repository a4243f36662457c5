"""Many processes that run one program together (`jax.distributed`), each with its own devices.

All processes run the same control flow on the same values; the first one writes the run directory
and the terminal. With a single process everything here is the identity. JAX is imported only where
it is needed: `first` answers before that.
"""

import json
import os
import re
import sys
from typing import NamedTuple

SECONDS = 300  # within which all processes must have started


class Coordinator(NamedTuple):
    """Where process 0 listens ("HOST:PORT"), the number of processes, and the number of this one;
    None for what the cluster says itself."""

    address: str | None = None
    processes: int | None = None
    process: int | None = None


def start(coordinator: Coordinator | None = None) -> None:
    """Join the processes of this program, before JAX's first computation.

    SLURM (srun), Open MPI, Kubernetes (indexed jobs) and Cloud TPU say who the others are;
    elsewhere `coordinator` does. A program that none of them has started in several processes stays
    alone, as it does with `processes` 1.

    Raises ValueError for a coordinator that is not whole, RuntimeError if not all processes have
    started within `SECONDS`.
    """
    given = coordinator or Coordinator()
    if given.processes == 1 or (given == Coordinator() and _is_alone()):
        return
    import jax

    try:
        jax.distributed.initialize(
            *given,
            local_device_ids=[] if _has_all_devices() else None,
            initialization_timeout=SECONDS,
        )
    except ValueError as error:
        if given == Coordinator() and "should be defined" in str(error):
            return  # no cluster that JAX knows
        raise ValueError(
            f"--coordinator: {error} Give --coordinator=HOST:PORT --processes=N --process=I"
        ) from None


def _is_alone() -> bool:
    """Whether a cluster has started this program in one process, which must not wait for others."""
    here = os.environ
    if "SLURM_JOB_ID" in here:  # a batch script or a login shell sees its job's number of tasks
        return int(here.get("SLURM_STEP_NUM_TASKS", 1)) == 1
    if "OMPI_COMM_WORLD_SIZE" in here:
        return int(here["OMPI_COMM_WORLD_SIZE"]) == 1
    return "KUBERNETES_SERVICE_HOST" in here and "JOB_COMPLETION_INDEX" not in here


def _has_all_devices() -> bool:
    """Whether this process takes all GPUs that it sees: it is the only one on its machine, or sees
    only its own. Otherwise JAX gives the processes of a machine one each."""
    here = os.environ
    on_machine = here.get("OMPI_COMM_WORLD_LOCAL_SIZE", here.get("SLURM_STEP_TASKS_PER_NODE", ""))
    seen = [gpu for gpu in here.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return re.fullmatch(r"1(\(x\d+\))?", on_machine) is not None or len(seen) == 1


def count() -> int:
    """The number of processes."""
    return sys.modules["jax"].process_count() if _are_many() else 1


def first() -> bool:
    """Whether this process writes the run directory and the terminal: process 0."""
    return not _are_many() or sys.modules["jax"].process_index() == 0


def _are_many() -> bool:
    jax = sys.modules.get("jax")  # if it is not imported, nothing was started
    return jax is not None and jax.distributed.is_initialized()


def whole(tree):
    """A tree of arrays as NumPy arrays, on every process, whatever their shardings; one leaf after
    the other is gathered. All processes must call it together."""
    import jax
    import numpy as np

    def gathered(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        from jax.experimental import multihost_utils

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
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(placed, tree, shardings)


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


def meet(name: str) -> None:
    """Wait until all processes are here. name: the same on all of them."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
