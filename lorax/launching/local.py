"""The engine of one machine: a process per GPU, or per share of the cores of a CPU.

    python -m lorax.launch --config=FILE --on=local --workers=2

An engine is a module with three functions: add_options(parser) adds its options; check(options)
raises ValueError, before anything starts, if they can't be met; run(directories, options) runs
parts, tries those whose worker dies again, and yields (part, None or why it failed for good) as
each ends. Workers of this one end with their launcher.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorax import rundir
from lorax.launching import machines, state, worker
from lorax.launching.options import at_least

SECONDS = 0.2  # between two looks at the workers


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--on=local`."""
    add = parser.add_argument_group("--on=local").add_argument
    of = "one for each GPU, or for 8 cores of a CPU"
    add("--workers", type=int, metavar="N", help=f"processes (default: {of})")
    add("--retries", type=int, default=2, metavar="N", help="of a part whose worker dies (2)")


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for numbers out of range."""
    at_least(options, workers=1, retries=0)
    here = machines.here()
    if here.platform != "cpu" and (options.workers or 1) > machines.most_here(here):
        raise ValueError(
            f"--workers: {options.workers} given, this machine has {here.devices} "
            f"{here.platform.upper()}s for {machines.most_here(here)} workers"
        )


def run(
    directories: Sequence[Path], options: argparse.Namespace
) -> Iterator[tuple[Path, str | None]]:
    """Run the parts; (part, None or why it failed for good) of each as it ends."""
    here = machines.here()
    free = list(range(options.workers or machines.most_here(here)))
    waiting, running, retries = list(directories), {}, {}
    for part in waiting:
        state.launch(part)
    try:
        while waiting or running:
            while waiting and free:
                part, slot = waiting.pop(0), free.pop(0)
                running[part] = slot, start(part, here.platform, slot)
            time.sleep(SECONDS)
            for part in [
                part for part, (_, process) in running.items() if process.poll() is not None
            ]:
                slot, process = running.pop(part)
                process.stdin.close()
                free.append(slot)
                outcome = state.outcome(part)
                if state.tries_again(part, outcome, retries, options.retries):
                    waiting.insert(0, part)
                else:
                    state.end(part, outcome.reason)
                    yield part, outcome.reason
    finally:
        for _, process in running.values():
            process.stdin.close()  # they end
        for _, process in running.values():
            process.wait()


def start(part: Path, platform: str, slot: int) -> subprocess.Popen:
    """Start a worker. Its standard input stays open as long as this process lives."""
    environment = dict(os.environ)
    if platform == "gpu":
        known = environment.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = known.split(",")[slot] if known else str(slot)
    with open(part / state.LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "lorax.launching.local", str(part)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _end_with_launcher() -> None:
    """End this process as soon as its standard input ends: the launcher is gone."""
    os.read(0, 1)  # nothing is ever written there
    os._exit(1)


def main(argv: list[str]) -> int:
    """A worker that does not outlive its launcher."""
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    while rundir.is_locked(Path(argv[1])):  # by the worker of a launcher that was killed just now
        time.sleep(SECONDS)
    return worker.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
