"""The terminal during a sweep: lines, a bar with the time left, a table of settings."""

import statistics
import sys
import time
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lorax import rundir
from lorax.analysis import intrinsic, runs
from lorax.console import console
from lorax.listing import duration
from lorax.train.loop import Terminal

WIDTH = 80  # columns of the table of settings, if the output is no terminal
ROWS = 40  # settings in it; the others are in the report
FEW = 12  # members, up to which each has a line when it is done
NAME = 22  # columns of a member's name in a line
# An evaluation has a line if so many seconds have passed since the last one, and this share of the
# time since the beginning, and at each tenth of the way: an hour has at most about 200 lines.
SECONDS, SHARE = 1.0, 0.03


class Evaluation(NamedTuple):
    """One evaluation of the members of a program. losses: {member: loss, or None if it is not
    finite}."""

    step: int
    losses: dict[int, float | None]


class Evaluations:
    """The evaluations of a run in training, as they come into metrics.jsonl."""

    def __init__(self, directory):
        self.directory, self.read = directory, rundir.metrics_size(directory)

    def newest(self) -> Evaluation | None:
        """The last evaluation since the last call; None if there was none."""
        if rundir.metrics_size(self.directory) < self.read:  # a continued run has cut it
            self.read = 0
        rows, self.read = rundir.metrics_after(self.directory, self.read)
        rows = [row for row in rows if row["split"] == "eval"]
        if not rows:
            return None
        step = rows[-1]["step"]
        return Evaluation(step, {row["member"]: row["loss"] for row in rows if row["step"] == step})


class Screen:
    """Context that owns the terminal; if output is not a terminal, the bar becomes lines."""

    def __enter__(self):
        # A notebook sets FORCE_COLOR in subprocesses, and rich would then draw bars too.
        options = {} if sys.stdout.isatty() else {"force_terminal": False, "width": 140}
        self.console = console(**options)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar.start()
        self.task, self.reported, self.members, self.said = None, -1, {}, set()
        self.began = self.spoke = time.monotonic()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        self.console.print(line, soft_wrap=True)

    def terminal(self, members: list[dict]) -> Terminal:
        """The functions that the training loop calls. members: the rows of members.jsonl."""
        self.members = {row["member"]: row for row in members}
        return Terminal(self.say, self.progress, self._finished)

    def progress(self, done: float, total: float, newest: Evaluation | None = None) -> None:
        """Show how many member steps are done, and the newest evaluation if there is a new one.

        Without a bar, each tenth of the way has a line, unless an evaluation had one.
        """
        if self.task is None:
            self.task = self.bar.add_task("", total=total)
        self.bar.update(self.task, completed=done, total=total)
        left, tenth = self.bar.tasks[0].time_remaining, int(10 * done / total)
        left = "" if left is None else f", {duration(left)} left"
        line = evaluated(newest, self.members) if newest else None
        if line in self.said:  # parts of a group start from the same loss
            line = None
        if line and (tenth > self.reported or self._is_due()):
            self.say(line + left)
            self.said.add(line)
        elif not self.console.is_terminal and tenth > self.reported:
            self.say(f"{10 * tenth:3d}% trained{left}")
        else:
            return
        self.reported, self.spoke = tenth, time.monotonic()

    def _is_due(self) -> bool:
        """Whether enough time has passed for the line of an evaluation."""
        now = time.monotonic()
        return now - self.spoke >= max(SECONDS, SHARE * (now - self.began))

    def end_bar(self) -> None:
        """End the bar of training, so that the report can draw its own."""
        if self.console.is_terminal:
            self.bar.stop()

    def _finished(self, row) -> None:
        if len(self.members) <= FEW:
            loss = "diverged" if row["eval_loss"] is None else f"eval loss {row['eval_loss']:.4f}"
            params = self.members[row["member"]]["trainable_params"]
            self.say(f"  {row['name']:28s} {params:>12,} parameters   {loss}")

    def table(self, run: runs.Run) -> None:
        """The settings of a run, best first; of several seeds, their mean."""
        cells = settings(run)
        width = self.console.width if self.console.is_terminal else WIDTH
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
        for heading in _fitting(cells, width):
            left = heading in ("setting", "method", "targets", "status")
            table.add_column(heading, justify="left" if left else "right", overflow="fold")
        for row in cells[:ROWS]:
            table.add_row(*(row[column.header] for column in table.columns))
        self.say("\nSettings, best first")
        self.console.print(table)
        if len(cells) > ROWS:
            self.say(f"and {len(cells) - ROWS} more; the report has all")

    def dimensions(self, estimates) -> None:
        """The result of a search: a table of `lorax.analysis.intrinsic.estimate`."""
        rows = [intrinsic.shown(row) for _, row in estimates.iterrows()]
        title = f"Intrinsic dimension ({intrinsic.name(estimates['threshold'].iloc[0])})"
        table = Table(title=title, title_justify="left")
        for heading in rows[0]:
            left = heading in ("condition", "verdict")
            table.add_column(heading, justify="left" if left else "right")
        for row in rows:
            table.add_row(*row.values())
        self.console.print(table)


