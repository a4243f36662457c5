"""Draws first_gradient.png from phi.csv and losses.csv.

python -m experiments.first_gradient.figure
"""

from pathlib import Path

import pandas as pd

from experiments import losses
from experiments.first_gradient.rule import AHEAD, BY, NEAR, OPTIMISERS
from experiments.losses import Losses
from experiments.plotting import THIN, Row, drawn, intervals, legend, line
from experiments.verdicts import numbers, tuned

HERE = Path(__file__).parent
NAMES = dict(zip(OPTIMISERS.values(), ("gradient descent", "AdamW"), strict=True))


def main() -> None:
    phi = numbers(HERE, "phi.csv")
    starts = losses.read(HERE, BY)
    bases = list(phi.groupby("base", sort=False))
    file = HERE / "first_gradient.png"
    with drawn(file, 2, len(bases), size=(3.5, 2.7), width_ratios=(5, 4)) as grid:
        for (turns, ahead), (base, table) in zip(grid, bases, strict=True):
            overlap(turns, table)
            turns.set_title(base)
            intervals(ahead, [lead(starts[base], words) for words in AHEAD])
            ahead.set_xlabel("loss after 25 steps\nless LoRA-One's (nats)")
        legend(grid, 2)


def overlap(axes, table: pd.DataFrame) -> None:
    """phi above chance over the steps, the mean over ranks at their best rates."""
    above = table.assign(above=table["gradient_overlap"] - table["gradient_chance"])
    settings = [(name, s) for name in NAMES for s in sorted(set(table["scale"]))]
    for n, (optimiser, scale) in enumerate(settings):
        own = above[(above["optimizer"] == optimiser) & (above["scale"] == scale)]
        best = tuned(own[own["step"] == own["step"].max()], ["rank"])
        rates = dict(best.members.groupby("rank")["lr"].first())
        at_best = own[own["lr"] == own["rank"].map(rates)]
        mean = at_best.pivot_table(index="step", columns="seed", values="above")
        line(axes, n, mean, f"{NAMES[optimiser]}, s = {words(scale)}", best.doubt())
    axes.axhline(NEAR, **THIN)
    axes.set_xlabel("step")
    axes.set_ylabel("overlap with the first\ngradient, above chance")


def words(scale: float) -> str:
    return f"{scale:g}" if scale >= 1 else f"1/{1 / scale:g}"


def lead(of: Losses, part: str) -> Row:
    other = AHEAD[part]
    weights = {other: 1, "lora-one": -1}
    name = {"kaiming": "default", "lora-ga": "LoRA-GA"}[other]
    seeds, doubt = of.of_seeds(weights), of.doubt(*weights)
    return Row(name, of.contrast(weights), seeds, (0,), doubt)


if __name__ == "__main__":
    main()
