"""What an answer compares: the settings of a sweep, their members and their measured losses.

A candidate is a point of the axes that decide how much is trained (method, rank, targets...). Along
the other axes (learning rate, alpha...) each candidate is at its own best, which the validation
loss chooses. Members that were trained or measured on different data are never compared: there is
a `Field` for each such condition.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorax.analysis import runs
from lorax.analysis.answer.measured import Metric, measured, of_rows
from lorax.config import key_of

#: Keys, and sections, that decide what is measured: with other values, losses can't be compared.
CONDITIONS = ("base", "quant", "train.seq_len")
CONDITION_SECTIONS = ("task.", "eval.")
#: Why a member has no value, by its status.
LATER = {"diverged": "diverged", "running": "not finished", "stopped": "stopped for better values"}


class Field(NamedTuple):
    """The settings of one condition. P points of all axes; S candidates with R points each; K
    seeds; N test rows (1 if a run has kept no losses of single rows). Losses: lower is better, a
    score has the opposite sign. NaN: not measured.

    condition: {field: value} that all members share; empty if the run has only one condition.
    sizes, tuned: the axes of the candidates, and those along which each is at its best.
    points: a row per point: its axes, trainable_params, members (a list, one a seed or None),
    eligible, why it is not, candidate (its number), place (its number among the R).
    candidates: a row per candidate: its sizes, trainable_params, and its best point: the number of
    that (point; -1 if none is eligible), eligible, members.
    sums: (P, K, N), each row's summed loss. weights: (N,). validation: (P, K). start: (K, N), the
    base's summed losses. full: the number of the point of full fine-tuning that others are shown
    beside, None if there is none.
    """

    run: runs.Run
    table: pd.DataFrame
    metric: Metric
    condition: dict[str, Any]
    sizes: tuple[str, ...]
    tuned: tuple[str, ...]
    seeds: list
    points: pd.DataFrame
    candidates: pd.DataFrame
    sums: np.ndarray
    weights: np.ndarray
    validation: np.ndarray
    start: np.ndarray
    full: int | None

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes; those of the candidates first."""
        return (*self.sizes, *self.tuned)

    def sizes_of(self, candidate: int) -> dict[str, Any]:
        """{axis: value} of a candidate's own axes, as JSON has them; those it doesn't use are left
        out."""
        return plain(self.candidates.loc[candidate], self.sizes)

    def setting(self, candidate: int) -> dict[str, Any]:
        """The same of all axes: along the tuned ones it is at its best."""
        point = self.candidates["point"][candidate]
        return self.sizes_of(candidate) if point < 0 else plain(self.points.loc[point], self.axes)

    def by_candidate(self) -> tuple[np.ndarray, np.ndarray]:
        """(sums (S, R, K, N), validation (S, R, K)): of each candidate's points."""
        own = self.points[self.points["candidate"] >= 0]
        shape = (len(self.candidates), int(own["place"].max()) + 1)
        sums = np.full((*shape, *self.sums.shape[1:]), np.nan)
        validation = np.full((*shape, len(self.seeds)), np.nan)
        place = own["candidate"].to_numpy(), own["place"].to_numpy()
        sums[place], validation[place] = self.sums[own.index], self.validation[own.index]
        return sums, validation


def fields(run: runs.Run, metric: str = "loss") -> list[Field]:
    """A field for each condition of a run. metric: "loss", or a score of the task.

    Raises ValueError for a metric that the run has not measured.
    """
    table, measure = measured(run, runs.summary(run), metric)
    by = runs.axes(run, table)
    conditions = [name for name in by.fields if is_condition(name)]
    axes = [name for name in by.fields if name not in conditions]
    return [
        _field(run, members, measure, condition, axes)
        for condition, members in _groups(table, conditions)
    ]


def plain(row: Mapping[str, Any] | pd.Series, names: Iterable[str]) -> dict[str, Any]:
    """{name: value} of a row as JSON has them. If methods differ, without the fields that its
    method doesn't use."""
    names = list(names)
    used = lambda name: "method" not in names or name in runs.MISSING
    kept = [name for name in names if used(name) or not runs.is_missing(row[name])]
    return {name: scalar(row[name]) for name in kept}


def scalar(value: Any) -> Any:
    """A table's value for JSON; a whole number is an int again, which missing values beside it
    have made a float."""
    if runs.is_missing(value):
        return None
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_condition(axis: str) -> bool:
    """Whether members with different values of this axis can't be compared."""
    key = key_of(axis) if axis != "setting" else axis
    return key in CONDITIONS or key.startswith(CONDITION_SECTIONS)


def _groups(table: pd.DataFrame, names: Sequence[str]) -> Iterator[tuple[dict, pd.DataFrame]]:
    """({name: value}, the members that have these values)."""
    if not names:
        yield {}, table
        return
    for _, members in table.groupby(list(names), sort=False, dropna=False):
        yield {name: members[name].iloc[0] for name in names}, members


