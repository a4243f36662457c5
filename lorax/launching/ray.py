"""Parts as tasks of Ray, on a cluster (`--address`) or on this machine.

    python -m lorax.launch --config=FILE --on=ray --address=auto --gpus=1

A task gets the path of its part and returns nothing: weights, metrics and adapters go through the
run directory, which all nodes must see, and never through Ray's object store. Each task has a
process of its own. Ray itself retries those that die (`max_retries`). No runtime environment is
made: lorax and its packages must be installed on every node, as they are here.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorax import errors
from lorax.launching import state
from lorax.launching.options import at_least

MISSING = "--on=ray needs Ray: pip install lorax-research[ray]"
STORE = 80_000_000  # bytes of an object store that holds paths; Ray takes no less than 75 MiB
HERE = "local"  # the address of a cluster that Ray starts on this machine, and ends with it


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--on=ray`."""
    add = parser.add_argument_group("--on=ray").add_argument
    usual = os.environ.get("RAY_ADDRESS", HERE)
    add("--address", default=usual, help="of the cluster: auto, HOST:PORT, or local (this machine)")
    add("--workers", type=int, metavar="N", help="parts that run at the same time")
    add("--gpus", type=float, metavar="N", help="of each part (default: 1 if this machine has any)")
    add("--cpus", type=int, default=1, metavar="N", help="of each part (1)")
    add("--memory", type=float, metavar="GB", help="of each part")
    add("--retries", type=int, default=2, metavar="N", help="of a part whose worker dies (2)")


def check(options: argparse.Namespace) -> None:
    """Raises ValueError if Ray is not installed or an option is out of range."""
    errors.optional("ray", "ray", MISSING)
    at_least(options, workers=1, gpus=0, cpus=1, memory=0, retries=0)


def run(
    directories: Sequence[Path], options: argparse.Namespace
) -> Iterator[tuple[Path, str | None]]:
    """Run the parts; (part, None or why it failed for good) of each as it ends."""
    import ray

    with _connected(options):
        again = {"max_calls": 1, "max_retries": options.retries, "retry_exceptions": True}
        train = ray.remote(**resources(options), **again)(_train)
        for part in directories:
            state.launch(part)
        waiting, tasks = list(directories), {}
        try:
            while waiting or tasks:
                while waiting and len(tasks) < (options.workers or len(directories)):
                    part = waiting.pop(0)
                    tasks[train.remote(str(part.absolute()), os.getcwd())] = part
                (task,), _ = ray.wait(list(tasks), num_returns=1)
                part = tasks.pop(task)
                with contextlib.suppress(ray.exceptions.RayError):  # the part says itself why
                    ray.get(task)
                outcome = state.outcome(part)
                state.end(part, outcome.reason)
                yield part, outcome.reason
        finally:
            for task in tasks:
                ray.cancel(task, force=True)


def _train(part: str, folder: str) -> None:
    """The task: train a part in a process that Ray starts. An error is raised if another try may do
    better; worker.json has the others. folder: where the launcher stands."""
    os.chdir(folder)
    from lorax.launching import worker  # imports JAX

    with contextlib.suppress(*state.MISTAKES), state.logged(Path(part)):
        worker.run(Path(part))


@contextlib.contextmanager
def _connected(options: argparse.Namespace):
    """Context with Ray, which must not be started yet. A cluster on this machine ends with it."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    here = {"include_dashboard": False, "object_store_memory": STORE}
    try:
        with warnings.catch_warnings():
            # Ray's programs are started by a fork that runs nothing of JAX.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            ray.init(
                address=options.address,
                namespace="lorax",
                log_to_driver=False,
                logging_level="ERROR",
                **(here if options.address == HERE else {}),
            )
    except Exception as error:  # Ray has no type of its own for them
        why = errors.reason(error)
        raise ValueError(f"--address: {options.address!r} given, no Ray there ({why})") from error
    try:
        yield
    finally:
        ray.shutdown()


def resources(options: argparse.Namespace) -> dict[str, float]:
    """What each task takes. Raises ValueError for more than this machine has, and for parts on CPUs
    of a cluster with GPUs that nobody has asked for."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = lambda name: max((node.get(name, 0) for node in nodes), default=0)
    gpus, memory = options.gpus, options.memory or 0
    if gpus is None:
        gpus = min(1, most("GPU"))
        if gpus and options.address != HERE:
            raise ValueError("--gpus: not given, and there are some; --gpus=0 trains on CPUs")
    _enough(options, "cpus", options.cpus, most("CPU"))
    _enough(options, "gpus", gpus, most("GPU"))
    _enough(options, "memory", memory, most("memory") / 1e9)
    asked = {"num_cpus": options.cpus, "num_gpus": gpus}
    return asked | ({"memory": memory * 1e9} if memory else {})


def _enough(options: argparse.Namespace, flag: str, asked: float, most: float) -> None:
    """Raises ValueError if this machine has less; a line if a cluster has less, which may grow."""
    if asked > most and options.address == HERE:
        raise ValueError(f"--{flag}: {asked:g} given, this machine has {most:.3g}")
    if asked > most:
        line = f"--{flag}: no node of the cluster has {asked:g} yet; parts wait for one"
        print(f"lorax: {line}", file=sys.stderr)
