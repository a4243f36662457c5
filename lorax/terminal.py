"""The terminal during a sweep: lines, a bar with the time left, a table of members."""

import sys

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lorax.analysis import intrinsic
from lorax.console import console
from lorax.train.loop import Terminal


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
        self.task, self.reported = None, -1
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        self.console.print(line, soft_wrap=True)

    def terminal(self, members: list[dict]) -> Terminal:
        """The functions that the training loop calls. members: the rows of members.jsonl."""
        by_index = {row["member"]: row for row in members}
        return Terminal(self.say, self.progress, lambda row: self._finished(by_index, row))

    def progress(self, done: float, total: float) -> None:
        """Show how many member steps are done; without a bar, a line at every tenth."""
        if self.task is None:
            self.task = self.bar.add_task("", total=total)
        self.bar.update(self.task, completed=done, total=total)
        tenth = int(10 * done / total)
        if not self.console.is_terminal and tenth > self.reported:
            left = self.bar.tasks[0].time_remaining
            self.say(f"{10 * tenth:3d}% trained" + ("" if left is None else f", {left:.0f} s left"))
            self.reported = tenth

    def end_bar(self) -> None:
        """End the bar of training, so that the report can draw its own."""
        if self.console.is_terminal:
            self.bar.stop()

    def _finished(self, by_index, row) -> None:
        loss = "diverged" if row["eval_loss"] is None else f"eval loss {row['eval_loss']:.4f}"
        params = by_index[row["member"]]["trainable_params"]
        self.say(f"  {row['name']:28s} {params:>12,} parameters   {loss}")

    def table(self, members: list[dict], rows: dict[int, dict]) -> None:
        """All members, best first."""
        table = Table(title="Members, best first", title_justify="left")
        scores = list(dict.fromkeys(name for row in rows.values() for name in row["scores"]))
        headings = ("member", "parameters", "scale s", "eval loss", *scores)
        for name in (*headings, "seconds", "status"):
            left = name in ("member", "status")
            table.add_column(name, justify="left" if left else "right", no_wrap=name == "member")
        worst = float("inf")
        for row in sorted(members, key=lambda r: rows[r["member"]]["eval_loss"] or worst):
            final = rows[row["member"]]
            loss = final["eval_loss"]
            table.add_row(
                row["name"],
                f"{row['trainable_params']:,}",
                "-" if row["scale"] is None else f"{row['scale']:g}",
                "-" if loss is None else f"{loss:.4f}",
                *(f"{final['scores'][n]:.4f}" if n in final["scores"] else "-" for n in scores),
                f"{final['seconds']:.1f}",
                status(final),
            )
        self.console.print(table)

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


def status(final: dict) -> str:
    """A member's status and, if it ended before the last step, where. final: its row of
    `lorax.train.loop.train`."""
    at = final.get("stopped_at") if final["status"] == "stopped" else final["diverged_at"]
    return final["status"] + ("" if at is None else f" at step {at}")
