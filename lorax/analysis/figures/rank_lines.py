"""Figures of singular values and of the ranks computed from them."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lorax.analysis.figures.style import (
    COLOURS,
    DASHES,
    MARKERS,
    REFERENCE,
    STYLE,
    has_no_order,
    legend_lines,
    legend_of_values,
    line_style,
    main_axis,
    mean_line,
    named,
    panel_title,
    panels,
    pick,
    plain,
    values_in_order,
)

MOST_LINES = 7  # layers in a panel of `base_spectrum`


def spectra(sigmas: pd.DataFrame, layers: Sequence[int], main: str = "rank") -> Figure:
    """Singular values of dW by index: one row per layer, one column per target, one line per
    member.

    Args:
      sigmas: rows of `tables.spectra`, with a column `main`.
      layers: which layers to draw.
      main: the column that colours the lines, normally the rank.
    """
    targets = list(dict.fromkeys(sigmas["target"]))
    values = values_in_order(sigmas[main])
    drawn = sigmas[(sigmas["sigma"] > 0) & sigmas["layer"].isin(layers)]
    with matplotlib.rc_context(STYLE):
        size = (1.4 + 2.5 * len(targets), 0.9 + 1.7 * len(layers))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(layers), len(targets), sharex=True, sharey=True, squeeze=False)
        for row, layer in enumerate(layers):
            for column, target in enumerate(targets):
                axes = grid[row, column]
                in_panel = drawn[(drawn["layer"] == layer) & (drawn["target"] == target)]
                if in_panel.empty:  # an embedding is outside all layers
                    axes.set_axis_off()
                    continue
                below = drawn["layer"].isin(layers[row + 1 :]) & (drawn["target"] == target)
                left = drawn["target"].isin(targets[:column]) & (drawn["layer"] == layer)
                axes.tick_params(labelbottom=not below.any(), labelleft=not left.any())
                for n, value in enumerate(values):
                    for _, curve in in_panel[in_panel[main] == value].groupby("member"):
                        marker_step = max(1, len(curve) // 8)
                        thin = {"markersize": 3, "markevery": marker_step, "linewidth": 1}
                        axes.plot(curve["index"], curve["sigma"], **line_style(n) | thin)
                axes.set_title(plain(panel_title(layer, target)))
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        figure.supxlabel("index of singular value", fontsize=9)
        figure.supylabel("singular value of ΔW", fontsize=9)
        legend_of_values(figure, values, main)
        return figure


def update_ranks(ranks: pd.DataFrame, main: str = "rank") -> Figure:
    """Effective and stable rank of dW against the adapter's rank: means with single matrices.

    Args:
      ranks: rows of `tables.spectra`'s second table, with a column `main`.
      main: the column on the x axis, normally the rank.
    """
    targets = list(dict.fromkeys(ranks["target"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 3.3), layout="constrained")
        for axes, column in zip(
            figure.subplots(1, 2, sharey=True), ("effective", "stable"), strict=True
        ):
            values, place = main_axis(axes, ranks[main], main)
            joined = {"linestyle": "none"} if has_no_order(values) else {}
            adapter_rank = pd.to_numeric(ranks["rank"], errors="coerce")
            nominal = adapter_rank.groupby(place(ranks[main])).mean().dropna()
            style = REFERENCE | joined
            style |= {"marker": "_", "markersize": 20} if joined else {}
            if len(nominal):  # no line for a method without a rank
                axes.plot(nominal.index, nominal, label="rank at most", **style)
            for n, target in enumerate(targets):
                of_target = ranks[(ranks["target"] == target) & (ranks[column] > 0)]
                x = place(of_target[main])
                mean = of_target.groupby(x)[column].mean()
                colour = pick(COLOURS, n)
                axes.plot(mean.index, mean, label=plain(target), **line_style(n) | joined)
                axes.plot(x, of_target[column], ".", color=colour, alpha=0.3, markersize=4)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_title(f"{column} rank of ΔW")
        figure.axes[0].set_ylabel("rank")
        figure.axes[0].legend()
        return figure


def base_spectrum(sigmas: pd.DataFrame, layers: Sequence[int] | None = None) -> Figure:
    """Singular values of W by index, one panel per target, one line per layer.

    Args:
      sigmas: from `tables.base_spectra`.
      layers: which to draw; by default at most seven, evenly spaced.
    """
    if layers is None:
        all_layers = sorted(set(sigmas["layer"]))
        places = np.linspace(0, len(all_layers) - 1, min(MOST_LINES, len(all_layers)))
        layers = [all_layers[round(x)] for x in places]
    targets = list(dict.fromkeys(sigmas["target"]))
    columns = min(4, len(targets))
    # Values that are only rounding would stretch the axis by ten decades.
    drawn = sigmas[sigmas["layer"].isin(layers)]
    drawn = drawn[drawn["sigma"] > 1e-7 * drawn.groupby("path")["sigma"].transform("max")]
    with matplotlib.rc_context(STYLE):
        figure, grid = panels(len(targets), columns, (1.4, 0.9), (2.2, 2.0), sharey=True)
        for axes, target in zip(grid, targets, strict=True):
            for n, layer in enumerate(layers):
                curve = drawn[(drawn["layer"] == layer) & (drawn["target"] == target)]
                marker_step = max(1, len(curve) // 6)
                thin = {"markersize": 3, "markevery": marker_step, "linewidth": 1}
                axes.plot(curve["index"], curve["sigma"], **line_style(n) | thin)
            axes.set_title(plain(target))
            axes.set_yscale("log")
        figure.supxlabel("index of singular value", fontsize=9)
        figure.supylabel("singular value of W", fontsize=9)
        legend_of_values(figure, ["none" if layer < 0 else layer for layer in layers], "layer")
        return figure


def by_layer(ranks: pd.DataFrame) -> Figure:
    """Norm, effective and stable rank of dW by layer: one line per target, one dash style per
    adapter.

    Args:
      ranks: rows of `tables.spectra`'s second table; "member" names the adapter.
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
        styles, labels = list(map(line_style, range(len(targets)))), list(map(plain, targets))
        if len(adapters) > 1:
            dashes = [pick(DASHES, m) for m in range(len(adapters))]
            styles += [{"color": "0.3", "linestyle": dash} for dash in dashes]
            labels += map(plain, adapters)
        figure.legend(legend_lines(styles), labels, loc="outside right upper")
        return figure


