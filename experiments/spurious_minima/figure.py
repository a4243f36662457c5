"""Draws spurious_minima.png from losses.csv.

python -m experiments.spurious_minima.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.plotting import THIN, Row, dots, drawn, intervals, legend, line_style
from experiments.spurious_minima.rule import INPUTS, LOWER, NEAR, SHARE, deviances
from experiments.verdicts import mapped, numbers
from lorax.analysis import compare

HERE = Path(__file__).parent
#: threshold: (its words, the ratio from which it is said to be enough)
THRESHOLDS = {"first": ("r (r + 1) / (2 K N)", 1.0), "second": ("(r (64 + K) - r²) / (K N)", 1.35)}

LOWEST = 1e-7  # losses below are drawn there


def main() -> None:
    bases = list(numbers(HERE, "losses.csv").groupby("base", sort=False))
    n = len(bases)
    file = HERE / "spurious_minima.png"
    with drawn(file, 2, 2 * n, size=(3.5, 2), height_ratios=(5, 3) * n) as grid:
        for (base, table), curves, (share, nearer) in zip(
            bases, grid[::2], grid[1::2], strict=True
        ):
            table = with_ratios(table)
            for axes, name in zip(curves, THRESHOLDS, strict=True):
                reached(axes, table, name)
                axes.set_title(base)
            curves[0].set_ylabel("loss that is left\n(share of the base's)")
            intervals(share, [enough(table, name) for name in THRESHOLDS])
            share.set_xlabel("share that reaches it above the threshold")
            intervals(nearer, [lower(table)])
            nearer.set_xlabel("deviance, first less second threshold")
        legend(grid)


def with_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Whether every run reaches the minimum, and the logarithm of what the thresholds compare."""
    r, k, n = (table[name].astype(float) for name in ("rank", "outputs", "n_train"))
    return table.assign(
        reached=(table["train_loss"] < NEAR * table["base_loss"]).astype(float),
        first=np.log(r * (r + 1) / (2 * k * n)),
        second=np.log((r * (INPUTS + k) - r**2) / (k * n)),
    )


def reached(axes, table: pd.DataFrame, name: str) -> None:
    """The loss that is left: a marker a cell of outputs, examples and rank, at the geometric mean
    of its seeds, and these as dots beside it. A run below the line reaches the minimum."""
    words, least = THRESHOLDS[name]
    left = (table["train_loss"] / table["base_loss"]).clip(lower=LOWEST)
    table = table.assign(left=np.log10(left))
    for n, (outputs, own) in enumerate(table.groupby("outputs")):
        cells = own.groupby(["n_train", "rank"])[[name, "left"]].mean()
        style = line_style(n) | {"linestyle": "none", "alpha": 0.7, "label": f"K = {outputs}"}
        axes.plot(np.exp(cells[name]), 10 ** cells["left"], **style)
        dots(axes, np.exp(own[name]), 10 ** own["left"], style["color"], right=4)
    axes.axvline(least, **THIN)
    axes.axhline(NEAR, **THIN)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(words)


def enough(table: pd.DataFrame, name: str) -> Row:
    words, least = THRESHOLDS[name]
    above = table[table[name] > np.log(least)].groupby("seed")["reached"].mean()
    return Row(f"{name}:\n> {least:g}", compare.interval(above), above, (SHARE,))


def lower(table: pd.DataFrame) -> Row:
    """By how much the second threshold's deviance is lower; a seed's part times their number."""
    parts = (deviances(table, "first") - deviances(table, "second")).groupby(table["seed"]).sum()
    total = lambda part: len(parts) * part
    margins = (-LOWER, LOWER)
    return Row("second\nnearer", mapped(compare.interval(parts), total), total(parts), margins)


if __name__ == "__main__":
    main()
