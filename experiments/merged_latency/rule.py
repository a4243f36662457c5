"""What does an adapter cost in inference?"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.verdicts import (
    Verdict,
    all_of,
    by_equivalence,
    by_interval,
    complete,
    copied,
    mapped,
    numbers,
    shown,
)
from lorax.analysis import compare
from lorax.analysis.compare import Interval

CLAIM = "merged LoRA has the base's latency; bottleneck adapters cost 20% to 30% at batch 1"
SOURCE = "LoRA (arXiv:2106.09685), table 1"
RULE = """\
Times over the base's in the same round, as geometric means over rounds. Merged LoRA takes the time
of the base if the 90% interval lies within 5% to both sides at all three shapes, and does not if
none of it does at one. Bottleneck adapters cost as much as published if the 95% interval of that of
Houlsby's, at one sequence of 128 tokens, lies above 1.2, and do not if it lies below."""
COMMANDS = dict.fromkeys(
    ("gpt2-nano", "stories-llama-260k", "gpt2"),
    ("python -m experiments.merged_latency.run --clock=wall",),
)
MINUTES = dict.fromkeys(COMMANDS, 2.6)
PARTS = ("merged: within 5% of the base", "Houlsby's adapters: 20% or more at batch 1")


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    copied(runs, folder, "numbers.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, table in numbers(folder, "numbers.csv").groupby("base", sort=False):
        ratios = dict(list(table.groupby(["side", "shape"])["ratio"]))
        shapes = [shape for side, shape in ratios if side == "merged LoRA"]
        merged = {shape: factor(ratios["merged LoRA", shape], 0.9) for shape in shapes}
        verdict = all_of(by_equivalence(x, 1 / 1.05, 1.05) for x in merged.values())
        number = "; ".join(f"{shape}: {shown(x, 2)}" for shape, x in merged.items())
        found.append(Verdict(PARTS[0], base, verdict, number, merged[shapes[0]]))
        cost = factor(ratios["houlsby", "1 x 128"], 0.95)
        found.append(Verdict(PARTS[1], base, by_interval(cost, "above", 1.2), shown(cost, 2), cost))
    return complete(found, PARTS)


def factor(ratios: pd.Series, level: float) -> Interval:
    """The geometric mean over rounds with its interval."""
    return mapped(compare.interval(np.log(ratios), level), np.exp)
