"""Figures that compare runs: their curves, and their methods."""

import pandas as pd

from lorax.analysis.figures import style, vega
from lorax.analysis.figures.encodings import in_panels
from lorax.analysis.figures.loss_marks import FORMAT
from lorax.analysis.settings_compared import with_interval

EVEN = ("rank", "alpha")  # axes of powers of two


def curves(points: pd.DataFrame, loss: str) -> vega.Chart:
    """Final loss against the axes of the runs' sweeps: one panel per axis, one line per part of a
    run, with 95% intervals.

    Args:
      points: run, axis, part, x, mean, se, n, line (rows of `settings_compared.curve`).
      loss: name and unit of the loss.
    """
    data = with_interval(points)
    data["of"] = [
        ", ".join(filter(None, pair)) for pair in zip(data["run"], data["part"], strict=True)
    ]
    names = style.distinct(data["of"])
    by_axis = data.groupby("axis", sort=False)
    charts = [_curve(rows, axis, names, loss) for axis, rows in by_axis]
    if len(charts) == 1:
        return style.themed(charts[0].properties(width="container", height=style.HEIGHT))
    charts = [chart.properties(width=240, height=190) for chart in charts]
    return style.themed(vega.concat(*charts, columns=2).resolve("scale", y="shared"))


def _curve(data: pd.DataFrame, axis: str, names: list[str], loss: str) -> vega.Chart:
    values = sorted(set(data["x"]))
    log = values[0] > 0 and len(values) > 1
    scale = {"type": "log", "base": 2 if axis in EVEN else 10} if log else {"zero": False}
    ticks = {"values": values} if axis in EVEN or len(values) <= 5 else {"tickCount": 4}
    ticks |= {"format": "~s" if axis == "trainable_params" else "~g", "labelOverlap": "greedy"}
    x = vega.column(
        "x:Q",
        title=style.label(axis),
        scale=dict(nice=False, padding=14, **scale),
        axis=dict(**ticks),
    )
    y = lambda name: vega.column(f"{name}:Q", title=f"final {loss}", scale=dict(zero=False))
    of = lambda marks: style.lines_of("of", names, marks)
    said = {"run": "run", "part": "of", "x": (style.label(axis), "~g"), "line": "at its best"}
    base = vega.Chart(data)
    return vega.layer(
        base.mark("rule").encode(x=x, y=y("low"), y2="high:Q", **of("rule")),
        base.mark("line").encode(x=x, y=y("mean"), **of("line")),
        base.mark("point").encode(
            x=x, y=y("mean"), **of("point"), tooltip=style.tooltips(said | numbers(data, loss))
        ),
    )


def methods_of_runs(points: pd.DataFrame, loss: str) -> vega.Chart:
    """The best final loss of each method of each run, with 95% intervals: one row per method, one
    marker per run.

    Args:
      points: run, method, setting, trainable_params, mean, se, n.
      loss: name and unit of the loss.
    """
    data = with_interval(points)
    names = style.distinct(data["run"])
    order = list(data.groupby("method")["mean"].min().sort_values(kind="stable").index)
    place = {
        "y": vega.column("method:N", sort=order, title=None, axis=dict(grid=True, labelLimit=260)),
        "yOffset": vega.column("run:N", sort=names),
    }
    x = lambda name: vega.column(f"{name}:Q", title=f"final {loss}", scale=dict(zero=False))
    of = lambda marks: style.lines_of("run", names, marks)
    said = {"run": "run", "method": "method"}
    said |= {"setting": "best setting"} if "setting" in data else {}
    base = vega.Chart()
    chart = vega.layer(
        base.mark("rule").encode(x=x("low"), x2="high:Q", **place, **of("rule")),
        base.mark("point").encode(
            x=x("mean"), **place, **of("point"), tooltip=style.tooltips(said | numbers(data, loss))
        ),
    )
    return style.themed(in_panels(chart, data, [], len(order) * max(26, 16 * len(names))))


def numbers(points: pd.DataFrame, loss: str) -> dict:
    """For tooltips: mean, interval (if there is one) and seeds."""
    found = {"mean": (f"mean {loss}", FORMAT), "n": "seeds"}
    if points["low"].notna().any():
        found |= style.interval(FORMAT)
    return found
