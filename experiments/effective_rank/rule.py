"""How many directions does an update use?"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments import sweeps
from experiments.verdicts import (
    Verdict,
    all_of,
    by_interval,
    commands,
    complete,
    crossed,
    mapped,
    numbers,
    shown,
    write,
)
from lorax.analysis import tables

CLAIM = "full fine-tuning's dW has a far higher effective rank than LoRA's; a fixed alpha lowers it"
SOURCE = "Shuttleworth et al. (arXiv:2410.21228); Biderman et al. (arXiv:2405.09673)"
TWICE = 2.0
RULE = """\
Effective rank of dW (exp of the entropy of sigma / sum(sigma)) at two learning rates, as geometric
means over seeds and matrices. That of full fine-tuning is far above LoRA's if the 95% interval of
its ratio to that of the largest rank with alpha = 2 r lies above 2 at both rates, and is not if it
lies below at one. alpha = 8 lowers that of the largest rank if the interval of its ratio to that of
alpha = 2 r, at the same alpha times rate, lies below 1 at both, and does not if it lies above."""
STUDY = "intruders"
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k", "MiniLM", "SmolLM2-135M")
MINUTES = {"gpt2-nano": 8, "stories-llama-260k": 15}
PARTS = ("full fine-tuning: twice LoRA's or more", "alpha = 8: below alpha = 2 r")
COLUMNS = ["base", "member", "method", "rank", "alpha", "lr", "factor", "seed", "path", "width"]
COLUMNS += ["norm", "effective", "energy90", "stable"]


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """Writes ranks.csv: a row a member and matrix. Matrices are the linear layers; the embedding,
    which only full fine-tuning changes, is left out. factor: 1 for the lower of a setting's two
    rates, 3 for the higher."""
    found = []
    for base, (directory,) in runs.items():
        sweep = sweeps.load(directory, STUDY)
        table = sweep.table[sweep.table["status"] == "finished"].copy()
        lowest = table.groupby(["method", "rank", "alpha"], dropna=False)["lr"].transform("min")
        table["factor"] = (table["lr"] / lowest).round().astype(int)
        _, ranks = tables.spectra({member: sweep.run.update(member) for member in table.index})
        ranks = ranks[ranks["layer"] >= 0].rename(columns={"rank": "width"})  # full: min(in, out)
        fields = ["method", "rank", "alpha", "lr", "factor", "seed"]
        ranks = ranks.merge(table[fields], left_on="member", right_index=True)
        found.append(ranks.assign(base=base)[COLUMNS])
    write(pd.concat(found), folder, "ranks.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, ranks in numbers(folder, "ranks.csv").groupby("base", sort=False):
        lora = ranks[ranks["method"] == "lora"]
        largest = lora[lora["rank"] == lora["rank"].max()]
        own, fixed = (largest[(largest["alpha"] == 8) == is_8] for is_8 in (False, True))
        full = ranks[ranks["method"] == "full"]
        found.append(decided(PARTS[0], base, full, own, "above", TWICE))
        found.append(decided(PARTS[1], base, fixed, own, "below", 1.0))
    return complete(found, PARTS)


def decided(
    part: str, base: str, a: pd.DataFrame, b: pd.DataFrame, side: str, margin: float
) -> Verdict:
    """Whether the effective ranks of a over those of b lie on that side of the margin at each
    rate."""
    at = ["factor", "seed", "path"]
    logs = np.log(a.set_index(at)["effective"] / b.set_index(at)["effective"])
    intervals = [
        mapped(crossed(own.droplevel("factor").unstack("path")), np.exp)
        for _, own in logs.groupby("factor")
    ]
    verdict = all_of(by_interval(x, side, margin) for x in intervals)
    number = "; ".join(shown(x, 2) for x in intervals) + " times"
    return Verdict(part, base, verdict, number, intervals[0])
