"""Draws dimension_optimiser.png from accuracy.csv.

python -m experiments.dimension_optimiser.figure
"""

from pathlib import Path

import pandas as pd

from experiments.dimension_optimiser.rule import THRESHOLD, crossings
from experiments.plotting import COLOURS, Row, drawn, intervals, legend, line, ticks
from experiments.verdicts import numbers, tuned
from lorax.analysis import compare

HERE = Path(__file__).parent
NAMES = {"adamw": "Adam", "sgd": "SGD"}


def main() -> None:
    bases = list(numbers(HERE, "accuracy.csv").groupby("base", sort=False))
    file = HERE / "dimension_optimiser.png"
    with drawn(file, 2, len(bases), size=(3.5, 2.8), width_ratios=(5, 4)) as grid:
        for (curves, ratio), (base, table) in zip(grid, bases, strict=True):
            accuracies(curves, table)
            intervals(ratio, rows(table))
            ratio.set_xlabel("log2(d90 of Adam / d90 of SGD)")
            curves.set_title(base)
        legend(grid)


def accuracies(axes, table: pd.DataFrame) -> None:
    """Accuracy by dimension at the best rates, and what is needed: 90% of full fine-tuning's."""
    table = table.assign(error=1 - table["accuracy"])
    for n, (optimiser, name) in enumerate(NAMES.items()):
        best = tuned(table[table["optimizer"] == optimiser], ["dim"], "error").members
        accuracy = best.pivot(index="dim", columns="seed", values="accuracy")
        line(axes, n, accuracy.drop(index=0), name)
        label = f"90% of full fine-tuning's, {name}"
        goal = THRESHOLD * accuracy.loc[0].mean()
        axes.axhline(goal, color=COLOURS[n], linewidth=0.8, linestyle=(0, (2, 2)), label=label)
    ticks(axes, accuracy.index[1:])
    axes.set_xlabel("dimensions of the subspace")
    axes.set_ylabel("accuracy")


def rows(table: pd.DataFrame) -> list[Row]:
    d90 = {name: crossings(table[table["optimizer"] == name]) for name in NAMES}
    ratio = d90["adamw"] - d90["sgd"]
    wide, narrow = compare.interval(ratio), compare.interval(ratio, level=0.9)
    factor = Row("a factor of\n2 or more\n(95%)", wide, ratio, (-1, 1))
    return [factor, Row("the same\n(90%)", narrow, ratio, (-0.5, 0.5))]


if __name__ == "__main__":
    main()
