"""Figures of singular values, of the ranks computed from them, and of numbers by layer."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lorax.analysis.figures import vega
from lorax.analysis.figures.panels import (
    INTERVAL,
    digits,
    in_words,
    logarithmic,
    means_of_layers,
    whole_numbers,
    with_panels,
    wrapped,
)
from lorax.analysis.figures.style import (
    distinct,
    filtered,
    label,
    lines_of,
    named,
    themed,
    tooltips,
    with_intervals,
)

POINTS = 24  # of a curve of singular values
MOST = 14  # lines of a panel that differ in colour, marker and dash
SIZES = {"norm": "norm of ΔW", "effective": "effective rank", "stable": "stable rank"}


def spectra(sigmas: pd.DataFrame, main: str = "rank", *, each: bool = False) -> vega.Chart:
    """Singular values of dW by index, one line per value of `main`: means over members and layers,
    one panel per target; or with each, means over members, one panel per matrix.

    Args:
      sigmas: rows of `tables.spectra`, with a column `main`.
      main: the column that colours the lines, normally the rank.
    """
    table, order = in_words(sigmas[sigmas["sigma"] > 0], main)
    table = with_panels(table) if each else table.assign(panel=table["target"])
    of = "mean over members" if each else "mean over layers and members"
    return _curves(table, order, main, "singular value of ΔW", of)


def base_spectrum(sigmas: pd.DataFrame) -> vega.Chart:
    """Singular values of W by index, one panel per target, one line per layer. Values that are
    only rounding are left out, as they would stretch the axis by ten decades.

    sigmas: from `tables.base_spectra`.
    """
    largest = sigmas.groupby("path")["sigma"].transform("max")
    table = sigmas[sigmas["sigma"] > 1e-7 * largest]
    table, order = in_words(table.replace({"layer": {-1: "none"}}), "layer")
    table = table.assign(panel=table["target"], member="base")
    return _curves(table, order, "layer", "singular value of W", "value")


def _curves(
    table: pd.DataFrame, order: Sequence[str], main: str, y_title: str, of: str
) -> vega.Chart:
    """sigma against index on logarithmic axes: means of what a panel and a line have in common."""
    points = {round(x) for x in np.geomspace(1, max(table["index"].max(), 1), POINTS)}
    table = table[table["index"].isin(points)].assign(sigma=digits(table["sigma"]))
    # As lists, the values take a tenth of the room.
    by_matrix = table.groupby(["member", "path", "panel", "line"], sort=False)
    lists = by_matrix[["index", "sigma"]].agg(list).reset_index().drop(columns="path")
    means = (
        vega.Chart()
        .flatten("index", "sigma")
        .aggregate(mean="mean(sigma)", n="count()", groupby=["panel", "line", "index"])
        .encode(
            x=vega.column(
                "index:Q", title="index of singular value", **logarithmic(table["index"], 2)
            ),
            y=vega.column("mean:Q", title=y_title, **logarithmic(table["sigma"])),
            tooltip=tooltips(
                {"panel": "matrix", "line": named(main), "index": "index"}
                | {"mean": (of, ".4~g"), "n": "of how many"}
            ),
        )
    )
    title = label(main)
    if len(order) <= MOST:
        parts = [
            means.mark("line").encode(**lines_of("line", order, "line", title)),
            means.mark("point", size=14).encode(**lines_of("line", order, "point", title)),
        ]
    else:  # from dark to light
        ramp = vega.column("line:O", title=title, sort=order, scale=dict(scheme="cividis"))
        parts = [
            means.mark("line").encode(color=ramp),
            means.mark("point", size=10).encode(color=ramp),
        ]
    chart = vega.layer(*parts, data=lists)
    return themed(filtered(wrapped(chart.properties(height=130), distinct(table["panel"]))))


def update_ranks(ranks: pd.DataFrame, main: str = "rank") -> vega.Chart:
    """Effective and stable rank of dW against `main`, one line per target. Dots are layers, means
    over members; lines are means over layers, with t intervals over layers.

    Args:
      ranks: rows of `tables.spectra`'s second table, with a column `main`.
      main: the column on the x axis, normally the rank.
    """
    kinds = {name: f"{name} rank of ΔW" for name in ("effective", "stable")}
    most = pd.to_numeric(ranks["rank"], errors="coerce")  # a method without a rank has no line
    table = ranks.assign(reference=most.where(most > 0))
    table = table.assign(**{name: table[name].where(table[name] > 0) for name in kinds})
    return means_of_layers(table, main, kinds, log="rank of ΔW")


def by_layer(ranks: pd.DataFrame) -> vega.Chart:
    """Norm, effective and stable rank of dW by layer: one line per target; for several adapters one
    line per adapter, and a row of panels per target.

    Args:
      ranks: rows of `tables.spectra`'s second table; "member" names the adapter.
    """
    table = ranks.assign(adapter=ranks["member"])
    table = table.assign(**{column: digits(table[column]) for column in SIZES})
    line = "adapter" if table["adapter"].nunique() > 1 else "target"
    panels = SIZES
    if line == "adapter":
        pairs = itertools.product(distinct(table["target"]), SIZES.items())
        panels = {f"{target} {size}": f"{target}: {title}" for target, (size, title) in pairs}
    of_panel = "datum.target + ' ' + datum.size" if line == "adapter" else "datum.size"
    chart = (
        vega.Chart(table[["adapter", "layer", "target", *SIZES]])
        .fold(list(SIZES), names=("size", "value"))
        .calculate(panel=of_panel)
        .encode(
            x=vega.column("layer:Q", title="layer", **whole_numbers(table["layer"])),
            y=vega.column("value:Q", title=None),
            tooltip=tooltips(
                {"adapter": "adapter", "target": "target", "layer": "layer"}
                | {"value": ("value", ".4~g")}
            ),
        )
    )
    lines = lambda marks: lines_of(line, distinct(table[line]), marks, line)
    parts = [
        chart.mark("line").encode(**lines("line")),
        chart.mark("point", size=24).encode(**lines("point")),
    ]
    height = 200 if len(panels) == len(SIZES) else 120
    whole = wrapped(vega.layer(*parts).properties(height=height), panels)
    return themed(whole.resolve("scale", y="independent"))


def by_layer_and_value(table: pd.DataFrame, column: str, main: str = "rank") -> vega.Chart:
    """A number of every update by layer: one panel per target, one line per value of `main`. Lines
    are means over members, with t intervals.

    Args:
      table: member, layer, target, the column and `main`.
      column: the number to draw. The axis is logarithmic if it spans two decades.
    """
    table, order = in_words(table[np.isfinite(table[column])], main)
    data = table[["member", "layer", "target", "line"]].assign(value=digits(table[column]))
    low, high = data["value"].min(), data["value"].max()
    y = {"title": named(column), "scale": dict(zero=False)}
    y |= logarithmic(data["value"]) if low > 0 and high > 100 * low else {}
    means = with_intervals(vega.Chart(), "value", ["target", "line", "layer"]).encode(
        x=vega.column("layer:Q", title="layer", **whole_numbers(data["layer"])),
        y=vega.column("mean:Q", **y),
        tooltip=tooltips(
            {"target": "target", "layer": "layer", "line": named(main)}
            | {"mean": ("mean over members", ".4~g")}
            | INTERVAL
            | {"n": "members"}
        ),
    )
    lines = lambda marks: lines_of("line", order, marks, label(main))
    parts = [
        means.mark("rule").encode(y=vega.column("low:Q", **y), y2="high:Q", **lines("rule")),
        means.mark("line").encode(**lines("line")),
        means.mark("point", size=24).encode(**lines("point")),
    ]
    chart = vega.layer(*parts, data=data)
    return themed(
        filtered(wrapped(chart.properties(height=160), distinct(data["target"]), "target"))
    )
