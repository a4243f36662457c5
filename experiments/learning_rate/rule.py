"""The best learning rate: does it depend on the rank, and is it ten times full fine-tuning's?"""

from pathlib import Path

import pandas as pd

from experiments import losses, sweeps
from experiments.optima import edges, optima
from experiments.verdicts import (
    LADDER,
    WITHDRAWN,
    Verdict,
    by_equivalence,
    commands,
    complete,
    mapped,
    numbers,
    texts,
    write,
)
from lorax.analysis import compare
from lorax.analysis.compare import Interval

CLAIM = "the best learning rate hardly depends on the rank, and is ten times full fine-tuning's"
SOURCE = "Thinking Machines 2025"
RULE = """\
A seed's best rate is the vertex of the parabola, in the logarithm of the rate, through its lowest
validation loss and the two neighbours, of five rates three apart; ratios are taken seed by seed.
The rate hardly depends on the rank if the 90% interval of the ratio of the largest rank's to that
of r = 4, over seeds, lies within a factor of two to both sides, and does if none of it does. It is
ten times full fine-tuning's if the interval of the geometric mean over ranks from 4 on, over that
of full fine-tuning, lies between 5 and 20, and is not if none of it does. A lowest loss at the edge
of the grid withdraws the number."""
STUDY, BY = "lr_vs_rank", ["method", "rank"]
QUARTER = "gpt2-nano alpha=4"
COMMANDS = commands(STUDY, *LADDER)
COMMANDS[QUARTER] = commands(STUDY, "gpt2-nano", flags="--config.method.alpha=4")["gpt2-nano"]
MINUTES = {"gpt2-nano": 12, QUARTER: 7.5, "stories-llama-260k": 21}
PARTS = ("within a factor of two from r = 4 to the largest", "ten times full fine-tuning's")


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """Writes losses.csv and rows.csv (`experiments.losses`), and optima.csv: log2 of the best rate
    of each setting and seed."""
    losses.collect(runs, folder, BY, STUDY)
    tables = []
    for base, (directory,) in runs.items():
        table = sweeps.load(directory, STUDY).table
        tables.append(optima(table, BY, loss="final_loss").assign(base=base))
    write(pd.concat(tables)[["base", *BY, "seed", "best", "edge"]], folder, "optima.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, best in numbers(folder, "optima.csv").groupby("base", sort=False):
        if wrong := edges(best.assign(edge=texts(best["edge"]))):
            found += [Verdict(part, base, WITHDRAWN, wrong) for part in PARTS]
            continue
        by_seed = best.pivot(index="seed", columns=BY, values="best")
        lora = by_seed["lora"]
        lora = lora[[rank for rank in lora if rank >= 4]]
        over_ranks = factor(lora[lora.columns.max()] - lora[4])
        over_full = factor(lora.mean(axis=1) - by_seed["full"].iloc[:, 0])
        found.append(decided(PARTS[0], base, over_ranks, 1 / 2, 2))
        found.append(decided(PARTS[1], base, over_full, 5, 20))
    return complete(found, PARTS)


def factor(logs: pd.Series) -> Interval:
    """The geometric mean over seeds with its 90% interval; logs: log2, one a seed."""
    return mapped(compare.interval(logs, 0.9), lambda log: 2**log)


def decided(part: str, base: str, times: Interval, low: float, high: float) -> Verdict:
    verdict = by_equivalence(times, low, high)
    number = f"{times.value:.2g} times ({times.low:.2g} to {times.high:.2g}, 90%)"
    return Verdict(part, base, verdict, number, times)
