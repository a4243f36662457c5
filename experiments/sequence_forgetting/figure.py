"""Draws sequence_forgetting.png from losses.csv and intruders.csv.

python -m experiments.sequence_forgetting.figure
"""

from pathlib import Path

import pandas as pd

from experiments.plotting import GREY, Row, drawn, intervals, legend, line
from experiments.sequence_forgetting.rule import FULL, HIGH, LOW, by_seed, difference
from experiments.verdicts import numbers

HERE = Path(__file__).parent
NAMES = {LOW: "LoRA, low rank", HIGH: "LoRA, high rank", FULL: "full fine-tuning"}


def main() -> None:
    counts = numbers(HERE, "intruders.csv")
    bases = list(numbers(HERE, "losses.csv").groupby("base", sort=False))
    n = len(bases)
    file = HERE / "sequence_forgetting.png"
    with drawn(file, 2, 2 * n, size=(3.5, 2.1), height_ratios=(2, 1) * n) as grid:
        for (base, losses), above, below in zip(bases, grid[::2], grid[1::2], strict=True):
            own = counts[counts["base"] == base]
            curves(*above, losses, own)
            compared(*below, losses, own)
            for axes in above:
                axes.set_title(base)
                axes.set_xticks(sorted(set(losses["number"])))
                axes.set_xlabel("tasks that were trained")
        legend(grid, 2)


def curves(forgotten, found, losses: pd.DataFrame, counts: pd.DataFrame) -> None:
    """Forgetting and intruders after every task: the mean over the tasks before it and the text."""
    before = losses[losses["task"] != losses["after"]]
    means = before.pivot_table(index=["line", "number"], columns="seed", values="forgetting")
    for n, (name, label) in enumerate(NAMES.items()):
        line(forgotten, n, means.loc[name], label)
        own = counts[counts["line"] == name]
        line(found, n, own.pivot(index="number", columns="seed", values="intruders"), label)
    control = counts[counts["line"] == LOW].groupby("number")["control"].mean()
    style = {"color": GREY, "linewidth": 1}
    found.plot(control.index, control, **style, label="random directions, low rank's norms")
    forgotten.set_ylabel("forgetting (nats a token)")
    found.set_ylabel("intruders")


def compared(forgotten, found, losses: pd.DataFrame, counts: pd.DataFrame) -> None:
    """The differences of the rule, of the seeds that have both."""
    last, first = losses["number"].max(), losses["number"].min()
    after = losses[(losses["number"] == last) & (losses["task"] != losses["after"])]
    of = by_seed(after, "forgetting")
    low = counts[counts["line"] == LOW].pivot(index="seed", columns="number")
    now = low["intruders"][last]
    pairs = {"low less full": (of[LOW], of[FULL]), "high less low": (of[HIGH], of[LOW])}
    intervals(forgotten, rows(pairs))
    forgotten.set_xlabel("forgetting after the last task (nats)")
    pairs = {"last less first": (now, low["intruders"][first])}
    intervals(found, rows(pairs | {"less random": (now, low["control"][last])}))
    found.set_xlabel("intruders, low rank")


def rows(pairs: dict) -> list[Row]:
    return [Row(name, difference(a, b), (a - b).dropna(), (0,)) for name, (a, b) in pairs.items()]


if __name__ == "__main__":
    main()
