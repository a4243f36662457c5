"""Does LoRA forget more than full fine-tuning over a sequence of tasks? See `experiments`."""

from pathlib import Path

import pandas as pd

from experiments import verdicts as common
from experiments.verdicts import Verdict, by_interval, commands, complete, shown
from lorax.analysis import compare, forgetting
from lorax.analysis.compare import Interval

CLAIM = "over tasks in a row LoRA of a low rank piles up intruders and forgets more than full"
SOURCE = "Shuttleworth et al. (arXiv:2410.21228), section 5"
RULE = (
    "Forgetting of a member after five tasks is the mean, over the four tasks before the last and "
    "the pretraining text, of the loss then less the loss when the task had just been trained (the "
    "text: the base's). LoRA of a low rank forgets more if its forgetting less full fine-tuning's, "
    "paired by seed, has its 95% interval above 0; a high rank forgets less than a low one if the "
    "difference lies below 0. Intruders (k = 10, epsilon = 0.5, of all that was added since the "
    "first base, summed over matrices) pile up if their number after five tasks less that after "
    "one lies above 0 at the low rank; they are more than random directions give if their number "
    "less that of a control of the same singular values lies above 0."
)
STUDY = "forgetting_sequence"
MEASURE = "python -m experiments.sequence_forgetting.measure {1}"
COMMANDS = {
    base: (*runs, MEASURE)
    for base, runs in commands(STUDY, "gpt2-nano", "stories-llama-260k").items()
}
LOW, HIGH, FULL = "lora low", "lora high", "full"
PARTS = (
    "low rank forgets more than full fine-tuning",
    "high rank forgets less than low rank",
    "intruders pile up at the low rank",
    "more intruders than random directions give",
)


def collect(given: dict[str, list[Path]], folder: Path) -> None:
    """Write losses.csv, a row a member, task trained and task measured, and intruders.csv."""
    losses, found = [], []
    for base, (run, measured) in given.items():
        table = forgetting.sequence(run).drop(columns="member")
        losses.append(named(base, table))
        found.append(named(base, pd.read_csv(measured / "intruders.csv").drop(columns="member")))
    common.write(pd.concat(losses), folder, "losses.csv")
    common.write(pd.concat(found), folder, "intruders.csv")


def named(base: str, table: pd.DataFrame) -> pd.DataFrame:
    """A table with its base, and the lines named `LOW`, `HIGH` and `FULL`."""
    ranks = table["line"].str.extract(r"rank=(\d+)")[0].astype(float)
    lora = table["line"].str.contains("method=lora")
    line = (ranks == ranks[lora].min()).map({True: LOW, False: HIGH}).where(lora, FULL)
    table = table.assign(line=line)
    table.insert(0, "base", base)
    return table


def verdicts(folder: Path) -> list[Verdict]:
    losses = common.numbers(folder, "losses.csv")
    counts = common.numbers(folder, "intruders.csv")
    found = []
    for base, of_base in losses.groupby("base", sort=False):
        found += of_one(base, of_base, counts[counts["base"] == base])
    return complete(found, PARTS)


def of_one(base: str, losses: pd.DataFrame, counts: pd.DataFrame) -> list[Verdict]:
    """The verdicts on one base."""
    last, first = losses["number"].max(), losses["number"].min()
    after = losses[(losses["number"] == last) & (losses["task"] != losses["after"])]
    forgotten = by_seed(after, "forgetting")
    low = counts[counts["line"] == LOW].pivot(index="seed", columns="number", values="intruders")
    control = counts[(counts["line"] == LOW) & (counts["number"] == last)].set_index("seed")
    numbers = [
        (difference(forgotten[LOW], forgotten[FULL]), "above", "nats"),
        (difference(forgotten[HIGH], forgotten[LOW]), "below", "nats"),
        (difference(low[last], low[first]), "above", "intruders"),
        (difference(low[last], control["control"]), "above", "intruders"),
    ]
    return [
        Verdict(part, base, by_interval(number, side), f"{shown(number)} {unit}", number)
        for part, (number, side, unit) in zip(PARTS, numbers, strict=True)
    ]


def by_seed(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The mean over tasks: a row a seed, a column a line."""
    return table.groupby(["seed", "line"])[column].mean().unstack()


def difference(a: pd.Series, b: pd.Series) -> Interval:
    """a - b over the seeds that have both: a member that diverged did not go on."""
    both = pd.concat([a, b], axis=1).dropna()
    return compare.paired(both.iloc[:, 0], both.iloc[:, 1])
