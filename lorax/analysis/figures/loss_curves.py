"""Figures of the members' losses: by rank, by step, by method."""

from collections.abc import Callable, Iterable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorax.analysis import runs
from lorax.analysis.figures.style import (
    COLOURS,
    DASHES,
    GREY,
    LOSS,
    MARKERS,
    REFERENCE,
    STYLE,
    bars,
    distinct,
    has_no_order,
    main_axis,
    named,
    panels,
    pick,
    plain,
    style_of,
)


def rank_curve(
    settings: pd.DataFrame,
    points: pd.DataFrame,
    main: str,
    base: float,
    chosen: pd.Series | None,
    loss: str = LOSS,
) -> Figure:
    """Final eval loss against the sweep's main axis (normally the rank, on a log2 axis).

    Args:
      settings: rows of `runs.settings`: means, with standard errors if there are several seeds.
      points: rows of `runs.summary`: the single seeds.
      main: the column on the x axis.
      base: the unadapted base's loss, or NaN if it is unknown or differs between members.
      chosen: the row of settings to mark.
      loss: name and unit of the loss (`runs.loss_name`).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        values, place = main_axis(axes, settings[main], main)
        lines, names = settings["line"].nunique(), has_no_order(values)
        # With more settings than colours, dots look alike; the table distinguishes them.
        same_style = names and lines > len(COLOURS)
        for n, (line, rows) in enumerate(settings.groupby("line", sort=False)):
            n = 0 if same_style else n
            style = {"color": pick(COLOURS, n)}
            style["linestyle"] = "none" if names else pick(DASHES, n)
            errors = bars(rows["se"])
            description = "mean of seeds" if (rows["n"] > 1).any() else "one seed"
            description += " ± standard error" * (errors is not None)
            label = plain(line) or (description if lines == 1 else None)
            axes.errorbar(
                place(rows[main]),
                rows["mean"],
                yerr=errors,
                marker=pick(MARKERS, n),
                capsize=3,
                label=None if same_style else label,
                **style,
            )
            of_line = points.merge(rows[_shared(rows, points, main)].drop_duplicates())
            dots = {"color": style["color"], "alpha": 0.45, "markersize": 6}
            axes.plot(place(of_line[main]), of_line["final_loss"], ".", **dots)
        if chosen is not None:
            _mark(axes, place(settings[main]), main, chosen, place)
        _base_line(axes, base, settings, points)
        axes.margins(y=0.25)  # room for the text below the marked point
        axes.set_ylabel("final " + loss)
        _legend(axes, outside=lines > 4 and not same_style)
        return figure


def methods(compared: pd.DataFrame) -> Figure:
    """Each method's best final eval loss with its standard error, best on top; a dashed line marks
    full fine-tuning. compared: from `settings_compared.methods`."""
    with matplotlib.rc_context(STYLE):
        height = max(2.1, 0.9 + 0.28 * len(compared))  # room for the y label next to two methods
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


def learning_curves(
    metrics: pd.DataFrame, points: pd.DataFrame, by: runs.Axes, loss: str = LOSS
) -> Figure:
    """Eval loss against step: one panel per setting of the other axes, one colour per value of the
    main axis. Thin lines are members, thick lines means over members that differ only in the seed.
    Diverged members are thin and dashed.

    Args:
      metrics: of a run.
      points: rows of `runs.summary` for the members to draw.
      by: the axes in which these members differ.
    """
    evals = metrics[(metrics["split"] == "eval") & metrics["member"].isin(points.index)]
    lines = [runs.fields(row, by.others) for _, row in points.iterrows()]
    titles = list(dict.fromkeys(lines))
    of_axis = points[by.main] if by.main else [None] * len(points)
    values = _ordered(of_axis)
    which = np.array([values.index(None if runs.is_missing(v) else v) for v in of_axis])
    columns = 2 if len(titles) == 4 else min(3, len(titles))
    with matplotlib.rc_context(STYLE):
        inches = {"size": (1.9, 0.8), "per_panel": (2.3, 2.1), "alone": (6.4, 3.8)}
        figure, grid = panels(len(titles), columns, **inches, sharex=True, sharey=True)
        handles = {}
        for axes, title in zip(grid, titles, strict=True):
            in_panel = np.array([line == title for line in lines])
            for n in sorted(set(which[in_panel])):
                members = points[in_panel & (which == n)]
                handles[n] = _with_mean(axes, evals, members, style_of(n, len(values)))
                if by.main:
                    value = plain(runs.in_words(values[n], by.main))
                    handles[n].set_label(f"{named(by.main)} {value}")
                else:
                    handles[n].set_label("mean over seeds")
            axes.set_title(plain(title).replace(", ", "\n"))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
            axes.tick_params(labelbottom=True)
        _clip_to_converged(grid[0], evals, points)
        figure.supxlabel("optimizer step", fontsize=9)
        figure.supylabel(loss, fontsize=9)
        handles = [handles[n] for n in sorted(handles)]
        if len(titles) > 1 or len(handles) > 5:
            figure.legend(handles=handles, loc="outside right upper")
        else:
            grid[0].legend(handles=handles)
        return figure


def _with_mean(axes: Axes, evals: pd.DataFrame, members: pd.DataFrame, style: dict):
    """Draws thin lines for members that differ only in the seed and a thick line for the mean of
    those that did not diverge. Returns the thick line."""
    converged = members.index[members["status"] != "diverged"]
    for member in members.index:
        curve = evals[evals["member"] == member].sort_values("step")
        thin = {"color": style["color"], "alpha": 0.35, "linewidth": 0.8}
        thin["linestyle"] = "-" if member in converged else (0, (2, 2))
        axes.plot(curve["step"], curve["loss"], **thin)
    mean = evals[evals["member"].isin(converged)].groupby("step")["loss"].mean()
    marker_step = max(1, len(mean) // 8)
    (line,) = axes.plot(mean.index, mean, markersize=4, markevery=marker_step, **style)
    return line


def _ordered(column: Iterable) -> list:
    """The values of an axis: numbers by size, then names in their order, then None."""
    values = distinct(column)
    numbers = sorted(v for v in values if isinstance(v, (int, float, np.number)))
    return [*numbers, *(v for v in values if isinstance(v, str)), *[None] * (None in values)]


def _shared(rows: pd.DataFrame, points: pd.DataFrame, main: str) -> list[str]:
    """The columns that match points to a row: the axes."""
    measured = {"line", "scale", "trainable_params", "mean", "se", "n", "diverged", main}
    return [main, *(name for name in rows if name in points and name not in measured)]


def _base_line(axes: Axes, base: float, settings: pd.DataFrame, points: pd.DataFrame) -> None:
    """The base's loss as a dashed line. If it is far above the losses, the line is at the upper
    edge, with the value in the legend."""
    if not np.isfinite(base):
        return
    losses = np.concatenate([settings["mean"].dropna(), points["final_loss"].dropna()])
    low, high = (losses.min(), losses.max()) if len(losses) else (base, base)
    if base <= high + 1.5 * (high - low):
        axes.axhline(base, label="base, unadapted", **REFERENCE)
        return
    label = f"base, unadapted: {base:.3f}, above this scale"
    axes.plot([0, 1], [1, 1], transform=axes.transAxes, clip_on=False, label=label, **REFERENCE)


def _mark(axes: Axes, places: np.ndarray, main: str, chosen: pd.Series, place: Callable) -> None:
    """Ring a setting. places: of all settings."""
    (x,), y = place([chosen[main]]), chosen["mean"]
    axes.plot([x], [y], "o", markersize=13, fillstyle="none", color="black", markeredgewidth=1.2)
    # At either end of the axis, align the text inwards.
    align = {places.max(): "right", places.min(): "left"}.get(x, "center")
    axes.annotate(
        f"{named(main)} {plain(runs.in_words(chosen[main], main))}: the answer",
        (x, y),
        xytext=(0, -26),
        textcoords="offset points",
        ha=align if places.min() < places.max() else "center",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.6, "shrinkB": 7},
    )


def _clip_to_converged(axes: Axes, evals: pd.DataFrame, points: pd.DataFrame) -> None:
    """Keep a diverging member from squashing all other curves."""
    converged = points.index[points["status"] != "diverged"]
    losses = evals.loc[evals["member"].isin(converged), "loss"].dropna()
    if len(losses) and len(converged) < len(points):
        low, high = losses.min(), losses.max()
        margin = 0.05 * (high - low or 1.0)
        axes.set_ylim(low - margin, high + margin)


def _legend(axes: Axes, outside: bool) -> None:
    if outside:
        axes.figure.legend(loc="outside right upper")
    else:
        axes.legend()
