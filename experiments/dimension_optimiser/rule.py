"""Does d90 depend on the optimiser? See `experiments`."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments import sweeps
from experiments.verdicts import (
    WITHDRAWN,
    Verdict,
    by_equivalence,
    by_interval,
    complete,
    numbers,
    shown,
    tuned,
    write,
)
from lorax.analysis import compare, intrinsic

CLAIM = "the intrinsic dimension depends on the optimiser"
SOURCE = "a confound of Li et al. (arXiv:1804.08838), who use both"
RULE = (
    "d90 is where a seed's accuracy, monotone in d by isotonic regression and linear in log d "
    "between two dimensions, crosses 90% of full fine-tuning's under the same optimiser, each "
    "dimension and full fine-tuning at its best rate. A confound: |log2(d90 of Adam / "
    "d90 of SGD)| above 1, by the 95% interval over seeds. The same: within 1/2 of 0, by the 90% "
    "interval. A crossing outside the grid of dimensions withdraws the number."
)
STUDY = "dimension_optimiser"
COMMANDS = {
    "digits MLP": tuple(
        f"python -m lorax.run --config=configs/{STUDY}.py:{name}" for name in ("adamw", "sgd")
    )
}
FACTOR, SAME = "a factor of two or more", "the same within a factor of 1.4"
THRESHOLD = 0.9


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """accuracy.csv: a row a member; dim is 0 for full fine-tuning."""
    tables = []
    for base, sweep in sweeps.each(runs, STUDY):
        table = sweep.table[["dim", "lr", "seed", "status", "accuracy"]].fillna({"dim": 0})
        table.insert(0, "base", base)
        table.insert(1, "optimizer", sweep.run.config["config"]["train"]["optimizer"])
        tables.append(table.astype({"dim": int}))
    write(pd.concat(tables), folder, "accuracy.csv")


def verdicts(folder: Path) -> list[Verdict]:
    table = numbers(folder, "accuracy.csv")
    found = [v for base, of in table.groupby("base", sort=False) for v in of_base(base, of)]
    return complete(found, (FACTOR, SAME))


def of_base(base: str, table: pd.DataFrame) -> list[Verdict]:
    d90 = {name: crossings(of) for name, of in table.groupby("optimizer")}
    missing = sum(int(np.isnan(x).sum()) for x in d90.values())
    if missing:
        why = f"{missing} of {sum(map(len, d90.values()))} crossings outside the grid of dimensions"
        return [Verdict(part, base, WITHDRAWN, why) for part in (FACTOR, SAME)]
    ratio = d90["adamw"] - d90["sgd"]
    wide, narrow = compare.interval(ratio), compare.interval(ratio, level=0.9)
    means = ", ".join(f"{name} {2 ** x.mean():.0f}" for name, x in d90.items())
    number = f"log2 of the ratio {shown(wide, 2)} ({means})"
    side = wide if wide.value >= 0 else wide._replace(low=-wide.high, high=-wide.low)
    return [
        Verdict(FACTOR, base, by_interval(side, "above", 1.0), number, wide),
        Verdict(SAME, base, by_equivalence(narrow, -0.5, 0.5), f"{shown(narrow, 2)}, 90%", narrow),
    ]


def crossings(table: pd.DataFrame) -> np.ndarray:
    """log2 of d90, one a seed; NaN where it lies outside the grid. table: of one optimiser."""
    table = table.assign(error=1 - table["accuracy"])  # lower is better
    best = tuned(table, ["dim"], "error").members
    accuracy = best.pivot(index="seed", columns="dim", values="accuracy")
    subspaces = accuracy.drop(columns=0)
    sizes = [
        intrinsic.crossing(subspaces.columns, values, THRESHOLD * full, "accuracy").size
        for full, values in zip(accuracy[0], subspaces.to_numpy(), strict=True)
    ]
    return np.log2(sizes)
