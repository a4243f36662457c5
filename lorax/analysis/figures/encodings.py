"""How members and axes of a sweep become marks: the rows that a chart embeds, and the encodings of
axes, colours, panels and tooltips."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorax.analysis import runs
from lorax.analysis.figures import style, vega
from lorax.analysis.figures.layout import distinct, has_order, is_setting, lost
from lorax.analysis.figures.panels import side_by_side

# From low to high: as light as lines have to be on white and on black ground.
RAMP = ((76, 91, 212), (154, 75, 200), (209, 71, 127), (224, 122, 47))
HEIGHT = 150  # pixels of a panel


def field(name: str) -> str:
    """A column's name in a chart: Vega reads dots and brackets as paths."""
    return re.sub(r"\W", "_", name)


# -------------------------------------------------------------------------------------------- rows


def of_axes(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """The axes as a chart embeds them: under names that Vega can read; in words ("all" for a
    missing number) if not all values are numbers."""
    columns = {
        field(name): list(table[name])
        if is_numeric(table[name])
        else [runs.in_words(value, name) for value in table[name]]
        for name in names
    }
    return pd.DataFrame(columns, index=table.index)


def is_numeric(column: Iterable) -> bool:
    """Whether an axis is embedded as numbers: it has an order, and no value is missing."""
    return has_order(column) and not any(map(runs.is_missing, column))


def of_members(
    table: pd.DataFrame,
    names: Sequence[str],
    loss: str,
    panel: str | None = None,
    setting: pd.Series | None = None,
) -> pd.DataFrame:
    """The members as a chart of means over seeds embeds them: their axes, member, name, status,
    loss, panel (its title), lost (seeds of the setting that did not reach the end), and chosen
    (whether they have the setting to mark).

    Args:
      table: rows of `runs.summary`.
      names: the axes; members that agree in them are seeds of one setting.
      loss: the column to draw.
      panel: the axis that makes panels.
      setting: values of the axes; None: there is none to mark.
    """
    reached = ~table["status"].isin(runs.WITHOUT_RESULT)
    return of_axes(table, names).assign(
        member=table["member"],
        name=table["name"],
        status=table["status"],
        loss=table[loss].where(reached),
        panel=titles(table, panel),
        lost=lost(table, names),
        chosen=is_setting(table, setting, names),
    )


def with_members(chart: vega.Chart, members: pd.DataFrame) -> vega.Chart:
    """The chart, whose table has a column `member`, with the other columns of a table of members,
    which is embedded once instead of on every row."""
    return chart.lookup("member", members)


def titles(table: pd.DataFrame, panel: str | None) -> list[str]:
    """The title of each member's panel: "alpha = 8"; "" without panels."""
    if panel is None:
        return [""] * len(table)
    return [f"{style.label(panel)} = {runs.in_words(value, panel)}" for value in table[panel]]


def titles_in_order(table: pd.DataFrame, panel: str) -> list[str]:
    """All titles of panels: numbers by size, words as they come."""
    return titles(pd.DataFrame({panel: distinct(table[panel])}, dtype=object), panel)


# --------------------------------------------------------------------------------------- encodings


def in_order(name: str, values: Iterable) -> list:
    """The different values of an axis, as `of_axes` embeds them."""
    found = distinct(values)
    return found if is_numeric(found) else [runs.in_words(value, name) for value in found]


def place(name: str, values: Iterable, **options: Any) -> dict[str, Any]:
    """Encodes an axis of the sweep: positive numbers on a logarithmic scale with a tick for each;
    other values at equal distances, in their order."""
    values = in_order(name, values)
    if is_numeric(values) and values[0] > 0:
        of = style.position(pd.Series(values), name)
    else:
        axis = dict(labelAngle=0, labelLimit=260)
        of = {"type": "ordinal", "sort": values, "title": style.label(name), "axis": axis}
    return {"field": field(name), **of, **options}


def colours(name: str | None, values: Iterable, marks: str) -> dict[str, Any]:
    """The encodings of the axis that has the colours: a ramp for values with an order, a cycle for
    names; with markers and dashes (`style.lines_of`). {} without an axis.

    marks: "point", "line" or "rule".
    """
    if name is None:
        return {}
    domain = in_order(name, values)
    encodings = style.lines_of(field(name), domain, marks, style.label(name))
    if has_order(values):
        encodings["color"]["scale"] = dict(domain=domain, range=ramp(len(domain)))
    return encodings


def ramp(count: int) -> list[str]:
    """Colours of `count` ordered values, low to high."""
    places = np.linspace(0, len(RAMP) - 1, count)
    channels = [np.interp(places, range(len(RAMP)), of) for of in zip(*RAMP, strict=True)]
    mixed = zip(*channels, strict=True)
    return ["#" + "".join(f"{round(x):02x}" for x in colour) for colour in mixed]


def tooltips(
    names: Iterable[str], table: pd.DataFrame, more: dict[str, Any]
) -> list[dict[str, Any]]:
    """A mark's axes, then `more` (as in `style.tooltips`)."""
    axes = {
        field(name): (style.label(name), "~g") if is_numeric(table[name]) else style.label(name)
        for name in names
    }
    return style.tooltips(axes | more)


def in_panels(
    chart: vega.Chart,
    data: pd.DataFrame,
    panels: Sequence[str],
    height: int | None = None,
    columns: int | None = None,
) -> Any:
    """The chart on the data; if there are panels (titles), one for each, row by row.

    Args:
      height: in pixels; None: that of other figures.
      columns: how many panels a row has at most; None: as their number suggests.
    """
    if not panels:
        height = style.HEIGHT if height is None else height
        return chart.properties(data=data, width="container", height=height)
    columns = columns or side_by_side(len(panels), 3)
    chart = chart.properties(data=data, height=HEIGHT if height is None else height)
    chart = style.facets(chart, "panel", panels, columns)
    # A shared axis would also stand below a gap.
    gaps = len(panels) % chart.spec["columns"]
    return chart.resolve("axis", x="independent") if gaps else chart
