"""The style of all figures: colours, markers and dashes, names of axes, legends.

Lines have Okabe and Ito's colours and each a marker and a dash style, so they can be distinguished
without colour. Maps are cividis, whose lightness increases uniformly. Losses are in nats.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib
import matplotlib.lines
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from lorax.analysis import runs

# Okabe & Ito's palette, without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2)), (0, (2, 2)), "-")
GREY = "0.45"
REFERENCE = {"color": GREY, "linewidth": 1, "linestyle": (0, (6, 3))}  # chance, the base, a bound
LOSS = "eval loss (nats)"  # for models that predict tokens or classes
NAMES = {"rank": "rank r of the adapter", "lr": "learning rate", "alpha": "α"}
NAMES |= {"trainable_params": "trainable parameters", "n_train": "training examples"}
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
MAP = {**STYLE, "axes.spines.top": True, "axes.spines.right": True}


def pick(choices: Sequence, n: int):
    """The nth choice; after the last, the first again."""
    return choices[n % len(choices)]


def line_style(n: int) -> dict:
    """Colour, marker and dash of the nth line; each of them identifies it."""
    return {"color": pick(COLOURS, n), "marker": pick(MARKERS, n), "linestyle": pick(DASHES, n)}


def style_of(n: int, count: int) -> dict:
    """The style of the nth of `count` lines; if there are more than colours, from dark to light."""
    if count <= len(COLOURS):
        return line_style(n)
    return line_style(n) | {"color": matplotlib.colormaps["cividis"](0.95 * n / (count - 1))}


def named(main: str) -> str:
    """A column's name in words."""
    return main.replace("_", " ")


def plain(name: object) -> str:
    """A user's name as plain text for matplotlib: no mathematics between dollar signs, and no
    leading underscore, which would hide the line from the legend."""
    text = str(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def distinct(column: Iterable) -> list:
    """The distinct values of a column, in their order; None for missing values.

    Done in Python, because `Series.map` turns None into NaN, which doesn't equal itself.
    """
    return list(dict.fromkeys(None if runs.is_missing(value) else value for value in column))


def main_axis(
    axes: Axes, column: pd.Series, main: str
) -> tuple[list, Callable[[Iterable], np.ndarray]]:
    """Set up the x axis. Returns its values in order, and a function from a column (n,) to
    positions (n,)."""
    values = distinct(column)
    numeric = all(isinstance(v, (int, float, np.number)) and v > 0 for v in values)
    axes.set_xlabel(NAMES.get(main, named(main)))
    if not numeric:
        axes.set_xticks(range(len(values)), [plain(runs.in_words(v, main)) for v in values])
        at = {value: n for n, value in enumerate(values)}
        positions = lambda column: [
            at[None if runs.is_missing(value) else value] for value in column
        ]
        return values, lambda column: np.array(positions(column), int)
    values = sorted(values)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    # A single value would have no range.
    axes.set_xlim(values[0] / 1.25, values[-1] * 1.25)
    return values, lambda column: np.array(list(column), float)


def panels(
    count: int,
    columns: int,
    size: tuple[float, float],
    per_panel: tuple[float, float],
    alone: tuple[float, float] | None = None,
    **shared: bool | str,
) -> tuple[Figure, np.ndarray]:
    """A figure of `count` panels, row by row, and their axes (count,). Places left over stay empty.

    Args:
      columns: how many panels a row has.
      size: inches (width, height) outside the panels.
      per_panel: inches (width, height) of a column and of a row.
      alone: the figure's inches if there is only one panel, if not the sum of both.
      shared: which axes the panels share, as in `Figure.subplots`.
    """
    rows = -(-count // columns)
    inches = (size[0] + per_panel[0] * columns, size[1] + per_panel[1] * rows)
    if alone is not None and count == 1:
        inches = alone
    figure = Figure(figsize=inches, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def bars(errors: pd.Series) -> pd.Series | None:
    """Standard errors to draw, or None if there are none (one seed): bars of length zero would look
    like certainty."""
    return errors if errors.notna().any() else None


def mean_line(axes: Axes, values: pd.core.groupby.SeriesGroupBy, **style: object) -> None:
    """A line through the means of the groups, with standard errors."""
    mean = values.mean()
    axes.errorbar(mean.index, mean, yerr=bars(values.sem()), **style)


def has_no_order(values: Sequence) -> bool:
    """Whether the values of an axis are names (of methods, targets) or None, which no line should
    connect."""
    return all(value is None or isinstance(value, str) for value in values)


def values_in_order(column: pd.Series) -> list:
    """The values of the main axis: numbers by size, then words."""
    return sorted(set(column), key=lambda value: (isinstance(value, str), value))


def legend_lines(styles: Iterable[dict]) -> list[matplotlib.lines.Line2D]:
    """Lines for a legend, also of values that a panel lacks."""
    return [matplotlib.lines.Line2D([], [], **style) for style in styles]


def legend_of_values(
    figure: Figure, values: Sequence, main: str, more: Mapping[str, dict] | None = None
) -> None:
    """A legend of all values, also those that a panel lacks, and of the lines in `more`."""
    lines = legend_lines([*map(line_style, range(len(values))), *(more or {}).values()])
    labels = [f"{named(main)} = {plain(runs.in_words(value, main))}" for value in values]
    figure.legend(lines, [*labels, *(more or {})], loc="outside right upper")


def panel_title(layer: int, target: str) -> str:
    """The title of a matrix's panel; a matrix outside all layers has only its target."""
    return f"{target}, layer {layer}" if layer >= 0 else target
