"""When does a rank run out?"""

from pathlib import Path

import pandas as pd

from experiments import sweeps
from experiments.verdicts import (
    CONTRADICTED,
    REPRODUCED,
    UNDECIDED,
    WITHDRAWN,
    Verdict,
    commands,
    complete,
    means_only,
    numbers,
    write,
)
from lorax.analysis import compare

CLAIM = "a rank leaves full fine-tuning's curve at a step that grows with the rank"
SOURCE = "Thinking Machines 2025"
LARGE = 0.02  # of the loss compared with: less is not called behind
RULE = """\
r = 1, 4 and 16 on all linear layers and full fine-tuning, each at its own best rate, on new data. A
rank leaves full fine-tuning at the first step from which on the 95% interval of its training loss
(means over the steps of a call) less that of full fine-tuning, seed by seed, lies above 0 and the
difference is more than 2% of the loss. Reproduced if the steps at which they leave grow from rank
to rank; contradicted if all ranks have left at the first call, or a larger rank leaves before a
smaller one; else undecided. A best rate at the edge of its grid withdraws the number."""
STUDY, BY = "capacity", ["method", "rank"]
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
PARTS = ("the step of leaving grows with the rank",)


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """Writes curves.csv: validation and training losses of every member at its setting's best rate,
    at every evaluation and call."""
    tables = []
    for base, (directory,) in runs.items():
        sweep = sweeps.load(directory, STUDY)
        best = sweeps.at_best(sweep, BY)
        for split in ("eval", "train"):
            curves = sweeps.evals(sweep, split)
            curves = curves[curves["member"].isin(best["member"])]
            curves = curves.merge(best[["member", "doubt"]], on="member")
            columns = ["rank", "lr", "doubt", "seed", "step", "loss"]
            tables.append(curves[columns].assign(base=base, split=split))
    write(pd.concat(tables), folder, "curves.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found, bases = [], dict(list(numbers(folder, "curves.csv").groupby("base", sort=False)))
    for base, curves in bases.items():
        doubts = curves["doubt"].dropna()
        if len(doubts):
            found.append(Verdict(PARTS[0], base, WITHDRAWN, doubts.iloc[0]))
            continue
        trained = curves[(curves["split"] == "train") & (curves["step"] > 0)]
        steps = {rank: leaves(trained, rank) for rank in sorted(set(trained["rank"]) - {0})}
        words = ", ".join(f"r = {rank}: {step or 'never'}" for rank, step in steps.items())
        first = trained["step"].min()
        found.append(Verdict(PARTS[0], base, decided(list(steps.values()), first), words))
    found += means_only(folder, "capacity.csv", PARTS, bases)
    return complete(found, PARTS)


def leaves(trained: pd.DataFrame, rank: int) -> int | None:
    """The step from which on a rank stays behind full fine-tuning (rank 0); None: never."""
    losses = trained.pivot(index="step", columns=["rank", "seed"], values="loss")
    behind = []
    for step, row in losses.iterrows():
        gap = compare.paired(row[rank], row[0])
        behind.append((step, gap.low > 0 and gap.value > LARGE * row[0].mean()))
    left = None
    for step, is_behind in reversed(behind):
        if not is_behind:
            break
        left = int(step)
    return left


def decided(steps: list[int | None], first: int) -> str:
    """The verdict on the steps at which the ranks leave, smallest rank first."""
    known = [float("inf") if step is None else step for step in steps]
    pairs = list(zip(known, known[1:], strict=False))
    if all(step == first for step in known) or any(a > b for a, b in pairs):
        return CONTRADICTED
    return REPRODUCED if all(a < b for a, b in pairs) else UNDECIDED
