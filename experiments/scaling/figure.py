"""Draws scaling.png from curves.csv.

python -m experiments.scaling.figure
"""

from pathlib import Path

from experiments.plotting import drawn, line
from experiments.scaling.rule import FIRST
from experiments.verdicts import numbers

HERE = Path(__file__).parent
SCALINGS = {"lora": "α / r", "rslora": "α / √r"}


def main() -> None:
    bases = list(numbers(HERE, "curves.csv").groupby("base", sort=False))
    file = HERE / "scaling.png"
    with drawn(file, 2, len(bases), sharex=True, sharey="row") as grid:
        for row, (base, curves) in zip(grid, bases, strict=True):
            for axes, (scaling, title) in zip(row, SCALINGS.items(), strict=True):
                own = curves[curves["scaling"] == scaling]
                for n, (rank, of_rank) in enumerate(own.groupby("rank")):
                    values = of_rank.pivot(index="step", columns="seed", values="loss")
                    line(axes, n, values, f"r = {rank}")
                axes.axvspan(0, FIRST, color="0.93", zorder=0)
                axes.set_title(f"{base}, s = {title}")
                axes.set_xlabel("step")
            row[0].set_ylabel("validation loss (nats)")
            row[0].legend(title="first steps shaded")


if __name__ == "__main__":
    main()
