"""Draws full_rank_updates.png from losses.csv and ranks.csv.

python -m experiments.full_rank_updates.figure
"""

from pathlib import Path

import pandas as pd

from experiments import losses
from experiments.full_rank_updates.rule import BY, METHODS
from experiments.losses import Losses
from experiments.plotting import COLOURS, MARKERS, Row, dots, drawn, intervals, legend
from experiments.verdicts import numbers
from lorax.analysis import compare

HERE = Path(__file__).parent
NAMES = ("LoRA", "GraLoRA", "HiRA", "SHiRA", "RandLoRA", "FourierFT")


def main() -> None:
    ranks, bases = numbers(HERE, "ranks.csv"), losses.read(HERE, BY)
    file = HERE / "full_rank_updates.png"
    with drawn(file, 2, len(bases), size=(3.5, 2.8)) as grid:
        for (by_rank, lead), (base, of) in zip(grid, bases.items(), strict=True):
            draw(by_rank, of, ranks[ranks["base"] == base])
            by_rank.set_title(base)
            intervals(lead, [ahead(of, *pair) for pair in zip(METHODS, NAMES[1:], strict=True)])
            lead.set_xlabel(f"{of.split} loss below LoRA's (nats)")
        legend(grid, len(NAMES))


def draw(axes, of: Losses, ranks: pd.DataFrame) -> None:
    """Loss by the effective rank of dW, with 95% intervals of both."""
    rank = ranks.pivot(index="seed", columns="method", values="rank")
    for n, (method, name) in enumerate(zip(("lora", *METHODS), NAMES, strict=True)):
        x, y = compare.interval(rank[method]), of.contrast({method: 1})
        bars = [[[of.value - of.low], [of.high - of.value]] for of in (x, y)]
        style = {"color": COLOURS[n], "fmt": MARKERS[n], "capsize": 3, "label": name}
        axes.errorbar([x.value], [y.value], xerr=bars[0], yerr=bars[1], **style)
        dots(axes, rank[method], of.by_seed[method], COLOURS[n], right=4)
    axes.set_xscale("log")
    axes.set_xlabel("effective rank of ΔW")
    axes.set_ylabel(f"{of.split} loss (nats a token)")


def ahead(of: Losses, method: str, name: str) -> Row:
    weights = {"lora": 1, method: -1}
    return Row(name, of.contrast(weights), of.of_seeds(weights), (0,), of.doubt(*weights))


if __name__ == "__main__":
    main()
