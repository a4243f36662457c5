"""Losses of settings, each at its best learning rate, and contrasts of them with intervals.

A run sweeps settings, rates and seeds (`sweep.tune = "lr"` or the whole grid). The validation loss
chooses the rate and the loss of test rows is compared, so that the choice makes none look better.
Two files have all that a contrast needs:

losses.csv  a row a member: base, the setting, lr, seed, status, trainable_params, and losses in
            nats a token (MiniLM: a sentence): start and start_test before training, validation and
            test after it (none for members that a race stopped, or that diverged)
rows.csv    the part of the settings' errors that comes from the test rows: the covariance of the
            mean losses of two settings, by `lorax.analysis.compare.bootstrap`. The other part, from
            the seeds, follows from losses.csv
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments import sweeps, verdicts
from lorax.analysis import compare, runs
from lorax.analysis.compare import Interval

START = "start"  # the base before training, as a setting: the same for every seed


class Losses(NamedTuple):
    """Losses of one base's settings at their best rates: of test rows, where a run has them."""

    split: str  # "test", or "validation" if there are no test rows: a column of losses.csv
    members: pd.DataFrame  # of losses.csv, those at the best rates
    by_seed: pd.DataFrame  # (K seeds, S settings), and START
    from_rows: pd.DataFrame  # (S, S): covariance of the means that comes from the test rows
    rows: int  # how many test rows
    doubts: dict[str, str]  # settings whose best rate is not known, and why

    def contrast(self, weights: Mapping, level: float = compare.LEVEL) -> Interval:
        """The interval of the sum over {setting: weight} of weight times loss, over seeds and rows:
        a difference is {a: 1, b: -1}."""
        seeds = self.of_seeds(weights)
        weights = pd.Series(weights, dtype=float)
        if not np.isfinite(seeds).all():
            raise ValueError(f"{list(weights.index)}: a seed has no test loss")
        rows = self.from_rows.loc[list(weights.index), list(weights.index)].to_numpy()
        by_seeds, by_rows = float(seeds.var(ddof=1) / len(seeds)), float(weights @ rows @ weights)
        return compare.of_variances(
            float(seeds.mean()), by_seeds, by_rows, len(seeds), self.rows, level
        )

    def of_seeds(self, weights: Mapping) -> pd.Series:
        """The same sum of each seed."""
        weights = pd.Series(weights, dtype=float)
        return self.by_seed[list(weights.index)] @ weights.to_numpy()

    def means(self) -> pd.DataFrame:
        """A row a setting: its fields, and `loss` with its interval, `low` and `high`."""
        rows = []
        for setting, members in self.members.groupby("setting", sort=False):
            loss = self.contrast({setting: 1})
            row = members.iloc[0].to_dict() | {"loss": loss.value}
            rows.append(row | {"low": loss.low, "high": loss.high, "n": len(members)})
        return pd.DataFrame(rows)

    def doubt(self, *settings: str) -> str:
        """Why the best rate of one of these settings is not known; "" if all are."""
        return verdicts.Tuned(self.members, self.doubts).doubt(*settings)


def collect(
    given: Mapping[str, list[Path]],
    folder: Path,
    by: list[str],
    config: str,
    only: Callable[[pd.DataFrame], pd.Series] | None = None,
) -> None:
    """Write losses.csv and rows.csv. given: as for a rule's `collect`. by: columns of
    `lorax.analysis.runs.summary` that tell the settings apart. config: the study in configs/ that
    the runs are of. only: of a table of members, which the claim is about; None: all."""
    tables, covariances = [], []
    for base, sweep in sweeps.each(given, config):
        chosen = sweep.table if only is None else sweep.table[only(sweep.table)]
        table = of_members(sweep.run, chosen, base, by)
        tables.append(table)
        covariances.append(covariance(sweep.run, table, base, by))
    verdicts.write(pd.concat(tables), folder, "losses.csv")
    verdicts.write(pd.concat(covariances), folder, "rows.csv")


def of_members(run: runs.Run, table: pd.DataFrame, base: str, by: list[str]) -> pd.DataFrame:
    """Rows of losses.csv, with the member's number as index. table: of `sweeps.load`."""
    names = {
        "base_loss": "start",
        "base_test_loss": "start_test",
        "final_loss": "validation",
        "test_loss": "test",
    }
    columns = [*by, "lr", "seed", "status", "trainable_params", *names]
    table = table[columns].rename(columns=names)
    if "n_train" in by:
        table["n_train"] = ["all" if np.isnan(n) else f"{n:.0f}" for n in table["n_train"]]
    table.insert(0, "base", base)
    return table


def covariance(run: runs.Run, table: pd.DataFrame, base: str, by: list[str]) -> pd.DataFrame:
    """Rows of rows.csv, from the test rows of the members at their settings' best rates."""
    columns = ["base", "a", "b", "covariance", "rows"]
    best = verdicts.tuned(table.assign(member=table.index), by, "validation").members
    if run.rows(best["member"].iloc[0]) is None:  # a run without test rows
        return pd.DataFrame(columns=columns)
    of = {
        setting: [run.rows(member) for member in members.sort_values("seed")["member"]]
        for setting, members in best.groupby("setting", sort=False)
    }
    seeds = {len(rows) for rows in of.values()}
    if len(seeds) > 1:
        raise ValueError(f"{base}: settings have {seeds} seeds; need the same for all")
    first = next(iter(of.values()))[0]
    sums = [[rows["loss"] for rows in members] for members in of.values()]
    sums.append([first["start"]] * seeds.pop())
    drawn = compare.bootstrap(np.array(sums), first["weight"])
    names = [*of, START]
    from_rows = np.cov(drawn.over_rows.T, bias=True)
    rows = [
        (base, a, b, from_rows[i, j], drawn.rows)
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i <= j
    ]
    return pd.DataFrame(rows, columns=columns)


def read(folder: Path, by: list[str]) -> dict[str, Losses]:
    """{base: its losses}, from the CSVs; {} if there are none. Settings are called as
    `verdicts.label` says."""
    table, rows = (verdicts.numbers(folder, name) for name in ("losses.csv", "rows.csv"))
    return {
        base: _of_base(members, rows[rows["base"] == base], by)
        for base, members in table.groupby("base", sort=False)
    }


def _of_base(members: pd.DataFrame, rows: pd.DataFrame, by: list[str]) -> Losses:
    best, doubts = verdicts.tuned(members, by, "validation")
    split, start = ("test", "start_test") if best["test"].notna().all() else ("validation", "start")
    by_seed = best.pivot(index="seed", columns="setting", values=split)
    by_seed[START] = members[start].iloc[0]
    names = list(by_seed)
    from_rows = pd.DataFrame(0.0, names, names)
    if split == "test":
        for row in rows.itertuples():
            from_rows.loc[row.a, row.b] = from_rows.loc[row.b, row.a] = row.covariance
    count = int(rows["rows"].iloc[0]) if len(rows) else 1
    return Losses(split, best, by_seed, from_rows, count, doubts)
