"""Draws learning_rate.png from losses.csv.

python -m experiments.learning_rate.figure
"""

from pathlib import Path

from experiments.plotting import drawn, line
from experiments.sweeps import name
from experiments.verdicts import numbers

HERE = Path(__file__).parent


def main() -> None:
    bases = list(numbers(HERE, "losses.csv").groupby("base", sort=False))
    with drawn(HERE / "learning_rate.png", len(bases)) as grid:
        for axes, (base, table) in zip(grid[0], bases, strict=True):
            settings = table.groupby(["method", "rank"])
            for n, ((method, rank), own) in enumerate(settings):
                values = own.pivot(index="lr", columns="seed", values="validation")
                line(axes, n, values, name(method, rank))
            axes.set_xscale("log")
            axes.set_title(base)
            axes.set_xlabel("learning rate")
            axes.set_ylabel("validation loss (nats)")
            axes.legend()


if __name__ == "__main__":
    main()
