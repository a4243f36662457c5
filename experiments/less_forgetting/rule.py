"""Does LoRA learn less and forget less than full fine-tuning? See `experiments`."""

from pathlib import Path

import pandas as pd

from experiments import verdicts as common
from experiments.verdicts import WITHDRAWN, Verdict, by_interval, commands, complete, shown
from lorax.analysis import compare, forgetting, runs

CLAIM = "LoRA learns less than full fine-tuning, and forgets less where both have learned as much"
SOURCE = "Biderman et al. (arXiv:2405.09673), sections 4.1 to 4.3"
RULE = (
    "Forgetting is the loss on the pretraining text (gpt2-nano: the mean of its two texts) less "
    "the base's. Learns less: at the rate of the lowest mean final loss, LoRA's final validation "
    "loss less full fine-tuning's, paired by seed, has its 95% interval above 0; a best rate at "
    "the edge of its grid withdraws the number. Forgets less: at the lowest loss that every seed "
    "of both reaches, the least forgetting over rates and steps (linear between evaluations), "
    "LoRA's less full fine-tuning's, has its interval below 0. A high rank forgets more than a low "
    "one: the same difference of the two ranks lies above 0. Full fine-tuning may stop early like "
    "LoRA."
)
STUDY = "forgetting"
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
RANKS = {"low": "lora 4", "high": "lora large"}
FULL = "full"
PARTS = (
    *(f"{rank} rank learns less than full fine-tuning" for rank in RANKS),
    *(f"{rank} rank forgets less than full fine-tuning at equal loss" for rank in RANKS),
    "high rank forgets more than low rank at equal loss",
)


def collect(given: dict[str, list[Path]], folder: Path) -> None:
    """Write points.csv: a row a member, evaluation and text."""
    tables = [table(base, directory) for base, found in given.items() for directory in found]
    common.write(pd.concat(tables), folder, "points.csv")


def table(base: str, directory: Path) -> pd.DataFrame:
    """`forgetting.points` of a run, its lines named as in `RANKS`."""
    run = runs.load(directory)
    ranks, lora = run.members["rank"], run.members["method"] == "lora"
    largest = ranks[lora].max()
    names = {
        m: f"lora {ranks[m]:.0f}" if ranks[m] < largest else RANKS["high"]
        for m in ranks[lora].index
    }
    points = forgetting.points(run)
    points["line"] = [names.get(member, FULL) for member in points["member"]]
    points.insert(0, "base", base)
    return points.drop(columns="kl")


def verdicts(folder: Path) -> list[Verdict]:
    points = common.numbers(folder, "points.csv")
    found = []
    for base, of_base in points.groupby("base", sort=False):
        keys = ["line", "member", "lr", "seed", "step"]
        mean = of_base.groupby(keys, as_index=False, sort=False)[["loss", "forgetting"]].mean()
        found += of_one(base, mean)
    return complete(found, PARTS)


def of_one(base: str, points: pd.DataFrame) -> list[Verdict]:
    """The verdicts on one base. points: forgetting is the mean over its texts."""
    low, high = RANKS["low"], RANKS["high"]
    found = [learns_less(base, points, line, PARTS[i]) for i, line in enumerate((low, high))]
    pairs = [(low, FULL, "below"), (high, FULL, "below"), (high, low, "above")]
    for part, (a, b, side) in zip(PARTS[2:], pairs, strict=True):
        loss = forgetting.lowest_common(points, (a, b))
        more = forgetting.at_equal_loss(points, a, b, loss)
        number = f"{shown(more)} nats at a loss of {loss:.3f}"
        found.append(Verdict(part, base, by_interval(more, side), number, more))
    return found


def learns_less(base: str, points: pd.DataFrame, line: str, part: str) -> Verdict:
    last = points[points["step"] == points["step"].max()]
    best = common.tuned(last, ["line"], "loss")
    if doubt := best.doubt(line, FULL):
        return Verdict(part, base, WITHDRAWN, doubt)
    of = best.members.pivot(index="seed", columns="line", values="loss")
    behind = compare.paired(of[line], of[FULL])
    return Verdict(part, base, by_interval(behind, "above"), f"{shown(behind)} nats", behind)
