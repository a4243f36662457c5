"""What does forgetting follow from: the KL on the new task, the update's norm or its rank? See
`experiments`."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments import verdicts as common
from experiments.verdicts import Verdict, by_interval, commands, complete, shown
from lorax.analysis import compare, forgetting, runs
from lorax.analysis.compare import Interval

CLAIM = "forgetting follows from the KL to the base on the new task, not from norm or rank"
SOURCE = "RL's Razor (arXiv:2509.04259)"
MARGIN = 0.1  # of R^2
RULE = (
    "Of every member after its last step: forgetting on the pretraining text (gpt2-nano: the mean "
    "of its two texts), KL(base || tuned) in nats a token on the new task's validation rows, the "
    "squared norm of dW over all matrices, and the rank. A polynomial in one of them (the rank as "
    "its logarithm), of first or second degree, whichever is better, predicts the forgetting of "
    "each setting (full fine-tuning, or LoRA of one rank) from the others; R^2 is over all "
    "members, and one below 0 counts as 0: the mean of all is better. KL explains more than "
    "another if the difference of the two R^2 lies above 0.1 with its 95% interval, the "
    "jackknife's over seeds; not if it lies below."
)
STUDY = "forgetting"
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
FULL_RANK = {"gpt2-nano": 128, "stories-llama-260k": 64}  # of most matrices: the width
RIVALS = {"squared_norm": "the norm of dW", "log_rank": "the rank"}
PARTS = tuple(f"KL explains forgetting better than {words}" for words in RIVALS.values())


def collect(given: dict[str, list[Path]], folder: Path) -> None:
    """Write members.csv: a row a member."""
    tables = [table(base, directory) for base, found in given.items() for directory in found]
    common.write(pd.concat(tables), folder, "members.csv")


def table(base: str, directory: Path) -> pd.DataFrame:
    run = runs.load(directory)
    found = runs.summary(run).assign(squared_norm=forgetting.squared_norms(run))
    texts = [f"forgetting_{task}" for task in forgetting.tasks(run)]
    found["forgetting"] = found[texts].mean(axis=1, skipna=False)
    columns = ["method", "rank", "lr", "seed", "final_loss", "forgetting", "final_kl"]
    found = found[[*columns, "squared_norm"]].rename(columns={"final_kl": "kl"})
    found.insert(0, "base", base)
    return found


def verdicts(folder: Path) -> list[Verdict]:
    members = common.numbers(folder, "members.csv")
    found = []
    for base, of_base in members.groupby("base", sort=False):
        found += [explains_more(base, of_base, *pair) for pair in zip(RIVALS, PARTS, strict=True)]
    return complete(found, PARTS)


def explains_more(base: str, members: pd.DataFrame, rival: str, part: str) -> Verdict:
    members = members.dropna(subset=["forgetting", "kl", "squared_norm"])
    members = members.assign(log_rank=np.log2(members["rank"].fillna(FULL_RANK[base])))
    more = jackknife(members, lambda table: r2(table, "kl") - r2(table, rival))
    both = f"R² {r2(members, 'kl'):.3f} against {r2(members, rival):.3f}, difference {shown(more)}"
    return Verdict(part, base, by_interval(more, "above", MARGIN), both, more)


def r2(members: pd.DataFrame, name: str) -> float:
    groups = members["method"] + members["rank"].astype(str)
    arguments = members[name], members["forgetting"], groups
    return max(0.0, *(forgetting.held_out_r2(*arguments, degree) for degree in (1, 2)))


def jackknife(members: pd.DataFrame, of) -> Interval:
    """A function of all members with Student's t interval over their seeds, from the jackknife's
    standard error (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11)."""
    seeds = members["seed"].unique()
    whole, n = of(members), len(seeds)
    without = np.array([of(members[members["seed"] != seed]) for seed in seeds])
    # n - 1 times the deviations: a standard deviation over sqrt(n) is the jackknife's error.
    return compare.interval(whole + (n - 1) * (without.mean() - without))
