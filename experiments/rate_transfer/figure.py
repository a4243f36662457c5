"""Draws rate_transfer.png from losses.csv.

python -m experiments.rate_transfer.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.plotting import THIN, Row, drawn, intervals, legend, line, ticks
from experiments.rate_transfer.rule import ADAMW, MUON, OPTIMISERS, PROXY, SHARE, regret
from experiments.verdicts import numbers, tuned
from lorax.analysis import compare
from lorax.analysis.compare import Interval

HERE = Path(__file__).parent


def main() -> None:
    bases = list(numbers(HERE, "losses.csv").groupby("base", sort=False))
    file = HERE / "rate_transfer.png"
    with drawn(file, 2, 2 * len(bases), size=(3.5, 2.5)) as grid:
        for n, (base, table) in enumerate(bases):
            panels = grid[2 * n : 2 * n + 2].ravel()
            for axes, part in zip(panels, OPTIMISERS, strict=False):
                by_rate(axes, table[table["train.optimizer"] == OPTIMISERS[part]])
                axes.set_title(f"{base}, {part.partition(':')[0]}")
            intervals(panels[3], rows(table))
            panels[3].set_xlabel("regret at rank 2's rate, % of the gain")
        legend(grid)


def by_rate(axes, table: pd.DataFrame) -> None:
    """Test loss by rate, a line a rank, and the best rate of rank 2."""
    for n, (rank, own) in enumerate(table.groupby("rank")):
        line(axes, n, own.pivot(index="lr", columns="seed", values="test"), f"r = {rank}")
    best = tuned(table[table["rank"] == PROXY], ["rank"], "validation").members
    axes.axvline(best["lr"].iloc[0], **THIN)
    ticks(axes, sorted(set(table["lr"]))[::2])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("test loss (nats a token)")


def rows(table: pd.DataFrame) -> list[Row]:
    of = {part: regret(table, name) for part, name in OPTIMISERS.items()}
    rows = [row(part.partition(":")[0], *of[part], SHARE) for part in OPTIMISERS]
    (adamw, doubt), (muon, other) = of[ADAMW], of[MUON]
    return [*rows, row("AdamW less\nLoRA-Muon", adamw - muon, doubt or other, 0.0)]


def row(name: str, lost: pd.Series, doubt: str, margin: float) -> Row:
    """A regret in percent; without an interval if it is not known."""
    interval = Interval(np.nan, np.nan, np.nan, "seeds") if doubt else compare.interval(100 * lost)
    return Row(name, interval, [] if doubt else 100 * lost, (100 * margin,), doubt)


if __name__ == "__main__":
    main()
