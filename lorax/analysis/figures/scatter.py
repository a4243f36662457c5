"""The figure of a calibration: estimates against the planted truth."""

import numpy as np
import pandas as pd

from lorax.analysis.calibration import ESTIMATORS
from lorax.analysis.figures import style, vega

COLUMNS = 3
SIZE = 150  # pixels of a panel
ZERO = 0.5  # where zero is drawn on a logarithmic axis
SIDE = 1.07  # between noise levels, as a factor


def calibration(estimates: pd.DataFrame) -> vega.Chart:
    """Estimate against truth, one panel per estimator, on logarithmic axes with the line of
    agreement. Noise levels differ in colour and marker and are drawn side by side; every seed is a
    point. estimates: from `calibration.estimates`, not empty."""
    estimates = estimates[estimates["estimate"].notna()]
    names = [name for name in ESTIMATORS if name in set(estimates["estimator"])]
    noises = [f"{noise:g}" for noise in sorted(set(estimates["noise"]))]
    charts = [_panel(estimates[estimates["estimator"] == name], name, noises) for name in names]
    return style.themed(vega.concat(*charts, columns=min(COLUMNS, len(charts))))


def _panel(rows: pd.DataFrame, name: str, noises: list[str]) -> vega.Chart:
    """One estimator, with the same range on both axes; ticks are at the planted values and at
    doublings of the largest."""
    unit = "d*" if rows["quantity"].iloc[0] == "dimension" else "r*"
    noise = [f"{value:g}" for value in rows["noise"]]
    levels = [level for level in noises if level in set(noise)]
    side = [SIDE ** (levels.index(x) - (len(levels) - 1) / 2) for x in noise]
    data = rows[["truth", "estimate"]].assign(
        noise=noise, member=rows["member"] if "member" in rows else -1,
        x=rows["truth"].clip(lower=ZERO) * side, y=rows["estimate"].clip(lower=ZERO),
    )  # fmt: skip
    truths = sorted(set(rows["truth"].clip(lower=ZERO)))
    low, high = min(truths[0], data["y"].min()) / 1.4, max(truths[-1], data["y"].max()) * 1.4
    doublings = truths[-1] * 2.0 ** np.arange(1, 12)
    ticks = [float(tick) for tick in (*truths, *doublings[doublings < high])]
    axis = dict(values=ticks, labelExpr=f"datum.value === {ZERO} ? '0' : datum.label",
                    format="~g", labelOverlap="greedy", grid=False)  # fmt: skip
    scale = dict(type="log", base=2, domain=[float(low), float(high)], nice=False)
    x = vega.column("x:Q", title=f"planted {unit}", scale=scale, axis=axis)
    y = vega.column("y:Q", title=f"estimate of {unit}", scale=scale, axis=axis)
    said = style.tooltips(
        {"noise": "noise", "truth": ("planted", "~g"), "estimate": ("estimate", ".4g")}
    )
    line = vega.Chart(pd.DataFrame({"x": [low, high], "y": [low, high]}))
    line = line.mark("line", style="reference").encode(x=x, y=y)
    points = style.filtered(vega.Chart(data)).mark("point", filled=False, size=36)
    points = points.encode(
        x=x, y=y, **style.lines_of("noise", noises, "point", "noise"), tooltip=said
    )
    return vega.layer(line, points).properties(title=name, width=SIZE, height=SIZE)
