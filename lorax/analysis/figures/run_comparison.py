"""Figures that compare runs: their curves, and their methods."""

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter, NullLocator

from lorax.analysis.figures.style import (
    COLOURS,
    MARKERS,
    NAMES,
    STYLE,
    bars,
    legend_lines,
    named,
    panels,
    pick,
    plain,
    style_of,
)


def curves(points: pd.DataFrame, loss: str) -> Figure:
    """Final eval loss against the axes of the runs' sweeps: one panel per axis, one line per part
    of a run.

    Args:
      points: run, axis, part, x, mean, se (rows of `settings_compared.curve`).
      loss: name and unit of the loss.
    """
    axes_of = list(dict.fromkeys(points["axis"]))
    lines = list(dict.fromkeys(zip(points["run"], points["part"], strict=True)))
    styles = [style_of(n, len(lines)) for n in range(len(lines))]
    columns = min(2, len(axes_of))
    with matplotlib.rc_context(STYLE):
        figure, grid = panels(len(axes_of), columns, (1.8, 0.7), (3.2, 2.6), sharey=True)
        for axes, axis in zip(grid, axes_of, strict=True):
            of_axis = points[points["axis"] == axis]
            for (run, part), style in zip(lines, styles, strict=True):
                line = of_axis[(of_axis["run"] == run) & (of_axis["part"] == part)]
                axes.errorbar(line["x"], line["mean"], yerr=bars(line["se"]), capsize=2, **style)
            axes.set_xlabel(NAMES.get(axis, named(axis)))
            _logarithmic(axes, axis, of_axis["x"])
        figure.supylabel("final " + loss, fontsize=9)
        labels = [plain(", ".join(filter(None, line))) for line in lines]
        figure.legend(legend_lines(styles), labels, loc="outside upper center", ncols=2)
        return figure


def methods_of_runs(points: pd.DataFrame, loss: str) -> Figure:
    """The best final eval loss of each method of each run, with standard errors: one row per
    method, one marker per run. points: run, method, mean, se."""
    of_methods, of_runs = (list(dict.fromkeys(points[name])) for name in ("method", "run"))
    with matplotlib.rc_context(STYLE):
        height = 1.1 + 0.3 * len(of_methods) * max(1, 0.5 * len(of_runs))
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot()
        for n, run in enumerate(of_runs):
            of_run = points[points["run"] == run]
            shift = 0.6 * ((n + 0.5) / len(of_runs) - 0.5)
            rows = of_run["method"].map(of_methods.index) + shift
            errors = of_run["se"].fillna(0) if of_run["se"].notna().any() else None
            style = {"fmt": pick(MARKERS, n), "color": pick(COLOURS, n), "capsize": 3}
            axes.errorbar(of_run["mean"], rows, xerr=errors, label=plain(run), **style)
        axes.set_yticks(range(len(of_methods)), map(plain, of_methods))
        axes.set_ylim(len(of_methods) - 0.5, -0.5)
        axes.set_xlabel("final " + loss)
        figure.legend(loc="outside upper center", ncols=2)
        return figure


def _logarithmic(axes, axis: str, x: pd.Series) -> None:
    """Ranks and alphas on a log2 axis, learning rates and counts on a log10 axis."""
    if (x <= 0).any():
        return
    if axis in ("rank", "alpha"):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_xscale("log")
        if axis == "trainable_params":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if x.nunique() == 1 or axis in ("rank", "alpha"):
        axes.xaxis.set_minor_locator(NullLocator())
    if x.max() < 10 * x.min() and axis not in ("rank", "alpha"):
        axes.set_xticks(sorted(set(x))[:: max(1, x.nunique() // 4)])
