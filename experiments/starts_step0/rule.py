"""Starts from the base or from data: is step 0 the base, and does PiSSA learn faster?"""

from pathlib import Path

from experiments.verdicts import (
    CONTRADICTED,
    REPRODUCED,
    WITHDRAWN,
    Verdict,
    by_interval,
    complete,
    copied,
    numbers,
    shown,
    tuned,
)
from lorax.analysis import compare

CLAIM = "starts from the base or from data leave step 0 as it is, and PiSSA learns faster"
SOURCE = "PiSSA, OLoRA, CorDA, LoRA-GA, EVA"
TOLERANCE = 1e-5
RULE = """\
Step 0 is the base's if the largest difference of logits over the largest logit, of any start and
seed, is at most 1e-5 (some eighty roundings of float32), and is not if it is more; LoftQ, which
does not claim it, is left out. PiSSA learns faster if the 95% interval of the default start's mean
training loss over 60 steps less that of PiSSA, each at its own best rate, seed by seed, lies above
0, and does not if it lies below. A best rate at the edge of its grid withdraws the number."""
BASES = ("gpt2-nano", "stories-llama-260k")
COMMANDS = dict.fromkeys(BASES, ("python -m experiments.starts_step0.run",))
MINUTES = dict.fromkeys(BASES, 49)
PARTS = ("step 0 is the base", "PiSSA lowers the training loss faster")


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    copied(runs, folder, "starts.csv", "training.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, starts in numbers(folder, "starts.csv").groupby("base", sort=False):
        worst = starts.loc[starts["quant"] == "none", "largest"].max()
        verdict = REPRODUCED if worst <= TOLERANCE else CONTRADICTED
        found.append(Verdict(PARTS[0], base, verdict, f"{worst:.1e} of the largest logit"))
    for base, training in numbers(folder, "training.csv").groupby("base", sort=False):
        best = tuned(training, ["init"], "mean")
        if doubt := best.doubt():
            found.append(Verdict(PARTS[1], base, WITHDRAWN, doubt))
            continue
        by_seed = best.members.pivot(index="seed", columns="init", values="mean")
        ahead = compare.paired(by_seed["kaiming"], by_seed["pissa"])
        verdict = by_interval(ahead, "above")
        found.append(Verdict(PARTS[1], base, verdict, f"by {shown(ahead)} nats", ahead))
    return complete(found, PARTS)
