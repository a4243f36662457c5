"""What members are compared by: a metric's values on validation and test rows, and of each row."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorax.analysis import runs


class Metric(NamedTuple):
    """What settings are compared by.

    name: "loss", or a score of the task. sign: 1 if lower is better, else -1. split: "test", or
    "eval" if the run has no test rows. validation, value, base: columns of the field's table: what
    choices are made by, what is reported, and the same before training.
    """

    name: str
    unit: str  # "nats"; "" for a score
    sign: int
    split: str
    validation: str = "_validation"
    value: str = "_value"
    base: str = "_base"

    @property
    def called(self) -> str:
        """ "test loss"."""
        return f"{self.split} {self.name}"


def measured(run: runs.Run, table: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, Metric]:
    """The table of `runs.summary` with the columns of a `Metric`, and that metric."""
    if metric == "loss":
        names = ("final_loss", "test_loss", "base_loss", "base_test_loss")
    else:
        names = (metric, f"test_{metric}", "", "")
        if metric not in table:
            known = ", ".join(["loss", *runs.scores(run)])
            raise ValueError(f"analysis.metric: {metric!r} given, this run measures {known}")
    validation, test, base, base_test = names
    has_test = test in table and table[test].notna().any()
    split = "test" if has_test else "eval"
    unit = runs.loss_unit(run) if metric == "loss" else ""
    measure = Metric(metric, unit, 1 if metric == "loss" else -1, split)
    before = base_test if has_test else base
    start = table[before] if before in table else _at_start(run, table, metric, split)
    value = table[test if has_test else validation]
    lost = table["status"].isin(runs.WITHOUT_RESULT)  # a score may have been measured before
    columns = {measure.validation: table[validation], measure.value: value, measure.base: start}
    columns = {name: measure.sign * pd.to_numeric(c) for name, c in columns.items()}
    for name in (measure.validation, measure.value):
        columns[name] = columns[name].mask(lost)
    return table.assign(**columns), measure


def _at_start(run: runs.Run, table: pd.DataFrame, metric: str, split: str) -> pd.Series:
    """A score of each member at step 0; NaN where it was not measured."""
    if metric not in run.metrics:
        return pd.Series(np.nan, table.index)
    first = run.metrics[(run.metrics["step"] == 0) & (run.metrics["split"] == split)]
    return first.set_index("member")[metric].reindex(table.index)


def of_rows(
    run: runs.Run, table: pd.DataFrame, metric: Metric
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]] | None:
    """(the base's summed losses (N,), weights (N,), {member: summed losses (N,)}) of the test rows;
    None if they are not known, or not the same rows for all."""
    if metric.split != "test" or ("data_seed" in table and table["data_seed"].nunique() > 1):
        return None
    kept = {m: run.rows(m) for m in table.index[table[metric.value].notna()]}
    if not kept or any(rows is None for rows in kept.values()):
        return None
    weights = np.asarray(next(iter(kept.values()))["weight"], float)
    same = lambda rows: np.array_equal(np.asarray(rows["weight"], float), weights)
    if not all(map(same, kept.values())):
        return None
    name, start = ("loss", "start") if metric.name == "loss" else ("score", "start_score")
    losses = {m: metric.sign * np.asarray(r[name], float) for m, r in kept.items() if name in r}
    agree = lambda m: math.isclose(
        losses[m].sum() / weights.sum(), table[metric.value][m], rel_tol=1e-3, abs_tol=1e-4
    )
    # The score of single rows may be another than the one that was asked for.
    if len(losses) < len(kept) or not all(map(agree, losses)):
        return None
    begun = table.loc[list(kept), metric.base]
    middle = (begun - begun.median()).abs()
    first = middle.idxmin() if middle.notna().any() else next(iter(kept))
    return metric.sign * np.asarray(kept[first][start], float), weights, losses
