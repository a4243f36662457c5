"""Maps: subspace similarity, and one number for every matrix.

Colours are cividis, whose lightness increases uniformly. Small maps show their numbers in the
cells, large maps contours. Figure numbers are those of the LoRA paper (arXiv 2106.09685).
"""

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from lorax.analysis.figures.style import MAP, panel_title, plain

PHI = "subspace similarity φ(i, j)"
FEW = 8  # rows and columns; maps up to this size show their numbers in the cells
CONTOURS = (0.25, 0.5, 0.75)  # of larger maps


def similarity_maps(
    phi: dict[tuple[int, str], np.ndarray], control: np.ndarray, y_label: str, x_label: str
) -> Figure:
    """Subspace similarity phi(i, j): one row per layer, one column per target, then
    control.

    Args:
      phi: (r1, r2) by (layer, target), from `basis_similarity`; missing pairs stay empty.
      control: (r1, r2), the mean over random subspaces of the same space.
      y_label, x_label: what i and j count ("i: top directions, r = 8").
    """
    layers = sorted({layer for layer, _ in phi})
    targets = list(dict.fromkeys(target for _, target in phi))
    with matplotlib.rc_context(MAP):
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
                image = _map(axes, values)
                title = "Gaussian control" if target is None else panel_title(layer, target)
                axes.set_title(plain(title))
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        bar = figure.colorbar(image, ax=grid, shrink=0.9 if len(layers) == 1 else 0.6, pad=0.02)
        bar.set_label(PHI)
        return figure


def figure3(phi: dict[tuple[int, str], np.ndarray], control: np.ndarray | None = None) -> Figure:
    """The paper's figure 3, one row per matrix: phi(i, j) of a small rank (i, downwards) against a
    large one (j, to the right), and next to it a zoom on j <= r1.

    The zoom shows the lower-left triangle, j <= i, where phi says how much of the large rank's top
    j directions the small rank's top i contain. Cells with j > i are grey; the full map shows them.

    Args:
      phi: (r1, r2) by (layer, target), r1 <= r2.
      control: (r1, r2), the mean over random subspaces; drawn as a last row.
    """
    r1, r2 = next(iter(phi.values())).shape
    rows = [(panel_title(*place), values) for place, values in phi.items()]
    rows += [("Gaussian control", control)] if control is not None else []
    with matplotlib.rc_context(MAP):
        figure = Figure(figsize=(7.0, 0.7 + 2.0 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), 2, sharey=True, squeeze=False, width_ratios=(1.7, 1))
        for (full, zoom), (title, values) in zip(grid, rows, strict=True):
            image = _map(full, values)
            corner = np.array(values[:, :r1], float)
            corner[np.triu_indices(r1, 1, corner.shape[1])] = np.nan
            zoom.set_facecolor("0.8")
            _map(zoom, corner)
            full.set_title(plain(title))
            zoom.set_title("zoom: the triangle j ≤ i")
            full.set_ylabel(f"i (r = {r1})")
        for axes in grid[-1]:
            axes.set_xlabel(f"j (r = {r2})")
        figure.colorbar(image, ax=grid, shrink=0.9 / len(rows) ** 0.5, pad=0.02).set_label(PHI)
        return figure


def figure4(phi: Mapping[str | tuple[int, str], np.ndarray], gaussian: np.ndarray) -> Figure:
    """The paper's figure 4: phi(i, j) between two seeds, the targets side by side, then the
    Gaussian control.

    Args:
      phi: (r, r) by target or (layer, target).
      gaussian: (r, r), for two random matrices or the mean of many.
    """
    titles = [name if isinstance(name, str) else panel_title(*name) for name in phi]
    maps = [*zip(titles, phi.values(), strict=True), ("Gaussian control", gaussian)]
    r1, r2 = gaussian.shape
    return _row_of_maps(maps, f"j (r = {r2}, the other seed)", f"i (r = {r1}, one seed)", PHI)


def against_base(
    phi: Mapping[str, np.ndarray], chance: np.ndarray | None = None, top: float = 0.1
) -> Figure:
    """The paper's figure 8: how much of dW's directions (j, to the right) W's leading ones (i,
    downwards) contain; one panel per title ("r = 8"), then chance. The dashed line is at W's top
    share.

    Args:
      phi: (r, n) by title, dW's directions first, from `tables.against_base`.
      chance: (r, n), for random directions.
      top: the share of W's directions above the line; the paper discusses the first 10%.
    """
    maps = [(title, np.transpose(values)) for title, values in phi.items()]
    maps += [("random directions", np.transpose(chance))] if chance is not None else []
    label = "i: directions of W"
    figure = _row_of_maps(maps, "j: directions of ΔW", label, PHI, sharex=False)
    for axes, (_, values) in zip(figure.axes, maps, strict=False):
        line = {"color": "white", "linewidth": 1, "linestyle": (0, (4, 2))}
        axes.axhline(max(1, round(top * len(values))) + 0.5, **line)
    return figure


def layer_grid(values: pd.DataFrame, label: str, *, log: bool = False) -> Figure:
    """One number for every matrix: one row per target, one column per layer, the numbers in the
    cells.

    Args:
      values: columns layer, target, value; several values of one matrix are averaged.
      label: the name and unit of the number.
      log: colour by the logarithm, for numbers that span decades; only for positive numbers.
    """
    table = values.pivot_table(index="target", columns="layer", values="value", dropna=False)
    table = table.reindex(dict.fromkeys(values["target"]))
    return _grid(table, table.map(_short), label, log=log)


