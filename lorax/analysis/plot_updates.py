"""Figures of what was learned: tables and arrays of `updates` in, `matplotlib.figure.Figure` out.

In the style of `plots`: lines have a colour, a marker and a dash each. Maps are cividis, whose
lightness rises evenly; small ones have their numbers in the cells, large ones contours. The
figures' numbers are the LoRA paper's (arXiv 2106.09685).
"""

from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.lines
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from lorax.analysis.plots import (
    COLOURS,
    GREY,
    STYLE,
    has_no_order,
    line_style,
    main_axis,
    named,
    pick,
    plain,
)
from lorax.analysis.runs import in_words
from lorax.analysis.subspace import Band

PHI = "subspace similarity φ(i, j)"
MAP = {**STYLE, "axes.spines.top": True, "axes.spines.right": True}
FEW = 8  # rows and columns up to which a map has its numbers in the cells
CONTOURS = (0.25, 0.5, 0.75)  # of a map that has more
MOST_LINES = 7  # layers in a panel of `base_spectrum`
# Columns of `amplifications` and of a trajectory, as a figure names them.
NORMS = {
    "delta_norm": "‖ΔW‖",
    "w_in_w": "‖UᵀWV‖, W's directions",
    "w_in_delta": "‖UᵀWV‖, ΔW's directions",
    "w_in_random": "‖UᵀWV‖, random directions",
}
QUANTITIES = {
    "norm": "‖ΔW‖ (Frobenius)",
    "effective": "effective rank of ΔW",
    "stable": "stable rank of ΔW",
    "energy90": "90% energy rank of ΔW",
    "overlap_final": "overlap with final ΔW",
}


