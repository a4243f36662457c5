"""Figures of several runs, and of adapters by layer; in the style of `plots`."""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from lorax.analysis.plots import (
    COLOURS,
    DASHES,
    MARKERS,
    NAMES,
    STYLE,
    line_style,
    named,
    pick,
    plain,
    style_of,
)


def curves(found: pd.DataFrame, loss: str) -> Figure:
    """Final eval loss against what runs were swept over: a panel an axis, a line a part of a run.

    Args:
      found: run, axis, part, x, mean, se (rows of `compare.curve`).
      loss: its name and unit.
    """
    axes_of = list(dict.fromkeys(found["axis"]))
    lines = list(dict.fromkeys(zip(found["run"], found["part"], strict=True)))
    styles = [style_of(n, len(lines)) for n in range(len(lines))]
    columns = min(2, len(axes_of))
    rows = -(-len(axes_of) // columns)
    with matplotlib.rc_context(STYLE):
        size = (1.8 + 3.2 * columns, 0.7 + 2.6 * rows)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axes in grid[len(axes_of) :]:
            axes.set_axis_off()
        for axes, axis in zip(grid, axes_of, strict=False):
            here = found[found["axis"] == axis]
            for (run, part), style in zip(lines, styles, strict=True):
                line = here[(here["run"] == run) & (here["part"] == part)]
                bars = line["se"] if line["se"].notna().any() else None
                axes.errorbar(line["x"], line["mean"], yerr=bars, capsize=2, **style)
            axes.set_xlabel(NAMES.get(axis, named(axis)))
            _logarithmic(axes, axis, here["x"])
        figure.supylabel("final " + loss, fontsize=9)
        handles = [matplotlib.lines.Line2D([], [], **style) for style in styles]
        labels = [plain(", ".join(filter(None, line))) for line in lines]
        figure.legend(handles, labels, loc="outside upper center", ncols=2)
        return figure


def methods(found: pd.DataFrame, loss: str) -> Figure:
    """The best final eval loss of each method of each run, with standard errors: a row a method, a
    marker a run. found: run, method, mean, se."""
    of_methods, of_runs = (list(dict.fromkeys(found[name])) for name in ("method", "run"))
    with matplotlib.rc_context(STYLE):
        height = 1.1 + 0.3 * len(of_methods) * max(1, 0.5 * len(of_runs))
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot()
        for n, run in enumerate(of_runs):
            own = found[found["run"] == run]
            shift = 0.6 * ((n + 0.5) / len(of_runs) - 0.5)
            rows = own["method"].map(of_methods.index) + shift
            errors = own["se"].fillna(0) if own["se"].notna().any() else None
            style = {"fmt": pick(MARKERS, n), "color": pick(COLOURS, n), "capsize": 3}
            axes.errorbar(own["mean"], rows, xerr=errors, label=plain(run), **style)
        axes.set_yticks(range(len(of_methods)), map(plain, of_methods))
        axes.set_ylim(len(of_methods) - 0.5, -0.5)
        axes.set_xlabel("final " + loss)
        figure.legend(loc="outside upper center", ncols=2)
        return figure


def by_layer(ranks: pd.DataFrame) -> Figure:
    """Norm, effective and stable rank of dW layer by layer: a line a target, a dash an adapter.

    Args:
      ranks: rows of `updates.spectra`'s second table; "member" names the adapter.
    """
    columns = {"norm": "‖ΔW‖", "effective": "effective rank", "stable": "stable rank"}
    targets, adapters = (list(dict.fromkeys(ranks[name])) for name in ("target", "member"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.2), layout="constrained")
        for axes, (column, title) in zip(figure.subplots(1, 3), columns.items(), strict=True):
            for (target, adapter), line in ranks.groupby(["target", "member"], sort=False):
                n, m = targets.index(target), adapters.index(adapter)
                ordered = line.sort_values("layer")
                axes.plot(
                    ordered["layer"],
                    ordered[column],
                    color=pick(COLOURS, n),
                    marker=pick(MARKERS, n),
                    linestyle=pick(DASHES, n if len(adapters) == 1 else m),
                    markersize=4,
                )
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.supxlabel("layer", fontsize=9)
        handles, labels = _handles(len(targets)), [plain(target) for target in targets]
        if len(adapters) > 1:
            handles += [
                matplotlib.lines.Line2D([], [], color="0.3", linestyle=pick(DASHES, m))
                for m in range(len(adapters))
            ]
            labels += [plain(adapter) for adapter in adapters]
        figure.legend(handles, labels, loc="outside right upper")
        return figure


def between_layers(maps: dict[tuple[str, str], tuple[list[int], np.ndarray]]) -> Figure:
    """How much the directions of one layer's update are those of another's: a row a side, a column
    a target.

    Args:
      maps: by (target, side): the layers and phi (layers, layers) between them.
    """
    targets, sides = (list(dict.fromkeys(key[n] for key in maps)) for n in (0, 1))
    with matplotlib.rc_context({**STYLE, "axes.spines.top": True, "axes.spines.right": True}):
        size = (1.3 + 1.9 * len(targets), 0.8 + 1.8 * len(sides))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(sides), len(targets), squeeze=False)
        image = None
        for row, side in enumerate(sides):
            for column, target in enumerate(targets):
                axes, found = grid[row, column], maps.get((target, side))
                if found is None:
                    axes.set_axis_off()
                    continue
                layers, phi = found
                image = axes.imshow(phi, vmin=0, vmax=1, cmap="cividis", interpolation="nearest")
                axes.set_title(plain(f"{target}, {side}"), fontsize=8)
                ticks = sorted({0, len(layers) // 2, len(layers) - 1})
                axes.set_xticks(ticks, [layers[tick] for tick in ticks])
                axes.set_yticks(ticks, [layers[tick] for tick in ticks])
        figure.supxlabel("layer", fontsize=9)
        figure.supylabel("layer", fontsize=9)
        bar = figure.colorbar(image, ax=grid, shrink=0.8, pad=0.02)
        bar.set_label("φ(r, r)")
        return figure


def _handles(count: int) -> list[matplotlib.lines.Line2D]:
    """Lines for a legend: it lists every one, also those that a panel lacks."""
    return [matplotlib.lines.Line2D([], [], **line_style(n)) for n in range(count)]


def _logarithmic(axes, axis: str, x: pd.Series) -> None:
    """Ranks and scales by powers of two, rates and counts by powers of ten."""
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
