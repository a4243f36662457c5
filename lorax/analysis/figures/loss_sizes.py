"""The figure of losses against trainable parameters."""

from collections.abc import Sequence

import pandas as pd

from lorax.analysis import runs
from lorax.analysis.figures import style, vega
from lorax.analysis.figures.encodings import colours, field, in_panels, of_members, tooltips
from lorax.analysis.figures.layout import FULL, extent
from lorax.analysis.figures.loss_marks import LossAxis, of_mean, references

HEIGHT = 340  # pixels
LETTER = 6  # pixels, of a name
MOST_LEFT = 0.25  # of the width, for the first name
SLANT = 0.65  # the sine of 40 degrees: names are slanted, so that each has its room


def size_curve(
    table: pd.DataFrame, names: Sequence[str], colour: str | None, unit: str = "nats"
) -> vega.Chart:
    """Final loss against trainable parameters: every setting's mean over seeds with its 95%
    interval. A step line joins the settings that no other beats with as many parameters or fewer
    (`layout.frontier`), among those of which all seeds reached the end; they are named.

    Args:
      table: rows of `runs.summary`.
      names: the sweep's axes.
      colour: the axis that has the colours.
      unit: of the loss.
    """
    found = runs.measured(table)
    said = short_names(table, names)
    longest = LETTER * max(map(len, said))
    low, high = extent(table[found.loss], runs.base_loss(table))
    ends = low - SLANT * longest / HEIGHT * (high - low), high
    axis = LossAxis("y", f"final {found.split} loss ({unit})", ends, first=low)
    data = of_members(table, names, found.loss)
    data["params"], data["short"] = table["trainable_params"], said
    groups = [*map(field, names), "params", "short", "lost"]
    mean = style.with_intervals(vega.Chart(), "loss", groups)
    kept = _frontier(mean)
    sizes = table["trainable_params"]
    share = min(MOST_LEFT, SLANT * longest / style.WIDTH)
    left = (sizes.max() / sizes.min()) ** (share / (1 - share))
    domain = [float(sizes.min() / left / 1.1), float(sizes.max() * 1.3)]
    scale = dict(type="log", nice=False, domain=domain)
    axis_x = dict(format="~s", tickCount=6, labelOverlap="greedy")
    x = vega.column("params:Q", title=style.label("trainable_params"), scale=scale, axis=axis_x)
    of = lambda marks: colours(colour, table[colour] if colour else (), marks)
    said = {"params": (style.label("trainable_params"), ",")} | of_mean(table, names, axis.title)
    said = tooltips(names, table, said)
    pale = vega.either("datum.kept", 1, 0.35)
    line = kept.filter("datum.kept").mark(
        "line", style="reference", interpolate="step-after", strokeDash=[1, 0]
    )
    name = kept.filter("datum.kept").mark(
        "text", align="right", baseline="top", angle=320, dx=-6, dy=3, fontSize=11
    )
    layers = [
        line.encode(x=x, **axis.of("mean")),
        kept.filter("datum.kept")
        .mark("rule")
        .encode(x=x, **axis.span("low", "high"), **of("rule")),
        kept.mark("point").encode(
            x=x, **axis.of("mean"), **of("point"), opacity=pale, tooltip=said
        ),
        name.encode(x=x, **axis.of("mean"), text="short:N"),
        *references(table.head(0), [], table, axis),
    ]
    return style.themed(style.filtered(in_panels(vega.layer(*layers), data, [], HEIGHT)))


def _frontier(mean: vega.Chart) -> vega.Chart:
    """Adds `kept`: whether all seeds reached the end, and the mean is lower than those of all
    settings with fewer parameters and the lowest of its own size."""
    order = [{"field": "params"}, {"field": "eligible"}]
    return (
        mean.calculate(eligible="datum.lost > 0 ? 1e300 : datum.mean")
        .window({"lowest": "min(eligible)"}, sort=order, frame=[None, 0], ignorePeers=True)
        .window({"before": "lag(lowest)"}, sort=order)
        .calculate(
            kept="datum.lost === 0 && (datum.before === null || datum.eligible < datum.before)"
        )
    )


def short_names(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """The settings in few words, as they stand beside their dots: "r 8, q v, 0.01"."""
    said = {"rank": "r {}", "alpha": "α {}", "lr": "lr {}"}
    texts = []
    for _, row in table.iterrows():
        used = [name for name in names if not runs.is_missing(row[name])]
        words = [said.get(name, "{}").format(runs.in_words(row[name], name)) for name in used]
        texts.append(FULL if row["method"] == "full" else ", ".join(words))
    return texts
