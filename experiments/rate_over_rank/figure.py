"""Draws rate_over_rank.png from losses.csv.

python -m experiments.rate_over_rank.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.optima import edges, optima, slopes
from experiments.plotting import THIN, Row, drawn, intervals, legend, line, line_style, ticks
from experiments.rate_over_rank.rule import BY, NEAR, PARTS, in_cells
from experiments.verdicts import numbers
from lorax.analysis import compare

HERE = Path(__file__).parent


def main() -> None:
    bases = list(numbers(HERE, "losses.csv").groupby("base", sort=False))
    file = HERE / "rate_over_rank.png"
    with drawn(file, 2, len(bases), size=(3.5, 3), width_ratios=(3, 2)) as grid:
        for (rates, found), (base, table) in zip(grid, bases, strict=True):
            parts = {part: optima(table[in_cells(table, *PARTS[part][:2])], BY) for part in PARTS}
            for n, (part, best) in enumerate(parts.items()):
                draw(rates, n, part, best)
            ticks(rates, sorted(set(table["rank"])))
            rates.set_title(base)
            rates.set_xlabel("rank r of the adapter")
            rates.set_ylabel("best learning rate")
            rates.set_yscale("log")
            intervals(found, [slope(part, best) for part, best in parts.items()])
            found.set_xlabel("slope (90%)")
        legend(grid, 2)


def draw(axes, n: int, part: str, best: pd.DataFrame) -> None:
    """Best rates of the seeds by rank, and the claimed slope through their mean."""
    values = best.pivot(index="rank", columns="seed", values="best")
    line(axes, n, 2**values, part.partition(": slope")[0])
    x = np.log2(values.index)
    claimed = values.mean(axis=1).mean() + PARTS[part][2] * (x - x.to_numpy().mean())
    axes.plot(values.index, 2**claimed, **(THIN | {"linestyle": line_style(n)["linestyle"]}))


def slope(part: str, best: pd.DataFrame) -> Row:
    claimed, seeds = PARTS[part][2], slopes(best)
    name = part.partition(": slope")[0].replace(", ", ",\n")
    margins = (claimed - NEAR, claimed + NEAR)
    return Row(name, compare.interval(seeds, level=0.9), seeds, margins, edges(best))


if __name__ == "__main__":
    main()
