"""Is an update of higher rank better at the same number of parameters? See `experiments`."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from experiments import losses, sweeps
from experiments.losses import Losses
from experiments.verdicts import (
    CONTRADICTED,
    REPRODUCED,
    UNDECIDED,
    WITHDRAWN,
    Verdict,
    by_interval,
    commands,
    complete,
    numbers,
    shown,
    write,
)
from lorax.analysis import tables

CLAIM = "at equal parameters an update of higher rank is better"
SOURCE = "RandLoRA (arXiv:2502.00987); HiRA (ICLR 2025); GraLoRA (arXiv:2505.20355)"
LEVEL = 0.05
RULE = (
    "Each method at its best rate. Ordered by rank: Kendall's tau over methods between the mean "
    "test loss and the mean effective rank of dW, negative with a one-sided permutation p below "
    "0.05; contradicted if it is positive with such a p. A method beats LoRA if the 95% interval "
    "over seeds and test rows of loss(LoRA) - loss(method) lies above 0, and does not if below. "
    "SHiRA, entries of W at random places, is the control. A best rate at the edge of its grid "
    "withdraws the number."
)
STUDY, BY = "full_rank_updates", ["method"]
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k", "SmolLM2-135M")
ORDERED = "loss falls with the effective rank"
METHODS = ("gralora", "hira", "shira", "randlora", "fourierft")
PARTS = (ORDERED, *(f"{method} beats lora" for method in METHODS))


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """losses.csv and rows.csv; ranks.csv: a row a member at its method's best rate, the mean over
    matrices of the effective rank of dW."""
    losses.collect(runs, folder, BY, STUDY)
    found = []
    for base, (directory,) in runs.items():
        sweep = sweeps.load(directory, STUDY)
        best = sweeps.at_best(sweep, BY)
        _, ranks = tables.spectra({member: sweep.run.update(member) for member in best.index})
        mean = ranks.groupby("member")["effective"].mean()
        found.append(best.assign(base=base, rank=mean)[["base", "method", "seed", "rank"]])
    write(pd.concat(found), folder, "ranks.csv")


def verdicts(folder: Path) -> list[Verdict]:
    ranks, found = numbers(folder, "ranks.csv"), []
    for base, of in losses.read(folder, BY).items():
        found.append(ordered(base, of, ranks[ranks["base"] == base]))
        found += [beats(base, of, method) for method in METHODS]
    return complete(found, PARTS)


def ordered(base: str, of: Losses, ranks: pd.DataFrame) -> Verdict:
    names = ("lora", *METHODS)
    if doubt := of.doubt(*names):
        return Verdict(ORDERED, base, WITHDRAWN, doubt)
    effective = ranks.groupby("method")["rank"].mean()[list(names)].to_numpy()
    loss = of.by_seed[list(names)].mean().to_numpy()
    tau = lambda x: stats.kendalltau(effective, x).statistic
    found = tau(loss)
    orders = np.array([tau(np.array(x)) for x in permutations(loss)])
    below, above = (orders <= found + 1e-9).mean(), (orders >= found - 1e-9).mean()
    verdict = REPRODUCED if below < LEVEL else CONTRADICTED if above < LEVEL else UNDECIDED
    return Verdict(ORDERED, base, verdict, f"tau {found:.2f}, one-sided p {min(below, above):.3f}")


def beats(base: str, of: Losses, method: str) -> Verdict:
    part = f"{method} beats lora"
    if doubt := of.doubt(method, "lora"):
        return Verdict(part, base, WITHDRAWN, doubt)
    lead = of.contrast({"lora": 1, method: -1})
    return Verdict(part, base, by_interval(lead, "above"), f"by {shown(lead)} nats", lead)
