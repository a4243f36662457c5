"""Draws alpha_or_rate.png from losses.csv.

python -m experiments.alpha_or_rate.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.alpha_or_rate.rule import NEAR, at_small_rate
from experiments.optima import edges, optima, slopes
from experiments.plotting import THIN, Row, drawn, intervals, line, ticks
from experiments.verdicts import numbers, tuned
from lorax.analysis import compare

HERE = Path(__file__).parent


def main() -> None:
    bases = list(numbers(HERE, "losses.csv").groupby("base", sort=False))
    file = HERE / "alpha_or_rate.png"
    with drawn(file, 3, len(bases), size=(2.4, 2.7)) as grid:
        for (alphas, exponent, gaps), (base, table) in zip(grid, bases, strict=True):
            best = optima(at_small_rate(table), ["rank"], rate="alpha")
            best["best"] += np.log2(best["rank"])  # alpha = s r
            draw(alphas, best)
            alphas.set_title(base)
            seeds = slopes(best)
            found = compare.interval(seeds, level=0.9)
            intervals(
                exponent, [Row("p of\nα ~ rᵖ", found, seeds, (0.5 - NEAR, 0.5 + NEAR), edges(best))]
            )
            exponent.set_xlabel("exponent p (90%)")
            intervals(gaps, rows(table))
            gaps.set_xlabel("loss at the best rate less\nloss at the best α (nats)")


def draw(axes, best: pd.DataFrame) -> None:
    """The best alpha at the small rate by rank, and alpha ~ sqrt(r) through the mean."""
    values = best.pivot(index="rank", columns="seed", values="best")
    line(axes, 0, 2**values, "")
    x = np.log2(values.index)
    claimed = values.mean(axis=1).mean() + (x - x.to_numpy().mean()) / 2
    axes.plot(values.index, 2**claimed, **THIN)
    ticks(axes, values.index)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("rank r of the adapter")
    axes.set_ylabel("best α at the small rate")


def rows(table: pd.DataFrame) -> list[Row]:
    """What the best alpha at the small rate takes off the loss at the best rate."""
    by_alpha = tuned(at_small_rate(table), ["rank"], "validation", "alpha")
    by_rate = tuned(table[table["alpha"] == 1], ["rank"], "validation")
    of = [x.members.pivot(index="seed", columns="rank", values="test") for x in (by_rate, by_alpha)]
    lost, doubt = of[0] - of[1], by_alpha.doubt() or by_rate.doubt()
    mean = lost.mean(axis=1)
    each = [Row(f"r = {r}", compare.interval(lost[r]), lost[r]) for r in lost]
    return [*each, Row("mean", compare.interval(mean), mean, (0,), doubt)]


if __name__ == "__main__":
    main()
