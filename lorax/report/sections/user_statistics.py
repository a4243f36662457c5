"""Sections on statistics that the user wrote (`analysis.also`, --also): one for each."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.analysis import figures, runs, tables
from lorax.report import page, words
from lorax.report.page import Picture, Section
from lorax.report.selection import drawn_of, label, spread, unmeasured

MAX_TARGETS = 4  # columns of a figure
MAX_NUMBERS = 4  # rows
KEYS = ["member", "path", "layer", "target"]


def of_run(
    run: runs.Run,
    updates: Mapping[int, tables.Updates],
    statistics: Sequence[tables.Statistic],
    kernels: Mapping[str, np.ndarray] | None,
    why: str,
) -> dict[str, tables.Measured]:
    """{name: what a statistic says of all updates}: of those given, and of those that the run's
    config names. why: there are no kernels."""
    asked = (run.config.get("config", {}).get("analysis") or {}).get("also") or ()
    names = {str(spelling).rpartition(":")[2] for spelling in asked}
    names -= {statistic.__name__ for statistic in statistics}
    return tables.statistics(updates, statistics, kernels, why) | _stored(run, sorted(names))


def _stored(run: runs.Run, names: Sequence[str]) -> dict[str, tables.Measured]:
    """What an earlier report wrote of these statistics. Their files are not run: config.json is
    data, which may come from elsewhere."""
    found = {}
    for name in names:
        file = rundir.table(run.directory, name)
        if not name.isidentifier() or name in tables.RESERVED or not file.exists():
            continue
        table = pd.read_csv(file)
        columns = [column for column in table if column not in KEYS]
        empty = table[table[columns].isna().any(axis=1)]
        why = {(m, path): "no number" for m, path in empty[["member", "path"]].to_numpy()}
        found[name] = tables.Measured(table, columns, why)
    return found


def sections(
    measured: Mapping[str, tables.Measured],
    shown: pd.DataFrame,
    main: str,
    statistics: Sequence[tables.Statistic],
) -> list[Section]:
    """A section for each statistic.

    Args:
      measured: what they say of all updates.
      shown: a row a member that figures show: member, and the column `main`.
      statistics: the functions; their docstrings' first lines say what they are.
    """
    made, about = [], _described(statistics)
    for name, of in measured.items():
        made += page.attempt(title(name), _section, name, of, shown, main, about.get(name, ""))
    return made


def title(name: str) -> str:
    """ "Condition number" for condition_number."""
    return f"{name[:1].upper()}{name[1:]}".replace("_", " ")


def _described(statistics: Sequence[tables.Statistic]) -> dict[str, str]:
    """The first line of each docstring."""
    lines = {of.__name__: (of.__doc__ or "").strip().partition("\n")[0] for of in statistics}
    return {name: line for name, line in lines.items() if line}


def headings(measured: Mapping[str, tables.Measured]) -> pd.DataFrame | None:
    """All statistics side by side, by member and path, under the headings of a report's table."""
    joined = None
    for name, of in measured.items():
        single = of.columns == [name]
        named = {c: words.axis(name) if single else f"{words.axis(name)}: {c}" for c in of.columns}
        table = of.table[["member", "path", *of.columns]].rename(columns=named)
        joined = table if joined is None else joined.merge(table, on=["member", "path"])
    return joined


def _section(name: str, of: tables.Measured, shown: pd.DataFrame, main: str, about: str) -> Section:
    files = {f"{name}.csv": of.table}
    content = page.paragraph(about) if about else ""
    if of.missing:
        content += page.note(unmeasured(of.missing, len(of.table)))
    here = label(of.table, shown, main).dropna(subset=of.columns, how="all")
    if not len(here):
        return Section(title(name), content + page.paragraph("No number to draw."), files=files)
    targets, columns = list(dict.fromkeys(here["target"])), of.columns
    drawn = spread(targets, MAX_TARGETS)
    caption = (
        f"{title(name)} by layer: a line for each {words.axis(main)}, means over seeds; bars are "
        "one standard error." + drawn_of([], [], drawn, targets, f"analysis/{name}.csv has all")
    )
    if len(columns) > MAX_NUMBERS:
        caption += f" The first {MAX_NUMBERS} of {len(columns)} numbers."
    first = here[columns[0]]
    alt = (
        f"Line charts of {words.axis(name)} by layer: from {first.min():.3g} to {first.max():.3g}, "
        f"{first.mean():.3g} on average."
    )
    content += page.figure(name, caption, alt)
    figure = figures.by_layer_and_value(
        here[here["target"].isin(drawn)], columns[:MAX_NUMBERS], main
    )
    return Section(title(name), content, {name: Picture(figure, here)}, files)