def evaluated(newest: Evaluation, members: dict[int, dict]) -> str:
    """An evaluation in a line: "step 50/150: best 2.1345 (rank=8), median 2.3456".
    members: {member: its row of members.jsonl}."""
    losses = {member: loss for member, loss in newest.losses.items() if loss is not None}
    steps = members[next(iter(newest.losses))]["steps"]
    line = f"step {newest.step}/{steps}: "
    if not losses:
        return line + "no finite loss"
    if len(newest.losses) == 1 or not newest.step:
        of_base = "" if newest.step else ", before training"
        return f"{line}eval loss {statistics.median(losses.values()):.4f}{of_base}"
    best = min(losses, key=losses.get)
    name = members[best]["name"]
    name = name if len(name) <= NAME else name[: NAME - 1] + "…"
    median = f"median {statistics.median(losses.values()):.4f}"
    return f"{line}best {losses[best]:.4f} ({name}), {median}"


# ------------------------------------------------------------------------------ table of settings


def settings(run: runs.Run) -> list[dict[str, str]]:
    """A row of texts per setting, best first: its axes, parameters, mean loss over its seeds with
    their standard deviation, scores, and what became of the members that have no loss.

    Where an axis was tuned, a setting stands at its best value, and has it. The loss and the scores
    are of the test rows if there are any; scores of generated texts are of the task's prompts.
    """
    table = runs.summary(run)
    loss = runs.measured(table).loss
    has_numbers = lambda column: column in table and table[column].notna().any()
    columns = {
        name: f"test_{name}" if has_numbers(f"test_{name}") else name for name in runs.scores(run)
    }
    by = runs.axes(run, table)
    axes = list(by.names) or ["method" if by.tuned else "setting"]
    fields, rows = [*axes, *by.tuned], []
    for _, members in table.groupby(axes, sort=False, dropna=False):
        group = runs.at_best(members, by.tuned)
        first, losses = group.iloc[0], group[loss].dropna()
        row = {name: runs.in_words(first[name], name) or "only" for name in fields}
        row["parameters"] = f"{first['trainable_params']:,}"
        row[loss.replace("final", "eval").replace("_", " ")] = _number(losses.mean())
        if len(table) > len(table[fields].drop_duplicates()):
            row |= {"± sd": _number(losses.std()), "seeds": str(len(losses))}
        row |= {name: _number(group[column].mean()) for name, column in columns.items()}
        if (table["status"] != "finished").any():
            row["status"] = _unfinished(members)
        rows.append(((len(losses) < len(group), losses.mean() if len(losses) else 0.0), row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _unfinished(group) -> str:
    """What became of the members of a setting that did not finish: "1 diverged" of several seeds,
    "diverged at 50" of a single one."""
    others = group[group["status"] != "finished"]
    if len(group) > 1 or others.empty:
        return ", ".join(f"{n} {status}" for status, n in others["status"].value_counts().items())
    status, *steps = others.iloc[0][["status", "stopped_at", "diverged_at"]]
    return status + "".join(f" at {step:g}" for step in steps if not runs.is_missing(step))


def _number(x) -> str:
    return "-" if x != x else f"{x:.4f}"


def _fitting(cells: list[dict[str, str]], width: int) -> list[str]:
    """The headings that fit side by side: the last scores are left out first."""
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in cells[0]}
    headings, loss = list(widths), next(i for i, name in enumerate(widths) if "loss" in name)
    extra = [name for name in headings[loss + 1 :] if name not in ("± sd", "seeds", "status")]
    while extra and sum(widths[name] + 2 for name in headings) > width:
        headings.remove(extra.pop())
    return headings
