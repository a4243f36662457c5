"""Line charts of what was learned: similarity, table 7, intruders, growth, CKA."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorax.analysis.figures.style import (
    COLOURS,
    GREY,
    REFERENCE,
    STYLE,
    legend_of_values,
    line_style,
    main_axis,
    mean_line,
    named,
    panels,
    pick,
    plain,
    values_in_order,
)
from lorax.analysis.measures.overlap import Band

# Labels for columns of `amplifications` and of a trajectory.
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


def diagonal(phi: Mapping[str, np.ndarray], band: Band) -> Figure:
    """phi(i, i) against i, one line per comparison, over the chance level: mean and 5% to 95%.

    Args:
      phi: (r1, r2) by name.
      band: from `chance_similarity`, for the space of the comparisons (the kernels of an MLP and
        of attention may have different ones).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        mean, low, high = (np.diagonal(part) for part in band)
        i = np.arange(1, len(mean) + 1)
        axes.fill_between(i, low, high, color=GREY, alpha=0.25, linewidth=0, label="chance, 5-95%")
        axes.plot(i, mean, label="chance, mean", **REFERENCE)
        for n, (name, values) in enumerate(phi.items()):
            on_diagonal = np.diagonal(values)
            marker_step = max(1, len(on_diagonal) // 8)
            i = np.arange(1, len(on_diagonal) + 1)
            axes.plot(i, on_diagonal, label=plain(name), markevery=marker_step, **line_style(n))
        axes.set_xlabel("i: top directions of both")
        axes.set_ylabel("subspace similarity φ(i, i)")
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside right upper")
        return figure


def table7(amplified: pd.DataFrame, main: str = "rank") -> Figure:
    """The paper's table 7 against the rank: the norms of W and dW in each other's directions, and
    the amplification factor. Medians over matrices and members; bars are quartiles. The norms are
    Frobenius norms, the axes logarithmic.

    Args:
      amplified: rows of `tables.amplifications`, with a column `main`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for n, (column, label) in enumerate(NORMS.items()):
            _quartiles(left, amplified, main, column, n, label)
        _quartiles(right, amplified, main, "factor", 0, None)
        right.axhline(1, **REFERENCE)
        left.set_ylabel("Frobenius norm")
        right.set_ylabel("amplification ‖ΔW‖ / ‖UᵀWV‖")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2)
        return figure


def _quartiles(axes: Axes, table: pd.DataFrame, main: str, column: str, n: int, label) -> None:
    values, place = main_axis(axes, table[main], main)
    # A factor is infinite if W is zero in these directions; a log axis has no zero.
    usable = table[np.isfinite(table[column]) & (table[column] > 0)]
    parts = usable.groupby(place(usable[main]))[column].quantile([0.25, 0.5, 0.75]).unstack()
    if len(parts):
        middle = parts[0.5]
        bars = [middle - parts[0.25], parts[0.75] - middle]
        axes.errorbar(parts.index, middle, yerr=bars, capsize=3, label=label, **line_style(n))
        axes.set_yscale("log")


def intruder_counts(table: pd.DataFrame, k: int = 10, main: str = "rank") -> Figure:
    """Intruders among the k leading directions, summed over matrices, against epsilon: means over
    members with standard errors, one line per value of `main`. The norm-matched random control is
    thin and dotted, without markers, in the same colour.

    Args:
      table: rows of `tables.intruder_table`, with a column `main`.
    """
    sums = table[table["k"] == k].groupby([main, "member", "epsilon"], dropna=False)
    sums = sums[["intruders", "control"]].sum(min_count=1).reset_index()
    matrices = table.loc[table["k"] == k].groupby("member")["path"].nunique().max()
    values = values_in_order(sums[main])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for n, value in enumerate(values):
            by_epsilon = sums[sums[main] == value].groupby("epsilon")
            mean_line(axes, by_epsilon["intruders"], capsize=3, **line_style(n))
            control = by_epsilon["control"].mean()
            if control.notna().any():
                dotted = {"color": pick(COLOURS, n), "linestyle": (0, (1, 2)), "linewidth": 1}
                axes.plot(control.index, control, **dotted)
        axes.set_xlabel("ε: an intruder's largest |cosine| with a direction of W")
        axes.set_ylabel(f"intruders in the top {k} of {matrices} matrices")
        dotted = {"color": "black", "linestyle": (0, (1, 2)), "linewidth": 1}
        legend_of_values(figure, values, main, {"norm-matched control": dotted})
        return figure


def trajectory(
    table: pd.DataFrame, main: str = "rank", quantities: Sequence[str] | None = None
) -> Figure:
    """Properties of updates during training, one panel per quantity. Thick lines: means over
    matrices and members, one line per value of `main`. Thin lines: single members.

    Args:
      table: columns member, step, path, the quantities (norm, effective, stable, energy90,
        overlap_final) and `main`.
      quantities: which to draw; by default all in the table.
    """
    drawn = [name for name in quantities or QUANTITIES if name in table]
    columns = min(3, len(drawn))
    values = values_in_order(table[main])
    with matplotlib.rc_context(STYLE):
        figure, grid = panels(len(drawn), columns, (1.4, 0.8), (2.5, 2.2), sharex=True)
        for axes, name in zip(grid, drawn, strict=True):
            for n, value in enumerate(values):
                of_value = table[table[main] == value]
                for _, member in of_value.groupby("member"):
                    by_step = member.groupby("step")[name].mean()
                    axes.plot(
                        by_step.index, by_step, color=pick(COLOURS, n), alpha=0.3, linewidth=0.7
                    )
                mean = of_value.groupby("step")[name].mean()
                marker_step = max(1, len(mean) // 8)
                axes.plot(mean.index, mean, markevery=marker_step, **line_style(n))
            axes.set_ylabel(QUANTITIES.get(name, named(name)))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.tick_params(labelbottom=True)
        figure.supxlabel("optimizer step", fontsize=9)
        legend_of_values(figure, values, main)
        return figure


def cka(table: pd.DataFrame, main: str = "rank") -> Figure:
    """Linear CKA between the adapted model's and the base's activations against the layer: means
    over members with standard errors, one line per value of `main`.

    Args:
      table: columns member, layer, cka and `main`.
    """
    values = values_in_order(table[main])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for n, value in enumerate(values):
            by_layer = table[table[main] == value].groupby("layer")["cka"]
            mean_line(axes, by_layer, capsize=3, **line_style(n))
        axes.set_xlabel("layer")
        axes.set_ylabel("linear CKA with the base (0 to 1)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_of_values(figure, values, main)
        return figure
