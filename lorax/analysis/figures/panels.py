"""Charts of several panels, and the tables that they embed."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from lorax.analysis import runs
from lorax.analysis.figures import vega
from lorax.analysis.figures.style import (
    distinct,
    facets,
    filtered,
    has_no_order,
    interval,
    lines_of,
    named,
    panel_title,
    position,
    themed,
    tooltips,
    values_in_order,
    with_intervals,
)

SHORT = 10  # characters of a name that fits below a panel of many
INTERVAL = interval(".4~g")  # in tooltips


def wrapped(
    chart: vega.Chart, panels: Collection[str], field: str = "panel", columns: int = 3
) -> vega.Chart:
    """`facets` of a chart that computes its numbers. The transforms of its first layer are those of
    all: Vega-Lite can't compute others in panels.

    Args:
      panels: the values of the column `field`, in their order; or {value: title}.
      columns: how many panels a row has at most.
    """
    transform = chart.spec["layer"][0].get("transform", [])
    layers = [
        {key: value for key, value in layer.items() if key != "transform"}
        for layer in chart.spec["layer"]
    ]
    chart = chart.properties(layer=layers)
    chart = facets(chart, field, list(panels), side_by_side(len(panels), columns))
    chart = chart.properties(transform=transform) if transform else chart
    if isinstance(panels, Mapping):
        header = {"labelExpr": f"{json.dumps(panels)}[datum.value]", "title": None}
        chart = chart.properties(facet=chart.spec["facet"] | {"header": header})
    return chart.resolve("axis", x="independent")  # a shared axis would also be below a gap


def side_by_side(count: int, most: int) -> int:
    """How many of `count` panels a row has; one less than the most if two rows have fewer gaps."""
    fewer = most < count <= 2 * most and -count % (most - 1) < -count % most
    return min(count, most - fewer)


def means_of_layers(
    table: pd.DataFrame, main: str, kinds: Mapping[str, str], *, log: str = ""
) -> vega.Chart:
    """Numbers of matrices against `main`, one panel per number, one line per target. Dots are
    layers, means over members; lines are means over layers, with their t intervals. Bars end where
    the axis does: none of these numbers is negative.

    Args:
      table: member, layer, target, `main`, the numbers, and `reference`, the height of a dashed
        line at each value of `main`, or NaN.
      kinds: the numbers' titles by column.
      log: the title of a logarithmic axis that all panels share; else each has its own.
    """
    numbers = pd.concat([table[column] for column in ("reference", *kinds)]).dropna()
    y = {"title": log, **logarithmic(numbers, 2)} if log else {"title": None}
    lowest = numbers.min() if log and len(numbers) else 0
    data, _ = in_words(table, main)
    joined = not has_no_order(distinct(table[main]))
    data = data.assign(x=data[main] if joined else data["line"])
    data = data.assign(**{column: digits(data[column]) for column in (*kinds, "reference")})
    layers = (
        vega.Chart()
        .fold(list(kinds), names=("kind", "value"))
        .filter("isValid(datum.value)")
        .aggregate(
            value="mean(value)",
            reference="max(reference)",
            groupby=["kind", "target", "x", "layer"],
        )
    )
    chart = with_intervals(layers, "value", ["kind", "target", "x"], keep=True)
    x = position(data["x"], main)
    if not joined and data["line"].str.len().max() > SHORT:
        x["axis"] = dict(labelAngle=-35)
    chart = chart.encode(x=vega.column("x", **x))
    chart = chart.calculate(bar=f"isValid(datum.low) ? max(datum.low, {lowest}) : null")
    height = lambda column: vega.column(f"{column}:Q", **y)
    lines = lambda marks: lines_of("target", distinct(data["target"]), marks, "target")
    place = {"target": "target", "x": named(main)}
    dots = place | {"layer": "layer", "value": ("mean over members", ".4~g")}
    means = chart.encode(
        y=height("mean"),
        tooltip=tooltips(
            place | {"mean": ("mean over layers", ".4~g")} | INTERVAL | {"n": "layers"}
        ),
    )
    parts = [
        chart.mark("point", style="member", size=20).encode(
            y=height("value"), tooltip=tooltips(dots), **lines("point")
        ),
        chart.mark("rule").encode(y=height("bar"), y2="high:Q", **lines("rule")),
        means.mark("point").encode(**lines("point")),
    ]
    if joined:
        parts.insert(2, means.mark("line").encode(**lines("line")))
    if data["reference"].notna().any():
        reference = chart.encode(y=height("reference"))
        tick = reference.mark("tick", style="reference", orient="horizontal", size=30)
        parts.append(reference.mark("line", style="reference") if joined else tick)
    columns = ["member", "layer", "target", "x", "reference", *kinds]
    whole = wrapped(vega.layer(*parts, data=data[columns]).properties(height=230), kinds, "kind", 2)
    return themed(filtered(whole if log else whole.resolve("scale", y="independent")))


def in_words(table: pd.DataFrame, main: str) -> tuple[pd.DataFrame, list[str]]:
    """(the table with the column `line`, the values of its column `main` in words; all of them in
    their order)."""
    words = {}
    for value in values_in_order(table[main]):
        text = runs.in_words(value, main)
        words[value] = text if isinstance(text, str) else f"{text:g}"
    return table.assign(line=table[main].map(words)), list(dict.fromkeys(words.values()))


def with_panels(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the column `panel`, the title of each row's matrix; its rows are in the order
    of layers, and of targets within a layer."""
    order = {target: n for n, target in enumerate(dict.fromkeys(table["target"]))}
    table = table.assign(place=table["target"].map(order))
    table = table.sort_values(["layer", "place"], kind="stable").drop(columns="place")
    places = table[["layer", "target"]].itertuples(index=False)
    return table.assign(panel=[panel_title(*place) for place in places])


def digits(values: pd.Series, count: int = 4) -> pd.Series:
    """Numbers rounded to so many significant digits, which a chart needs no more of."""
    return values.map(lambda value: float(f"{value:.{count}g}"))


def logarithmic(values: pd.Series, base: int = 10) -> dict[str, Any]:
    """Options of an encoding for a logarithmic axis that ends where the positive values do and has
    ticks at powers of the base; at every one if they are few."""
    powers = np.log(values[values > 0]) / np.log(base)
    low, high = (math.floor(powers.min()), math.ceil(powers.max())) if len(powers) else (0, 1)
    step = -(-(high - low) // 6) or 1
    ticks = [float(base) ** power for power in range(low, high + 1, step)]
    inside = [tick for tick in ticks if values.min() <= tick <= values.max()]
    at = {"values": ticks} if len(inside) > 1 else {}
    return {
        "scale": dict(type="log", base=base, nice=False),
        "axis": at | dict(format="~g", labelOverlap="greedy", tickCount=4),
    }


def whole_numbers(values: pd.Series) -> dict[str, Any]:
    """Options of an encoding for an axis of layers; -1 is the place outside all layers."""
    low, high = int(values.min()), int(values.max())
    step = -(-(high - low) // 6) or 1
    ticks = dict(
        values=list(range(low, high + 1, step)),
        labelExpr="datum.value < 0 ? 'none' : datum.label",
        format="d",
    )
    return {"axis": ticks, "scale": dict(domain=[low - 0.3, high + 0.3], nice=False)}