def spectra(sigmas: pd.DataFrame, layers: Sequence[int], main: str = "rank") -> Figure:
    """Singular values of dW by index: a row a layer, a column a target, a line a member.

    Args:
      sigmas: rows of `updates.spectra`, with a column `main`.
      layers: which layers to draw.
      main: the column that colours the lines, normally the rank.
    """
    targets = list(dict.fromkeys(sigmas["target"]))
    values = _values(sigmas[main])
    drawn = sigmas[(sigmas["sigma"] > 0) & sigmas["layer"].isin(layers)]
    with matplotlib.rc_context(STYLE):
        size = (1.4 + 2.5 * len(targets), 0.9 + 1.7 * len(layers))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(layers), len(targets), sharex=True, sharey=True, squeeze=False)
        for row, layer in enumerate(layers):
            for column, target in enumerate(targets):
                axes = grid[row, column]
                here = drawn[(drawn["layer"] == layer) & (drawn["target"] == target)]
                if here.empty:  # an embedding is in no layer, and no layer has one
                    axes.set_axis_off()
                    continue
                below = drawn["layer"].isin(layers[row + 1 :]) & (drawn["target"] == target)
                left = drawn["target"].isin(targets[:column]) & (drawn["layer"] == layer)
                axes.tick_params(labelbottom=not below.any(), labelleft=not left.any())
                for n, value in enumerate(values):
                    for _, curve in here[here[main] == value].groupby("member"):
                        often = max(1, len(curve) // 8)
                        thin = {"markersize": 3, "markevery": often, "linewidth": 1}
                        axes.plot(curve["index"], curve["sigma"], **line_style(n) | thin)
                axes.set_title(plain(_panel(layer, target)))
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        figure.supxlabel("index of singular value", fontsize=9)
        figure.supylabel("singular value of ΔW", fontsize=9)
        _legend(figure, values, main)
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
            values, place = main_axis(axes, ranks[main], main)
            joined = {"linestyle": "none"} if has_no_order(values) else {}
            given = pd.to_numeric(ranks["rank"], errors="coerce")
            nominal = given.groupby(place(ranks[main])).mean().dropna()
            style = {"color": GREY, "linewidth": 1, "linestyle": (0, (6, 3))} | joined
            style |= {"marker": "_", "markersize": 20} if joined else {}
            if len(nominal):  # a method without a rank has none to fall short of
                axes.plot(nominal.index, nominal, label="rank at most", **style)
            for n, target in enumerate(targets):
                here = ranks[(ranks["target"] == target) & (ranks[column] > 0)]
                x = place(here[main])
                mean = here.groupby(x)[column].mean()
                colour = pick(COLOURS, n)
                axes.plot(mean.index, mean, label=plain(target), **line_style(n) | joined)
                axes.plot(x, here[column], ".", color=colour, alpha=0.3, markersize=4)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_title(f"{column} rank of ΔW")
        figure.axes[0].set_ylabel("rank")
        figure.axes[0].legend()
        return figure


# -------------------------------------------------------------------------------------------- maps


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
                title = "Gaussian control" if target is None else _panel(layer, target)
                axes.set_title(plain(title))
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        bar = figure.colorbar(image, ax=grid, shrink=0.9 if len(layers) == 1 else 0.6, pad=0.02)
        bar.set_label(PHI)
        return figure


def figure3(phi: dict[tuple[int, str], np.ndarray], control: np.ndarray | None = None) -> Figure:
    """The paper's figure 3, a row a matrix: phi(i, j) of a small rank (i, downwards) against a
    large one (j, to the right), and beside it the zoom on j <= r1.

    The zoom shows the lower-left triangle, j <= i, where phi says how much of the large rank's top
    j lies within the small rank's top i. Cells with j > i are grey: the full map has them.

    Args:
      phi: (r1, r2) by (layer, target), r1 <= r2.
      control: (r1, r2), the mean over random subspaces; a last row where it is given.
    """
    r1, r2 = next(iter(phi.values())).shape
    rows = [(_panel(*place), values) for place, values in phi.items()]
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
    """The paper's figure 4: phi(i, j) between two seeds, the targets side by side and the Gaussian
    control last.

    Args:
      phi: (r, r) by target or (layer, target).
      gaussian: (r, r), of two random matrices or the mean of many.
    """
    titles = [name if isinstance(name, str) else _panel(*name) for name in phi]
    maps = [*zip(titles, phi.values(), strict=True), ("Gaussian control", gaussian)]
    r1, r2 = gaussian.shape
    return _row_of_maps(maps, f"j (r = {r2}, the other seed)", f"i (r = {r1}, one seed)", PHI)


def against_base(
    phi: Mapping[str, np.ndarray], chance: np.ndarray | None = None, top: float = 0.1
) -> Figure:
    """The paper's figure 8: how much of dW's directions (j, to the right) W's leading ones (i,
    downwards) hold; a panel a title ("r = 8"), chance last. The dashed line is at W's top share.

    Args:
      phi: (r, n) by title, dW's directions first, as `updates.against_base` gives them.
      chance: (r, n), what random directions would give.
      top: the share of W's directions above the line; the paper speaks of the first 10%.
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
    """One number for every matrix: a row a target, a column a layer, the numbers in the cells.

    Args:
      values: columns layer, target, value; several of one matrix are averaged.
      label: what the number is, with its unit.
      log: colours by its logarithm, for what spans decades; only of positive numbers.
    """
    table = values.pivot_table(index="target", columns="layer", values="value", dropna=False)
    table = table.reindex(dict.fromkeys(values["target"]))
    return _grid(table, table.map(_short), label, log=log)


def sensitivity(ranking: pd.DataFrame) -> Figure:
    """Score of every matrix as a share of all, with the rank that it was given: rows of
    `updates.sensitivity` of one member."""
    at = {"index": "target", "columns": "layer"}
    order = list(dict.fromkeys(ranking["target"]))
    share = ranking.assign(value=ranking["score"] / ranking["score"].sum())
    share = share.pivot_table(values="value", **at).reindex(order)
    ranks = ranking.pivot_table(values="rank", **at).reindex(order)
    return _grid(share, ranks.map("{:g}".format), "share of the score")


# ------------------------------------------------------------------------------------------- lines


def diagonal(phi: Mapping[str, np.ndarray], band: Band) -> Figure:
    """phi(i, i) against i, a line a comparison, over what chance gives: mean and 5% to 95%.

    Args:
      phi: (r1, r2) by name.
      band: of `gaussian_similarity`, in the space that the comparisons share (an MLP's kernels and
        attention's may lie in different ones).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        mean, low, high = (np.diagonal(part) for part in band)
        i = np.arange(1, len(mean) + 1)
        axes.fill_between(i, low, high, color=GREY, alpha=0.25, linewidth=0, label="chance, 5-95%")
        axes.plot(i, mean, color=GREY, linewidth=1, linestyle=(0, (6, 3)), label="chance, mean")
        for n, (name, values) in enumerate(phi.items()):
            own = np.diagonal(values)
            often = max(1, len(own) // 8)
            i = np.arange(1, len(own) + 1)
            axes.plot(i, own, label=plain(name), markevery=often, **line_style(n))
        axes.set_xlabel("i: top directions of both")
        axes.set_ylabel("subspace similarity φ(i, i)")
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside right upper")
        return figure


def table7(amplified: pd.DataFrame, main: str = "rank") -> Figure:
    """The paper's table 7 against the rank: what W and dW have in each other's directions, and the
    amplification factor. Medians over matrices and members, bars are quartiles; all are Frobenius
    norms on logarithmic axes.

    Args:
      amplified: rows of `updates.amplifications`, with a column `main`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for n, (column, label) in enumerate(NORMS.items()):
            _quartiles(left, amplified, main, column, n, label)
        _quartiles(right, amplified, main, "factor", 0, None)
        right.axhline(1, color=GREY, linewidth=1, linestyle=(0, (6, 3)))
        left.set_ylabel("Frobenius norm")
        right.set_ylabel("amplification ‖ΔW‖ / ‖UᵀWV‖")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2)
        return figure


def _quartiles(axes: Axes, table: pd.DataFrame, main: str, column: str, n: int, label) -> None:
    values, place = main_axis(axes, table[main], main)
    # A factor is infinite where W has nothing; a log axis has no zero.
    usable = table[np.isfinite(table[column]) & (table[column] > 0)]
    parts = usable.groupby(place(usable[main]))[column].quantile([0.25, 0.5, 0.75]).unstack()
    if len(parts):
        middle = parts[0.5]
        around = [middle - parts[0.25], parts[0.75] - middle]
        axes.errorbar(parts.index, middle, yerr=around, capsize=3, label=label, **line_style(n))
        axes.set_yscale("log")


def intruder_counts(table: pd.DataFrame, k: int = 10, main: str = "rank") -> Figure:
    """Intruders among the k leading directions, summed over matrices, against epsilon: means over
    members with standard errors, a line a value of `main`; thin and dotted, without a marker, the
    norm-matched random control in the same colour.

    Args:
      table: rows of `updates.intruder_table`, with a column `main`.
    """
    sums = table[table["k"] == k].groupby([main, "member", "epsilon"], dropna=False)
    sums = sums[["intruders", "control"]].sum(min_count=1).reset_index()
    matrices = table.loc[table["k"] == k].groupby("member")["path"].nunique().max()
    values = _values(sums[main])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for n, value in enumerate(values):
            of = sums[sums[main] == value].groupby("epsilon")
            mean, bars = of["intruders"].mean(), of["intruders"].sem()
            bars = bars if bars.notna().any() else None
            axes.errorbar(mean.index, mean, yerr=bars, capsize=3, **line_style(n))
            control = of["control"].mean()
            if control.notna().any():
                dotted = {"color": pick(COLOURS, n), "linestyle": (0, (1, 2)), "linewidth": 1}
                axes.plot(control.index, control, **dotted)
        axes.set_xlabel("ε: an intruder's largest |cosine| with a direction of W")
        axes.set_ylabel(f"intruders in the top {k} of {matrices} matrices")
        dotted = {"color": "black", "linestyle": (0, (1, 2)), "linewidth": 1}
        _legend(figure, values, main, {"norm-matched control": dotted})
        return figure


def base_spectrum(sigmas: pd.DataFrame, layers: Sequence[int] | None = None) -> Figure:
    """Singular values of W by index, a panel a target, a line a layer (at most seven, spread).

    Args:
      sigmas: of `updates.base_spectra`.
      layers: which to draw.
    """
    if layers is None:
        every = sorted(set(sigmas["layer"]))
        places = np.linspace(0, len(every) - 1, min(MOST_LINES, len(every)))
        layers = [every[round(x)] for x in places]
    targets = list(dict.fromkeys(sigmas["target"]))
    columns = min(4, len(targets))
    lines = -(-len(targets) // columns)
    # What is rounding beside the largest would stretch the axis by ten decades.
    drawn = sigmas[sigmas["layer"].isin(layers)]
    drawn = drawn[drawn["sigma"] > 1e-7 * drawn.groupby("path")["sigma"].transform("max")]
    with matplotlib.rc_context(STYLE):
        size = (1.4 + 2.2 * columns, 0.9 + 2.0 * lines)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
        for axes in grid[len(targets) :]:
            axes.set_axis_off()
        for axes, target in zip(grid, targets, strict=False):
            for n, layer in enumerate(layers):
                curve = drawn[(drawn["layer"] == layer) & (drawn["target"] == target)]
                often = max(1, len(curve) // 6)
                thin = {"markersize": 3, "markevery": often, "linewidth": 1}
                axes.plot(curve["index"], curve["sigma"], **line_style(n) | thin)
            axes.set_title(plain(target))
            axes.set_yscale("log")
        figure.supxlabel("index of singular value", fontsize=9)
        figure.supylabel("singular value of W", fontsize=9)
        _legend(figure, ["none" if layer < 0 else layer for layer in layers], "layer")
        return figure


def trajectory(
    table: pd.DataFrame, main: str = "rank", quantities: Sequence[str] | None = None
) -> Figure:
    """What updates were like along training, a panel a quantity: thick lines are means over
    matrices and members, a line a value of `main`; thin ones the single members.

    Args:
      table: columns member, step, path, the quantities (norm, effective, stable, energy90,
        overlap_final) and `main`.
      quantities: which to draw; without it all that the table has.
    """
    drawn = [name for name in quantities or QUANTITIES if name in table]
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    values = _values(table[main])
    with matplotlib.rc_context(STYLE):
        size = (1.4 + 2.5 * columns, 0.8 + 2.2 * lines)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, squeeze=False).ravel()
        for axes in grid[len(drawn) :]:
            axes.set_axis_off()
        for axes, name in zip(grid, drawn, strict=False):
            for n, value in enumerate(values):
                here = table[table[main] == value]
                for _, member in here.groupby("member"):
                    of = member.groupby("step")[name].mean()
                    axes.plot(of.index, of, color=pick(COLOURS, n), alpha=0.3, linewidth=0.7)
                mean = here.groupby("step")[name].mean()
                often = max(1, len(mean) // 8)
                axes.plot(mean.index, mean, markevery=often, **line_style(n))
            axes.set_ylabel(QUANTITIES.get(name, named(name)))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.tick_params(labelbottom=True)
        figure.supxlabel("optimizer step", fontsize=9)
        _legend(figure, values, main)
        return figure


def cka(table: pd.DataFrame, main: str = "rank") -> Figure:
    """Linear CKA between the adapted and the base's activations against the layer: means over
    members with standard errors, a line a value of `main`.

    Args:
      table: columns member, layer, cka and `main`.
    """
    values = _values(table[main])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for n, value in enumerate(values):
            of = table[table[main] == value].groupby("layer")["cka"]
            mean, bars = of.mean(), of.sem()
            bars = bars if bars.notna().any() else None
            axes.errorbar(mean.index, mean, yerr=bars, capsize=3, **line_style(n))
        axes.set_xlabel("layer")
        axes.set_ylabel("linear CKA with the base (0 to 1)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, values, main)
        return figure


# ----------------------------------------------------------------------------------------- helpers


def _values(column: pd.Series) -> list:
    """The values of the main axis: numbers by size, then words."""
    return sorted(set(column), key=lambda value: (isinstance(value, str), value))


def _legend(
    figure: Figure, values: Sequence, main: str, more: Mapping[str, dict] | None = None
) -> None:
    """Every value, also those that a panel lacks, and lines of other kinds."""
    lines = [matplotlib.lines.Line2D([], [], **line_style(n)) for n in range(len(values))]
    lines += [matplotlib.lines.Line2D([], [], **style) for style in (more or {}).values()]
    labels = [f"{named(main)} = {plain(in_words(value, main))}" for value in values]
    figure.legend(lines, [*labels, *(more or {})], loc="outside right upper")


def _short(value: float) -> str:
    return f"{value:,.0f}" if 100 <= abs(value) < np.inf else f"{value:.2g}"


def _map(axes: Axes, values: np.ndarray):
    """phi as an image, from 0 to 1, (1, 1) at the upper left; numbers where there are few cells,
    else contours."""
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
    """A cell a matrix, coloured by `table` with `words` in it: targets (rows) x layers."""
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
            if value == value:  # also an infinite one, in black on grey
                dark = shown[i, j] and norm(value) < 0.6
                text = {"ha": "center", "va": "center", "fontsize": 8}
                axes.text(j, i, words.iloc[i, j], color="white" if dark else "black", **text)
        axes.set_xticks(range(len(table.columns)), table.columns)
        axes.set_yticks(range(len(table.index)), map(plain, table.index))
        axes.set_xlabel("layer")
        axes.set_ylabel("target")
        figure.colorbar(image, ax=axes, pad=0.02).set_label(label)
        return figure


def _panel(layer: int, target: str) -> str:
    return f"{target}, layer {layer}" if layer >= 0 else target


def _ticks(r: int) -> list[int]:
    """1 and r, and the quarters between where there is room."""
    if r <= 4:
        return list(range(1, r + 1))
    return sorted({1, *(round(r * share) for share in (0.25, 0.5, 0.75)), r})
