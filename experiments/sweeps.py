"""Runs of the studies in configs/, as the rules' `collect` reads them, and numbers in words."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments import verdicts
from lorax.analysis import runs


class Sweep(NamedTuple):
    """A run of a config at one size."""

    size: str  # "gpt2-nano", "stories-llama-260k": the base
    run: runs.Run
    table: pd.DataFrame  # a row a member, of `runs.summary`; full fine-tuning has rank 0 here


def load(directory: str | pathlib.Path, config: str) -> Sweep:
    """A run of configs/`config`.py. Raises ValueError for a run of another config, and for one that
    is not finished: its settings don't have all of their members."""
    run = runs.load(directory)
    command = run.config.get("command", "")
    if f"configs/{config}.py" not in command:
        raise ValueError(f"{directory}: need a run of configs/{config}.py, got one of {command!r}")
    if (state := run.status.get("state")) != "finished":
        raise ValueError(f"{directory}: the run is {state}; run its command again to finish it")
    table = runs.summary(run)
    table["rank"] = table["rank"].fillna(0).astype(int)
    return Sweep(pathlib.Path(run.config["config"]["base"]).name, run, table)


def each(given: Mapping[str, list[pathlib.Path]], config: str) -> Iterator[tuple[str, Sweep]]:
    """(base, run) of every run of configs/`config`.py. given: as for a rule's `collect`."""
    for base, directories in given.items():
        for directory in directories:
            yield base, load(directory, config)


def evals(sweep: Sweep, split: str = "eval") -> pd.DataFrame:
    """A row a member and evaluation (or call of training): step and loss beside its fields."""
    rows = sweep.run.metrics[sweep.run.metrics["split"] == split]
    return rows[["member", "step", "loss"]].merge(sweep.table.reset_index(drop=True), on="member")


def name(method: str, rank: int) -> str:
    """What a line is called: "LoRA, r = 4", "full fine-tuning"."""
    return {"full": "full fine-tuning", "prefix": "prefix"}.get(method, f"LoRA, r = {rank}")


def at_best(sweep: Sweep, by: list[str]) -> pd.DataFrame:
    """The members of each setting (`by`) at its best learning rate, by their numbers, with a column
    `doubt`; see `experiments.verdicts.tuned`."""
    table = sweep.table.assign(number=sweep.table.index)
    best, doubts = verdicts.tuned(table, by)
    best["doubt"] = [doubts.get(setting, "") for setting in best["setting"]]
    return best.set_index("number").rename_axis(None)


def words(values, digits: int = 3) -> str:
    """Mean and standard error of seeds: "1.234 ± 0.005"; "-" where there is none."""
    values = np.asarray(values, float)
    if not len(values) or not np.isfinite(values).all():
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{values.mean():.{digits}f} ± {standard_error(values):.{digits}f}"


def standard_error(values) -> float:
    """Of the mean of `values`, one a seed."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def markdown(heads: Sequence, rows: Iterable[Sequence]) -> str:
    """A table in Markdown."""
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, rows)])
