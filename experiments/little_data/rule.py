"""How do methods compare on a hundred examples?"""

from pathlib import Path

from experiments import losses
from experiments.losses import Losses
from experiments.verdicts import (
    LADDER,
    WITHDRAWN,
    Verdict,
    all_of,
    by_interval,
    commands,
    complete,
    means_only,
    shown,
)

CLAIM = "on 100 examples LoRA is at least as good as full fine-tuning, and a prefix is worst off"
SOURCE = "LoRA (arXiv:2106.09685), table 16"
RULE = """\
LoRA, full fine-tuning and a prefix, each at its own best rate, at the step of the best validation
loss. On 100 examples LoRA is as good as full fine-tuning if the 95% interval of its test loss less
that of full fine-tuning, over seeds and test rows, lies below 0, and is not if it lies above 0. A
prefix is worst if its loss less LoRA's, and less full fine-tuning's, lies above 0. It is worst off
with little data if what it loses from all examples to 100, less what LoRA loses, lies above 0. A
best rate at the edge of its grid withdraws the number."""
BY, STUDY = ["method", "n_train"], "n_train"
COMMANDS = commands(STUDY, *LADDER)
PARTS = (
    "100 examples: LoRA is better than full fine-tuning",
    "100 examples: a prefix is the worst",
    "a prefix loses most by little data",
)


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY)


def verdicts(folder: Path) -> list[Verdict]:
    found, bases = [], losses.read(folder, BY)
    for base, of in bases.items():
        lora, full, prefix = ("lora, 100", "full, 100", "prefix, 100")
        lost = {prefix: 1, "prefix, all": -1, lora: -1, "lora, all": 1}
        found.append(decided(PARTS[0], base, of, [{lora: 1, full: -1}], "below"))
        worst = [{prefix: 1, lora: -1}, {prefix: 1, full: -1}]
        found.append(decided(PARTS[1], base, of, worst, "above"))
        found.append(decided(PARTS[2], base, of, [lost], "above"))
    found += means_only(folder, "little_data.csv", PARTS, bases)
    return complete(found, PARTS)


def decided(part: str, base: str, of: Losses, contrasts: list[dict], side: str) -> Verdict:
    """Whether all contrasts lie on that side of 0."""
    if doubt := of.doubt(*(name for weights in contrasts for name in weights)):
        return Verdict(part, base, WITHDRAWN, doubt)
    intervals = [of.contrast(weights) for weights in contrasts]
    verdict = all_of(by_interval(interval, side) for interval in intervals)
    number = "; ".join(map(shown, intervals)) + " nats"
    return Verdict(part, base, verdict, number, intervals[0])
