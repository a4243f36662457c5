"""Draws dimension_over_size.png from points.csv.

python -m experiments.dimension_over_size.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.dimension_over_size.rule import SMALLEST
from experiments.dimensions import THRESHOLD, difference, log_d90
from experiments.plotting import COLOURS, THIN, Row, drawn, intervals, legend, line
from experiments.verdicts import numbers
from lorax.analysis import intrinsic
from lorax.analysis.compare import Interval

HERE = Path(__file__).parent


def main() -> None:
    bases = dict(list(numbers(HERE, "points.csv").groupby("base", sort=False)))
    file = HERE / "dimension_over_size.png"
    with drawn(file, 2 if bases else 0, size=(3.5, 3.2), width_ratios=(3, 2)) as grid:
        shares, ratios = grid[0]
        d90 = {base: log_d90(table, "subspace", "loss") for base, table in bases.items()}
        for n, (base, table) in enumerate(bases.items()):
            draw(shares, n, base, table)
            value, low, high = 2 ** np.array(d90[base][:3])
            bar = [[value - low], [high - value]]
            style = {"color": COLOURS[n], "fmt": "|", "capsize": 3, "elinewidth": 3}
            shares.errorbar([value], [THRESHOLD], xerr=bar, **style)
        shares.axhline(THRESHOLD, **THIN)
        shares.set_xscale("log")
        shares.set_xlabel("dimensions of the subspace")
        shares.set_ylabel("share of full fine-tuning's gain")
        if SMALLEST in d90:
            smallest = d90.pop(SMALLEST)
            intervals(ratios, [smaller(base, difference(d90[base], smallest)) for base in d90])
        ratios.set_xlabel(f"log2(d90 / d90 of\n{SMALLEST})")
        legend(grid, 2)


def draw(axes, n: int, base: str, table: pd.DataFrame) -> None:
    """What subspaces at their best rates take off the loss, as a share of full fine-tuning's."""
    full, subspaces = (
        intrinsic.tuned(table[table["kind"] == kind], by, "loss")
        for kind, by in (("full", "params"), ("subspace", "dim"))
    )
    start, gain = full["start"].mean(), full["start"].mean() - full["value"].mean()
    share = subspaces.assign(share=(start - subspaces["value"]) / gain)
    parameters = full["params"].iloc[0]
    label = f"{base}, {parameters / 1e6:.3g} million parameters"
    line(axes, n, share.pivot(index="dim", columns="seed", values="share"), label)


def smaller(base: str, ratio: Interval) -> Row:
    """A base's ratio to the smallest model's d90: gpt2-nano's, of another task, decides nothing."""
    if base == "gpt2-nano":
        return Row(f"{base}\n(another task)", ratio)
    return Row(base, ratio, margins=(0,))


if __name__ == "__main__":
    main()
