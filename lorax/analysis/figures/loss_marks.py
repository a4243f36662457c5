"""The marks that figures of final losses share: means over seeds with intervals, seeds, lines of
the base and of full fine-tuning."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from lorax.analysis import runs
from lorax.analysis.figures import style, vega
from lorax.analysis.figures.encodings import colours, field, tooltips

FORMAT = ".4f"


class LossAxis(NamedTuple):
    """The axis of the loss in a figure."""

    channel: str  # "x" or "y"
    title: str  # with its split and unit
    ends: tuple[float, float]
    first: float | None = None  # lower values have no label: the space there is for something else

    def of(self, name: str) -> dict[str, Any]:
        """The encoding of a column of losses. What is beyond the ends lies on them."""
        scale = dict(domain=list(self.ends), clamp=True, nice=False, zero=False)
        labels = f"datum.value < {self.first} ? '' : datum.label"
        axis = {} if self.first is None else {"axis": {"labelExpr": labels}}
        return {self.channel: vega.column(f"{name}:Q", title=self.title, scale=scale, **axis)}

    def span(self, low: str, high: str) -> dict[str, Any]:
        """The encodings of an interval."""
        return self.of(low) | {f"{self.channel}2": high}


def means(
    table: pd.DataFrame,
    names: Sequence[str],
    other: dict[str, Any],
    colour: str | None,
    axis: LossAxis,
    joined: bool,
) -> list[vega.Chart]:
    """Layers for a chart of `encodings.of_members`: 95% intervals over seeds, a line through the
    means (if joined), the seeds, the means (hollow if a seed is lost), and the ring.

    Args:
      table: the members, rows of `runs.summary`.
      names: the axes of the sweep; members that agree in them are seeds of one setting.
      other: the encodings of the axis that is not the loss.
      colour: the axis that has the colours.
      axis: of the loss.
    """
    look = lambda marks: other | colours(colour, table[colour] if colour else (), marks)
    over_seeds = style.with_intervals(
        vega.Chart(), "loss", [*map(field, names), "panel", "lost", "chosen"]
    )
    bars = over_seeds.mark("rule").encode(**look("rule"), **axis.span("low", "high"))
    line = over_seeds.mark("line").encode(**look("line"), **axis.of("mean"))
    seeds = vega.Chart().filter("isValid(datum.loss)").mark("point", style="member", size=16)
    of_seed = tooltips(names, table, {"name": "member", "loss": (axis.title, FORMAT)})
    seeds = seeds.encode(**look("rule"), **axis.of("loss"), tooltip=of_seed)
    dots = over_seeds.mark("point").encode(
        **look("point"),
        **axis.of("mean"),
        fillOpacity=vega.either("datum.lost > 0", 0, 1),
        tooltip=tooltips(names, table, of_mean(table, names, axis.title)),
    )
    ring = over_seeds.filter("datum.chosen").calculate(ring="'the answer'")
    ring = ring.mark("point", style="ring", size=240)
    ring = ring.encode(**other, **axis.of("mean"), tooltip=style.tooltips({"ring": "ringed"}))
    return [bars, *[line] * joined, seeds, dots, ring]


def of_mean(table: pd.DataFrame, names: Sequence[str], title: str) -> dict[str, Any]:
    """For tooltips: the numbers of a mean over seeds; without an interval if there is one seed."""
    found = {"mean": (f"mean {title}", FORMAT)}
    if table.groupby(list(names), dropna=False).size().max() > 1:
        found |= style.interval(FORMAT)
    return found | {"n": "seeds", "lost": "seeds that did not reach the end"}


def references(
    others: pd.DataFrame, names: Sequence[str], table: pd.DataFrame, axis: LossAxis
) -> list[vega.Chart]:
    """Layers of lines across the figure: the base's loss, and the means of members that have no
    place on the other axis. What is beyond the end of the axis is drawn there, with its value.

    Args:
      others: members of the lines.
      names: of the lines, one a member.
      table: all members, for the base's loss.
    """
    found, base = runs.measured(table), runs.base_loss(table)
    lines = others[["member", found.loss]].assign(line=names)
    lines.columns = ["member", "loss", "line"]
    if base is not None:
        unhidden = pd.DataFrame({"member": [-1], "loss": [base], "line": ["base"]})
        lines = pd.concat([lines, unhidden], ignore_index=True)
    if lines.empty:
        return []
    across = axis.channel == "y"
    lines = vega.Chart(lines).filter(style.SHOWN)
    mean = lines.aggregate(mean="mean(loss)", n="valid(loss)", groupby=["line"])
    mean = mean.filter("datum.n > 0").calculate(
        text="datum.line + ' ' + format(datum.mean, '.3f')"
        + f" + (datum.mean > {axis.ends[1]:.6g} ? ', beyond this scale' : '')",
        base="datum.line === 'base'",
    )
    said = style.tooltips({"line": "line", "mean": (axis.title, FORMAT), "n": "seeds"})
    rule = mean.mark("rule", style="reference").encode(**axis.of("mean"), tooltip=said)
    # Curves fall to the right: there is room below the base's line there, and at the left above
    # a line that the curves come near to.
    text = lambda which, **where: (
        mean.filter(which)
        .mark("text", style="reference-text", **where)
        .encode(text="text:N", **axis.of("mean"), **_start(across, where["align"]))
    )
    if not across:
        return [rule, text("datum.base", align="right", baseline="bottom", dx=0),
                text("!datum.base", align="left", baseline="bottom", dx=0)]  # fmt: skip
    return [
        rule,
        text("datum.base", align="right", baseline="top", dy=4),
        text("!datum.base", align="left", baseline="bottom", dy=-4),
    ]


def _start(across: bool, align: str) -> dict[str, Any]:
    """Where a line's text starts: at an end of the line."""
    if not across:
        return {"y": vega.value(-4)}
    return {"x": vega.value("width") if align == "right" else vega.value(2)}
