"""The style of the figures of experiments/, which matplotlib draws."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorax.analysis import compare

# Okabe & Ito's palette, without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2)), (0, (2, 2)), "-")
GREY = "0.45"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@contextmanager
def drawn(
    file: Path, columns: int, rows: int = 1, size: tuple[float, float] = (3.4, 3.0), **share
) -> Iterator:
    """A figure of rows x columns panels, each of this size in inches, as an array (rows, columns);
    saved at the end of the block. share: sharex, sharey. Raises SystemExit, with what makes the
    numbers, if there are no panels: a claim that has not been run."""
    if not rows * columns:
        claim = file.parent.name
        raise SystemExit(f"{file}: no numbers yet; python -m experiments.rerun {claim} --write")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        yield figure.subplots(rows, columns, squeeze=False, **share)
        figure.savefig(file, dpi=150)


def line(axes: Axes, n: int, values: pd.DataFrame, label: str) -> None:
    """The n-th line of a panel: means over seeds with their 95% t intervals. values: a row a place
    on the x axis, its index, and a column a seed."""
    half = compare.half_width(values.sem(axis=1), values.count(axis=1))
    style = {"capsize": 3, "label": label} | line_style(n)
    axes.errorbar(values.index, values.mean(axis=1), half, **style)


def ticks(axes: Axes, values: Sequence, base: int = 2) -> None:
    """A logarithmic x axis with a tick at each of these values."""
    axes.set_xscale("log", base=base)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def line_style(n: int) -> dict:
    """Colour, marker and dash of the nth line; each of them identifies it."""
    pick = lambda choices: _nth(choices, n)
    return {"color": pick(COLOURS), "marker": pick(MARKERS), "linestyle": pick(DASHES)}


def _nth(choices: Sequence, n: int):
    """The nth choice; after the last, the first again."""
    return choices[n % len(choices)]