def sensitivity(ranking: pd.DataFrame) -> Figure:
    """Score of every matrix as a share of the sum, with the rank chosen for it. ranking: rows of
    `tables.sensitivity` for one member."""
    at = {"index": "target", "columns": "layer"}
    order = list(dict.fromkeys(ranking["target"]))
    share = ranking.assign(value=ranking["score"] / ranking["score"].sum())
    share = share.pivot_table(values="value", **at).reindex(order)
    ranks = ranking.pivot_table(values="rank", **at).reindex(order)
    return _grid(share, ranks.map("{:g}".format), "share of the score")


def between_layers(maps: dict[tuple[str, str], tuple[list[int], np.ndarray]]) -> Figure:
    """How much the directions of different layers' updates agree: one row per side, one column per
    target.

    Args:
      maps: by (target, side): the layers and phi (layers, layers) between them.
    """
    targets, sides = (list(dict.fromkeys(key[n] for key in maps)) for n in (0, 1))
    with matplotlib.rc_context(MAP):
        size = (1.3 + 1.9 * len(targets), 0.8 + 1.8 * len(sides))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(sides), len(targets), squeeze=False)
        image = None
        for row, side in enumerate(sides):
            for column, target in enumerate(targets):
                axes, layers_and_phi = grid[row, column], maps.get((target, side))
                if layers_and_phi is None:
                    axes.set_axis_off()
                    continue
                layers, phi = layers_and_phi
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


def _short(value: float) -> str:
    return f"{value:,.0f}" if 100 <= abs(value) < np.inf else f"{value:.2g}"


def _map(axes: Axes, values: np.ndarray):
    """phi as an image, from 0 to 1, with (1, 1) at the upper left; with numbers if there are few
    cells, else with contours."""
    rows, columns = values.shape
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    style = {"cmap": "cividis", "aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(values, vmin=0, vmax=1, extent=extent, **style)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(columns)))
    axes.yaxis.set_major_locator(FixedLocator(_ticks(rows)))
    if max(rows, columns) <= FEW:
        for (i, j), value in np.ndenumerate(values):
            if value == value:
                colour = "white" if value < 0.6 else "black"
                text = {"ha": "center", "va": "center", "fontsize": 6, "color": colour}
                axes.text(j + 1, i + 1, f"{value:.2f}".removeprefix("0"), **text)
        return image
    crossed = [c for c in CONTOURS if np.nanmin(values) < c < np.nanmax(values)]
    if crossed and min(rows, columns) > 1:
        i, j = np.arange(1, rows + 1), np.arange(1, columns + 1)
        colours = ["white" if level < 0.6 else "black" for level in crossed]
        lines = axes.contour(j, i, values, levels=crossed, colors=colours, linewidths=0.7)
        axes.clabel(lines, fontsize=6, fmt="%g")
    return image


def _row_of_maps(maps, x_label: str, y_label: str, label: str, *, sharex: bool = True) -> Figure:
    with matplotlib.rc_context(MAP):
        figure = Figure(figsize=(1.4 + 2.1 * len(maps), 3.0), layout="constrained")
        grid = figure.subplots(1, len(maps), sharex=sharex, sharey=True, squeeze=False)[0]
        for axes, (title, values) in zip(grid, maps, strict=True):
            image = _map(axes, values)
            axes.set_title(plain(title))
        figure.supxlabel(x_label, fontsize=9)
        grid[0].set_ylabel(y_label)
        figure.colorbar(image, ax=grid, pad=0.02).set_label(label)
        return figure


def _grid(table: pd.DataFrame, words: pd.DataFrame, label: str, *, log: bool = False) -> Figure:
    """One cell per matrix, coloured by `table`, with the text in `words`: targets (rows) x
    layers."""
    values = table.to_numpy(float)
    shown = np.isfinite(values) & ((values > 0) | (not log))
    coloured = np.where(shown, values, np.nan)
    with matplotlib.rc_context(MAP):
        size = (2.2 + 0.55 * values.shape[1], 1.0 + 0.35 * values.shape[0])
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor("0.9")
        low, high = (np.nanmin(coloured), np.nanmax(coloured)) if shown.any() else (0.1, 1.0)
        norm = LogNorm(low, high) if log else Normalize(min(low, 0.0), high)
        image = axes.imshow(coloured, norm=norm, cmap="cividis", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if value == value:  # also infinite values, in black on grey
                dark = shown[i, j] and norm(value) < 0.6
                text = {"ha": "center", "va": "center", "fontsize": 8}
                axes.text(j, i, words.iloc[i, j], color="white" if dark else "black", **text)
        axes.set_xticks(range(len(table.columns)), table.columns)
        axes.set_yticks(range(len(table.index)), map(plain, table.index))
        axes.set_xlabel("layer")
        axes.set_ylabel("target")
        figure.colorbar(image, ax=axes, pad=0.02).set_label(label)
        return figure


def _ticks(r: int) -> list[int]:
    """1 and r, and the quarters in between if there is room."""
    if r <= 4:
        return list(range(1, r + 1))
    return sorted({1, *(round(r * share) for share in (0.25, 0.5, 0.75)), r})
