"""Draws targets.png from losses.csv.

python -m experiments.targets.figure
"""

from pathlib import Path

from experiments import losses
from experiments.plotting import COLOURS, MARKERS, dots, drawn, legend, of_loss
from experiments.targets.rule import BY, ONE
from experiments.verdicts import in_short

HERE = Path(__file__).parent


def main() -> None:
    bases = losses.read(HERE, BY)
    with drawn(HERE / "targets.png", len(bases), size=(3.5, 2.9)) as grid:
        for panel, (base, of) in zip(grid[0], bases.items(), strict=True):
            rows = of.means().sort_values("loss").reset_index(drop=True)
            place = dict(zip(rows["setting"], rows.index, strict=True))
            alone = rows["targets"].isin(ONE)
            for n, own in enumerate((rows[alone], rows[~alone])):
                bars = [own["loss"] - own["low"], own["high"] - own["loss"]]
                style = {"color": COLOURS[n], "fmt": MARKERS[n], "capsize": 3}
                label = ("one matrix", "several")[n]
                panel.errorbar(own["loss"], own.index, xerr=bars, label=label, **style)
                seeds = of.members[of.members["setting"].isin(own["setting"])]
                at = seeds["setting"].map(place)
                dots(panel, seeds[of.split], at, COLOURS[n], up=5)
            panel.set_yticks(rows.index, rows["targets"] + ", r = " + rows["rank"].astype(str))
            panel.invert_yaxis()
            panel.set_title(", ".join((base, *in_short(of.doubts.values()))))
            panel.set_xlabel(of_loss(of.split, base))
        legend(grid)


if __name__ == "__main__":
    main()
