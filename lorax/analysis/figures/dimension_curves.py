"""The figure of a search for the intrinsic dimension."""

import pandas as pd

from lorax.analysis import intrinsic as search
from lorax.analysis.figures import style, vega
from lorax.analysis.figures.encodings import in_panels

UNIT = "nats"
LEVELS = {"full fine-tuning": ("bottom", -3), "needed": ("top", 4)}  # where the names stand
SERIES = ("random subspace", "LoRA")


def intrinsic(table: pd.DataFrame, estimates: pd.DataFrame, unit: str = UNIT) -> vega.Chart:
    """The metric against the dimension of the subspace, one panel per condition: means over seeds
    at each dimension's best learning rate with 95% intervals, single seeds as dots, and LoRA if it
    was run. Horizontal lines: full fine-tuning and the level to reach. Ring: the estimate; the band
    is its 95% interval.

    Args:
      table: from `intrinsic.points`.
      estimates: from `intrinsic.estimate`.
      unit: of the loss.
    """
    metric = estimates["metric"].iloc[0]
    data = pd.concat(
        [drawn(table, row, metric) for _, row in estimates.iterrows()], ignore_index=True
    )
    panels = list(dict.fromkeys(data["panel"]))
    of = f"loss ({unit})" if metric == "loss" else f"{style.named(metric)} (fraction)"
    title = f"final validation {of}"
    lora = SERIES[1] in set(data["series"])
    x_title = "dimension d" + "; parameters of LoRA" * lora
    scale = dict(type="log", nice=False, padding=12)
    x = lambda name: vega.column(
        f"{name}:Q", title=x_title, scale=scale, axis=dict(format="~s", tickCount=5)
    )
    y = lambda name: vega.column(f"{name}:Q", title=title, scale=dict(zero=False))
    layers = [*_levels(y, title), *_estimate(x, y), *_curves(x, y, title, lora)]
    chart = in_panels(vega.layer(*layers), data, panels if len(panels) > 1 else [])
    if len(panels) == 1:
        chart = chart.properties(title=panels[0])
    return style.themed(style.filtered(chart))


def drawn(table: pd.DataFrame, estimate: pd.Series, metric: str) -> pd.DataFrame:
    """The rows of a condition's panel. Series: "random subspace" and "LoRA" (member, size, value),
    "full fine-tuning" and "needed" (value), and the estimate (size, low, high, value)."""
    subspaces, lora = search.points_of(table, estimate["condition"])
    parts = []
    for series, rows, by in zip(SERIES, (subspaces, lora), ("dim", "params"), strict=True):
        if len(rows):
            best = search.tuned(rows, by, metric)
            columns = {"size": best[by], "value": best["value"], "member": best["member"]}
            parts.append(pd.DataFrame({**columns, "lr": best["lr"], "series": series}))
    if estimate["verdict"] != "no baseline":
        levels = {"full fine-tuning": estimate["baseline"], "needed": estimate["needed"]}
        parts.append(pd.DataFrame({"series": list(levels), "value": list(levels.values())}))
    if estimate["d"] == estimate["d"]:
        ends = {"low": estimate["low"], "high": estimate["high"], "value": estimate["needed"]}
        parts.append(pd.DataFrame([{"series": "estimate", "size": estimate["d"], **ends}]))
    words = [estimate["condition"], search.brief(estimate)]
    rows = pd.concat(parts, ignore_index=True).assign(panel=": ".join(filter(None, words)))
    return rows.fillna({"member": -1})  # no member, so never hidden


def _of(series: str) -> vega.Chart:
    return vega.Chart().filter(f"datum.series === '{series}'")


def _levels(y, title: str) -> list[vega.Chart]:
    """The lines of full fine-tuning and of the value to reach, with their names."""
    said = style.tooltips({"series": "line", "value": (title, ".4f")})
    rule = vega.Chart().filter({"field": "series", "oneOf": list(LEVELS)})
    rule = rule.mark("rule", style="reference").encode(y=y("value"), tooltip=said)
    texts = [
        _of(series)
        .mark("text", style="reference-text", align="right", baseline=baseline, dy=dy)
        .encode(x=vega.value("width"), y=y("value"), text="series:N")
        for series, (baseline, dy) in LEVELS.items()
    ]
    return [rule, *texts]


def _estimate(x, y) -> list[vega.Chart]:
    """The band of the interval, and the ring."""
    said = style.tooltips({"size": ("estimate", ",.4r")} | style.interval(",.4r"))
    return [
        _of("estimate").mark("rect", style="band").encode(x=x("low"), x2="high:Q", tooltip=said),
        _of("estimate")
        .mark("point", style="ring", size=200)
        .encode(x=x("size"), y=y("value"), tooltip=said),
    ]


def _curves(x, y, title: str, lora: bool) -> list[vega.Chart]:
    """Means with their intervals, and the seeds."""
    size = "trainable parameters" if lora else "dimension d"
    points = vega.Chart().filter({"field": "series", "oneOf": list(SERIES)})
    over = style.with_intervals(points, "value", ["series", "size", "panel", "lr"])
    look = lambda marks: style.lines_of("series", SERIES[: 1 + lora], marks) if lora else {}
    said = {"series": "of", "size": (size, ","), "lr": ("learning rate", "~g")}
    seed = style.tooltips(said | {"member": "member", "value": (title, ".4f")})
    mean = {"mean": (f"mean {title}", ".4f")} | style.interval(".4f")
    return [
        over.mark("rule").encode(x=x("size"), y=y("low"), y2="high:Q", **look("rule")),
        over.mark("line").encode(x=x("size"), y=y("mean"), **look("line")),
        points.mark("point", style="member", size=14).encode(
            x=x("size"), y=y("value"), **look("rule"), tooltip=seed
        ),
        over.mark("point").encode(
            x=x("size"), y=y("mean"), **look("point"),
            tooltip=style.tooltips(said | mean | {"n": "seeds"}),
        ),
    ]  # fmt: skip
