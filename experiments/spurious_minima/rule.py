"""From which rank on does LoRA reach the linear model's minimum? See `experiments`."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import optimize, special

from experiments import sweeps
from experiments.verdicts import (
    CONTRADICTED,
    REPRODUCED,
    UNDECIDED,
    Verdict,
    by_interval,
    complete,
    mapped,
    numbers,
    shown,
    write,
)
from lorax.analysis import compare

CLAIM = "LoRA reaches the linear model's minimum from a rank on that grows with K N"
SOURCE = "Jang et al. (arXiv:2402.11867); Park (arXiv:2605.03724)"
NEAR = 1e-3  # of the loss before training
SHARE, LOWER = 0.95, 4.0
RULE = (
    "A run reaches the minimum, which is 0, if its training loss at the end is below 1/1000 of "
    "what the base has. Enough: of the runs with r (r + 1) / 2 > K N, or r (64 + K) - r^2 > 1.35 "
    "K N, more than 95% reach it, by the 95% interval over seeds. Which threshold is nearer: "
    "logistic regressions of reaching it on log(r (r + 1) / (2 K N)) and on log((r (64 + K) - "
    "r^2) / (K N)); the second is if its deviance is lower by more than 4, and the first if that "
    "is, by the 95% interval over seeds of the sum of their parts."
)
STUDY, INPUTS = "spurious_minima", 64
COMMANDS = {"linear layer": (f"python -m lorax.run --config=configs/{STUDY}.py",)}
FIRST, SECOND = "r (r + 1) / 2 > K N is enough", "r (m + n) - r^2 > 1.35 K N is enough"
NEARER = "the second threshold is nearer"
PARTS = (FIRST, SECOND, NEARER)


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """losses.csv: a row a member: K outputs, N examples, rank, seed, the base's loss and the
    training loss over the last steps."""
    tables = []
    for base, sweep in sweeps.each(runs, STUDY):
        table = sweep.table[["base", "n_train", "rank", "seed", "status", "base_loss"]].copy()
        table["outputs"] = table["base"].str.rsplit("-", n=1).str[-1].astype(int)
        train = sweep.run.metrics[sweep.run.metrics["split"] == "train"]
        table["train_loss"] = train.sort_values("step").groupby("member")["loss"].last()
        table["base"] = base
        tables.append(table.astype({"n_train": int}))
    write(pd.concat(tables), folder, "losses.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, table in numbers(folder, "losses.csv").groupby("base", sort=False):
        r, k, n = (table[name].astype(float) for name in ("rank", "outputs", "n_train"))
        table = table.assign(
            reached=(table["train_loss"] < NEAR * table["base_loss"]).astype(float),
            first=np.log(r * (r + 1) / (2 * k * n)),
            second=np.log((r * (INPUTS + k) - r**2) / (k * n)),
        )
        found += [
            enough(base, table[table["first"] > 0], FIRST),
            enough(base, table[table["second"] > np.log(1.35)], SECOND),
            nearer(base, table),
        ]
    return complete(found, PARTS)


def enough(base: str, above: pd.DataFrame, part: str) -> Verdict:
    """Whether nearly all of the runs above a threshold reach the minimum."""
    share = compare.interval(above.groupby("seed")["reached"].mean())
    number = f"{share.value:.1%} of {len(above)} runs ({share.low:.1%} to {share.high:.1%})"
    return Verdict(part, base, by_interval(share, "above", SHARE), number, share)


def nearer(base: str, table: pd.DataFrame) -> Verdict:
    lower = deviances(table, "first") - deviances(table, "second")
    per_seed = compare.interval(lower.groupby(table["seed"]).sum())
    n = table["seed"].nunique()
    total = mapped(per_seed, lambda part: n * part)
    verdict = (
        REPRODUCED if total.low > LOWER else CONTRADICTED if total.high < -LOWER else UNDECIDED
    )
    return Verdict(NEARER, base, verdict, f"deviance lower by {shown(total, 1)}", total)


def deviances(table: pd.DataFrame, column: str) -> pd.Series:
    """Each run's part of the deviance of a logistic regression of `reached` on a column."""
    x, y = table[column].to_numpy(), table["reached"].to_numpy()

    def parts(beta):
        return -2 * special.log_expit((2 * y - 1) * (beta[0] + beta[1] * x))

    fit = optimize.minimize(lambda beta: parts(beta).sum() + 1e-6 * beta @ beta, (0.0, 1.0))
    return pd.Series(parts(fit.x), table.index)
