"""The figure of all members: a line for each through its values on all axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorax.analysis import runs
from lorax.analysis.figures import style, vega
from lorax.analysis.figures.encodings import of_axes, ramp, tooltips, with_members
from lorax.analysis.figures.layout import distinct, extent, has_order
from lorax.analysis.figures.loss_marks import FORMAT

SIZE = "trainable_params"
MOST_TICKS = 8  # of an axis
NO_LOSS = 1.1  # the height of members without a final loss: above the axis


def parallel(table: pd.DataFrame, names: Sequence[str], unit: str = "nats") -> vega.Chart:
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
    lines = vega.Chart(pd.concat(parts, ignore_index=True))
    lines = style.filtered(with_members(lines, members))
    axes = pd.DataFrame(ticks, columns=["axis", "height", "text"])
    layers = [_axes(axes), *_lines(lines, list(columns), title, (low, high), said), *_ticks(axes)]
    return style.themed(vega.layer(*layers).properties(width="container", height=340))


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


def _x(order: Sequence[str] | None = None) -> dict[str, Any]:
    axis = dict(
        orient="top", domain=False, ticks=False, labelAngle=0, labelLimit=0, labelPadding=24,
        labelBaseline="line-top", labelExpr="split(datum.label, ' ')",
    )  # fmt: skip
    return vega.column("axis:N", sort=order, title=None, axis=axis, scale=dict(padding=0.25))


Y = vega.column("height:Q", axis=None, scale=dict(domain=[0, NO_LOSS]))


def _axes(ticks: pd.DataFrame) -> vega.Chart:
    """The upright lines."""
    ends = vega.Chart(ticks).aggregate(low="min(height)", high="max(height)", groupby=["axis"])
    return ends.mark("rule", style="reference", strokeDash=[1, 0]).encode(
        x=_x(), y=vega.column("low:Q", axis=None), y2="high:Q"
    )


def _lines(
    lines: vega.Chart, order: Sequence[str], title: str, ends: tuple[float, float], said: list
) -> list[vega.Chart]:
    """The members; the one under the pointer is thick."""
    select = {"type": "point", "on": "pointerover", "fields": ["member"]}
    hover = {"param": "hover", "empty": False}
    scale = dict(domain=list(ends), range=ramp(5), clamp=True)
    colour = vega.column("loss:Q", title=title, scale=scale, legend=dict(gradientLength=200))
    x, width = _x(order), vega.either(hover, 4, 1.3)
    reached = lines.filter("isValid(datum.loss)").mark("line", strokeOpacity=0.75)
    reached = reached.encode(
        x=x, y=Y, detail="member:N", color=colour, strokeWidth=width, tooltip=said
    )
    lost = lines.filter("!isValid(datum.loss)")
    lost = lost.mark("line", style="reference", strokeWidth=1, opacity=0.4)
    lost = lost.encode(x=x, y=Y, detail="member:N", tooltip=said)
    return [lost, reached.parameter(name="hover", select=select)]


def _ticks(ticks: pd.DataFrame) -> list[vega.Chart]:
    """The values, on ground of their own, as lines run behind them."""
    text = lambda **look: (
        vega.Chart(ticks).mark("text", align="left", dx=5, fontSize=11, **look).encode(
            x=_x(), y=Y, text="text:N"
        )
    )  # fmt: skip
    return [text(style="halo"), text()]
