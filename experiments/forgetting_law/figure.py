"""Draws forgetting_law.png from members.csv.

python -m experiments.forgetting_law.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.forgetting_law.rule import FULL_RANK, MARGIN, RIVALS, jackknife, r2
from experiments.plotting import Row, drawn, intervals, legend, line_style, ticks
from experiments.sweeps import name
from experiments.verdicts import numbers

HERE = Path(__file__).parent
LABELS = {
    "kl": "KL(base ‖ tuned) on the\nnew task (nats a token)",
    "squared_norm": "‖ΔW‖², sum over matrices",
    "log_rank": "rank",
}


def main() -> None:
    bases = list(numbers(HERE, "members.csv").groupby("base", sort=False))
    with drawn(HERE / "forgetting_law.png", 2, 2 * len(bases), size=(3.5, 2.6)) as grid:
        for n, (base, members) in enumerate(bases):
            members = members.dropna(subset=["forgetting", "kl", "squared_norm"])
            rank = members["rank"].fillna(FULL_RANK[base])
            members = members.assign(log_rank=np.log2(rank))
            panels = grid[2 * n : 2 * n + 2].ravel()
            for axes, column in zip(panels, LABELS, strict=False):
                draw(axes, members, column)
                axes.set_title(f"{base}: R² {r2(members, column):.2f}")
            intervals(panels[3], [better(members, rival) for rival in RIVALS])
            panels[3].set_xlabel("R² of KL less the other's")
        legend(grid)


def draw(axes, members: pd.DataFrame, column: str) -> None:
    """A dot a member: its forgetting by a column; on the rank's axis the rates lie side by side."""
    settings = members.groupby(["method", "rank"], dropna=False)
    for n, ((method, rank), own) in enumerate(settings):
        x = own[column]
        if column == "log_rank":
            x = 2 ** (x + 0.1 * own["lr"].rank(method="dense"))
        largest = rank == members["rank"].max()
        label = (
            "LoRA, the largest r" if largest else name(method, 0 if np.isnan(rank) else int(rank))
        )
        style = line_style(n) | {"linestyle": "none", "alpha": 0.6, "markersize": 4}
        axes.plot(x, own["forgetting"], **style, label=label)
    if column == "log_rank":
        ticks(axes, sorted(set(2 ** members[column])))
    axes.set_xlabel(LABELS[column])
    axes.set_ylabel("forgetting (nats a token)")


def better(members: pd.DataFrame, rival: str) -> Row:
    """By how much KL explains more; without dots: a seed alone has no R² of its own."""
    more = jackknife(members, lambda table: r2(table, "kl") - r2(table, rival))
    return Row(RIVALS[rival], more, margins=(MARGIN,))


if __name__ == "__main__":
    main()