# ----------------------------------------------------------------------------------- of a condition


def _field(run, table: pd.DataFrame, metric: Metric, condition: dict, axes: list[str]) -> Field:
    own = table[~_beside(table)]
    varied = [name for name in axes if own[name].nunique(dropna=False) > 1]
    varied = varied or ["rank" if own["rank"].notna().any() else "method"]
    sizes = tuple(n for n in varied if _is_size(own, n, varied)) or tuple(varied[:1])
    tuned = tuple(name for name in varied if name not in sizes)
    seeds = sorted(own["seed"].unique(), key=str)
    seeds = sorted(seeds) if all(isinstance(seed, (int, np.integer)) for seed in seeds) else seeds
    grouped = _groups(table, list(dict.fromkeys([*axes, *varied])))
    points = pd.DataFrame(_point(own, metric, values, seeds) for values, own in grouped)
    points, candidates = _candidates(points, sizes, tuned)
    rows = of_rows(run, table, metric)
    at = list(points["members"])
    value = lambda column: np.array(
        [[np.nan if m is None else table[column][m] for m in members] for members in at], float
    )
    validation, kept = value(metric.validation), ~points["eligible"].to_numpy()
    if rows is None:
        sums, weights = value(metric.value)[..., None], np.ones(1)
        start = np.full((len(seeds), 1), table[metric.base].median())
    else:
        first, weights, losses = rows
        blank = np.full(len(weights), np.nan)
        sums = np.array([[losses.get(m, blank) for m in members] for members in at])
        start = np.broadcast_to(first, (len(seeds), len(weights)))
    sums[kept], validation[kept] = np.nan, np.nan
    candidates = _at_best(points, candidates, validation)
    full = _best(points, _beside(points), validation)
    found = (points, candidates, sums, weights, validation, start, full)
    return Field(run, table, metric, condition, sizes, tuned, seeds, *found)


def _beside(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of full fine-tuning beside other methods, (rows,) bool: it is no candidate,
    but what they are shown beside."""
    is_full = rows["method"] == "full"
    return is_full & ~is_full.all()


def _is_size(table: pd.DataFrame, name: str, axes: Sequence[str]) -> bool:
    """Whether an axis decides how much is trained."""
    if name == "method":
        return True
    others = [axis for axis in axes if axis != name]
    groups = [members for _, members in _groups(table, others)]
    return any(members["trainable_params"].nunique() > 1 for members in groups)


def _point(members: pd.DataFrame, metric: Metric, values: dict, seeds: list) -> dict:
    """A row of `Field.points`."""
    of_seed = dict(zip(members["seed"], members.index, strict=True))
    listed = [of_seed.get(seed) for seed in seeds]
    missing = members[members[metric.value].isna() | members[metric.validation].isna()]
    reasons: dict[str, list[str]] = {}
    for member, status in missing["status"].items():
        reasons.setdefault(LATER.get(status, "no value"), []).append(str(member))
    absent = sum(member is None for member in listed)
    texts = [f"{why} (member {', '.join(members)})" for why, members in reasons.items()]
    if absent and not reasons:
        texts.append(f"{len(seeds) - absent} of {len(seeds)} seeds")
    return values | {
        "method": members["method"].iloc[0],
        "lr": members["lr"].iloc[0] if "lr" in members else None,
        "trainable_params": int(members["trainable_params"].iloc[0]),
        "members": listed,
        "eligible": not texts,
        "why": "; ".join(texts),
    }


def _candidates(points: pd.DataFrame, sizes, tuned) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(points with the numbers of their candidates, a row per candidate)."""
    number = lambda rows, names: rows.groupby(names, sort=False, dropna=False).ngroup()
    own = number(points[~_beside(points)], list(sizes)).reindex(points.index, fill_value=-1)
    points = points.assign(candidate=own, place=number(points, list(tuned)) if tuned else 0)
    firsts = points[points["candidate"] >= 0].drop_duplicates("candidate")
    candidates = firsts[list(dict.fromkeys([*sizes, "trainable_params"]))]
    return points, candidates.reset_index(drop=True)


def _at_best(points, candidates: pd.DataFrame, validation: np.ndarray) -> pd.DataFrame:
    """The candidates with their best point, by the mean validation loss: its number (-1 if none is
    eligible), members and fields."""
    best = [_best(points, points["candidate"] == n, validation) for n in range(len(candidates))]
    return candidates.assign(
        point=[-1 if p is None else p for p in best],
        eligible=[p is not None for p in best],
        members=[[] if p is None else points["members"][p] for p in best],
    )


def _best(points: pd.DataFrame, which: pd.Series, validation: np.ndarray) -> int | None:
    """The number of the eligible point with the lowest mean validation loss among some."""
    own = points.index[which & points["eligible"]]
    return int(own[np.argmin(validation[own].mean(1))]) if len(own) else None
