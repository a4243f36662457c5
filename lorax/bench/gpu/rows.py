"""One line of the results: a case, the path that computes it, its times."""

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np

from lorax.errors import reason

LEAST, MOST = 5, 200  # calls that are timed


class SkippedError(Exception):
    """A measurement that does not apply here; its text says why."""


def row(case: str, path: str, seconds: np.ndarray, phases=(), **more) -> dict:
    """A row: the median, lowest and highest of the times, in milliseconds.

    case: what is computed; rows of one case are compared. path: how, or by what. phases: [(bytes
    moved, FLOPs)] at least, of what runs one after the other. more: JSON values.
    """
    ms = 1e3 * np.asarray(seconds)
    times = {"ms": float(np.median(ms)), "low": float(ms.min()), "high": float(ms.max())}
    return {"case": case, "path": path, **times, "phases": [list(p) for p in phases], **more}


def repeated(run: Callable[[], float], at_least: float) -> np.ndarray:
    """What `run` returns, seconds, from call to call for some seconds, after two to warm up."""
    run(), run()
    begin, seconds = time.perf_counter(), []
    for i in itertools.count():
        if i >= LEAST and time.perf_counter() - begin >= at_least or i >= MOST:
            return np.array(seconds)
        seconds.append(run())


def attempted(case: str, path: str, measure: Callable[[], dict]) -> Iterator[dict]:
    """The row of `measure`, or one that says why there is none; the next path goes on."""
    try:
        yield measure()
    except SkippedError as why:
        yield {"case": case, "path": path, "skipped": str(why)}
    except Exception as error:  # whatever a compiler or a driver raises
        yield {"case": case, "path": path, "failed": reason(error)[:300]}
