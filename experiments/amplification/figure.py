"""Draws amplification.png from matrices.csv.

python -m experiments.amplification.figure
"""

from pathlib import Path

from experiments.plotting import GREY, drawn, line
from experiments.verdicts import numbers

HERE = Path(__file__).parent
NAMES = {"factor": "amplification ‖ΔW‖ / ‖UᵀWV‖", "over_chance": "‖UᵀWV‖ / random directions'"}


def main() -> None:
    matrices = numbers(HERE, "matrices.csv")
    matrices = matrices[matrices["k"] == matrices["rank"]]
    bases = list(matrices.groupby("base", sort=False))
    file = HERE / "amplification.png"
    with drawn(file, len(bases), len(NAMES), size=(3.8, 2.6), sharex="col") as grid:
        for panels, (base, of_base) in zip(grid.T, bases, strict=True):
            for panel, (name, label) in zip(panels, NAMES.items(), strict=True):
                for n, ((target, rank), own) in enumerate(of_base.groupby(["target", "rank"])):
                    values = own.pivot(index="layer", columns="seed", values=name)
                    line(panel, n, values, f"{target}, r = {rank}")
                panel.set_xticks(sorted(set(of_base["layer"])))
                panel.set_ylabel(label)
            panels[0].set_yscale("log")
            panels[0].legend(ncols=2)
            panels[0].set_title(base + (", one learning rate" if of_base["doubt"].any() else ""))
            panels[1].set_ylim(bottom=0)
            panels[1].axhline(1, color=GREY, linewidth=1)
            panels[1].set_xlabel("layer")


if __name__ == "__main__":
    main()
