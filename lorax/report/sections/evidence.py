"""Sections on the scores of matrices before training, and on estimates of a planted rank."""

import pandas as pd

from lorax.analysis import calibration, figures, runs, tables
from lorax.report import page
from lorax.report.page import Picture, Section


def evidence(run: runs.Run, table: pd.DataFrame) -> list[Section]:
    """The score of each matrix on the first batches, if it decided the targets or ranks."""
    ranking = tables.sensitivity(run)
    if ranking is None:
        return []
    first = ranking["member"].iloc[0]
    shown = ranking[ranking["member"] == first].sort_values("score", ascending=False)
    name = table.loc[first, "name"]
    caption = (
        "Squared gradient that an adapter of each matrix can reach, per trained parameter, as a "
        f"share of the sum over matrices. The numbers are the chosen ranks. Member {name}."
    )
    alt = f"Heat map of scores by layer and target: highest for {shown['path'].iloc[0]}."
    figure = page.figure("sensitivity", caption, alt)
    rows = [
        [row["path"], row["rank"], row["energy"], page.Fixed(row["share"], 3), row["score"]]
        for _, row in shown.iterrows()
    ]
    header = ["matrix", "rank", "gradient energy ‖g‖²", "low-rank share"]
    header += ["energy × share ÷ parameters"]
    text = (
        "Computed before training on the member's first batches. analysis/sensitivity.csv has all "
        "members."
    )
    content = figure + page.table(header, rows, text, sortable=True)
    pictures = {"sensitivity": Picture(figures.sensitivity(shown), shown)}
    return [Section("Which matrices matter", content, pictures)]


def planted(
    run: runs.Run, table: pd.DataFrame, sigmas: pd.DataFrame, ranks: pd.DataFrame
) -> list[Section]:
    """Each estimate of a planted task compared with the planted value."""
    estimates = calibration.estimates(run, table, sigmas, ranks)
    if estimates.empty:
        return []
    alt = "Scatter plots of estimate against planted value, one per estimator."
    figure = page.figure("calibration", calibration.CAPTION, alt)
    header, rows = calibration.shown(calibration.summary(estimates))
    content = figure + page.table(header, rows, calibration.NOTE, sortable=True)
    pictures = {"calibration": Picture(figures.calibration(estimates), estimates)}
    return [Section("Calibration", content, pictures, {"calibration.csv": estimates})]
