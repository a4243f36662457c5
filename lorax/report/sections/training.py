"""Sections on training: how the updates grew, and how the activations changed. They need
`config.analysis.trajectory` and `config.analysis.cka`."""

import pandas as pd

from lorax import rundir
from lorax.analysis import figures, runs
from lorax.report import page, words
from lorax.report.page import Picture, Section
from lorax.report.selection import label


def sections(run: runs.Run, shown: pd.DataFrame, main: str) -> list[Section]:
    """Sections on the shown members, one for each table in analysis/."""
    tables = {name: _read(run, name, shown, main) for name in ("trajectory", "cka")}
    parts = []
    if tables["trajectory"] is not None:
        parts.append(_trajectory(tables["trajectory"], main))
    if tables["cka"] is not None:
        parts.append(_cka(tables["cka"], main))
    return parts


def _read(run: runs.Run, name: str, shown: pd.DataFrame, main: str) -> pd.DataFrame | None:
    file = rundir.table(run.directory, name)
    table = label(pd.read_csv(file), shown, main) if file.exists() else pd.DataFrame()
    return table if len(table) else None


def _trajectory(table: pd.DataFrame, main: str) -> Section:
    last = table[table["step"] == table["step"].max()]
    half = table[table["norm"] >= 0.5 * last["norm"].mean()]["step"].min()
    caption = (
        "The updates during training. Thin lines are members, each the mean over its matrices of "
        "all layers and targets; thick lines are means over the members of a value."
    )
    alt = (
        f"Line charts of ΔW during training: at the last step the effective rank is "
        f"{last['effective'].mean():.1f} on average, and half of the final norm is first reached "
        f"by step {half}."
    )
    content = page.aid(
        "The overlap shows when the final directions appear: if a line rises early and stays "
        "high, the update's directions settled early."
    )
    content += page.figure("trajectory", caption, alt)
    figure = figures.trajectory(table, main)
    return Section("During training", content, {"trajectory": Picture(figure, table)})


def _cka(table: pd.DataFrame, main: str) -> Section:
    lowest = table.loc[table["cka"].idxmin()]
    caption = (
        "Linear CKA between the residual streams with and without the adapter, by layer: means "
        "over members, with 95% intervals over members."
    )
    alt = (
        f"Line chart of CKA by layer: lowest, {lowest['cka']:.3f}, in layer {lowest['layer']:.0f} "
        f"at {words.axis(main)} {page.show(lowest[main])}."
    )
    content = page.aid("1: the layer's activations are unchanged; lower values: they changed more.")
    content += page.figure("cka", caption, alt)
    figure = figures.cka(table, main)
    return Section("Activations", content, {"cka": Picture(figure, table)})
