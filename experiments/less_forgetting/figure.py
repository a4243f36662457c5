"""Draws less_forgetting.png from points.csv.

python -m experiments.less_forgetting.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.less_forgetting.rule import FULL, RANKS
from experiments.plotting import COLOURS, THIN, Row, drawn, intervals, legend, line_style
from experiments.verdicts import numbers, tuned
from lorax.analysis import compare, forgetting

HERE = Path(__file__).parent
LOW, HIGH = RANKS.values()
NAMES = {FULL: "full fine-tuning", LOW: "LoRA, r = 4", "lora 16": "LoRA, r = 16"}
NAMES |= {HIGH: "LoRA, the largest r"}


def main() -> None:
    keys = ["base", "line", "member", "lr", "seed", "step"]
    points = numbers(HERE, "points.csv")
    if len(points):  # forgetting is the mean over the texts
        points = points.groupby(keys, as_index=False, sort=False)[["loss", "forgetting"]].mean()
    bases = list(points.groupby("base", sort=False))
    file = HERE / "less_forgetting.png"
    with drawn(file, 2, len(bases), size=(3.5, 3.4)) as grid:
        for (frontier, found), (base, own) in zip(grid, bases, strict=True):
            draw(frontier, own)
            frontier.set_title(base)
            intervals(found, rows(own))
            found.set_xlabel("difference (nats)")
        legend(grid, 2)


def draw(axes, points: pd.DataFrame) -> None:
    """Forgetting by loss: a dot a member and evaluation, and the mean frontier over seeds as far as
    all of them reach, with 95% intervals."""
    for n, (line, name) in enumerate(NAMES.items()):
        own = points[(points["line"] == line) & (points["step"] > 0)]
        axes.plot(own["loss"], own["forgetting"], ".", color=COLOURS[n], alpha=0.15, markersize=3)
        least = forgetting.lowest_common(points, (line,))
        losses = np.linspace(least, own["loss"].quantile(0.75), 8)
        found = forgetting.frontier(own, losses).pivot(
            index="loss", columns="seed", values="forgetting"
        )
        half = compare.half_width(found.sem(axis=1), found.count(axis=1))
        style = line_style(n) | {"label": name, "markersize": 4}
        axes.errorbar(found.index, found.mean(axis=1, skipna=False), half, **style)
    axes.axvline(forgetting.lowest_common(points, (LOW, FULL)), **THIN)
    axes.set_xlabel("validation loss of the task (nats a token)")
    axes.set_ylabel("forgetting (nats a token)")


def rows(points: pd.DataFrame) -> list[Row]:
    """How far LoRA stays behind at its best rate; what it forgets more at equal loss."""
    best = tuned(points[points["step"] == points["step"].max()], ["line"], "loss")
    loss = best.members.pivot(index="seed", columns="line", values="loss")
    found = []
    for words, line in RANKS.items():
        behind = loss[line] - loss[FULL]
        name = f"{words} rank's loss\nless full's"
        found.append(Row(name, compare.interval(behind), behind, (0,), best.doubt(line, FULL)))
    pairs = {(LOW, FULL): "low rank", (HIGH, FULL): "high rank", (HIGH, LOW): "high rank"}
    for (a, b), name in pairs.items():
        at = forgetting.frontier(points[points["line"].isin((a, b))], [common(points, a, b)])
        of = at.pivot(index="seed", columns="line", values="forgetting")
        more = of[a] - of[b]
        name = f"{name} forgets\nmore than {'full' if b == FULL else 'low'}"
        found.append(Row(name, compare.interval(more), more, (0,)))
    return found


def common(points: pd.DataFrame, a: str, b: str) -> float:
    return forgetting.lowest_common(points, (a, b))


if __name__ == "__main__":
    main()
