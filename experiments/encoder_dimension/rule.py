"""How many dimensions does fine-tuning a pretrained encoder take? See `experiments`."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.dimensions import COLUMNS, THRESHOLD, as_dimension, compared, log_d90
from experiments.verdicts import (
    REPRODUCED,
    WITHDRAWN,
    Verdict,
    by_interval,
    complete,
    numbers,
    write,
)
from lorax.analysis import intrinsic, runs

CLAIM = "a pretrained encoder has few intrinsic dimensions, fewer with a scale per layer"
SOURCE = "Aghajanyan et al. 2020 (arXiv:2012.13255), table 1 and figure 2"
RULE = (
    "d90 is the dimension at which the score reaches 90% of full fine-tuning's, with the interval "
    "of `lorax.analysis.intrinsic` (over seeds of the subspace and of the baseline). Few: the 95% "
    "interval lies below a thousandth of all parameters. Fewer with a scale per layer (SAID): the "
    "95% interval of log2(d90 of SAID / d90 of DID), of the two as independent, lies below 0. "
    "Pretraining lowers it: the same of pretrained against random weights, both measured against "
    "the pretrained model's goal; random weights whose full fine-tuning misses that goal need more "
    "dimensions than there are, and that is reproduced. A crossing outside the tested dimensions "
    "withdraws the number."
)
STUDY = "intrinsic_dimension_encoder"
COMMANDS = {
    "MiniLM": (f"python -m lorax.run --config=configs/{STUDY}.py",),
    "MiniLM CoLA": (f"python -m lorax.run --config=configs/{STUDY}.py:cola",),
}
FEW, SCALES, PRETRAINED = (
    "DID needs less than 0.1% of the parameters",
    "SAID needs fewer than DID",
    "pretraining lowers DID's d90",
)
PARTS = (FEW, SCALES, PRETRAINED)
SHARE = 1e-3
METRIC = {"MiniLM": "accuracy", "MiniLM CoLA": "matthews"}


def collect(runs_of: dict[str, list[Path]], folder: Path) -> None:
    """points.csv: a row a member, of `lorax.analysis.intrinsic.points`, and whether the base is
    pretrained."""
    tables = []
    for base, (directory,) in runs_of.items():
        table = intrinsic.points(runs.load(directory))
        drawn = table["condition"].str.contains("random:") | table["shared"].str.contains("random:")
        table["weights"] = np.where(drawn, "random", "pretrained")
        table.insert(0, "base", base)
        tables.append(table[["base", "weights", *COLUMNS]])
    write(pd.concat(tables), folder, "points.csv")


def verdicts(folder: Path) -> list[Verdict]:
    table = numbers(folder, "points.csv")
    found = [v for base, of in table.groupby("base", sort=False) for v in of_base(base, of)]
    return complete(found, PARTS)


def of_base(base: str, table: pd.DataFrame) -> list[Verdict]:
    """The three verdicts on one task. table: of points.csv."""
    pretrained, drawn = (table[table["weights"] == name] for name in ("pretrained", "random"))
    total = int(pretrained.loc[pretrained["kind"] == "full", "params"].iloc[0])
    did, said = (log_d90(pretrained, name, METRIC[base]) for name in ("subspace", "said"))
    if not np.isfinite(did.value):
        why = "d90 of DID lies outside the tested dimensions"
        return [Verdict(part, base, WITHDRAWN, why) for part in PARTS]
    few = by_interval(did, "below", np.log2(SHARE * total))
    found = [Verdict(FEW, base, few, f"d90 {as_dimension(did)} of {total:,}", did)]
    found.append(compared(SCALES, base, said, did, "SAID's d90"))
    best, reached = (full_score(of, METRIC[base]) for of in (pretrained, drawn))
    if reached < THRESHOLD * best:
        number = f"full fine-tuning of random weights reaches {reached:.3f}, "
        number += f"the goal is {THRESHOLD * best:.3f}"
        return [*found, Verdict(PRETRAINED, base, REPRODUCED, number)]
    goal = pd.concat([drawn[drawn["kind"] != "full"], pretrained[pretrained["kind"] == "full"]])
    control = log_d90(goal, "subspace", METRIC[base])
    return [*found, compared(PRETRAINED, base, did, control, "pretrained d90")]


def full_score(table: pd.DataFrame, metric: str) -> float:
    """The mean score of full fine-tuning at its best rate, which `log_d90` compares with."""
    return intrinsic.tuned(table[table["kind"] == "full"], "params", metric)["value"].mean()
