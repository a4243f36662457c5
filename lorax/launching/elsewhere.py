"""Parts whose workers somebody else starts: Kubernetes by index, another scheduler, a person.

    python -m lorax.launch --config=FILE --on=elsewhere --workers=8
    python -m lorax.launching.worker DIR/parts/I

The launcher writes the parts and waits until each has ended, as its worker.json says. Whoever
started a worker that died starts the next one. All must see the run directory.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorax.launching import state
from lorax.launching.options import at_least

SECONDS = 2.0  # between two looks at the parts


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--on=elsewhere`."""
    add = parser.add_argument_group("--on=elsewhere").add_argument
    add("--workers", type=int, required=True, metavar="N", help="how many there will be")
    add("--gpus", type=int, default=0, metavar="N", help="of each worker (0)")
    add("--retries", type=int, default=10, metavar="N", help="workers of a part that may die (10)")


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for an option out of range."""
    at_least(options, workers=1, gpus=0, retries=0)


def run(
    directories: Sequence[Path], options: argparse.Namespace
) -> Iterator[tuple[Path, str | None]]:
    """Wait for the parts; (part, None or why it failed for good) of each as it ends: done, wrong,
    or with more dead workers than `options.retries`."""
    waiting = list(directories)
    for part in waiting:
        if not state.is_alive(part) and not state.outcome(part).done:
            state.launch(part)
    print("each part waits for: python -m lorax.launching.worker", waiting[0], flush=True)
    while waiting:
        for part in list(waiting):
            found = state.read(part)
            again = found["state"] == "again" and not found["host"]
            if found["state"] in ("done", "failed") or again and found["tries"] > options.retries:
                why = state.outcome(part).reason
                state.end(part, why)
                waiting.remove(part)
                yield part, why
        time.sleep(SECONDS if waiting else 0)
