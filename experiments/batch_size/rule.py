"""Does LoRA suffer from large batches?"""

from pathlib import Path

import numpy as np

from experiments import losses
from experiments.losses import Losses
from experiments.verdicts import (
    REPRODUCED,
    UNDECIDED,
    WITHDRAWN,
    Verdict,
    all_of,
    by_interval,
    commands,
    complete,
    means_only,
    shown,
)

CLAIM = "LoRA's gap to full fine-tuning widens with the batch, whatever the rank"
SOURCE = "Thinking Machines 2025"
RULE = """\
800 examples in batches of 2, 8 and 32, each method, rank and batch at its own best rate. The gap is
LoRA's test loss less that of full fine-tuning, and its slope that of the line through the three
batches, per doubling. It widens if the 95% interval of the slope, over seeds and test rows, lies
above 0 at r = 4 and at r = 32, and does not if it lies below 0 at one. It does so whatever the rank
if the slope at r = 32 lies between a half and one and a half times that at r = 4, by the intervals
of both differences. A best rate at the edge of its grid withdraws the number."""
BY, STUDY, SMALL, LARGE = ["method", "rank", "batch_size"], "batch_size", 4, 32
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
MINUTES = {"gpt2-nano": 14, "stories-llama-260k": 8}
PARTS = ("the gap widens with the batch", "as much at r = 32 as at r = 4")


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY)


def verdicts(folder: Path) -> list[Verdict]:
    found, bases = [], losses.read(folder, BY)
    for base, of in bases.items():
        found += of_base(base, of)
    found += means_only(folder, "batch_size.csv", PARTS, bases)
    return complete(found, PARTS)


def of_base(base: str, of: Losses) -> list[Verdict]:
    if doubt := of.doubt(*of.by_seed):
        return [Verdict(part, base, WITHDRAWN, doubt) for part in PARTS]
    slopes = {rank: widening(of, rank) for rank in (SMALL, LARGE)}
    intervals = {rank: of.contrast(weights) for rank, weights in slopes.items()}
    widens = all_of(by_interval(interval, "above") for interval in intervals.values())
    words = ", ".join(f"r = {rank}: {shown(x)}" for rank, x in intervals.items())
    first = Verdict(PARTS[0], base, widens, f"{words} nats a doubling", intervals[SMALL])
    if widens != REPRODUCED:
        return [first, Verdict(PARTS[1], base, UNDECIDED, "no widening to compare")]
    less = lambda f: {
        name: slopes[LARGE].get(name, 0) - f * slopes[SMALL].get(name, 0)
        for name in slopes[LARGE] | slopes[SMALL]
    }
    sides = [
        by_interval(of.contrast(less(0.5)), "above"),
        by_interval(of.contrast(less(1.5)), "below"),
    ]
    difference = of.contrast(less(1))
    number = f"r = 32 less r = 4: {shown(difference)} nats a doubling"
    return [first, Verdict(PARTS[1], base, all_of(sides), number, difference)]


def widening(of: Losses, rank: int) -> dict[str, float]:
    """Weights of the losses in the slope of the gap on log2 of the batch."""
    batches = sorted(set(of.members["batch_size"]))
    x = np.log2(batches) - np.log2(batches).mean()
    full = {b: of.members.query("method == 'full' and batch_size == @b") for b in batches}
    weights = {}
    for batch, weight in zip(batches, x / (x**2).sum(), strict=True):
        weights[f"lora, {rank}, {batch}"] = weight
        weights[full[batch]["setting"].iloc[0]] = -weight
    return weights
