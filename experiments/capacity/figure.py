"""Draws capacity.png from curves.csv.

python -m experiments.capacity.figure
"""

from pathlib import Path

from experiments.plotting import GREY, drawn, line
from experiments.sweeps import name
from experiments.verdicts import numbers

HERE = Path(__file__).parent


def main() -> None:
    bases = list(numbers(HERE, "curves.csv").groupby("base", sort=False))
    with drawn(HERE / "capacity.png", 2, len(bases)) as grid:
        for (losses, apart), (base, own) in zip(grid, bases, strict=True):
            of = {
                r: x.pivot(index="step", columns="seed", values="loss")
                for r, x in own[own["split"] == "eval"].groupby("rank")
            }
            for n, rank in enumerate(sorted(of, reverse=True)):  # full fine-tuning, 0, last
                label = name("lora" if rank else "full", rank)
                line(losses, n, of[rank], label)
                if rank:
                    line(apart, n, of[rank] - of[0], label)
            apart.axhline(0, color=GREY, linewidth=1)
            losses.set_ylabel("validation loss (nats)")
            apart.set_ylabel("loss less full fine-tuning's (nats)")
            losses.legend()
            for axes in (losses, apart):
                axes.set_xlabel("step")
                axes.set_title(base)


if __name__ == "__main__":
    main()
