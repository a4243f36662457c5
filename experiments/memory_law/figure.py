"""Draws memory_law.png from reductions.csv.

python -m experiments.memory_law.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator
from scipy import optimize

from experiments.memory_law.rule import FITS, LAWS, MARGIN, over_draws, scores
from experiments.plotting import THIN, Row, drawn, intervals, legend, line, ticks
from experiments.verdicts import numbers, tuned

HERE = Path(__file__).parent


def main() -> None:
    bases = list(numbers(HERE, "reductions.csv").groupby("base", sort=False))
    file = HERE / "memory_law.png"
    with drawn(file, 3, len(bases), size=(2.4, 2.8), width_ratios=(5, 3, 4)) as grid:
        for (curves, law, rivals), (base, table) in zip(grid, bases, strict=True):
            best = tuned(table, ["rank", "length"]).members
            best = best.assign(reduction=best["base_loss"] - best["final_loss"])
            draw(curves, best)
            curves.set_title(base)
            held_out(law, rivals, best)
        legend(grid, 5)


def draw(axes, best: pd.DataFrame) -> None:
    """The reductions at the best rates, and the law fitted to the means of all cells."""
    cells = best.groupby(["rank", "length"])["reduction"].mean().reset_index()
    law, start = LAWS["the law"]
    rank, length = (cells[name].to_numpy(float) for name in ("rank", "length"))
    left = lambda constants: law(rank, length, *constants) - cells["reduction"]
    fit = optimize.least_squares(left, start, x_scale="jac", max_nfev=500)
    for n, (r, own) in enumerate(best.groupby("rank")):
        line(axes, n, own.pivot(index="length", columns="seed", values="reduction"), f"r = {r}")
        x = np.geomspace(min(length), max(length))
        axes.plot(x, law(r, x, *fit.x), **THIN)
    ticks(axes, sorted(set(best["length"])))
    axes.set_xlabel("length of the strings (tokens)")
    axes.set_ylabel("taken off the loss (nats a token)")


def held_out(law, rivals, best: pd.DataFrame) -> None:
    """R² of the law, and by how much it is higher than another's: the median and the central 95%
    over the draws of the cells that are held out."""
    cells = best.groupby(["rank", "length"])["reduction"].mean().reset_index()
    r2 = scores(cells)
    intervals(law, [Row("", over_draws(r2["the law"]), margins=(FITS,))])
    law.set_yticks([])
    law.set_xlabel("R² of cells\nheld out, the law")
    others = list(LAWS)[1:]
    more = {name: over_draws(r2["the law"] - r2[name]) for name in others}
    intervals(rivals, [Row(name, better, margins=(MARGIN,)) for name, better in more.items()])
    rivals.set_xscale("symlog", linthresh=MARGIN)
    rivals.xaxis.set_major_locator(FixedLocator((-10, -0.1, 0, 0.1, 10)))
    rivals.xaxis.set_major_formatter("{x:g}")
    rivals.set_xlabel("R² of the law\nless the rival's")


if __name__ == "__main__":
    main()
