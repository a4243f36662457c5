"""Draws rank_grows.png from ranks.csv.

python -m experiments.rank_grows.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.plotting import Row, drawn, intervals, legend, line, ticks
from experiments.rank_grows.rule import slopes
from experiments.verdicts import numbers
from lorax.analysis import compare

HERE = Path(__file__).parent
#: line: (method, column)
LINES = {
    "full fine-tuning": ("full", "k"),
    "its part below the noise's edge": ("full", "noise"),
    "LoRA": ("lora", "k"),
}
KINDS = ("attention", "feed-forward")


def main() -> None:
    bases = list(numbers(HERE, "ranks.csv").groupby("base", sort=False))
    n = len(bases)
    file = HERE / "rank_grows.png"
    with drawn(file, 2, 2 * n, size=(3.5, 2), height_ratios=(5, 2) * n) as grid:
        for (base, table), above, below in zip(bases, grid[::2], grid[1::2], strict=True):
            curves(*above, table)
            compared(*below, table)
            for axes in above:
                axes.set_title(base)
                powers = range(int(np.log2(max(table["step"]) / min(table["step"]))) + 1)
                ticks(axes, [min(table["step"]) * 2**k for k in powers])
                axes.set_xlabel("step")
        legend(grid, 3)


def curves(count, share, table: pd.DataFrame) -> None:
    """The number of directions over the steps: the mean over kinds of matrices, and of each kind
    as a share of the most that is possible."""
    over_steps = lambda of, column: of.pivot_table(index="step", columns="seed", values=column)
    for n, (name, (method, column)) in enumerate(LINES.items()):
        line(count, n, over_steps(table[table["method"] == method], column), name)
    for n, kind in enumerate(KINDS, start=len(LINES)):
        own = table[(table["method"] == "full") & (table["kind"] == kind)]
        line(share, n, 100 * over_steps(own, "share"), f"full fine-tuning, {kind}")
    count.set_ylabel("directions with\n90% of ‖ΔW‖²")
    share.set_ylabel("the same, as % of\nthe most possible")


def compared(growth, kinds, table: pd.DataFrame) -> None:
    """The numbers that the rule decides on."""
    full, lora = (table[table["method"] == method] for method in ("full", "lora"))
    beyond = slopes(full, "k") - slopes(full, "noise")
    of = {"full": slopes(full, "k"), "full less noise": beyond, "LoRA": slopes(lora, "k")}
    intervals(growth, [Row(name, compare.interval(x), x, (0,)) for name, x in of.items()])
    growth.set_xlabel("slope (directions a doubling)")
    last = full[full["step"] == full["step"].max()]
    share = 100 * last.pivot(index="seed", columns="kind", values="share")
    more = share["feed-forward"] - share["attention"]
    intervals(kinds, [Row("at the end", compare.interval(more), more, (0,))])
    kinds.set_xlabel("feed-forward less attention (%)")


if __name__ == "__main__":
    main()
