"""Draws amplification.png from matrices.csv.

python -m experiments.amplification.figure
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from experiments.plotting import GREY, STYLE, line_style
from experiments.verdicts import numbers
from lorax.analysis import compare

HERE = Path(__file__).parent
NAMES = {"factor": "amplification ‖ΔW‖ / ‖UᵀWV‖", "over_chance": "‖UᵀWV‖ / random directions'"}


def main() -> None:
    matrices = numbers(HERE, "matrices.csv")
    matrices = matrices[matrices["k"] == matrices["rank"]]
    bases = list(matrices.groupby("base", sort=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.4 + 3.1 * len(bases), 5.2), layout="constrained")
        grid = figure.subplots(2, len(bases), sharex="col", squeeze=False)
        for panels, (base, of_base) in zip(grid.T, bases, strict=True):
            for panel, (name, label) in zip(panels, NAMES.items(), strict=True):
                for n, ((target, rank), own) in enumerate(of_base.groupby(["target", "rank"])):
                    layers = own.groupby("layer")[name]
                    half = compare.half_width(layers.sem(), layers.count())
                    style = line_style(n) | {"label": f"{target}, r = {rank}", "capsize": 3}
                    panel.errorbar(layers.mean().index, layers.mean(), half, **style)
                panel.set_xticks(sorted(set(of_base["layer"])))
                panel.set_ylabel(label)
            panels[0].set_yscale("log")
            panels[0].legend(ncols=2)
            panels[0].set_title(base + (", one learning rate" if of_base["doubt"].any() else ""))
            panels[1].set_ylim(bottom=0)
            panels[1].axhline(1, color=GREY, linewidth=1)
            panels[1].set_xlabel("layer")
        figure.savefig(HERE / "amplification.png", dpi=150)


if __name__ == "__main__":
    main()
