"""Forgetting: what members lose on further tasks (`eval.also`) for what they gain on their own.

The frontier of a setting is the least forgetting at which it reaches a loss on its task: at any of
its rates, stopped at any step between two evaluations. Settings are compared at equal loss, seed by
seed. Biderman et al. 2024, LoRA Learns Less and Forgets Less (arXiv:2405.09673, section 4.3).
"""

import os
import pathlib
from collections.abc import Iterable

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.analysis import runs
from lorax.analysis.compare import Interval, paired
from lorax.analysis.runs import Run
from lorax.interop.adapter import Factors

WITHOUT = ("lr", "setting")  # fields that do not tell the lines of a frontier apart


def tasks(run: Run) -> list[str]:
    """The names of the further tasks of a run; [] if it has none."""
    splits = run.metrics["split"].unique()
    return [name.removeprefix(rundir.ALSO) for name in splits if name.startswith(rundir.ALSO)]


def points(run: Run, table: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per further task, member and evaluation that is finite.

    Columns: task, member, line (the setting without its rate: "method=lora, rank=4"), lr, seed,
    step, loss (on the validation rows of the run's own task), forgetting (loss on the further task
    less that before the first step), kl (from the base; NaN where a run has none), all in nats a
    target. Empty for a run without further tasks. table: the run's `runs.summary`, if it is known.
    """
    columns = ["task", "member", "line", "lr", "seed", "step", "loss", "forgetting", "kl"]
    further = tasks(run)
    if not further:
        return pd.DataFrame(columns=columns)
    of_member = _lines(run, runs.summary(run) if table is None else table)
    evals = run.metrics[run.metrics["split"] == "eval"]
    evals = evals.reindex(columns=["member", "step", "loss", "kl"])
    found = []
    for task in further:
        also = run.metrics[run.metrics["split"] == rundir.ALSO + task][["member", "step", "loss"]]
        start = also[also["step"] == 0].set_index("member")["loss"]
        also = also.assign(forgetting=also["loss"] - also["member"].map(start)).drop(columns="loss")
        rows = evals.merge(also, on=["member", "step"]).dropna(subset=["loss", "forgetting"])
        found.append(rows.join(of_member, on="member").assign(task=task))
    return pd.concat(found)[columns]


def _lines(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """The columns line, lr and seed of a run's members. table: their `runs.summary`."""
    names = [name for name in runs.axes(run, table).names if name not in WITHOUT]
    lines = [runs.fields(row, names) for _, row in table.iterrows()]
    return table[["lr", "seed"]].assign(line=lines)[["line", "lr", "seed"]]


def forgetting_at(points: pd.DataFrame, loss: float) -> float:
    """What is forgotten when a loss is reached for the first time, in the evaluations of one member
    (rows of `points`), linearly between two of them; NaN if it is never reached."""
    ordered = points.sort_values("step")
    losses, forgotten = ordered["loss"].to_numpy(), ordered["forgetting"].to_numpy()
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        return np.nan
    after = reached[0]
    if after == 0:
        return float(forgotten[0])
    before = after - 1
    share = (losses[before] - loss) / (losses[before] - losses[after])
    return float(forgotten[before] + share * (forgotten[after] - forgotten[before]))


def frontier(points: pd.DataFrame, losses: Iterable[float]) -> pd.DataFrame:
    """The least forgetting over a line's rates at which each of the losses is reached.

    points: of one task. Columns: line, seed, loss, forgetting (NaN if no rate reaches the loss).
    """
    losses, rows = list(losses), []
    for (line, seed), of_line in points.groupby(["line", "seed"], sort=False):
        members = [of_member for _, of_member in of_line.groupby("member")]
        for loss in losses:
            found = [forgetting_at(of_member, loss) for of_member in members]
            reached = [x for x in found if np.isfinite(x)]
            least = min(reached, default=np.nan)
            rows.append({"line": line, "seed": seed, "loss": loss, "forgetting": least})
    return pd.DataFrame(rows)


def lowest_common(points: pd.DataFrame, lines: Iterable[str]) -> float:
    """The lowest loss that every seed of these lines reaches, at its best rate and step."""
    chosen = points[points["line"].isin(set(lines))]
    return float(chosen.groupby(["line", "seed"])["loss"].min().max())


def at_equal_loss(
    points: pd.DataFrame, a: str, b: str, loss: float | None = None, level: float = 0.95
) -> Interval:
    """How much more line a forgets than line b at equal loss, paired by seed: the interval of the
    difference on their frontiers.

    points: of one task. loss: None for `lowest_common` of the two. Raises ValueError for a line
    that there is not, and for a loss that a seed does not reach.
    """
    for line in (a, b):
        if line not in set(points["line"]):
            known = ", ".join(dict.fromkeys(points["line"]))
            raise ValueError(f"line {line!r}: there are {known}")
    loss = lowest_common(points, (a, b)) if loss is None else loss
    table = frontier(points[points["line"].isin((a, b))], [loss])
    seeds = table.pivot(index="seed", columns="line", values="forgetting")
    if seeds[[a, b]].isna().any(axis=None):
        raise ValueError(f"loss {loss:.4g}: not reached by all seeds of {a} and {b}")
    return paired(seeds[a], seeds[b], level)


def squared_norms(run: Run, base=None) -> pd.Series:
    """The sum over matrices of the squared Frobenius norm of dW, of every member that saved an
    update. base: as for `Run.update`."""
    found = {}
    for member in run.members.index:
        try:
            found[member] = sum(map(_squared, run.update(member, base).values()))
        except (FileNotFoundError, ValueError):
            continue  # it diverged, was stopped, or changes no weights
    return pd.Series(found, name="squared_norm", dtype=float)


def _squared(update: Factors | np.ndarray) -> float:
    """The squared norm of dW (in, out), of factors without making dW: s^2 tr(a^T a b b^T)."""
    if not isinstance(update, Factors):
        return float(np.square(np.asarray(update, np.float64)).sum())
    a, b = np.asarray(update.a, np.float64), np.asarray(update.b, np.float64)
    return float(update.s**2 * np.sum((a.T @ a) * (b @ b.T)))


def held_out_r2(x: np.ndarray, y: np.ndarray, groups: Iterable, degree: int = 2) -> float:
    """R^2 of a polynomial of x for y (n,) when each group is predicted from the others: 1 less the
    squared errors over the squared deviations of y from its mean. Below 0 if the mean of all
    predicts better. Raises ValueError for fewer than two groups."""
    x, y, groups = np.asarray(x, float), np.asarray(y, float), np.asarray(list(groups))
    names = np.unique(groups)
    if len(names) < 2:
        raise ValueError(f"groups {[*names]}: leaving one out needs at least two")
    errors = np.empty_like(y)
    for name in names:
        out = groups == name
        # A fit on fewer different values than coefficients would not be determined.
        of = min(degree, len(np.unique(x[~out])) - 1)
        fit = np.polynomial.Polynomial.fit(x[~out], y[~out], of)
        errors[out] = y[out] - fit(x[out])
    return float(1 - np.square(errors).sum() / np.square(y - y.mean()).sum())


def sequence(directory: str | os.PathLike) -> pd.DataFrame:
    """The losses of a sequence of tasks (`config.sequence`) on every task after each.

    One row per member, run and task: after (the task that was trained last), number (of its run,
    from 1), member (of that run), first (the same member in the first run), line, lr and seed as in
    `points`, task, loss (on its validation rows, NaN if the member diverged), before (of the base
    that the sequence began with), learned (of the member when that task had just been trained, NaN
    before that; `before` for a task that is never trained) and forgetting (loss less learned).

    Raises FileNotFoundError if there is no run in the directory.
    """
    folders = sorted(pathlib.Path(directory).glob("[0-9]*-*"), key=_number)
    if not folders:
        raise FileNotFoundError(f"{directory}: no runs 1-NAME, 2-NAME... of a sequence")
    rows, first, of_first = [], {}, None
    for folder in folders:
        run = runs.load(folder)
        table, name = runs.summary(run), folder.name.partition("-")[2]
        if of_first is None:
            of_first, first = _lines(run, table), {member: member for member in table.index}
        else:  # a member's base is in a folder that has the number of the one it goes on from
            first = {m: first[int(os.path.basename(base))] for m, base in table["base"].items()}
        for member, row in table.iterrows():
            given = {"after": name, "number": _number(folder), "member": member}
            given |= {"first": first[member], **of_first.loc[first[member]]}
            ends = {
                task: _ends(row, f"final_also_{task}", f"forgetting_{task}") for task in tasks(run)
            }
            ends[name] = row["final_loss"], row["base_loss"]
            for task, (loss, start) in ends.items():
                rows.append(given | {"task": task, "loss": loss, "start": start})
    return _since_learned(pd.DataFrame(rows))


def _ends(row: pd.Series, after: str, difference: str) -> tuple[float, float]:
    """A loss after training and before it."""
    return row[after], row[after] - row[difference]


def _number(folder: pathlib.Path) -> int:
    return int(folder.name.partition("-")[0])


def _since_learned(table: pd.DataFrame) -> pd.DataFrame:
    """The columns before, learned and forgetting in place of start."""
    keys = ["first", "task"]
    own = table[table["after"] == table["task"]].set_index(keys)
    begun = table[table["number"] == table["number"].min()].set_index(keys)["start"]
    at = pd.MultiIndex.from_frame(table[keys])
    learned = own["loss"].reindex(at).to_numpy()
    known = own["number"].reindex(at).to_numpy() <= table["number"].to_numpy()
    table = table.assign(before=begun.reindex(at).to_numpy())
    never = ~table["task"].isin(set(table["after"]))  # what the base knew: a task of `eval.also`
    table["learned"] = np.where(never, table["before"], np.where(known, learned, np.nan))
    return table.assign(forgetting=table["loss"] - table["learned"]).drop(columns="start")
