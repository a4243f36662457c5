"""Draws rank.png from losses.csv.

python -m experiments.rank.figure
"""

from pathlib import Path

from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator

from experiments import losses
from experiments.plotting import COLOURS, dots, drawn, legend, line_style, of_loss
from experiments.rank.rule import BY
from experiments.verdicts import in_short

HERE = Path(__file__).parent
TARGETS = ("q", "q v", "q k v o")


def main() -> None:
    bases = losses.read(HERE, BY)
    with drawn(HERE / "rank.png", len(bases), 2, size=(3.5, 2.8), sharey="col") as grid:
        for (base, of), panels in zip(bases.items(), grid.T, strict=True):
            draw(panels, base, of)
        legend(grid)


def draw(panels, base: str, of: losses.Losses) -> None:
    """Loss by rank and by trainable parameters."""
    means = of.means()
    for panel, x in zip(panels, ("rank", "trainable_params"), strict=True):
        for n, targets in enumerate(TARGETS):
            own = means[means["targets"] == targets].sort_values("rank")
            bars = [own["loss"] - own["low"], own["high"] - own["loss"]]
            label = ", ".join(targets.split())
            panel.errorbar(own[x], own["loss"], bars, capsize=3, label=label, **line_style(n))
            seeds = of.members[of.members["targets"] == targets]
            dots(panel, seeds[x], seeds[of.split], COLOURS[n], right=4)
        panel.set_ylabel(of_loss(of.split, base))
    by_rank, by_size = panels
    by_rank.set_title(", ".join((base, *in_short(of.doubts.values()))))
    ranks = sorted(set(means["rank"]))
    by_rank.set_xscale("log", base=2)
    by_rank.set_xticks(ranks, ranks)
    by_rank.xaxis.set_minor_locator(NullLocator())
    by_rank.set_xlabel("rank r of the adapter")
    by_size.set_xscale("log")
    sizes = means["trainable_params"]
    wide = sizes.max() > 10 * sizes.min()
    by_size.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    by_size.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_size.xaxis.set_minor_formatter(NullFormatter())
    by_size.set_xlabel("trainable parameters")


if __name__ == "__main__":
    main()
