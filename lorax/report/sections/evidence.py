"""Sections on what the first batches said of each matrix, and on estimates of a planted rank."""

import pandas as pd

from lorax.analysis import calibration, figures, runs, tables
from lorax.report import page
from lorax.report.page import Picture, Section


def evidence(run: runs.Run, table: pd.DataFrame) -> list[Section]:
    """What evidence said of each matrix, where it chose targets or ranks."""
    ranking = tables.sensitivity(run)
    if ranking is None:
        return []
    first = ranking["member"].iloc[0]
    shown = ranking[ranking["member"] == first].sort_values("score", ascending=False)
    name = table.loc[first, "name"]
    caption = (
        "Squared gradient that an adapter can reach, for each parameter that it trains, as a share "
        f"of all matrices'; the numbers are the ranks that were chosen. Member {name}."
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
        "Before training, on the member's first batches. analysis/sensitivity.csv has all members."
    )
    content = figure + page.table(header, rows, text, sortable=True)
    pictures = {"sensitivity": Picture(figures.sensitivity(shown), shown)}
    return [Section("Which matrices matter", content, pictures)]


def planted(
    run: runs.Run, table: pd.DataFrame, sigmas: pd.DataFrame, ranks: pd.DataFrame
) -> list[Section]:
    """What the estimators say of a planted task against the truth."""
    found = calibration.estimates(run, table, sigmas, ranks)
    if found.empty:
        return []
    alt = "Scatter plots of estimate against planted truth, one an estimator."
    figure = page.figure("calibration", calibration.CAPTION, alt)
    header, rows = calibration.shown(calibration.summary(found))
    content = figure + page.table(header, rows, calibration.NOTE, sortable=True)
    pictures = {"calibration": Picture(figures.calibration(found), found)}
    return [Section("Calibration", content, pictures, {"calibration.csv": found})]
