"""Figures of a run: tables and arrays in, `matplotlib.figure.Figure` out, with no global state.

Lines are in Okabe and Ito's colours with a marker and a dash each, so that they can be told apart
without colour; maps are cividis, whose lightness rises evenly. Losses are in nats.
"""

from collections.abc import Callable, Iterable, Sequence

import matplotlib
import matplotlib.lines
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from lorax.analysis import intrinsic as search
from lorax.analysis import runs
from lorax.analysis.runs import Answer

# Okabe & Ito's palette, without the yellow that vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2)), (0, (2, 2)), "-")
GREY = "0.45"
LOSS = "eval loss (nats)"  # of what predicts tokens or classes
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


def rank_curve(
    settings: pd.DataFrame,
    points: pd.DataFrame,
    main: str,
    base: float,
    answer: Answer | None,
    loss: str = LOSS,
) -> Figure:
    """Final eval loss against the sweep's main axis (normally the rank, on a log2 axis).

    Args:
      settings: rows of `runs.settings`: means, with standard errors where there are two seeds.
      points: rows of `runs.summary`: the single seeds.
      main: the column on the x axis.
      base: the unadapted base's loss, or NaN where it is not known or differs between members.
      answer: what to mark; the band is one standard error about the best.
      loss: its name and unit (`runs.loss_name`).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        values, place = main_axis(axes, settings[main], main)
        lines, names = settings["line"].nunique(), has_no_order(values)
        # Dots of more settings than there are colours are told apart by the table.
        alike = names and lines > len(COLOURS)
        for n, (line, rows) in enumerate(settings.groupby("line", sort=False)):
            n = 0 if alike else n
            style = {"color": pick(COLOURS, n)}
            style["linestyle"] = "none" if names else pick(DASHES, n)
            # One seed has no bar: zero-length bars would look like certainty.
            bars = rows["se"].to_numpy(float) if rows["se"].notna().any() else None
            what = "mean of seeds" if (rows["n"] > 1).any() else "one seed"
            what += " ± standard error" * (bars is not None)
            label = plain(line) or (what if lines == 1 else None)
            axes.errorbar(
                place(rows[main]),
                rows["mean"],
                yerr=bars,
                marker=pick(MARKERS, n),
                capsize=3,
                label=None if alike else label,
                **style,
            )
            of_line = points.merge(rows[_shared(rows, points, main)].drop_duplicates())
            dots = {"color": style["color"], "alpha": 0.45, "markersize": 6}
            axes.plot(place(of_line[main]), of_line["final_loss"], ".", **dots)
        if answer is not None:
            _mark(axes, place(settings[main]), main, answer, place)
        _base_line(axes, base, settings, points)
        axes.margins(y=0.25)  # room for the words below the marked point
        axes.set_ylabel("final " + loss)
        _legend(axes, outside=lines > 4 and not alike)
        return figure


def methods(compared: pd.DataFrame) -> Figure:
    """Each method's best final eval loss with its standard error, best on top; a dashed line at
    full fine-tuning's. compared: of `compare.methods`."""
    with matplotlib.rc_context(STYLE):
        height = max(2.1, 0.9 + 0.28 * len(compared))  # room for the label beside two methods
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot()
        rows = range(len(compared))
        errors = compared["se"].fillna(0) if compared["se"].notna().any() else None
        axes.errorbar(
            compared["mean"], rows, xerr=errors, fmt=MARKERS[0], color=COLOURS[0], capsize=3
        )
        names = [
            f"{plain(row.method)} ({row.trainable_params:,})"
            for row in compared.itertuples(index=False)
        ]
        axes.set_yticks(rows, names)
        axes.set_ylim(len(compared) - 0.5, -0.5)
        full = compared.loc[compared["method"] == "full", "mean"]
        if len(full):
            axes.axvline(full.iloc[0], color=GREY, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xlabel("final " + LOSS)
        axes.set_ylabel("method\n(trainable parameters)")
        return figure


def intrinsic(table: pd.DataFrame, estimates: pd.DataFrame, loss: str = LOSS) -> Figure:
    """The metric against the dimension of the subspace, a panel a condition: means over seeds at
    each dimension's best learning rate with standard errors, single seeds as dots, LoRA beside it
    where it was run. Level lines are full fine-tuning's and the one to be reached, the upright line
    the estimate with its 95% interval.

    Args:
      table: of `intrinsic.points`.
      estimates: of `intrinsic.estimate`.
    """
    metric = estimates["metric"].iloc[0]
    columns = 2 if len(estimates) == 4 else min(3, len(estimates))
    rows = -(-len(estimates) // columns)
    lora = (table["kind"] == "lora").any()
    with matplotlib.rc_context(STYLE):
        size = (6.8, 3.4) if columns == 1 else (2.3 + 2.5 * columns, 0.9 + 2.4 * rows)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes in grid[len(estimates) :]:
            axes.set_axis_off()
        for axes in grid[: len(estimates)][-columns:]:  # those with none below
            axes.tick_params(labelbottom=True)
        for axes, (_, row) in zip(grid, estimates.iterrows(), strict=False):
            own = table[(table["kind"] == "subspace") & (table["condition"] == row["condition"])]
            _against_size(axes, search.tuned(own, "dim", metric), "dim", 0, "random subspace")
            shared = own["shared"].iloc[0]
            other = table[(table["kind"] == "lora") & (table["shared"] == shared)]
            if len(other):
                _against_size(axes, search.tuned(other, "params", metric), "params", 1, "LoRA")
            called = search.name(row["threshold"])
            if row["verdict"] != "no baseline":
                style = {"color": "black", "linewidth": 1}
                axes.axhline(
                    row["baseline"], linestyle=DASHES[1], label="full fine-tuning", **style
                )
                axes.axhline(row["needed"], linestyle=DASHES[2], label="needed", **style)
            if row["d"] == row["d"]:
                axes.axvline(row["d"], color=GREY, linewidth=1.2)
                ring = {"fillstyle": "none", "markersize": 11, "linestyle": "none"}
                axes.plot([row["d"]], [row["needed"]], "o", color="black", label=called, **ring)
                if row["low"] == row["low"]:
                    style = {"color": GREY, "alpha": 0.25, "linewidth": 0}
                    axes.axvspan(row["low"], row["high"], label="95% interval", **style)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500, 1k, 2k
            axes.xaxis.set_minor_formatter(NullFormatter())
            words = [*row["condition"].split(", "), search.brief(row)]
            axes.set_title("\n".join(plain(word) for word in words if word))
        what = "dimension d of the subspace"
        figure.supxlabel(what + ("; trainable parameters of LoRA" if lora else ""), fontsize=9)
        unit = " (fraction)" * (metric == "accuracy")
        label = loss if metric == "loss" else f"eval {plain(named(metric))}{unit}"
        figure.supylabel("final " + label, fontsize=9)
        handles = {}
        for axes in grid:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")
        return figure


def _against_size(axes: Axes, best: pd.DataFrame, by: str, n: int, label: str) -> None:
    """A line through the means over seeds with standard errors, and the seeds as dots."""
    values = best.groupby(by)["value"]
    style = line_style(n)
    mean = values.mean()
    bars = values.sem() if values.sem().notna().any() else None  # of one seed there is none
    axes.errorbar(mean.index, mean, yerr=bars, capsize=2, label=label, **style)
    axes.plot(best[by], best["value"], ".", color=style["color"], alpha=0.45, markersize=4)


def learning_curves(
    metrics: pd.DataFrame, points: pd.DataFrame, by: runs.Axes, loss: str = LOSS
) -> Figure:
    """Eval loss against step: a panel a setting of the other axes, in it a colour a value of the
    main one. Thin lines are members, thick ones their means over seeds, of members that differ in
    nothing else. Diverged members are thin and dashed.

    Args:
      metrics: of a run.
      points: rows of `runs.summary`, of the members to draw.
      by: the axes in which these differ.
    """
    evals = metrics[(metrics["split"] == "eval") & metrics["member"].isin(points.index)]
    lines = [runs.fields(row, by.others) for _, row in points.iterrows()]
    panels = list(dict.fromkeys(lines))
    of_axis = points[by.main] if by.main else [None] * len(points)
    values = _ordered(of_axis)
    which = np.array([values.index(None if runs.is_missing(v) else v) for v in of_axis])
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        size = (6.4, 3.8) if len(panels) == 1 else (1.9 + 2.3 * columns, 0.8 + 2.1 * rows)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        handles = {}
        for axes, panel in zip(grid, panels, strict=False):
            here = np.array([line == panel for line in lines])
            for n in sorted(set(which[here])):
                members = points[here & (which == n)]
                handles[n] = _with_mean(axes, evals, members, style_of(n, len(values)))
                if by.main:
                    value = plain(runs.in_words(values[n], by.main))
                    handles[n].set_label(f"{named(by.main)} {value}")
                else:
                    handles[n].set_label("mean over seeds")
            axes.set_title(plain(panel).replace(", ", "\n"))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
            axes.tick_params(labelbottom=True)
        _clip_to_converged(grid[0], evals, points)
        figure.supxlabel("optimizer step", fontsize=9)
        figure.supylabel(loss, fontsize=9)
        handles = [handles[n] for n in sorted(handles)]
        if len(panels) > 1 or len(handles) > 5:
            figure.legend(handles=handles, loc="outside right upper")
        else:
            grid[0].legend(handles=handles)
        return figure


def _with_mean(axes: Axes, evals: pd.DataFrame, members: pd.DataFrame, style: dict):
    """Thin lines for members that differ in the seed alone, a thick one for the mean of those that
    did not diverge; the thick line."""
    kept = members.index[members["status"] != "diverged"]
    for member in members.index:
        curve = evals[evals["member"] == member].sort_values("step")
        thin = {"color": style["color"], "alpha": 0.35, "linewidth": 0.8}
        thin["linestyle"] = "-" if member in kept else (0, (2, 2))
        axes.plot(curve["step"], curve["loss"], **thin)
    mean = evals[evals["member"].isin(kept)].groupby("step")["loss"].mean()
    often = max(1, len(mean) // 8)
    (line,) = axes.plot(mean.index, mean, markersize=4, markevery=often, **style)
    return line


def _ordered(column: Iterable) -> list:
    """The values of an axis: numbers by size, then names as they come, then none."""
    values = distinct(column)
    numbers = sorted(v for v in values if isinstance(v, (int, float, np.number)))
    return [*numbers, *(v for v in values if isinstance(v, str)), *[None] * (None in values)]


# ----------------------------------------------------------------------------------------- helpers


def pick(choices: Sequence, n: int):
    return choices[n % len(choices)]


def line_style(n: int) -> dict:
    """Colour, marker and dash of the nth line, which is told by any one of them."""
    return {"color": pick(COLOURS, n), "marker": pick(MARKERS, n), "linestyle": pick(DASHES, n)}


def style_of(n: int, count: int) -> dict:
    """The style of the nth of so many lines; of more than there are colours, from dark to light."""
    if count <= len(COLOURS):
        return line_style(n)
    return line_style(n) | {"color": matplotlib.colormaps["cividis"](0.95 * n / (count - 1))}


def named(main: str) -> str:
    return main.replace("_", " ")


def plain(name: object) -> str:
    """A name from outside as a figure shows it: without the mathematics that matplotlib sees
    between dollars, nor the underscore in front that keeps a line out of its legend."""
    text = str(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def distinct(column: Iterable) -> list:
    """The values of a column, each once, in their order; None for what is missing.

    Python's own: `Series.map` makes NaN of None, which equals nothing.
    """
    return list(dict.fromkeys(None if runs.is_missing(value) else value for value in column))


def main_axis(
    axes: Axes, column: pd.Series, main: str
) -> tuple[list, Callable[[Iterable], np.ndarray]]:
    """Set up the x axis; the values in order, and what finds the places (n,) of a column (n,)."""
    values = distinct(column)
    numeric = all(isinstance(v, (int, float, np.number)) and v > 0 for v in values)
    axes.set_xlabel(NAMES.get(main, named(main)))
    if not numeric:
        axes.set_xticks(range(len(values)), [plain(runs.in_words(v, main)) for v in values])
        at = {value: n for n, value in enumerate(values)}
        found = lambda column: [at[None if runs.is_missing(value) else value] for value in column]
        return values, lambda column: np.array(found(column), int)
    values = sorted(values)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    # A single value has no span of its own.
    axes.set_xlim(values[0] / 1.25, values[-1] * 1.25)
    return values, lambda column: np.array(list(column), float)


def has_no_order(values: Sequence) -> bool:
    """Whether the values of an axis are names (of methods, of targets, or none), which no line
    leads through."""
    return all(value is None or isinstance(value, str) for value in values)


def _shared(rows: pd.DataFrame, points: pd.DataFrame, main: str) -> list[str]:
    """The columns that say which points belong to a row: the axes."""
    measured = {"line", "scale", "trainable_params", "mean", "se", "n", "diverged", main}
    return [main, *(name for name in rows if name in points and name not in measured)]


def _base_line(axes: Axes, base: float, settings: pd.DataFrame, points: pd.DataFrame) -> None:
    """The base's loss as a dashed line; at the upper edge, in words, where it is far above."""
    if not np.isfinite(base):
        return
    style = {"color": GREY, "linestyle": (0, (6, 3)), "linewidth": 1}
    losses = np.concatenate([settings["mean"].dropna(), points["final_loss"].dropna()])
    low, high = (losses.min(), losses.max()) if len(losses) else (base, base)
    if base <= high + 1.5 * (high - low):
        axes.axhline(base, label="base, unadapted", **style)
        return
    label = f"base, unadapted: {base:.3f}, above this scale"
    axes.plot([0, 1], [1, 1], transform=axes.transAxes, clip_on=False, label=label, **style)


def _mark(axes: Axes, places: np.ndarray, main: str, answer: Answer, place: Callable) -> None:
    """Ring the answer, and shade one standard error about the best. places: of all settings."""
    best = answer.best
    # Only a rank has a reason to be small.
    ringed = answer.smallest if main == "rank" else best
    words = "lowest mean"
    if answer.known:
        low, high = best["mean"] - best["se"], best["mean"] + best["se"]
        label = "one standard error about the best"
        axes.axhspan(low, high, color=GREY, alpha=0.18, linewidth=0, label=label)
        words = "smallest within one standard error" if main == "rank" else words
    (x,), y = place([ringed[main]]), ringed["mean"]
    axes.plot([x], [y], "o", markersize=13, fillstyle="none", color="black", markeredgewidth=1.2)
    # At either end of the axis the words run inwards.
    align = {places.max(): "right", places.min(): "left"}.get(x, "center")
    axes.annotate(
        f"{named(main)} {plain(runs.in_words(ringed[main], main))}: {words}",
        (x, y),
        xytext=(0, -26),
        textcoords="offset points",
        ha=align if places.min() < places.max() else "center",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.6, "shrinkB": 7},
    )


def _clip_to_converged(axes: Axes, evals: pd.DataFrame, points: pd.DataFrame) -> None:
    """Keep a diverging member from squashing all other curves."""
    kept = points.index[points["status"] != "diverged"]
    losses = evals.loc[evals["member"].isin(kept), "loss"].dropna()
    if len(losses) and len(kept) < len(points):
        low, high = losses.min(), losses.max()
        margin = 0.05 * (high - low or 1.0)
        axes.set_ylim(low - margin, high + margin)


def _legend(axes: Axes, outside: bool) -> None:
    if outside:
        axes.figure.legend(loc="outside right upper")
    else:
        axes.legend()
