"""The report of a search for the intrinsic dimension."""

import pathlib

import pandas as pd

from lorax import rundir
from lorax.analysis import figures, intrinsic, runs
from lorax.report import notes, page, words
from lorax.report.page import Picture, Section
from lorax.report.sections import citation, evidence, losses, members, setup

SIZES = {"subspace": "dim"}  # the column that is a kind's size; params for the others
LEAD = "How many dimensions it takes to learn this task."


def is_search(run: runs.Run) -> bool:
    """Whether the run's config asks for a dimension (`search.threshold`)."""
    return bool((run.config.get("config", {}).get("search") or {}).get("threshold"))


def write(
    run: runs.Run, base: str | None = None, share: pathlib.Path | None = None
) -> pathlib.Path:
    """Write the report of a search into its run directory. Returns the path of report.html. base:
    the value of --base. share: write the page as one file here instead."""
    command = page.command([run.directory], base=base)
    sections = page.attempt("Intrinsic dimension", _sections, run, command)
    name = run.directory.resolve().name
    return page.save(run.directory, name, LEAD, sections, command, share)


def _sections(run: runs.Run, command: str) -> list[Section]:
    attempt = page.attempt
    table = runs.summary(run)
    by = runs.Axes("method", tuple(intrinsic.conditions(run, table)))
    points, estimated = read(run)
    files = {"intrinsic.csv": estimated, "intrinsic_points.csv": points}
    page.save_files(run.directory, files)  # calibration reads them
    empty = pd.DataFrame()
    sections = [
        *attempt("Intrinsic dimension", dimension, run, points, estimated),
        *attempt("Calibration", evidence.planted, run, table, empty, empty),
        *attempt("What was run", setup.facts, run, table, by, command),
        *attempt("Members", members.members, run, table, runs.axes(run, table), runs.scores(run)),
        *attempt("Learning curves", _learning, run, table, points, by),
        notes.section(notes.SEARCHES),
        *attempt("Cite this run", citation.citation, run),
    ]
    sections[0] = sections[0]._replace(files=files)
    return sections


def _learning(
    run: runs.Run, table: pd.DataFrame, points: pd.DataFrame, by: runs.Axes
) -> list[Section]:
    """Learning curves at the best learning rate of each size, one colour per size."""
    if points.empty:
        return []
    metric = run.config["config"]["search"]["metric"]
    by_condition = points.groupby(["kind", "condition"], sort=False)
    best = [
        intrinsic.tuned(rows, SIZES.get(kind, "params"), metric) for (kind, _), rows in by_condition
    ]
    shown = table.loc[sorted(pd.concat(best)["member"])]
    which = " Each dimension and each baseline is at its best learning rate."
    others = [axis for axis in by.others if axis != "method"]
    by = runs.Axes("trainable_params", ("method", *others))
    return [losses.learning(run, shown, by, which)]


