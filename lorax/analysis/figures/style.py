"""The style of all figures: colours, markers and dashes, names of axes, legends.

A figure is a `vega.Chart`, with its table. It names no colours of its own: marks
take them from the theme, by their order or by the name of a style (`STYLES`), so a page can show
the same chart on light and on dark ground.

Lines have Okabe and Ito's colours and each a marker and a dash style, so they can be distinguished
without colour. Maps are cividis, whose lightness increases uniformly. Losses are in nats.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from lorax.analysis import runs
from lorax.analysis.figures import vega

NAMES = {"rank": "rank r of the adapter", "lr": "learning rate", "alpha": "α"}
NAMES |= {"trainable_params": "trainable parameters", "n_train": "training examples"}
# The colours of a chart on light and on dark ground. Those of lines are Okabe and Ito's, without
# yellow on white and lighter on black.
LIGHT = {
    "text": "#1b1f24",
    "soft": "#57606a",
    "grid": "#e6e9ed",
    "ground": "#ffffff",
    "band": "#8c959f",
    "line-1": "#0072b2",
    "line-2": "#d55e00",
    "line-3": "#009e73",
    "line-4": "#cc79a7",
    "line-5": "#c58500",
    "line-6": "#56b4e9",
    "line-7": "#1b1f24",
}
DARK = {
    "text": "#e6e9ee",
    "soft": "#a4adb8",
    "grid": "#2c323a",
    "ground": "#14171b",
    "band": "#8c959f",
    "line-1": "#4aa8e0",
    "line-2": "#f08a4b",
    "line-3": "#2fc79a",
    "line-4": "#e3a0c4",
    "line-5": "#f0c04a",
    "line-6": "#9ad4f5",
    "line-7": "#e6e9ee",
}
# Markers and dashes of lines. Their numbers and that of the colours have no common divisor, so the
# first 7 * 5 * 3 lines all look different.
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
STROKES = ((1, 0), (6, 3), (2, 2))
WIDTH = 600  # pixels of an image; on a page, a chart is as wide as its place
HEIGHT = 280
SPACING = 20  # pixels between panels
AXIS, HEADER = 80, 60  # pixels beside the first panel of a row: for its axis; for the row's title
LEVEL = 0.95  # of the intervals that charts compute
SHOWN = "indexof(hidden, datum.member) < 0"  # whether a page's reader sees a mark's member


def theme(colours: Mapping[str, str] = LIGHT, font: str = "sans-serif") -> dict[str, Any]:
    """The configuration of all charts, for Vega-Lite.

    Args:
      colours: as in `LIGHT`; a page passes CSS variables of these names.
      font: a CSS font family.
    """
    text, soft, lines = colours["text"], colours["soft"], [
        colour for name, colour in colours.items() if name.startswith("line-")
    ]  # fmt: skip
    return {
        "font": font,
        "background": colours["ground"],
        "view": {"continuousWidth": WIDTH, "continuousHeight": HEIGHT, "stroke": None},
        "axis": {
            "domainColor": soft,
            "gridColor": colours["grid"],
            "labelColor": soft,
            "labelFontSize": 12,
            "tickColor": soft,
            "tickSize": 4,
            "titleColor": text,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 8,
        },
        "axisX": {"grid": False},
        "axisY": {"domain": False, "ticks": False, "tickCount": 5},
        "facet": {"spacing": SPACING},
        "concat": {"spacing": SPACING},
        "header": {
            "labelAnchor": "start",
            "labelColor": text,
            "labelFontSize": 12,
            "titleColor": soft,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
        },
        "title": {"anchor": "start", "color": text, "fontSize": 12, "fontWeight": "normal"},
        "legend": {
            "orient": "top",
            "columns": 4,
            "labelColor": text,
            "labelFontSize": 12,
            "labelLimit": 320,
            "symbolStrokeWidth": 1.6,
            "titleColor": soft,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
        },
        "range": {
            "category": lines,
            "symbol": list(SHAPES),
            "ramp": {"scheme": "cividis"},
            "heatmap": {"scheme": "cividis"},
            "ordinal": {"scheme": "cividis"},
        },
    } | _marks(colours)


def _marks(colours: Mapping[str, str]) -> dict[str, Any]:
    """The theme of marks, and the styles that a chart may name."""
    text, soft, band, line = (colours[name] for name in ("text", "soft", "band", "line-1"))
    return {
        "line": {"color": line, "strokeWidth": 1.8},
        "point": {"color": line, "filled": True, "size": 50, "opacity": 1},
        "rule": {"color": line, "strokeWidth": 1.4},
        "bar": {"color": line},
        "tick": {"color": line},
        "area": {"color": line},
        "text": {"color": text, "fontSize": 12},
        "style": {
            "reference": {"color": soft, "strokeDash": [6, 3], "strokeWidth": 1.2},
            "reference-text": {"color": soft, "fontSize": 11},
            "band": {"color": band, "fillOpacity": 0.2, "strokeOpacity": 0},
            "member": {"opacity": 0.45},
            "ring": {"filled": False, "color": text, "strokeWidth": 1.5},
            "halo": {"color": colours["ground"], "stroke": colours["ground"], "strokeWidth": 4},
        },
    }


def themed(chart: vega.Chart) -> vega.Chart:
    """The chart as it looks outside of a page, e.g. in a notebook. Every figure returns this."""
    return chart.properties(config=theme())


def filtered(chart: vega.Chart) -> vega.Chart:
    """The chart without the members that a page's reader hides, whose numbers the page puts into
    the parameter `hidden`. The chart's table has a column `member`. The filter comes before all
    other transforms, so what they compute (means over seeds) follows it.

    Raises ValueError if the chart has no table of its own, as a layer of several tables has none.
    """
    if "data" not in chart.spec:
        raise ValueError("filtered: the chart has no table; filter each of its parts")
    steps = [{"filter": SHOWN}, *chart.spec.get("transform", [])]
    return chart.properties(transform=steps).parameter(name="hidden", value=[])


def with_intervals(
    chart: vega.Chart, value: str, groupby: Sequence[str], *, keep: bool = False
) -> vega.Chart:
    """Computes, in the chart, for every group: `mean` of the column `value`, `n` (how many values
    are not missing), and `low` and `high`, the t interval of the mean at `LEVEL`. low and high are
    null for one value, so no bar is drawn. keep: whether the values stay, each with the numbers of
    its group."""
    # A chart has no quantiles of t. From 31 values on, this is Cornish and Fisher's expansion.
    quantiles = special.stdtrit(range(1, 31), 0.5 + LEVEL / 2)
    z = special.ndtri(0.5 + LEVEL / 2)
    listed = ", ".join(f"{quantile:.5g}" for quantile in quantiles)
    later = f"{z:.5g} + {(z**3 + z) / 4:.5g} / (datum.n - 1)"
    t = f"(datum.n <= 31 ? [{listed}][datum.n - 2] : {later})"
    half = f"{t} * datum.sd / sqrt(datum.n)"
    numbers = {"mean": f"mean({value})", "sd": f"stdev({value})", "n": f"valid({value})"}
    summarised = chart.join_aggregate if keep else chart.aggregate
    return (
        summarised(**numbers, groupby=list(groupby))
        .filter("datum.n > 0")
        .calculate(
            low=f"datum.n > 1 ? datum.mean - {half} : null",
            high=f"datum.n > 1 ? datum.mean + {half} : null",
        )
    )


def facets(
    chart: vega.Chart,
    field: str,
    values: Sequence,
    columns: int = 3,
) -> vega.Chart:
    """A panel for every value, row by row. A page with less room shows fewer in a row.

    Args:
      chart: the panel, with its height.
      field: the column of the values, as words, in the chart's table.
      values: all of them, in their order.
      columns: how many panels a row has at most.
    """
    columns = min(columns, len(values))
    by = vega.column(f"{field}:N", sort=list(values), header=dict(title=None))
    width = (WIDTH - AXIS - SPACING * (columns - 1)) // columns
    return chart.properties(width=width).facet(by, columns=columns)


def lines_of(
    field: str, values: Sequence, marks: str, title: str | None = None
) -> dict[str, dict[str, Any]]:
    """The encodings by which marks of different values differ: colour, and the shape of points or
    the dash of lines. Points and lines of one chart share a legend.

    Args:
      field: the chart's column of the values, as words.
      values: all of them, in their order; the chart may lack some.
      marks: "point", "line" or "rule".
      title: of the legend; None for no title.
    """
    kept = {"title": title, "scale": dict(domain=list(values))}
    encodings = {"color": vega.column(f"{field}:N", **kept)}
    if marks == "point":
        encodings["shape"] = vega.column(f"{field}:N", **kept)
    if marks == "line":
        # With the same domain, it would take the colours' legend away with its own.
        domain = [*values, ""]
        strokes = dict(domain=domain, range=[list(stroke) for stroke in STROKES])
        encodings["strokeDash"] = vega.column(f"{field}:N", scale=strokes, legend=None)
    return encodings


def position(column: pd.Series, name: str) -> dict[str, Any]:
    """Options of an encoding for an axis of a sweep: its type, title, scale and ticks. Positive
    numbers have a logarithmic scale with a tick at every value, or where there are many, at some;
    all else is in the order of `distinct`, as words.

    name: the column's in the chart.
    """
    values = distinct(column)
    title = label(name)
    if not _are_positive(values):
        words = [runs.in_words(value, name) for value in values]
        return {"type": "nominal", "title": title, "sort": words, "axis": dict(labelAngle=0)}
    values = sorted(float(value) for value in values)
    domain = [values[0] / 1.25, values[-1] * 1.25]
    base = 2 if all(math.log2(value).is_integer() for value in values) else 10
    return {
        "type": "quantitative",
        "title": title,
        "scale": dict(type="log", base=base, domain=domain, nice=False),
        "axis": dict(values=values, labelOverlap="greedy", format="~g"),
    }


def _are_positive(values: Iterable) -> bool:
    """Whether all are positive numbers, which a logarithmic axis can show."""
    return all(isinstance(v, (int, float, np.number)) and v > 0 for v in values)


def tooltips(columns: Mapping[str, str | tuple[str, str]]) -> list[dict[str, Any]]:
    """What a mark says when the pointer is on it.

    columns: titles by column, or (title, format) for a number, as d3-format has them.
    """
    shown = []
    for column, title in columns.items():
        if isinstance(title, tuple):
            shown.append(vega.column(f"{column}:Q", title=title[0], format=title[1]))
        else:
            shown.append(vega.column(f"{column}:N", title=title))
    return shown


def interval(digits: str, words: str = "95% interval from") -> dict[str, tuple[str, str]]:
    """For `tooltips`: the columns low and high. digits: their format."""
    return {"low": (words, digits), "high": ("to", digits)}


def named(main: str) -> str:
    """A column's name in words."""
    return main.replace("_", " ")


def label(name: str) -> str:
    """An axis of a sweep in words, as titles and legends show it."""
    return NAMES.get(name, named(name))


def distinct(column: Iterable) -> list:
    """The distinct values of a column, in their order; None for missing values.

    Done in Python, because `Series.map` turns None into NaN, which doesn't equal itself.
    """
    return list(dict.fromkeys(None if runs.is_missing(value) else value for value in column))


def has_no_order(values: Sequence) -> bool:
    """Whether the values of an axis are names (of methods, targets) or None, which no line should
    connect."""
    return all(value is None or isinstance(value, str) for value in values)


def values_in_order(column: pd.Series) -> list:
    """The values of the main axis: numbers by size, then words."""
    return sorted(set(column), key=lambda value: (isinstance(value, str), value))


def panel_title(layer: int, target: str) -> str:
    """The title of a matrix's panel; a matrix outside all layers has only its target."""
    return f"{target}, layer {layer}" if layer >= 0 else target
