"""Charts as images for papers, and as what a page draws with Vega."""

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

import vl_convert

from lorax import files
from lorax.analysis.figures import style

SCALE = 2  # pixels of an image per pixel on a page
DIGITS = 6  # of the numbers that a page embeds; they are drawn, and shown with fewer


def sized(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The specification with a width for images, if it takes the width of its place on a page."""
    return {**spec, "width": style.WIDTH} if spec.get("width") == "container" else dict(spec)


def png(spec: Mapping[str, Any]) -> bytes:
    """The chart as PNG, on light ground. spec: from `vega.Chart.to_dict`."""
    return vl_convert.vegalite_to_png(sized(spec), scale=SCALE)


def pdf(spec: Mapping[str, Any]) -> bytes:
    """The chart as PDF, with its text as text."""
    return vl_convert.vegalite_to_pdf(sized(spec))


def library() -> str:
    """The JavaScript of Vega and Vega-Lite, as the function `vegaEmbed`. Bundling it takes two
    seconds, so it is kept in the user's cache folder if that can be written to."""
    kept = None
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home
        kept = files.cache_folder() / f"vega-{vl_convert.__version__}.js"
        return kept.read_text(encoding="utf-8")
    bundle = vl_convert.javascript_bundle()
    if kept is not None:
        with contextlib.suppress(OSError):
            files.write_bytes(kept, bundle.encode())
    return bundle


def embedded(specs: Mapping[str, dict[str, Any]]) -> str:
    """All charts of a page, for its script: JSON of "charts" (by name, without their tables),
    "datasets" (each once, also if several charts have it: names of columns and rows of values),
    "config" (the theme, whose colours are CSS variables) and "pixels" (the room beside panels)."""
    datasets = {}
    charts = {}
    for name, spec in specs.items():
        charts[name] = {key: spec[key] for key in spec if key not in ("config", "$schema")}
        tables = charts[name].pop("datasets", {})
        datasets |= {key: columns(rows) for key, rows in tables.items() if key not in datasets}
        charts[name]["tables"] = list(tables)
    variables = {colour: f"var(--chart-{colour})" for colour in style.LIGHT}
    config = style.theme(variables, "system-ui, -apple-system, 'Segoe UI', sans-serif")
    pixels = {"spacing": style.SPACING, "axis": style.AXIS, "header": style.HEADER}
    page = {"config": config, "charts": charts, "datasets": datasets, "pixels": pixels}
    text = json.dumps(page, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c")  # nothing in it ends the script


def read(page: str) -> dict[str, dict[str, Any]]:
    """{name: specification, themed for light ground} of the charts that `embedded` put into a page;
    their numbers have `DIGITS` digits."""
    data = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page)
    found = json.loads(data[1])
    tables = {
        name: [dict(zip(table["names"], row, strict=True)) for row in table["rows"]]
        for name, table in found["datasets"].items()
    }
    return {
        name: {key: value for key, value in chart.items() if key != "tables"}
        | {"datasets": {table: tables[table] for table in chart["tables"]}}
        | {"config": style.theme()}
        for name, chart in found["charts"].items()
    }


def columns(rows: list[dict[str, Any]]) -> dict[str, list]:
    """A table's names of columns, and its rows as lists."""
    names = list(rows[0]) if rows else []
    return {"names": names, "rows": [[rounded(row[name]) for name in names] for row in rows]}


def rounded(value: Any) -> Any:
    """A number with `DIGITS` digits; all else as it is."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def css() -> str:
    """The colours of charts as CSS variables, on light and on dark ground."""
    values = (
        f"--chart-{name}: light-dark({light}, {style.DARK[name]});"
        for name, light in style.LIGHT.items()
    )
    return f":root {{ {' '.join(values)} }}"