def by_layer_and_value(table: pd.DataFrame, columns: Sequence[str], main: str = "rank") -> Figure:
    """Numbers of every update by layer: one row per number, one column per target, one line per
    value of `main`. Lines are means over members; bars are standard errors.

    Args:
      table: member, layer, target, the columns and `main`.
      columns: the numbers to draw. The axis is logarithmic if they span two decades.
    """
    targets = list(dict.fromkeys(table["target"]))
    values = values_in_order(table[main])
    with matplotlib.rc_context(STYLE):
        size = (1.6 + 2.4 * len(targets), 0.9 + 2.0 * len(columns))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(columns), len(targets), sharex=True, sharey="row", squeeze=False)
        for row, column in zip(grid, columns, strict=True):
            finite = table[np.isfinite(table[column])]
            for axes, target in zip(row, targets, strict=True):
                for n, value in enumerate(values):
                    of_value = finite[(finite[main] == value) & (finite["target"] == target)]
                    of_layer = of_value.groupby("layer")[column]
                    mean_line(axes, of_layer, capsize=3, **line_style(n))
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.xaxis.set_major_formatter(
                    FuncFormatter(lambda x, _: "none" if x == -1 else f"{x:g}")
                )
                axes.set_title(plain(target))
            low, high = finite[column].min(), finite[column].max()
            if low > 0 and high > 100 * low:
                row[0].set_yscale("log")
            row[0].set_ylabel(plain(named(column)))
        figure.supxlabel("layer", fontsize=9)
        legend_of_values(figure, values, main)
        return figure
