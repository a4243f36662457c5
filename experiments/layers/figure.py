"""Draws layers.png from losses.csv.

python -m experiments.layers.figure
"""

from pathlib import Path

from experiments import losses
from experiments.layers.rule import BY
from experiments.plotting import drawn, line_style, of_loss

HERE = Path(__file__).parent


def main() -> None:
    bases = losses.read(HERE, BY)
    with drawn(HERE / "layers.png", len(bases)) as grid:
        for axes, (base, of) in zip(grid[0], bases.items(), strict=True):
            means = of.means()
            for n, row in enumerate(means.itertuples()):
                bars = [[row.loss - row.low], [row.high - row.loss]]
                style = line_style(n) | {"linestyle": "none", "capsize": 3}
                axes.errorbar([n], [row.loss], bars, **style)
                seeds = of.members.loc[of.members["setting"] == row.setting, of.split]
                axes.plot([n] * len(seeds), seeds, ".", color="0.6", markersize=4)
            axes.set_xticks(range(len(means)), means["targets"])
            axes.set_title(base)
            axes.set_ylabel(of_loss(of.split, base))


if __name__ == "__main__":
    main()
