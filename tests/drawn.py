"""What a chart shows: its marks with their values, and its texts, as Vega lays them out."""

import functools
import json
import re
from collections.abc import Iterable, Iterator

import altair
import vl_convert

from lorax.report import charts


def marks(chart, kind: str | None = None, hidden: Iterable[int] = ()) -> list[dict[str, str]]:
    """The values of every mark, by title, in words: those of its encodings and of its tooltip.

    kind: "symbol", "line", "rule", "area", "rect" or "text"; by default all.
    hidden: numbers of members that the reader of a page has hidden.
    """
    found = []
    for mark in _marks(_drawn(chart, hidden)):
        if mark["role"] == "mark" and kind in (None, mark["marktype"]):
            items = [item for item in mark["items"] if "description" in item]
            found += [_values(item["description"]) for item in items]
    return found


def texts(chart, hidden: Iterable[int] = ()) -> list[str]:
    """All words: titles, labels of axes and legends, texts beside marks."""
    of_marks = (mark for mark in _marks(_drawn(chart, hidden)) if mark["marktype"] == "text")
    found = (item.get("text", "") for mark in of_marks for item in mark["items"])
    return [" ".join(text) if isinstance(text, list) else str(text) for text in found]


def number(text: str) -> float:
    """A number as a chart writes it."""
    return float(text.replace("\N{MINUS SIGN}", "-").replace(",", ""))


def specification(chart) -> dict:
    """The chart's specification, which Vega-Lite's schema allows."""
    spec = chart.to_dict()
    _check(json.dumps(spec | {"datasets": {}}))
    return spec


@functools.cache
def _check(spec: str) -> None:
    altair.Chart.from_dict(json.loads(spec))


def _drawn(chart, hidden: Iterable[int]) -> dict:
    spec = charts.sized(specification(chart))
    for parameter in spec.get("params", []):
        if parameter["name"] == "hidden":
            parameter["value"] = list(hidden)
    return vl_convert.vegalite_to_scenegraph(spec)["scenegraph"]


def _marks(node: dict) -> Iterator[dict]:
    if "marktype" in node:
        yield node
    for item in node.get("items", []):
        yield from _marks(item)


def _values(description: str) -> dict[str, str]:
    pairs = (part.split(": ", 1) for part in re.split(r"; ", description) if ": " in part)
    return {name: value for name, value in pairs}
