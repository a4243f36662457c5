"""Which factor has to be trained, a or b? See `experiments`."""

from pathlib import Path

from experiments import losses
from experiments.losses import START, Losses
from experiments.verdicts import LADDER, WITHDRAWN, Verdict, by_interval, commands, complete, shown

CLAIM = "training b with a random frozen a is as good as LoRA, the reverse is not"
SOURCE = "Zhu et al. (arXiv:2402.16842)"
SHARE = 0.05  # of LoRA's gain
RULE = (
    "At the same rank, each method at its best rate, the mean over ranks 4 and 16: b alone is as "
    "good as LoRA if it lacks less than 5% of what LoRA gains over the base, and a alone is worse "
    "if it lacks more, by the 95% interval over seeds and test rows of loss - loss(LoRA) - 0.05 "
    "(start - loss(LoRA)), below or above 0. The same for attention's matrices, whose input is as "
    "wide as their output, and for down (wide input) and up (wide output). A best rate at the "
    "edge of its grid withdraws the number."
)
STUDY, BY = "which_factor", ["method", "targets", "rank"]
COMMANDS = commands(STUDY, *LADDER)
TARGETS, RANKS = ("attention", "down", "up"), (4, 16)
#: words of a part: (method, the side on which the claim puts it)
ALONE = {"b alone is as good": ("lora-fa", "below"), "a alone is worse": ("frozen-b", "above")}
PARTS = [f"{words}: {targets}" for words in ALONE for targets in TARGETS]


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY)


def verdicts(folder: Path) -> list[Verdict]:
    found = [
        alone(base, of, words, targets)
        for base, of in losses.read(folder, BY).items()
        for words in ALONE
        for targets in TARGETS
    ]
    return complete(found, PARTS)


def alone(base: str, of: Losses, words: str, targets: str) -> Verdict:
    """Whether one factor alone lacks less, or more, than 5% of LoRA's gain."""
    method, side = ALONE[words]
    part = f"{words}: {targets}"
    one, both = ([f"{name}, {targets}, {r}" for r in RANKS] for name in (method, "lora"))
    if doubt := of.doubt(*one, *both):
        return Verdict(part, base, WITHDRAWN, doubt)
    mean = 1 / len(RANKS)
    plus, minus = dict.fromkeys(one, mean), dict.fromkeys(both, -mean)
    lost = of.contrast(plus | minus)
    gain = of.contrast({START: 1} | minus).value
    margin = of.contrast(plus | dict.fromkeys(both, (SHARE - 1) * mean) | {START: -SHARE})
    number = f"{shown(lost)} nats behind LoRA, {lost.value / gain:.1%} of its gain"
    return Verdict(part, base, by_interval(margin, side), number, lost)
