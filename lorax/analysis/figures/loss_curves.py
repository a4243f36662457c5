"""Figures of losses against an axis of the sweep, and against the step."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from lorax.analysis import runs
from lorax.analysis.figures import style, vega
from lorax.analysis.figures.encodings import (
    colours,
    field,
    in_order,
    in_panels,
    is_numeric,
    of_axes,
    of_members,
    place,
    titles_in_order,
    tooltips,
    with_members,
)
from lorax.analysis.figures.layout import (
    Layout,
    curve_members,
    extent,
    has_order,
    line_names,
    of_panels,
    panel_of,
    thinned,
    widened,
)
from lorax.analysis.figures.loss_marks import FORMAT, LossAxis, means, references

UNIT = "nats"
ROW = 26  # pixels of a name
DODGED = 14  # pixels of a colour beside others at a name


def rank_curve(
    table: pd.DataFrame,
    layout: Layout,
    unit: str = UNIT,
    chosen: pd.Series | None = None,
    panels: Sequence | None = None,
) -> vega.Chart:
    """Final loss against an axis of the sweep: means over seeds with 95% intervals, seeds as dots.
    Lines across: the base, and methods without a value on the axis (full fine-tuning). If the
    values of the axis are names, they are listed downwards, best first.

    Args:
      table: rows of `runs.summary`.
      layout: which axis is x, which is colour, and which makes panels.
      unit: of the loss.
      chosen: the setting to ring, by its axes.
      panels: which values of the panels' axis to draw; None: all.
    """
    found = runs.measured(table)
    points, others = curve_members(table, layout)
    points = of_panels(points, layout.panel, panels)
    data = of_members(points, layout.names, found.loss, layout.panel, chosen)
    ends = extent(pd.concat([points, others])[found.loss], runs.base_loss(table))
    ends = widened(ends, points, layout.names, found.loss)
    across = has_order(points[layout.x])
    axis = LossAxis("y" if across else "x", f"final {found.split} loss ({unit})", ends)
    encode = {}
    if across:
        encode["x"] = place(layout.x, points[layout.x])
    else:
        encode["y"] = _names(data, field(layout.x))
    if layout.colour and not across:
        order = in_order(layout.colour, points[layout.colour])
        kind = "quantitative" if is_numeric(order) else "nominal"
        encode["yOffset"] = vega.column(field(layout.colour), type=kind, sort=order)
    marks = means(points, layout.names, encode, layout.colour, axis, across)
    lines = line_names(others, points, layout.x)
    chart = vega.layer(*marks, *references(others, lines, table, axis))
    rows = points[layout.x].nunique(dropna=False)
    each = ROW if layout.colour is None else max(ROW, DODGED * points[layout.colour].nunique())
    height = None if across else each * max(rows, 2)
    shown = titles_in_order(points, layout.panel) if layout.panel else []
    return style.themed(style.filtered(in_panels(chart, data, shown, height)))


def _names(data: pd.DataFrame, name: str) -> dict[str, Any]:
    """The axis of names: the lowest mean first."""
    order = data.groupby(name, sort=False)["loss"].mean().sort_values(kind="stable").index
    axis = dict(labelLimit=260, grid=True)
    return vega.column(name, type="nominal", sort=list(order), title=None, axis=axis)


def learning_curves(
    metrics: pd.DataFrame,
    points: pd.DataFrame,
    by: runs.Axes,
    unit: str = UNIT,
    panels: Sequence[str] | None = None,
) -> vega.Chart:
    """Validation loss against the step: a panel for each setting of the other axes, a colour for
    each value of the main axis. Thin: members, dashed if they diverged, with a bar where they were
    stopped. Thick: means over members that differ only in the seed (`runs.averaged`).

    Args:
      metrics: of a run.
      points: rows of `runs.summary` for the members to draw.
      by: the axes in which these members differ.
      unit: of the loss.
      panels: which to draw, by `panel_of`; None: all.
    """
    points = points.assign(panel=panel_of(points, by))
    shown = list(dict.fromkeys(points["panel"])) if panels is None else list(panels)
    points = points[points["panel"].isin(shown)]
    evals = metrics[(metrics["split"] == "eval") & metrics["member"].isin(points.index)]
    curves = evals[["member", "step", "loss"]].dropna().sort_values(["member", "step"])
    curves = thinned(curves).assign(last=lambda rows: ~rows["member"].duplicated(keep="last"))
    names = by.fields
    members = of_axes(points, names).assign(
        member=points.index,
        name=points["name"],
        status=points["status"],
        panel=points["panel"],
        averaged=points.index.isin(runs.averaged(points, by)),
    )
    usual = curves["member"].map(points["status"]) != "diverged"
    ends = extent(curves.loc[usual, "loss"], runs.base_loss(points.assign(test_loss=None)))
    axis = LossAxis("y", f"validation loss ({unit})", ends)
    colour = colours(by.main, points[by.main] if by.main else (), "line")
    if colour:
        stroke = dict(symbolType="stroke", symbolStrokeWidth=2, symbolOpacity=1)
        colour["color"]["legend"] = stroke
    chart = vega.layer(*_members(points, names, colour, axis), *_means(points, names, colour, axis))
    chart = in_panels(chart, curves, shown if shown != [""] else [])
    return style.themed(style.filtered(with_members(chart, members)))


def _members(
    points: pd.DataFrame, names: Sequence[str], colour: dict[str, Any], axis: LossAxis
) -> list[vega.Chart]:
    """Thin lines, with a mark at the ends of those that diverged or were stopped."""
    x = vega.column("step:Q", title="optimizer step", axis=dict(tickMinStep=1, tickCount=4))
    only = {name: of for name, of in colour.items() if name == "color"}
    said = tooltips(names, points, {"name": "member", "step": "step", "loss": (axis.title, FORMAT)})
    dashed = vega.either("datum.status === 'diverged'", [2, 2], [1, 0])
    line = vega.Chart().mark("line", style="member", strokeWidth=1)
    line = line.encode(
        x=x, **axis.of("loss"), **only, strokeDash=dashed, detail="member:N", tooltip=said
    )
    ends = vega.Chart().filter(
        {"and": ["datum.last", {"field": "status", "oneOf": runs.WITHOUT_RESULT}]}
    )
    ends = ends.mark("point", shape="stroke", filled=False, size=60, strokeWidth=2)
    ends = ends.encode(
        x=x, **axis.of("loss"), **only,
        tooltip=tooltips(names, points, {"name": "member", "status": "status", "step": "step"}),
    )  # fmt: skip
    return [line, ends]


def _means(
    points: pd.DataFrame, names: Sequence[str], colour: dict[str, Any], axis: LossAxis
) -> list[vega.Chart]:
    """Thick lines, which are wide enough to be found by the pointer."""
    over = vega.Chart().filter("datum.averaged")
    groups = [*map(field, names), "panel", "step"]
    over = over.aggregate(mean="mean(loss)", n="valid(loss)", groupby=groups)
    numbers = {"step": "step", "mean": (f"mean {axis.title}", FORMAT), "n": "seeds"}
    said = tooltips(names, points, numbers)
    encode = {**colour, "x": vega.column("step:Q"), **axis.of("mean")}
    line = over.mark("line", strokeWidth=2.2).encode(**encode)
    dots = over.mark("point", size=60, opacity=0)
    return [line, dots.encode(x=encode["x"], **axis.of("mean"), tooltip=said)]
