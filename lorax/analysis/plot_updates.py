"""Figures of what was learned: tables and arrays of `updates` in, `matplotlib.figure.Figure` out.

In the style of `plots`: maps are cividis, lines have a colour, a marker and a dash each.
"""

from collections.abc import Sequence

import matplotlib
import matplotlib.lines
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from lorax.analysis.plots import COLOURS, DASHES, GREY, MARKERS, STYLE, main_axis, named, pick
from lorax.analysis.runs import in_words


def spectra(sigmas: pd.DataFrame, layers: Sequence[int], main: str = "rank") -> Figure:
    """Singular values of dW by index: a row a layer, a column a target, a line a member.

    Args:
      sigmas: rows of `updates.spectra`, with a column `main`.
      layers: which layers to draw.
      main: the column that colours the lines, normally the rank.
    """
    targets = list(dict.fromkeys(sigmas["target"]))
    values = sorted(set(sigmas[main]), key=lambda value: (isinstance(value, str), value))
    drawn = sigmas[(sigmas["sigma"] > 0) & sigmas["layer"].isin(layers)]
    with matplotlib.rc_context(STYLE):
        size = (1.4 + 2.5 * len(targets), 0.9 + 1.7 * len(layers))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(layers), len(targets), sharex=True, sharey=True, squeeze=False)
        for row, layer in enumerate(layers):
            for column, target in enumerate(targets):
                axes = grid[row, column]
                here = drawn[(drawn["layer"] == layer) & (drawn["target"] == target)]
                for n, value in enumerate(values):
                    for _, curve in here[here[main] == value].groupby("member"):
                        axes.plot(
                            curve["index"],
                            curve["sigma"],
                            color=pick(COLOURS, n),
                            marker=pick(MARKERS, n),
                            markersize=3,
                            markevery=max(1, len(curve) // 8),
                            linewidth=1,
                            linestyle=pick(DASHES, n),
                        )
                axes.set_title(_panel(layer, target))
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        figure.supxlabel("index of singular value", fontsize=9)
        figure.supylabel("singular value of ΔW", fontsize=9)
        # The legend lists every value, also where a panel lacks one.
        lines = [
            matplotlib.lines.Line2D(
                [],
                [],
                color=pick(COLOURS, n),
                marker=pick(MARKERS, n),
                linestyle=pick(DASHES, n),
            )
            for n in range(len(values))
        ]
        labels = [f"{named(main)} = {in_words(value)}" for value in values]
        figure.legend(lines, labels, loc="outside right upper")
        return figure


def update_ranks(ranks: pd.DataFrame, main: str = "rank") -> Figure:
    """Effective and stable rank of dW against the adapter's rank: means with single matrices.

    Args:
      ranks: rows of `updates.spectra`'s second table, with a column `main`.
      main: the column on the x axis, normally the rank.
    """
    targets = list(dict.fromkeys(ranks["target"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 3.3), layout="constrained")
        for axes, column in zip(
            figure.subplots(1, 2, sharey=True), ("effective", "stable"), strict=True
        ):
            _, position = main_axis(axes, ranks[main], main)
            nominal = ranks.groupby(ranks[main].map(position))["rank"].mean()
            style = {"color": GREY, "linewidth": 1, "linestyle": (0, (6, 3))}
            axes.plot(nominal.index, nominal, label="r of the adapter", **style)
            for n, target in enumerate(targets):
                here = ranks[(ranks["target"] == target) & (ranks[column] > 0)]
                x = here[main].map(position)
                mean = here.groupby(x)[column].mean()
                colour = pick(COLOURS, n)
                style = {"color": colour, "marker": pick(MARKERS, n), "label": str(target)}
                axes.plot(mean.index, mean, linestyle=pick(DASHES, n), **style)
                axes.plot(x, here[column], ".", color=colour, alpha=0.3, markersize=4)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_title(f"{column} rank of ΔW")
        figure.axes[0].set_ylabel("rank")
        figure.axes[0].legend()
        return figure


def similarity_maps(
    phi: dict[tuple[int, str], np.ndarray], control: np.ndarray, y_label: str, x_label: str
) -> Figure:
    """Subspace similarity phi(i, j): a row a layer, a column a target, the Gaussian control last.

    Args:
      phi: (r1, r2) by (layer, target), from `basis_similarity`; missing pairs stay empty.
      control: (r1, r2), the mean over random subspaces of the same space.
      y_label, x_label: what i and j count ("i: top directions, r = 8").
    """
    layers = sorted({layer for layer, _ in phi})
    targets = list(dict.fromkeys(target for _, target in phi))
    with matplotlib.rc_context({**STYLE, "axes.spines.top": True, "axes.spines.right": True}):
        size = (1.3 + 2.0 * (len(targets) + 1), 0.9 + 1.5 * len(layers))
        figure = Figure(figsize=size, layout="constrained")
        shape = (len(layers), len(targets) + 1)
        grid = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
        image = None
        for row, layer in enumerate(layers):
            for column, target in enumerate([*targets, None]):
                axes = grid[row, column]
                values = control if target is None else phi.get((layer, target))
                if values is None or (target is None and row < len(layers) - 1):
                    axes.set_axis_off()
                    continue
                r1, r2 = values.shape
                image = axes.imshow(
                    values,
                    vmin=0,
                    vmax=1,
                    cmap="cividis",
                    aspect="auto",
                    interpolation="nearest",
                    extent=(0.5, r2 + 0.5, r1 + 0.5, 0.5),
                )
                axes.set_title("Gaussian control" if target is None else _panel(layer, target))
                axes.xaxis.set_major_locator(FixedLocator(_ticks(r2)))
                axes.yaxis.set_major_locator(FixedLocator(_ticks(r1)))
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        bar = figure.colorbar(image, ax=grid, shrink=0.9 if len(layers) == 1 else 0.6, pad=0.02)
        bar.set_label("subspace similarity φ(i, j)")
        return figure


def sensitivity(ranking: pd.DataFrame) -> Figure:
    """Score of every matrix as a share of all, with the rank that it was given: rows of
    `updates.sensitivity` of one member."""
    layers, targets = sorted(set(ranking["layer"])), list(dict.fromkeys(ranking["target"]))
    share, ranks = np.full((2, len(targets), len(layers)), np.nan)
    for _, row in ranking.iterrows():
        at = targets.index(row["target"]), layers.index(row["layer"])
        share[at], ranks[at] = row["score"] / ranking["score"].sum(), row["rank"]
    with matplotlib.rc_context({**STYLE, "axes.spines.top": True, "axes.spines.right": True}):
        size = (2.2 + 0.45 * len(layers), 1.0 + 0.35 * len(targets))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(share, vmin=0, cmap="cividis", aspect="auto")
        for (i, j), rank in np.ndenumerate(ranks):
            if rank == rank:
                dark = share[i, j] < 0.6 * np.nanmax(share)
                colour = "white" if dark else "black"
                axes.text(j, i, f"{rank:g}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(layers)), layers)
        axes.set_yticks(range(len(targets)), targets)
        axes.set_xlabel("layer")
        figure.colorbar(image, ax=axes, pad=0.02).set_label("share of the score")
        return figure


# ----------------------------------------------------------------------------------------- helpers


def _panel(layer: int, target: str) -> str:
    return f"{target}, layer {layer}" if layer >= 0 else target


def _ticks(r: int) -> list[int]:
    """1 and r, and the quarters between where there is room."""
    if r <= 4:
        return list(range(1, r + 1))
    return sorted({1, *(round(r * share) for share in (0.25, 0.5, 0.75)), r})
