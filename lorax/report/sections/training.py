"""Sections on training: how the updates grew, how the activations changed, and the loss by kept
rank. They need `config.analysis.trajectory`, `config.analysis.cka` and
`config.analysis.kept_ranks`."""

import pandas as pd

from lorax import rundir
from lorax.analysis import figures, runs
from lorax.report import page, words
from lorax.report.page import Picture, Section
from lorax.report.selection import label


def sections(run: runs.Run, shown: pd.DataFrame, main: str) -> list[Section]:
    """Sections on the shown members, one for each table in analysis/."""
    tables = {name: _read(run, name, shown, main) for name in ("trajectory", "cka", "kept_rank")}
    parts = []
    if tables["trajectory"] is not None:
        parts.append(_trajectory(tables["trajectory"], main))
    if tables["cka"] is not None:
        parts.append(_cka(tables["cka"], main))
    if tables["kept_rank"] is not None:
        parts.append(_kept_rank(tables["kept_rank"], main, runs.loss_unit(run)))
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


def _kept_rank(table: pd.DataFrame, main: str, unit: str) -> Section:
    whole = table[table["kept"] == table.groupby("member")["kept"].transform("max")]
    best = whole.loc[whole["loss"].idxmin()]
    caption = (
        "The validation loss when every update keeps only its leading singular directions: means "
        "over members, with 95% intervals over members. At 0 nothing is left of the updates."
    )
    alt = (
        f"Line chart of loss by kept rank: with all of it the lowest is {best['loss']:.4g}, at "
        f"{words.axis(main)} {page.show(best[main])}."
    )
    content = page.aid(
        "Where a line is flat, the further directions do nothing. Training at that rank may find "
        "a better update than cutting one."
    )
    content += page.figure("kept_rank", caption, alt)
    figure = figures.kept_rank(table, main, unit)
    return Section("Kept rank", content, {"kept_rank": Picture(figure, table)})
