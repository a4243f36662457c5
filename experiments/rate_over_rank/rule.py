"""How does the best learning rate move with the rank, by scale and start? See `experiments`."""

from pathlib import Path

import numpy as np

from experiments import losses
from experiments.optima import edges, optima, slopes
from experiments.verdicts import (
    WITHDRAWN,
    Verdict,
    by_equivalence,
    commands,
    complete,
    numbers,
    shown,
)
from lorax.analysis import compare

CLAIM = "at s ~ r^-g the best learning rate goes as r^-(1-g)/2 if a starts random"
SOURCE = "arXiv:2602.06204, corollary 4.4"
NEAR = 1 / 8  # half of the distance between two predictions
RULE = (
    "The slope of log2 of the best rate on log2 r at r = 2, 8 and 32 is taken seed by seed; the "
    "best rate is the vertex of the parabola through the lowest validation loss and its two "
    "neighbours. Predictions are 1/4 apart. Reproduced if the 90% interval of the slope over "
    "seeds lies within 1/8 of the prediction, contradicted if none of it does. A best rate at the "
    "edge of the grid withdraws the number."
)
STUDY, BY = "rank_scale_rate", ["init", "rank", "alpha"]
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
#: part: (start, s at each rank, slope that is claimed)
PARTS = {
    "a random, s = 16 / r: slope 0": ("kaiming", {2: 8, 8: 2, 32: 0.5}, 0.0),
    "a random, s ~ 1 / sqrt(r): slope -1/4": ("kaiming", {2: 4, 8: 2, 32: 1}, -0.25),
    "a random, s = 2: slope -1/2": ("kaiming", {2: 2, 8: 2, 32: 2}, -0.5),
    "b random, s = 2: slope 0": ("init-b", {2: 2, 8: 2, 32: 2}, 0.0),
}


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY, of_claim)


def verdicts(folder: Path) -> list[Verdict]:
    tables = numbers(folder, "losses.csv").groupby("base", sort=False)
    return complete([slope(base, of, part) for base, of in tables for part in PARTS], PARTS)


def in_cells(table, init, scales):
    """Whether members have this start, and the scale (alpha) that `scales` has for their rank."""
    return (table["init"] == init) & (table["alpha"] == table["rank"].map(scales))


def of_claim(table):
    return np.any([in_cells(table, init, scales) for init, scales, _ in PARTS.values()], axis=0)


def slope(base: str, table, part: str) -> Verdict:
    init, scales, claimed = PARTS[part]
    best = optima(table[in_cells(table, init, scales)], BY)
    if wrong := edges(best):
        return Verdict(part, base, WITHDRAWN, wrong)
    interval = compare.interval(slopes(best), level=0.9)
    verdict = by_equivalence(interval, claimed - NEAR, claimed + NEAR)
    return Verdict(part, base, verdict, f"slope {shown(interval, 2)}, 90%", interval)
