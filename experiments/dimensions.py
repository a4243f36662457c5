"""Intrinsic dimensions of runs that search for them, and comparisons of two."""

import numpy as np
import pandas as pd

from experiments.verdicts import WITHDRAWN, Verdict, by_interval, shown
from lorax.analysis import intrinsic
from lorax.analysis.compare import Interval

THRESHOLD = 0.9
COLUMNS = ["kind", "method", "dim", "lr", "seed", "params", "status", "start", "value"]


def log_d90(table: pd.DataFrame, method: str, metric: str) -> Interval:
    """log2 of d90 with its interval; NaN if a curve does not cross what is needed.

    table: of `lorax.analysis.intrinsic.points`, of one base; the COLUMNS are enough. method:
    "subspace" (DID) or "said".
    """
    own = table[(table["kind"] == "full") | (table["method"] == method)]
    own = own.assign(condition="", shared="", member=np.arange(len(own)))
    row = intrinsic.estimate(own, THRESHOLD, metric).iloc[0]
    return Interval(*np.log2([row["d"], row["low"], row["high"]]), over="seeds")


def difference(a: Interval, b: Interval) -> Interval:
    """a - b of two independent numbers, such as logarithms of dimensions."""
    half = np.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)
    value = a.value - b.value
    return Interval(value, value - half, value + half, over="seeds")


def compared(part: str, base: str, a: Interval, b: Interval, what: str) -> Verdict:
    """The verdict on a below b, two independent intervals of log2 dimensions. what: a's name."""
    if not np.isfinite([a.value, b.value]).all():
        return Verdict(part, base, WITHDRAWN, f"{what}: outside the tested dimensions")
    ratio = difference(a, b)
    number = f"{what} {as_dimension(a)} against {as_dimension(b)}, log2 of the ratio {shown(ratio)}"
    return Verdict(part, base, by_interval(ratio, "below"), number, ratio)


def as_dimension(log: Interval) -> str:
    """log2 of a dimension as the dimension with its interval."""
    return f"{2**log.value:,.0f} ({2**log.low:,.0f} to {2**log.high:,.0f})"
