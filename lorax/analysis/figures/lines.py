"""Line charts of what was learned: similarity, table 7, intruders, growth, CKA."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorax.analysis.figures import vega
from lorax.analysis.figures.panels import (
    INTERVAL,
    digits,
    in_words,
    means_of_layers,
    whole_numbers,
    wrapped,
)
from lorax.analysis.figures.style import (
    filtered,
    interval,
    label,
    lines_of,
    named,
    themed,
    tooltips,
    with_intervals,
)
from lorax.analysis.measures.overlap import Band

# Labels for columns of `amplifications` and of a trajectory.
RATIOS = {
    "factor": "amplification factor",
    "over_chance": "W in ΔW's directions, over chance",
}
QUANTITIES = {
    "norm": "Frobenius norm of ΔW",
    "effective": "effective rank of ΔW",
    "stable": "stable rank of ΔW",
    "energy90": "90% energy rank of ΔW",
    "overlap_final": "overlap with final ΔW",
    "energy_top": "energy in W's leading directions",
    "energy_bottom": "energy in W's last directions",
    "gradient_overlap": "overlap of a with first gradient",
}


def diagonal(phi: Mapping[str, np.ndarray], band: Band) -> vega.Chart:
    """phi(i, i) against i, one line per comparison, over the level of chance: mean and 5% to 95%.

    Args:
      phi: (r1, r2) by name, or (layers, r1, r2): then lines are means over layers, with their t
        intervals.
      band: chance in the space of the comparisons (the kernels of an MLP and of attention may have
        different ones).
    """
    mean, low, high = (np.diagonal(part) for part in band)
    chance = pd.DataFrame({"i": range(1, len(mean) + 1), "mean": mean, "low": low, "high": high})
    rows = [
        {"line": name, "layer": layer, "i": i, "phi": value}
        for name, values in phi.items()
        for layer, matrix in enumerate(np.atleast_3d(values.T).T)
        for i, value in enumerate(np.diagonal(matrix), 1)
    ]
    table = pd.DataFrame(rows)
    x = vega.column("i:Q", title="i: top directions of both", **whole_numbers(table["i"]))
    y = vega.column("mean:Q", title="φ(i, i)", scale=dict(domain=[0, 1]))
    words = {"i": "i", "mean": ("mean of φ(i, i)", ".3f")}
    by_chance = vega.Chart(chance.round(4)).encode(
        x=x,
        tooltip=tooltips(
            {"i": "i", "mean": ("by chance", ".3f")} | interval(".3f", "5% to 95% from")
        ),
    )
    means = with_intervals(vega.Chart(table.assign(phi=digits(table["phi"]))), "phi", ["line", "i"])
    means = means.encode(
        x=x,
        tooltip=tooltips({"line": ""} | words | interval(".3f") | {"n": "layers"}),
    )
    lines = lambda marks: _below_each_other(lines_of("line", list(phi), marks))
    bar = means.mark("rule", strokeOpacity=0.5)
    parts = [
        by_chance.mark("area", style="band").encode(y="low:Q", y2="high:Q"),
        by_chance.mark("line", style="reference").encode(y=y),
        bar.encode(y=vega.column("low:Q"), y2="high:Q", **lines("rule")),
        means.mark("line").encode(y=y, **lines("line")),
        means.mark("point", size=24).encode(y=y, **lines("point")),
    ]
    return themed(vega.layer(*parts).properties(width="container"))


def _below_each_other(encodings: dict) -> dict:
    """The encodings with a legend of one column, for long names."""
    for name in ("color", "shape"):
        if name in encodings:
            encodings[name]["legend"] = dict(columns=1)
    return encodings


def table7(amplified: pd.DataFrame, main: str = "rank") -> vega.Chart:
    """The paper's amplification factor against the rank, and W's norm in dW's directions over that
    in random ones, one line per target. Dots are layers, means over members; lines are means over
    layers, with their t intervals.

    Args:
      amplified: rows of `tables.amplifications`, with a column `main`.
    """
    # A factor is infinite if W is zero in these directions.
    finite = amplified[list(RATIOS)].replace(np.inf, np.nan)
    table = amplified.assign(reference=1.0, **finite)
    return means_of_layers(table, main, RATIOS)


def intruder_counts(table: pd.DataFrame, k: int = 10, main: str = "rank") -> vega.Chart:
    """Intruders among the k leading directions, summed over matrices, against epsilon: means over
    members with their t intervals, one line per value of `main`. The norm-matched random control is
    dotted.

    Args:
      table: rows of `tables.intruder_table`, with a column `main`.
    """
    chosen, order = in_words(table[table["k"] == k], main)
    matrices = chosen.groupby("member")["path"].nunique().max()
    sums = chosen.groupby(["line", "member", "epsilon"], sort=False)[["intruders", "control"]]
    sums = sums.sum(min_count=1).reset_index()
    kinds = {"intruders": "intruders", "control": "norm-matched control"}
    sums = sums.rename(columns=kinds)
    chart = vega.Chart(sums).fold(list(kinds.values()), names=("kind", "value"))
    chart = chart.filter("isValid(datum.value)")
    means = with_intervals(chart, "value", ["kind", "line", "epsilon"]).encode(
        x=vega.column("epsilon:Q", title="ε: an intruder's largest |cosine| with a direction of W"),
        tooltip=tooltips(
            {"kind": "number", "line": named(main), "epsilon": "ε"}
            | {"mean": ("mean over members", ".1f")}
            | INTERVAL
            | {"n": "members"}
        ),
    )
    title = label(main)
    lines = lambda marks: lines_of("line", order, marks, title)
    dash = dict(domain=list(kinds.values()), range=[[1, 0], [2, 3]])
    scale = dict(domainMin=0)
    y = vega.column("mean:Q", title=f"intruders in the top {k} of {matrices} matrices", scale=scale)
    bars = means.filter("datum.kind === 'intruders'").calculate(
        low="max(datum.low, 0)", high=f"min(datum.high, {k * matrices})"
    )
    parts = [
        bars.mark("rule", strokeOpacity=0.5).encode(
            y=vega.column("low:Q"), y2="high:Q", **lines("rule")
        ),
        means.mark("line").encode(
            y=y,
            color=lines("line")["color"],
            strokeDash=vega.column("kind:N", scale=dash, title=None, legend=dict(columns=1)),
        ),
        means.mark("point", size=30).encode(y=y, **lines("point")),
    ]
    return themed(filtered(vega.layer(*parts)).properties(width="container"))


def trajectory(
    table: pd.DataFrame, main: str = "rank", quantities: Sequence[str] | None = None
) -> vega.Chart:
    """Properties of updates during training, one panel per quantity: thick lines are means over
    members, thin ones members; each is the mean over the member's matrices.

    Args:
      table: columns member, step, path, the quantities (norm, effective, stable, energy90,
        overlap_final) and `main`.
      quantities: which to draw; by default all in the table.
    """
    drawn = [name for name in quantities or QUANTITIES if name in table]
    titles = {name: QUANTITIES.get(name, named(name)) for name in drawn}
    table, order = in_words(table, main)
    means = table.groupby(["member", "step", "line"], sort=False)[drawn].mean().reset_index()
    means = means.assign(**{name: digits(means[name]) for name in drawn})
    chart = (
        vega.Chart(means)
        .fold(drawn, names=("kind", "value"))
        .join_aggregate(mean="mean(value)", n="valid(value)", groupby=["kind", "line", "step"])
        .encode(x=vega.column("step:Q", title="optimizer step", axis=dict(tickCount=4, format="d")))
    )
    lines = lambda marks: lines_of("line", order, marks, label(main))
    place = {"line": named(main), "step": "step"}
    tips = {
        "value": place | {"member": "member", "value": ("mean over matrices", ".4~g")},
        "mean": place | {"mean": ("mean over members", ".4~g"), "n": "members"},
    }
    y = lambda name: {
        "y": vega.column(f"{name}:Q", title=None, scale=dict(zero=False)),
        "tooltip": tooltips(tips[name]),
    }
    parts = [
        chart.mark("line", style="member", strokeWidth=0.8).encode(
            detail="member:N", color=lines("line")["color"], **y("value")
        ),
        chart.mark("line").encode(**y("mean"), **lines("line")),
        chart.mark("point", size=20).encode(**y("mean"), **lines("point")),
    ]
    panels = wrapped(vega.layer(*parts).properties(height=150), titles, "kind", 3)
    return themed(filtered(panels.resolve("scale", y="independent")))


def cka(table: pd.DataFrame, main: str = "rank") -> vega.Chart:
    """Linear CKA between the adapted model's and the base's activations against the layer: means
    over members with their t intervals, one line per value of `main`.

    Args:
      table: columns member, layer, cka and `main`.
    """
    x = vega.column("layer:Q", title="layer", **whole_numbers(table["layer"]))
    return _means(table, main, x, "cka", "linear CKA with the base (0 to 1)")


def kept_rank(table: pd.DataFrame, main: str = "rank", unit: str = "nats") -> vega.Chart:
    """The validation loss against the rank that is kept of every update: means over members with
    their t intervals, one line per value of `main`.

    Args:
      table: columns member, kept, loss and `main`.
      unit: of the loss.
    """
    kept = sorted(set(table["kept"]))
    x = vega.column("kept:O", title="singular directions kept of every ΔW", sort=kept)
    return _means(table, main, x, "loss", f"validation loss ({unit})")


def _means(table: pd.DataFrame, main: str, x: dict[str, Any], value: str, title: str) -> vega.Chart:
    """Means over members of the column `value` against x, one line per value of `main`."""
    table, order = in_words(table, main)
    column = x["field"]
    data = table[["member", column, "line"]].assign(**{value: digits(table[value], 5)})
    means = with_intervals(vega.Chart(data), value, ["line", column]).encode(
        x=x,
        tooltip=tooltips(
            {"line": named(main), column: column, "mean": ("mean over members", ".4f")}
            | INTERVAL
            | {"n": "members"}
        ),
    )
    lines = lambda marks: lines_of("line", order, marks, label(main))
    y = lambda name: vega.column(f"{name}:Q", title=title, scale=dict(zero=False))
    parts = [
        means.mark("rule").encode(y=y("low"), y2="high:Q", **lines("rule")),
        means.mark("line").encode(y=y("mean"), **lines("line")),
        means.mark("point", size=30).encode(y=y("mean"), **lines("point")),
    ]
    return themed(filtered(vega.layer(*parts)).properties(width="container"))
