"""Draws generalisation_gap.png from gaps.csv.

python -m experiments.generalisation_gap.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.generalisation_gap.rule import NEAR, exponents
from experiments.plotting import THIN, Row, drawn, intervals, legend, line, ticks
from experiments.verdicts import Tuned, numbers, tuned
from lorax.analysis import compare

HERE = Path(__file__).parent
CELL = ["n_train", "rank"]


def main() -> None:
    bases = list(numbers(HERE, "gaps.csv").groupby("base", sort=False))
    file = HERE / "generalisation_gap.png"
    with drawn(file, 2, len(bases), size=(3.5, 2.8), width_ratios=(3, 2)) as grid:
        for (curves, found), (base, table) in zip(grid, bases, strict=True):
            of = tuned(table.assign(gap=table["final_loss"] - table["train_loss"]), CELL)
            draw(curves, of.members)
            curves.set_title(base)
            intervals(found, rows(of))
            found.set_xlabel("exponent (90%)")
        legend(grid)


def draw(axes, best: pd.DataFrame) -> None:
    """The gap by the number of examples at the best rates, and sqrt(r / N) through the mean."""
    log = np.log(best["gap"].where(best["gap"] > 0))
    offset = (log - np.log(best["rank"] / best["n_train"]) / 2).mean()
    for n, (rank, own) in enumerate(best.groupby("rank")):
        values = own.pivot(index="n_train", columns="seed", values="gap")
        line(axes, n, values, f"r = {rank}")
        axes.plot(values.index, np.exp(offset) * (rank / values.index) ** 0.5, **THIN)
    ticks(axes, values.index)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("examples N")
    axes.set_ylabel("validation less training\nloss (nats a token)")


def rows(of: Tuned) -> list[Row]:
    """Exponents of the rank and of the examples, from the gaps that have a logarithm."""
    best, doubts = of.members, list(of.doubts.values())
    negative = (best["gap"] <= 0).any()
    doubt = "a gap is not positive" if negative else doubts[0] if len(doubts) > 1 else ""
    found, margins = exponents(best[best["gap"] > 0], "gap"), (0.5 - NEAR, 0.5 + NEAR)
    return [
        Row(name, compare.interval(found[of], level=0.9), found[of], margins, doubt)
        for of, name in {"p": "p (rank)", "q": "q (examples)"}.items()
    ]


if __name__ == "__main__":
    main()
