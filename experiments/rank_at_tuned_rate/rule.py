"""Does the loss fall with the rank at alpha / sqrt(r) alone, or is that the rate's doing?"""

from pathlib import Path

import numpy as np

from experiments import losses
from experiments.losses import START, Losses
from experiments.verdicts import (
    WITHDRAWN,
    Verdict,
    by_equivalence,
    by_interval,
    commands,
    complete,
    numbers,
    shown,
)
from lorax.analysis import compare

CLAIM = "at s = alpha / sqrt(r) the loss falls with the rank, at s = alpha / r it does not"
SOURCE = "rsLoRA (arXiv:2312.03732), section 4"
SHARE = 0.01  # of the gain
RULE = (
    "Both scales agree at r = 8, s = 2. At the rate that is best there, loss(r = 2) - loss(r = "
    "32) on the validation rows: above 1% of the gain (start less the lowest mean loss) it falls, "
    "below it does not, by the 95% interval over seeds. It is the rate's doing if the falls of "
    "both scales, each rank at its own best rate, differ by less than 1% of the gain: 90% "
    "interval over seeds and test rows, two-sided. A best rate at the edge of the grid withdraws "
    "the last number."
)
STUDY, BY = "rank_scale_rate", ["init", "rank", "alpha"]
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
SQRT, PLAIN, COMMON = {2: 4.0, 32: 1.0}, {2: 8.0, 32: 0.5}, (8, 2.0)
FALLS = "alpha / sqrt(r): falls at one rate"
FLAT = "alpha / r: does not fall at one rate"
SAME = "each rank at its best rate: both fall alike"


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY, of_claim)


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, of in numbers(folder, "losses.csv").groupby("base", sort=False):
        found += [at_one_rate(base, of, FALLS, SQRT), at_one_rate(base, of, FLAT, PLAIN)]
    found += [alike(base, of) for base, of in losses.read(folder, BY).items()]
    return complete(found, (FALLS, FLAT, SAME))


def of_claim(table):
    cells = [*SQRT.items(), *PLAIN.items(), COMMON]
    inside = np.array([cell in cells for cell in zip(table["rank"], table["alpha"], strict=True)])
    return (table["init"] == "kaiming") & inside


def at_one_rate(base: str, table, part: str, scales: dict) -> Verdict:
    """The fall from r = 2 to 32 at the rate that is best for r = 8."""
    means = table.groupby(["rank", "alpha", "lr"])["validation"].mean()
    rate = means[COMMON].idxmin()
    at = table[table["lr"] == rate].set_index(["rank", "alpha", "seed"])["validation"].sort_index()
    fall = compare.paired(at[2, scales[2]], at[32, scales[32]])
    margin = SHARE * (table["start"].iloc[0] - means.min())
    verdict = by_interval(fall, "above" if part == FALLS else "below", margin)
    number = f"{shown(fall)} nats at rate {rate:g}, margin {margin:.3f}"
    return Verdict(part, base, verdict, number, fall)


def alike(base: str, of: Losses) -> Verdict:
    """Whether the falls from r = 2 to 32 at the best rates are the same for both scales."""
    name = lambda scales, r: f"kaiming, {r}, {scales[r]}"
    names = [name(scales, r) for scales in (SQRT, PLAIN) for r in (2, 32)]
    if doubt := of.doubt(*names):
        return Verdict(SAME, base, WITHDRAWN, doubt)
    weights = dict(zip(names, (1, -1, -1, 1), strict=True))
    difference = of.contrast(weights, level=0.9)
    margin = SHARE * max(of.contrast({START: 1, name: -1}).value for name in names)
    verdict = by_equivalence(difference, -margin, margin)
    number = f"{shown(difference)} nats, 90%, margin {margin:.3f}"
    return Verdict(SAME, base, verdict, number, difference)
