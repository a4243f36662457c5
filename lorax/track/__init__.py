"""Trackers, which show a run elsewhere: TensorBoard, Weights & Biases and trackio.

Each has a file with a class `Tracker(directory)` and a function `check()`. `update()` sends what
the run has measured so far, `finish()` everything and the report; `close()` leaves it, finished or
not; `where()` says how to look at it.
They read the run directory and nothing else (`lorax.track.follow`), and call no training code.
"""

from collections.abc import Iterable
from pathlib import Path

from lorax.errors import optional

#: {name in `config.track`: the name to print}.
NAMES = {"tensorboard": "TensorBoard", "wandb": "W&B", "trackio": "trackio"}


def check(names: Iterable[str]) -> None:
    """Raises ValueError for a tracker whose package or login is missing."""
    for name in names:
        _module(name).check()


def trackers(names: Iterable[str], directory: Path) -> dict:
    """{name to print: `Tracker` of a run directory}."""
    return {NAMES[name]: _module(name).Tracker(directory) for name in names}


def _module(name: str):
    """The file of a tracker. Raises ValueError if its package is not installed."""
    missing = f"track: {name!r} needs a package: pip install lorax-research[trackers]"
    return optional(f"lorax.track.{name}", name, missing)
