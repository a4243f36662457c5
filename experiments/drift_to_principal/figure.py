"""Draws drift_to_principal.png from energy.csv.

python -m experiments.drift_to_principal.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.drift_to_principal.rule import METHODS
from experiments.plotting import THIN, Row, drawn, intervals, legend, line, ticks
from experiments.verdicts import numbers
from lorax.analysis import compare

HERE = Path(__file__).parent
SHARES = {"energy_top": "8 leading", "energy_bottom": "8 last"}


def main() -> None:
    bases = list(numbers(HERE, "energy.csv").groupby("base", sort=False))
    n = len(bases)
    file = HERE / "drift_to_principal.png"
    with drawn(file, 2, 2 * n, size=(3.5, 1.9), height_ratios=(2, 1) * n) as grid:
        for (base, table), above, below in zip(bases, grid[::2], grid[1::2], strict=True):
            for (column, words), curves, slopes in zip(SHARES.items(), above, below, strict=True):
                draw(curves, slopes, table, column)
                curves.set_title(f"{base}, {words} directions")
            above[0].axhline(0, **THIN)
            above[0].set_ylabel("share of ‖ΔW‖² less chance (%)")
        legend(grid)


def draw(curves, slopes, table: pd.DataFrame, column: str) -> None:
    """A share of dW's energy over the steps, and below it the slopes of the seeds."""
    share = 100 * (table[column] - table["chance"])
    rows = []
    for n, (method, name) in enumerate(METHODS.items()):
        own = table[table["method"] == method].assign(share=share)
        of = own.pivot(index="step", columns="seed", values="share")
        line(curves, n, of, name)
        seeds = np.polyfit(np.log2(of.index), of, 1)[0]
        rows.append(Row(name.replace(" ", "\n"), compare.interval(seeds), seeds, (0,)))
    first, last = min(table["step"]), max(table["step"])
    ticks(curves, [first * 2**k for k in range(int(np.log2(last / first)) + 1)])
    curves.set_xlabel("step")
    intervals(slopes, rows)
    slopes.set_xlabel("slope (% a doubling of the steps)")


if __name__ == "__main__":
    main()
