"""Figures of the members' losses: by rank, by step, by method."""

from collections.abc import Iterable

import altair as alt
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorax.analysis import runs
from lorax.analysis.figures.style import (
    COLOURS,
    GREY,
    LOSS,
    MARKERS,
    NAMES,
    STYLE,
    distinct,
    filtered,
    has_no_order,
    is_numeric,
    lines_of,
    named,
    panels,
    plain,
    position,
    style_of,
    themed,
    tooltips,
    with_intervals,
)


def rank_curve(
    settings: pd.DataFrame,
    points: pd.DataFrame,
    main: str,
    base: float,
    chosen: pd.Series | None,
    loss: str = LOSS,
) -> alt.LayerChart:
    """Final eval loss against the sweep's main axis (normally the rank, on a logarithmic axis):
    members as dots, means over seeds with their t intervals as lines.

    Args:
      settings: rows of `runs.settings`.
      points: rows of `runs.summary`: the single seeds.
      main: the column on the x axis.
      base: the unadapted base's loss, or NaN if it is unknown or differs between members.
      chosen: the row of settings to mark.
      loss: name and unit of the loss (`runs.loss_name`).
    """
    shared = _shared(settings, points, main)
    lines = settings[[*shared, "line"]].drop_duplicates()
    table = points[["member", "name", "seed", *shared, "final_loss"]].merge(lines, on=shared)
    if not is_numeric(distinct(points[main])):
        table[main] = [runs.in_words(value, main) for value in table[main]]
    x = alt.X(main, **position(points[main], main))
    y = alt.Y("mean:Q", title="final " + loss, scale=alt.Scale(zero=False))
    names = list(dict.fromkeys(settings["line"]))
    by = {mark: lines_of("line", names, mark) for mark in ("point", "line", "rule")}
    if len(names) == 1:
        by = dict.fromkeys(by, {})  # no legend
    axes = {name: NAMES.get(name, named(name)) for name in shared}
    chart = filtered(alt.Chart(table))
    members = (
        chart.transform_filter("isValid(datum.final_loss)")
        .mark_point(style="member", size=30)
        .encode(
            x=x,
            y=alt.Y("final_loss:Q"),
            tooltip=tooltips(
                {"member": "member", **axes, "seed": "seed", "final_loss": (loss, ".4f")}
            ),
            **by["point"],
        )
    )
    means = with_intervals(chart, "final_loss", [main, "line"]).encode(
        x=x,
        tooltip=tooltips(
            {main: axes[main], "line": "setting", "mean": (f"mean of {loss}", ".4f")}
            | {"low": ("95% interval from", ".4f"), "high": ("to", ".4f"), "n": "seeds"}
        ),
    )
    layers = [members, means.mark_rule().encode(y=alt.Y("low:Q"), y2="high:Q", **by["rule"])]
    if not has_no_order(distinct(points[main])):
        layers.append(means.mark_line().encode(y=y, **by["line"]))
    layers.append(means.mark_point(size=70).encode(y=y, **by["point"]))
    layers += _base_line(base, table["final_loss"])
    layers += _mark(chosen, main, x) if chosen is not None else []
    return themed(alt.layer(*layers).properties(width="container"))


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
    Diverged and stopped members are thin and dashed.

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
                handles[n] = _with_mean(axes, evals, members, by, style_of(n, len(values)))
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


def _with_mean(axes: Axes, evals: pd.DataFrame, members: pd.DataFrame, by: runs.Axes, style: dict):
    """Draws thin lines for members that differ only in the seed (and in what was tuned) and a thick
    line for the mean of those with a result (`runs.averaged`). Returns the thick line."""
    converged = runs.averaged(members, by)
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


def _base_line(base: float, losses: pd.Series) -> list[alt.Chart]:
    """The base's loss as a dashed line. If it is far above the losses, only its value at the upper
    edge."""
    if not np.isfinite(base):
        return []
    low, high = losses.min(), losses.max()
    fits = not losses.notna().any() or base <= high + 1.5 * (high - low)
    words = "base, unadapted" if fits else f"base, unadapted: {base:.3f}, above this scale"
    chart = alt.Chart(pd.DataFrame({"base": [base], "words": [words]}))
    at = {"x": alt.value("width"), "y": alt.Y("base:Q") if fits else alt.value(0)}
    text = chart.mark_text(style="reference-text", align="right", dy=-7)
    text = text.encode(text="words:N", **at)
    line = chart.mark_rule(style="reference").encode(y="base:Q")
    return [line, text] if fits else [text]


def _mark(chosen: pd.Series, main: str, x: alt.X) -> list[alt.Chart]:
    """A ring around a setting."""
    value = chosen[main] if is_numeric([chosen[main]]) else runs.in_words(chosen[main], main)
    chart = alt.Chart(pd.DataFrame({main: [value], "mean": [chosen["mean"]], "ringed": "answer"}))
    shown = tooltips({main: NAMES.get(main, named(main)), "ringed": "ringed"})
    return [chart.mark_point(style="ring", size=280).encode(x=x, y="mean:Q", tooltip=shown)]


def _clip_to_converged(axes: Axes, evals: pd.DataFrame, points: pd.DataFrame) -> None:
    """Keep a diverging member from squashing all other curves."""
    converged = points.index[points["status"] != "diverged"]
    losses = evals.loc[evals["member"].isin(converged), "loss"].dropna()
    if len(losses) and len(converged) < len(points):
        low, high = losses.min(), losses.max()
        margin = 0.05 * (high - low or 1.0)
        axes.set_ylim(low - margin, high + margin)
