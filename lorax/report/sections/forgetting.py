"""The section on forgetting, of runs with further tasks (`config.eval.also`)."""

import numpy as np
import pandas as pd

from lorax.analysis import compare, figures, forgetting, runs
from lorax.report import page
from lorax.report.page import Picture, Section

LOSSES = 9  # at which frontiers are drawn
TITLE = "Forgetting"


def section(run: runs.Run, table: pd.DataFrame) -> list[Section]:
    """What is forgotten for what is learned; [] for a run without further tasks. table: the run's
    `runs.summary`."""
    points = forgetting.points(run, table)
    learned = points[points["step"] > 0]
    if not len(learned):
        return []
    tasks = forgetting.tasks(run)
    points["line"] = points["line"].replace("", "all members")
    means = pd.concat([_means(points[points["task"] == task]).assign(task=task) for task in tasks])
    caption = (
        "Forgetting, the loss on a further task less that before the first step, against the loss "
        "on the task that is trained. Thin lines: members, from the first step to the last. Thick: "
        "the least forgetting over a line's rates and steps at which the loss is reached, means "
        "over seeds with 95% intervals."
    )
    ends = learned.groupby("line")["forgetting"].mean()
    alt = f"Chart of forgetting by validation loss: {ends.idxmin()} forgets least on average."
    content = page.aid("Down and to the left is better. Compare lines at the same loss.")
    content += page.figure("frontier", caption, alt)
    content += _table(points, tasks, runs.loss_unit(run))
    drawn = points[["task", "line", "member", "lr", "seed", "step", "loss", "forgetting", "kl"]]
    files = {"forgetting.csv": drawn, "frontier.csv": means}
    picture = Picture(
        figures.frontier(points.drop(columns="kl"), means, runs.loss_unit(run)), means
    )
    return [Section(TITLE, content, {"frontier": picture}, files)]


def _means(points: pd.DataFrame) -> pd.DataFrame:
    """The frontiers of one task, means over seeds, at the losses that all seeds of a line reach."""
    found = []
    for line, of_line in points.groupby("line", sort=False):
        start = of_line.loc[of_line["step"] == 0, "loss"].min()
        least = forgetting.lowest_common(of_line, [line])
        if not least < start:
            continue
        table = forgetting.frontier(of_line, np.linspace(start, least, LOSSES))
        for loss, of_seeds in table.groupby("loss"):
            mean = compare.interval(of_seeds["forgetting"])
            row = {"line": line, "loss": loss, "forgetting": mean.value}
            found.append(row | {"low": mean.low, "high": mean.high, "n": len(of_seeds)})
    return pd.DataFrame(found, columns=["line", "loss", "forgetting", "low", "high", "n"])


def _table(points: pd.DataFrame, tasks: list[str], unit: str) -> str:
    """Every line's lowest loss, and its forgetting at the lowest loss that all of them reach."""
    lines = list(dict.fromkeys(points["line"]))
    common = forgetting.lowest_common(points, lines)
    header = ["", "lowest loss of all seeds"]
    header += [f"forgetting of {task} at {common:.3f}" for task in tasks]
    rows = []
    for line in lines:
        of_line = points[points["line"] == line]
        row = [line, page.Fixed(forgetting.lowest_common(of_line, [line]))]
        for task in tasks:
            at = forgetting.frontier(of_line[of_line["task"] == task], [common])["forgetting"]
            row.append(_with_interval(at))
        rows.append(row)
    caption = (
        f"The least forgetting, in {unit} a target, at the lowest loss that every seed of every "
        "line reaches: means over seeds, with half the width of their 95% intervals."
    )
    return page.table(header, rows, caption)


def _with_interval(values: pd.Series) -> str:
    mean = compare.interval(values)
    half = (mean.high - mean.low) / 2
    return f"{mean.value:.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "")
