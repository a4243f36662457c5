"""Sections on statistics that the user wrote (`analysis.also`, --also): one for each."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.analysis import figures, runs, tables
from lorax.report import page, words
from lorax.report.page import Picture, Section
from lorax.report.selection import label, unmeasured

KEYS = ["member", "path", "layer", "target"]


def of_run(
    run: runs.Run,
    updates: Mapping[int, tables.Updates],
    statistics: Sequence[tables.Statistic],
    kernels: Mapping[str, np.ndarray] | None,
    why: str,
) -> dict[str, tables.Measured]:
    """{name: a statistic of all updates}, for the given statistics and those that the run's config
    names. why: the reason if there are no kernels."""
    configured = (run.config.get("config", {}).get("analysis") or {}).get("also") or ()
    names = {str(spelling).rpartition(":")[2] for spelling in configured}
    names -= {statistic.__name__ for statistic in statistics}
    return tables.statistics(updates, statistics, kernels, why) | _stored(run, sorted(names))


def _stored(run: runs.Run, names: Sequence[str]) -> dict[str, tables.Measured]:
    """The values that an earlier report wrote for these statistics. Their files are not run:
    config.json is data, which may come from elsewhere."""
    stored = {}
    for name in names:
        file = rundir.table(run.directory, name)
        if not name.isidentifier() or name in tables.RESERVED or not file.exists():
            continue
        table = pd.read_csv(file)
        columns = [column for column in table if column not in KEYS]
        empty = table[table[columns].isna().any(axis=1)]
        why = {(m, path): "no number" for m, path in empty[["member", "path"]].to_numpy()}
        stored[name] = tables.Measured(table, columns, why)
    return stored


def sections(
    measured: Mapping[str, tables.Measured],
    shown: pd.DataFrame,
    main: str,
    statistics: Sequence[tables.Statistic],
) -> list[Section]:
    """A section for each statistic.

    Args:
      measured: their values for all updates.
      shown: one row per member that figures show: member, and the column `main`.
      statistics: the functions; the first lines of their docstrings are shown as descriptions.
    """
    parts, descriptions = [], _described(statistics)
    for name, values in measured.items():
        parts += page.attempt(
            title(name), _section, name, values, shown, main, descriptions.get(name, "")
        )
    return parts


def title(name: str) -> str:
    """ "Condition number" for condition_number."""
    return f"{name[:1].upper()}{name[1:]}".replace("_", " ")


def _described(statistics: Sequence[tables.Statistic]) -> dict[str, str]:
    """The first line of each docstring."""
    lines = {
        statistic.__name__: (statistic.__doc__ or "").strip().partition("\n")[0]
        for statistic in statistics
    }
    return {name: line for name, line in lines.items() if line}


def _beside(table: pd.DataFrame, main: str) -> pd.DataFrame:
    """The table, to which the column `main` can be added: a number of that name gets another."""
    return table.rename(columns={main: f"{main} of yours"})


def headings(measured: Mapping[str, tables.Measured], main: str) -> pd.DataFrame | None:
    """All statistics by member and path, side by side, under the headings of the report's tables.
    main: a column that these tables have."""
    joined = None
    for name, values in measured.items():
        single = values.columns == [name]
        renamed = {
            c: words.axis(name) if single else f"{words.axis(name)}: {c}" for c in values.columns
        }
        table = values.table[["member", "path", *values.columns]].rename(columns=renamed)
        joined = table if joined is None else joined.merge(table, on=["member", "path"])
    return None if joined is None else _beside(joined, main)


def _section(
    name: str, values: tables.Measured, shown: pd.DataFrame, main: str, description: str
) -> Section:
    files = {f"{name}.csv": values.table}
    content = page.paragraph(description) if description else ""
    if values.missing:
        content += page.note(unmeasured(values.missing, len(values.table)))
    numbers = _beside(values.table[values.columns], main)
    columns = list(numbers)
    shown_rows = label(values.table[KEYS].join(numbers), shown, main)
    shown_rows = shown_rows.dropna(subset=columns, how="all")
    if not len(shown_rows):
        return Section(
            title(name), content + page.paragraph("There are no numbers to draw."), files=files
        )
    first = shown_rows[columns[0]]
    caption = (
        f"{title(name)} by layer, one panel per target: means over members, with 95% intervals "
        "over members."
    )
    alt = (
        f"Line charts of {words.axis(name)} by layer: from {first.min():.3g} to {first.max():.3g}, "
        f"{first.mean():.3g} on average."
    )
    pictures: dict[str, Picture] = {}
    for column in columns:
        chart = page.unused(name if not pictures else f"{name}_{page.slug(column)}", pictures)
        of = caption if len(columns) == 1 else f"{words.axis(column)}: {caption}"
        content += page.figure(chart, of, alt, folded=words.axis(column) if pictures else "")
        drawn = figures.by_layer_and_value(shown_rows, column, main)
        pictures[chart] = Picture(drawn, shown_rows)
        alt = f"Line charts of {words.axis(column)} by layer."
    return Section(title(name), content, pictures, files)
