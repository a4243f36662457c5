"""Where do parameters count for more, in attention or in the feed-forward layers?"""

from pathlib import Path

from experiments import losses
from experiments.losses import START, Losses
from experiments.verdicts import (
    WITHDRAWN,
    Verdict,
    all_of,
    by_interval,
    commands,
    complete,
    means_only,
    shown,
)

CLAIM = "at equal parameters the feed-forward layers beat attention"
SOURCE = "Thinking Machines 2025; Biderman et al. (arXiv:2405.09673)"
SHARE = 0.02  # of the gain
RULE = """\
Attention, the feed-forward layers, and both, at ranks that make as many parameters, each at its own
best rate. The feed-forward layers beat attention if the 95% interval of their loss less that of
attention, over seeds and test rows, lies below 0, and do not if it lies above 0. All layers are as
good as the feed-forward ones if the 90% interval of the difference lies within 2% of the gain of
the feed-forward layers over the base, to both sides, and are not if none of it does. A best rate at
the edge of its grid withdraws the number."""
BY, STUDY = ["targets"], "mlp_vs_attention"
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k", "MiniLM")
PARTS = ("the feed-forward layers beat attention", "all layers are as good as those")


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY)


def verdicts(folder: Path) -> list[Verdict]:
    found, bases = [], losses.read(folder, BY)
    for base, of in bases.items():
        found += [better(base, of), as_good(base, of)]
    found += means_only(folder, "layers.csv", PARTS, bases)
    return complete(found, PARTS)


def better(base: str, of: Losses) -> Verdict:
    if doubt := of.doubt("mlp", "attention"):
        return Verdict(PARTS[0], base, WITHDRAWN, doubt)
    difference = of.contrast({"mlp": 1, "attention": -1})
    number = f"by {shown(difference)} nats"
    return Verdict(PARTS[0], base, by_interval(difference, "below"), number, difference)


def as_good(base: str, of: Losses) -> Verdict:
    if doubt := of.doubt("mlp", "all-linear"):
        return Verdict(PARTS[1], base, WITHDRAWN, doubt)
    sides = [
        # all - mlp < f (start - mlp), and > -f (start - mlp)
        by_interval(of.contrast({"all-linear": 1, "mlp": f - 1, START: -f}, 0.9), side)
        for f, side in ((SHARE, "below"), (-SHARE, "above"))
    ]
    difference = of.contrast({"all-linear": 1, "mlp": -1}, 0.9)
    number = f"all less feed-forward: {shown(difference)} nats, 90%"
    return Verdict(PARTS[1], base, all_of(sides), number, difference)
