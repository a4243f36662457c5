"""The figure of all members: a line for each through its values on all axes."""

from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd

from lorax.analysis import runs
from lorax.analysis.figures import style
from lorax.analysis.figures.encodings import of_axes, ramp, tooltips, with_members
from lorax.analysis.figures.layout import distinct, extent, has_order
from lorax.analysis.figures.loss_marks import FORMAT

SIZE = "trainable_params"
MOST_TICKS = 8  # of an axis
NO_LOSS = 1.1  # the height of members without a final loss: above the axis


def parallel(table: pd.DataFrame, names: Sequence[str], unit: str = "nats") -> alt.TopLevelMixin:
    """Every member as a line through its values: the axes of the sweep, its trainable parameters
    and its final loss, which has the colour. Positive numbers lie on logarithmic axes, all else at
    equal distances. Members that diverged or were stopped are grey and dashed.

    Args:
      table: rows of `runs.summary`.
      names: the sweep's axes.
      unit: of the loss.
    """
    found = runs.measured(table)
    title = f"final {found.split} loss ({unit})"
    low, high = extent(table[found.loss], runs.base_loss(table))
    order = table.sort_values(found.loss, ascending=False, na_position="first")  # best on top
    loss = ((order[found.loss] - low) / (high - low)).clip(0, 1).fillna(NO_LOSS)
    levels = {f"{low + place * (high - low):.2f}": place for place in np.linspace(0, 1, 5)}
    columns = {short(name): heights(order[name], name) for name in (*names, SIZE)}
    columns["loss"] = loss, levels | {"none": NO_LOSS} if loss.max() > 1 else levels
    parts = [
        pd.DataFrame({"member": order["member"], "axis": axis, "height": at})
        for axis, (at, _) in columns.items()
    ]
    ticks = [(axis, n, text) for axis, (_, at) in columns.items() for text, n in at.items()]
    members = of_axes(order, names).assign(
        member=order["member"], name=order["name"], status=order["status"],
        loss=order[found.loss], params=order[SIZE],
    )  # fmt: skip
    said = {"name": "member", "params": (style.label(SIZE), ","), "loss": (title, FORMAT)}
    said = tooltips(names, order, said | {"status": "status"})
    lines = alt.Chart(pd.concat(parts, ignore_index=True))
    lines = style.filtered(with_members(lines, members))
    axes = pd.DataFrame(ticks, columns=["axis", "height", "text"])
    layers = [_axes(axes), *_lines(lines, list(columns), title, (low, high), said), *_ticks(axes)]
    return style.themed(alt.layer(*layers).properties(width="container", height=340))


def heights(column: pd.Series, name: str) -> tuple[pd.Series, dict[str, float]]:
    """Each member's height on an axis, from 0 to 1, and the heights of the ticks, by their text.
    Missing values are lowest."""
    values = distinct(column)
    missing = [value for value in values if value is None]
    present = [value for value in values if value is not None]
    if has_order(present) and present[0] > 0:
        start = 0.12 if missing else 0.0
        ends = np.log(present[0]), np.log(present[-1])
        places = [
            start + (1 - start) * (np.log(x) - ends[0]) / (ends[1] - ends[0]) for x in present
        ]
    else:
        places = list(np.linspace(0, 1, len(values) + 1 - (len(values) > 1))[: len(values)])
        present, missing = [*missing, *present], []
    at = dict(zip([*missing, *present], [*[0.0] * len(missing), *places], strict=True))
    found = pd.Series([at[None if runs.is_missing(x) else x] for x in column], column.index)
    kept = list(at)[:: -(-len(at) // MOST_TICKS)]
    words = {x: compact(x) if name == SIZE else runs.in_words(x, name) for x in kept}
    return found.astype(float), {words[x]: float(at[x]) for x in kept}


def compact(count: float) -> str:
    """A number in few characters: 288, 18.4k, 1M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def short(name: str) -> str:
    """The title of an axis, short enough for a narrow page."""
    return {"rank": "rank", "lr": "rate", SIZE: "parameters"}.get(name, style.label(name))


def _x(order: Sequence[str] | None = None) -> alt.X:
    axis = alt.Axis(
        orient="top", domain=False, ticks=False, labelAngle=0, labelLimit=0, labelPadding=24,
        labelBaseline="line-top", labelExpr="split(datum.label, ' ')",
    )  # fmt: skip
    return alt.X("axis:N", sort=order, title=None, axis=axis, scale=alt.Scale(padding=0.25))


Y = alt.Y("height:Q", axis=None, scale=alt.Scale(domain=[0, NO_LOSS]))


def _axes(ticks: pd.DataFrame) -> alt.Chart:
    """The upright lines."""
    ends = alt.Chart(ticks).transform_aggregate(
        low="min(height)", high="max(height)", groupby=["axis"]
    )
    return ends.mark_rule(style="reference", strokeDash=[1, 0]).encode(
        x=_x(), y=alt.Y("low:Q", axis=None), y2="high:Q"
    )


def _lines(
    lines: alt.Chart, order: Sequence[str], title: str, ends: tuple[float, float], said: list
) -> list[alt.Chart]:
    """The members; the one under the pointer is thick."""
    hover = alt.selection_point("hover", on="pointerover", fields=["member"], empty=False)
    scale = alt.Scale(domain=list(ends), range=ramp(5), clamp=True)
    colour = alt.Color("loss:Q", title=title, scale=scale, legend=alt.Legend(gradientLength=200))
    x, width = _x(order), alt.condition(hover, alt.value(4), alt.value(1.3))
    reached = lines.transform_filter("isValid(datum.loss)").mark_line(strokeOpacity=0.75)
    reached = reached.encode(
        x=x, y=Y, detail="member:N", color=colour, strokeWidth=width, tooltip=said
    )
    lost = lines.transform_filter("!isValid(datum.loss)")
    lost = lost.mark_line(style="reference", strokeWidth=1, opacity=0.4)
    lost = lost.encode(x=x, y=Y, detail="member:N", tooltip=said)
    return [lost, reached.add_params(hover)]


def _ticks(ticks: pd.DataFrame) -> list[alt.Chart]:
    """The values, on ground of their own, as lines run behind them."""
    text = lambda **look: (
        alt.Chart(ticks).mark_text(align="left", dx=5, fontSize=11, **look).encode(
            x=_x(), y=Y, text="text:N"
        )
    )  # fmt: skip
    return [text(style="halo"), text()]