def read(run: runs.Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`intrinsic.points`, and their `intrinsic.estimate`, which is empty if no subspace was
    trained."""
    search, points = run.config["config"]["search"], intrinsic.points(run)
    if not (points["kind"] == "subspace").any():
        return points, pd.DataFrame()
    return points, intrinsic.estimate(points, search["threshold"], search["metric"])


def dimension(run: runs.Run, points: pd.DataFrame, estimated: pd.DataFrame) -> Section:
    """d90 by condition, and the curves it is read from."""
    title = "Intrinsic dimension"
    if estimated.empty:
        text = '<div class="answer"><p><strong>No subspace has been trained yet.</strong></p></div>'
        return Section(title, text)
    lines = "".join(
        f"<p><strong>{page.escape(headline(row))}</strong></p>" for _, row in estimated.iterrows()
    )
    parts = [f'<div class="answer">{lines}</div>']
    if run.status.get("state") in rundir.UNFINISHED:
        parts.append(page.note("This run is not finished: all numbers are provisional."))
    diverged = int((points["status"] == "diverged").sum())
    if diverged:
        text = (
            f"{diverged} member{words.plural(diverged)} diverged and "
            f"count{'s' * (diverged == 1)} as if nothing had been learned; see the table of "
            "members."
        )
        parts.append(page.note(text))
    called, metric = intrinsic.name(estimated["threshold"].iloc[0]), estimated["metric"].iloc[0]
    measured = runs.loss_name(run) if metric == "loss" else words.axis(metric)
    content, picture = curves(points, estimated, measured, runs.loss_unit(run))
    parts.append(content)
    parts.append(estimates(estimated))
    seeds = [
        f"{row['condition'] or row['method']}: {row['by_seed']}"
        for _, row in estimated.iterrows()
        if row["by_seed"]
    ]
    parts.append(f"<p>{called} of each seed:</p>{page.listing(seeds)}" if seeds else "")
    parts.append(
        "<p>analysis/intrinsic_points.csv has every dimension, learning rate and seed.</p>"
    )
    return Section(title, "".join(parts), {"intrinsic": picture})


def headline(row: pd.Series) -> str:
    """The answer of one condition (a row of `intrinsic.estimate`) in a sentence."""
    prefix = f"{row['condition']}: " if row["condition"] else ""
    return prefix + intrinsic.headline(row)


def curves(
    points: pd.DataFrame, estimated: pd.DataFrame, measured: str, unit: str, name: str = "intrinsic"
) -> tuple[str, Picture]:
    """The HTML and the figure of the metric against the dimension, with a panel per condition.

    measured: the metric's name. unit: of the loss. name: the figure's.
    """
    called, metric = intrinsic.name(estimated["threshold"].iloc[0]), estimated["metric"].iloc[0]
    caption = (
        f"{measured[0].upper()}{measured[1:]} against the "
        "dimension of the subspace, each at its best learning rate. Dots: means over seeds; bars: "
        "95% intervals over seeds (Student's t); small dots: seeds. Dashed: full fine-tuning and "
        f"the value to reach, on the validation rows. Ring: {called}, with its 95% interval (with "
        "the error of full fine-tuning in it) shaded."
    )
    alt = f"Line charts of {metric} by dimension. " + " ".join(
        headline(row) + "." for _, row in estimated.iterrows()
    )
    content = page.aid("The estimate is where the line crosses the value to reach.")
    content += page.figure(name, caption, alt)
    return content, Picture(
        figures.intrinsic(points, estimated, unit), _numbers(points, estimated, metric)
    )


def estimates(estimated: pd.DataFrame) -> str:
    """The table of estimates, a row per condition."""
    cells = [intrinsic.shown(row) for _, row in estimated.iterrows()]
    caption = (
        f"{intrinsic.name(estimated['threshold'].iloc[0])} is the geometric mean of the seeds' "
        "crossings. The published definition is the smallest d tested whose mean over seeds "
        "reaches the needed value. LoRA parameters: how many parameters LoRA needs to reach it."
    )
    return page.table(list(cells[0]), [list(row.values()) for row in cells], caption)


def _numbers(points: pd.DataFrame, estimated: pd.DataFrame, metric: str) -> pd.DataFrame:
    """What `figures.intrinsic` draws: a row per dimension and seed at the best learning rate, with
    the mean and standard error over seeds and the panel's levels."""
    drawn, levels = [], ["baseline", "needed", "d", "low", "high"]
    for _, row in estimated.iterrows():
        subspaces, lora = intrinsic.points_of(points, row["condition"])
        for rows, by in ((subspaces, "dim"), (lora, "params")):
            if len(rows):
                best = intrinsic.tuned(rows, by, metric)
                values = best.groupby(by)["value"]
                best = best.assign(mean=values.transform("mean"), se=values.transform("sem"))
                drawn.append(best.assign(panel=row["condition"], **row[levels]))
    return pd.concat(drawn, ignore_index=True)
