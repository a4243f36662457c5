"""The style of the figures of experiments/, which matplotlib draws."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike

from lorax.analysis import compare
from lorax.analysis.compare import Interval

# Okabe & Ito's palette, without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2)), (0, (2, 2)), "-")
GREY = "0.45"
THIN = {"color": GREY, "linewidth": 1, "zorder": 1}  # a prediction or a margin
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
    saved at the end of the block. share: sharex, sharey, width_ratios. Raises SystemExit, with what
    makes the numbers, if there are no panels: a claim that has not been run."""
    if not rows * columns:
        claim = file.parent.name
        raise SystemExit(f"{file}: no numbers yet; python -m experiments.rerun {claim} --write")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        yield figure.subplots(rows, columns, squeeze=False, **share)
        figure.savefig(file, dpi=150)


def line(axes: Axes, n: int, values: pd.DataFrame, label: str, doubt: str = "") -> None:
    """The n-th line of a panel: means over seeds with their 95% t intervals, and beside each mean
    the seeds as dots. values: a row a place on the x axis, its index, and a column a seed. doubt:
    why numbers are withdrawn, which have hollow markers; "" if they are not."""
    half = compare.half_width(values.sem(axis=1), values.count(axis=1))
    style = {"capsize": 3, "label": label} | line_style(n)
    style |= {"fillstyle": "none" if doubt else "full"}
    axes.errorbar(values.index, values.mean(axis=1), half, **style)
    dots(axes, values.index, values, style["color"], right=4)


def of_loss(split: str, base: str) -> str:
    """The name of an axis of losses. MiniLM classifies whole sentences."""
    return f"{split} loss (nats a {'sentence' if base.startswith('MiniLM') else 'token'})"


class Row(NamedTuple):
    """A number of a claim, as `intervals` draws it."""

    name: str
    interval: Interval  # that decides
    seeds: ArrayLike = ()  # the same number of each seed
    margins: Sequence[float] = ()  # of the rule
    doubt: str = ""  # why the number is withdrawn; "" if it is not


def intervals(axes: Axes, rows: Iterable[Row]) -> None:
    """Numbers in rows, the first at the top: the interval, the seeds as dots above it, and the
    margins as grey lines. A number that is withdrawn has a hollow marker."""
    rows = list(rows)
    for y, row in enumerate(rows):
        value, low, high = row.interval[:3]
        style = {"color": COLOURS[0], "marker": "o", "capsize": 3}
        style |= {"fillstyle": "none" if row.doubt else "full"}
        axes.errorbar([value], [y], xerr=[[value - low], [high - value]], **style)
        axes.vlines(row.margins, y - 0.5, y + 0.5, **THIN)
        dots(axes, row.seeds, np.full(np.shape(row.seeds), y), COLOURS[0], up=5)
    names = [row.name + ("\n(withdrawn)" if row.doubt else "") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)


def dots(axes: Axes, x: ArrayLike, y: ArrayLike, colour: str, right=0.0, up=0.0) -> None:
    """A small dot a seed, moved by so many points: beside the mean, not on it. y may have a column
    a seed."""
    style = {"color": colour, "alpha": 0.45, "markersize": 5.5, "markeredgewidth": 0}
    for drawn in axes.plot(np.asarray(x), np.asarray(y), ".", **style):
        by = ScaledTranslation(right / 72, up / 72, axes.figure.dpi_scale_trans)
        drawn.set_transform(axes.transData + by)


def legend(grid: np.ndarray, columns: int = 4) -> None:
    """One legend above all panels, where it covers no data: each label once."""
    found = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        found |= {x: h for x, h in zip(labels, handles, strict=True) if x not in found}
    style = {"loc": "outside upper center", "ncols": columns}
    grid[0, 0].figure.legend(found.values(), found.keys(), **style)


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
