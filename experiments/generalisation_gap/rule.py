"""How does the generalisation gap depend on rank and data? See `experiments`."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments import sweeps
from experiments.verdicts import (
    WITHDRAWN,
    Verdict,
    by_equivalence,
    commands,
    complete,
    numbers,
    shown,
    tuned,
    write,
)
from lorax.analysis import compare

CLAIM = "the gap between evaluation and training goes as sqrt(r / N)"
SOURCE = "arXiv:2506.14530"
NEAR = 1 / 4
RULE = (
    "The gap is the validation loss less the training loss at the end, each rank and number of "
    "examples at its best rate; seed by seed, log(gap) = log c + p log r - q log N is fitted by "
    "least squares. Reproduced for p, and for q: the 90% interval over seeds lies within 1/4 of "
    "1/2; contradicted if none of it does. The same at the step of the lowest validation loss, "
    "reported without a verdict. A gap that is not positive, or a best rate at the edge of its "
    "grid in more than one of the cells, withdraws the numbers."
)
STUDY = "generalisation_gap"
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k", "SmolLM2-135M")
RANK, DATA = "p of r^p is 1/2", "q of N^-q is 1/2"


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """gaps.csv: a row a member: validation and training loss at the last step, and both at the step
    of the lowest validation loss (`stopped_`). Training losses are means since the evaluation
    before."""
    tables = []
    for base, sweep in sweeps.each(runs, STUDY):
        table = sweep.table[["n_train", "rank", "lr", "seed", "status", "final_loss"]].copy()
        table = table.join(losses(sweep.run.metrics)).astype({"n_train": int})
        table.insert(0, "base", base)
        tables.append(table)
    write(pd.concat(tables), folder, "gaps.csv")


def losses(metrics: pd.DataFrame) -> pd.DataFrame:
    """A row a member: train_loss at its last evaluation; stopped_loss and stopped_train at that of
    the lowest validation loss. metrics: of a run."""
    of = {split: rows for split, rows in metrics.groupby("split")}
    evals = of["eval"][of["eval"]["step"] > 0][["member", "step", "loss"]]
    train = of["train"][["member", "step", "loss"]].rename(columns={"loss": "train"})
    both = pd.merge_asof(
        evals.sort_values("step"), train.sort_values("step"), on="step", by="member"
    )
    last = both.groupby("member").last()
    best = both.loc[both.groupby("member")["loss"].idxmin().dropna()].set_index("member")
    columns = {"stopped_step": best["step"], "stopped_loss": best["loss"]}
    columns |= {"stopped_train": best["train"]}
    return pd.DataFrame({"train_loss": last["train"]} | columns)


def verdicts(folder: Path) -> list[Verdict]:
    tables = numbers(folder, "gaps.csv").groupby("base", sort=False)
    return complete([v for base, of in tables for v in of_base(base, of)], (RANK, DATA))


def of_base(base: str, table: pd.DataFrame) -> list[Verdict]:
    found = tuned(table, ["n_train", "rank"])
    best = found.members.assign(gap=found.members["final_loss"] - found.members["train_loss"])
    doubts, negative = list(found.doubts.values()), int((best["gap"] <= 0).sum())
    if negative or len(doubts) > 1:
        count = f"{negative} of {len(best)} gaps are not positive"
        why = count if negative else f"{doubts[0]} and {len(doubts) - 1} more"
        return [Verdict(part, base, WITHDRAWN, why) for part in (RANK, DATA)]
    p, q = (compare.interval(x, level=0.9) for x in exponents(best, "gap").values())
    return [
        Verdict(part, base, by_equivalence(x, 0.5 - NEAR, 0.5 + NEAR), f"{shown(x, 2)}, 90%", x)
        for part, x in ((RANK, p), (DATA, q))
    ]


def exponents(best: pd.DataFrame, column: str) -> dict[str, np.ndarray]:
    """p and q of every seed. best: members at their best rates."""
    fits = []
    for _, of in best.groupby("seed"):
        x = np.column_stack([np.ones(len(of)), np.log(of["rank"]), -np.log(of["n_train"])])
        fits.append(np.linalg.lstsq(x, np.log(of[column]), rcond=None)[0][1:])
    return dict(zip("pq", np.transpose(fits), strict=True))
