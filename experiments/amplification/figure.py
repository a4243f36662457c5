"""Draws amplification.png from matrices.csv.

python -m experiments.amplification.figure
"""

from pathlib import Path

from experiments.plotting import THIN, drawn, legend, line
from experiments.verdicts import in_short, numbers

HERE = Path(__file__).parent
NAMES = {"factor": "amplification ‖ΔW‖ / ‖UᵀWV‖", "over_chance": "‖UᵀWV‖ / random directions'"}


def main() -> None:
    matrices = numbers(HERE, "matrices.csv")
    if len(matrices):
        matrices = matrices[matrices["k"] == matrices["rank"]]
    bases = list(matrices.groupby("base", sort=False))
    file = HERE / "amplification.png"
    with drawn(file, len(bases), len(NAMES), size=(3.5, 2.6), sharex="col") as grid:
        for panels, (base, of_base) in zip(grid.T, bases, strict=True):
            largest = of_base["rank"].max()
            for panel, (name, label) in zip(panels, NAMES.items(), strict=True):
                for n, ((target, rank), own) in enumerate(of_base.groupby(["target", "rank"])):
                    values = own.pivot(index="layer", columns="seed", values=name)
                    r = "the largest r" if rank == largest else f"r = {rank}"
                    line(panel, n, values, f"{target}, {r}")
                panel.set_xticks(sorted(set(of_base["layer"])))
                panel.set_ylabel(label)
            panels[0].set_yscale("log", base=2)
            panels[0].yaxis.set_major_formatter("{x:g}")
            doubts = in_short(of_base["doubt"].dropna())
            panels[0].set_title("\n".join((f"{base}, the largest r: {largest}", *doubts)))
            panels[1].set_ylim(bottom=0)
            panels[1].axhline(1, **THIN)
            panels[1].set_xlabel("layer")
        legend(grid)


if __name__ == "__main__":
    main()
