"""Charts as values: Vega-Lite's specifications, whose tables are still pandas'.

A specification is nested dictionaries, as https://vega.github.io/vega-lite/docs/ has them. A
`Chart` holds one and is never changed: every method returns a new chart. Figures are made of
encodings, marks, transforms, layers and panels, as altair names them; what altair adds (its classes
for every dictionary, with copies and checks of all of them) takes longer than an analysis.
`altair.Chart.from_dict(chart.to_dict())` is the same chart in altair.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import pandas as pd

TYPES = {"Q": "quantitative", "N": "nominal", "O": "ordinal"}
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"


class Chart:
    """A chart: `spec` is its specification, with a pandas table or nothing under "data"."""

    def __init__(self, data: pd.DataFrame | None = None, **spec: Any):
        self.spec = ({} if data is None else {"data": data}) | spec

    def properties(self, **spec: Any) -> Self:
        """With these parts of the specification in place of those it has."""
        return Chart(**(self.spec | spec))

    def mark(self, kind: str, **look: Any) -> Self:
        """With marks of a kind: "point", "line", "rule", "rect", "text"..."""
        return self.properties(mark={"type": kind, **look})

    def encode(self, **channels: str | dict | list) -> Self:
        """With these encodings as well. Texts are read by `column`."""
        given = {
            name: column(value) if isinstance(value, str) else value
            for name, value in channels.items()
        }
        for name in {"x2", "y2"} & set(given):  # these have the type of x and y
            given[name] = {"field": given[name]["field"]}
        return self.properties(encoding=self.spec.get("encoding", {}) | given)

    # Transforms: each sees what those before it have made.

    def transform(self, *steps: dict[str, Any]) -> Self:
        """With these transforms after those it has."""
        return self.properties(transform=[*self.spec.get("transform", []), *steps])

    def filter(self, condition: str | dict) -> Self:
        """Keeps rows where an expression or a predicate holds."""
        return self.transform({"filter": condition})

    def calculate(self, **columns: str) -> Self:
        """Adds columns, each computed from a row by an expression."""
        return self.transform(
            *({"calculate": value, "as": name} for name, value in columns.items())
        )

    def aggregate(self, groupby: Sequence[str], **columns: str) -> Self:
        """One row for every group. columns: "mean(value)", "count()" by name."""
        return self.transform({"aggregate": _operations(columns), "groupby": list(groupby)})

    def join_aggregate(self, groupby: Sequence[str], **columns: str) -> Self:
        """The numbers of every group, as further columns of its rows."""
        return self.transform({"joinaggregate": _operations(columns), "groupby": list(groupby)})

    def fold(self, columns: Sequence[str], names: tuple[str, str]) -> Self:
        """A row for each of the columns. names: of the columns with its name and its value."""
        return self.transform({"fold": list(columns), "as": list(names)})

    def flatten(self, *columns: str) -> Self:
        """A row for every item of the lists in these columns."""
        return self.transform({"flatten": list(columns)})

    def window(self, columns: dict[str, str], **options: Any) -> Self:
        """Adds columns computed from neighbouring rows: "row_number()", "lag(value)" by name."""
        return self.transform({"window": _operations(columns)} | options)

    def lookup(self, key: str, table: pd.DataFrame) -> Self:
        """Adds the other columns of a table, of the row with the same key."""
        columns = [name for name in table if name != key]
        of = {"data": table, "key": key, "fields": columns}
        return self.transform({"lookup": key, "from": of})

    def facet(self, by: dict[str, Any], columns: int | None = None) -> Self:
        """A panel for every value of a column (`column`), or of `{"row": column}`."""
        inner = {key: value for key, value in self.spec.items() if key not in ("data", "params")}
        outer = {key: self.spec[key] for key in ("data", "params") if key in self.spec}
        panels = {} if columns is None else {"columns": columns}
        return Chart(**outer, facet=by, spec=inner, **panels)

    def resolve(self, kind: str, **channels: str) -> Self:
        """With channels that panels or layers share or not. kind: "scale", "axis" or "legend"."""
        resolved = self.spec.get("resolve", {})
        return self.properties(resolve=resolved | {kind: resolved.get(kind, {}) | channels})

    def parameter(self, **parameter: Any) -> Self:
        """With a further parameter."""
        return self.properties(params=[*self.spec.get("params", []), parameter])

    def to_dict(self) -> dict[str, Any]:
        """The specification in plain values, with all tables under "datasets"."""
        datasets: dict[str, list] = {}
        spec = _plain(self.spec, datasets)
        return {"$schema": SCHEMA} | spec | {"datasets": datasets}

    def _repr_mimebundle_(self, **_) -> dict[str, Any]:
        """As notebooks show it: an image, which needs no network."""
        import vl_convert

        return {"image/png": vl_convert.vegalite_to_png(self.to_dict())}


def layer(*charts: Chart, data: pd.DataFrame | None = None) -> Chart:
    """Charts on top of each other. Parts without a table draw `data`."""
    return _of_parts("layer", charts, Chart(data))


def concat(*charts: Chart, columns: int) -> Chart:
    """Charts beside each other, so many in a row."""
    return _of_parts("concat", charts, Chart(columns=columns))


def _of_parts(name: str, charts: Sequence[Chart], chart: Chart) -> Chart:
    """The chart with these parts. It has the table that they all share, and their parameters but
    selections, which have to stay with their marks."""
    parts, found = [dict(part.spec) for part in charts], []
    for part in parts:
        params = part.pop("params", [])
        found += [param for param in params if "select" not in param and param not in found]
        selections = [param for param in params if "select" in param]
        part |= {"params": selections} if selections else {}
    first = parts[0].get("data")
    if first is not None and all(part.get("data") is first for part in parts):
        chart = chart.properties(data=first)
        for part in parts:
            del part["data"]
    return chart.properties(**{name: parts}, **({"params": found} if found else {}))


def column(shorthand: str, **options: Any) -> dict[str, Any]:
    """An encoding: the values of a column. shorthand: "name:Q", its name and its type (`TYPES`); or
    the name alone. options: type, title, scale, axis, sort..."""
    name, _, kind = shorthand.rpartition(":")
    typed = {"field": name, "type": TYPES[kind]} if name else {"field": shorthand}
    return typed | options


def value(constant: Any) -> dict[str, Any]:
    """An encoding: the same for all marks."""
    return {"value": constant}


def either(condition: str | dict, yes: Any, no: Any) -> dict[str, Any]:
    """An encoding: one value where the condition (an expression, or {"param": name}) holds, another
    elsewhere."""
    test = {"test": condition} if isinstance(condition, str) else condition
    return {"condition": test | {"value": yes}, "value": no}


def _operations(columns: dict[str, str]) -> list[dict[str, str]]:
    """Columns that are computed by an operation: "mean(value)" by name."""
    found = []
    for name, words in columns.items():
        operation, _, of = words.rstrip(")").partition("(")
        found.append({"op": operation, **({"field": of} if of else {}), "as": name})
    return found


def _plain(part: Any, datasets: dict[str, list]) -> Any:
    """A part of a specification as JSON has it. Its tables go into `datasets`, by their hash."""
    if isinstance(part, pd.DataFrame):
        rows = _rows(part)
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
        datasets[name := f"data-{digest[:32]}"] = rows
        return {"name": name}
    if isinstance(part, dict):
        return {key: _plain(inner, datasets) for key, inner in part.items()}
    if isinstance(part, list | tuple):
        return [_plain(inner, datasets) for inner in part]
    return part.item() if isinstance(part, np.generic) else part


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows, with None for what is missing or infinite."""
    columns = [_cells(table[name]) for name in table]
    names = [str(name) for name in table]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _cells(values: pd.Series) -> list:
    if values.dtype.kind == "f":
        return [x if np.isfinite(x) else None for x in values.tolist()]
    if values.dtype.kind in "biu":
        return values.tolist()
    return [_cell(x) for x in values]


def _cell(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_cell(x) for x in value]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return None if value is pd.NA else value
