"""Sections on the updates themselves: singular values and the ranks computed from them."""

import pandas as pd

from lorax.analysis import figures
from lorax.report import page, words
from lorax.report.page import Picture, Section
from lorax.report.selection import drawn_of, spread, unchanged

MAX_LAYERS = 4  # rows of a figure; the tables hold every layer
MAX_TARGETS = 4  # columns


def spectra(sigmas: pd.DataFrame, main: str, where: str = "") -> Section:
    """Singular values by index.

    sigmas: from `tables.spectra`, with a column `main` that distinguishes the lines. where: which
    members these are, if not all.
    """
    all_layers = sorted(set(sigmas["layer"]))
    all_targets = list(dict.fromkeys(sigmas["target"]))
    layers, targets = spread(all_layers, MAX_LAYERS), spread(all_targets, MAX_TARGETS)
    drawn = sigmas[sigmas["layer"].isin(layers) & sigmas["target"].isin(targets)]
    caption = "Singular values of ΔW (of s·a·b for an update with factors)." + (
        f" Shown for {where}; analysis/spectra.csv has all." if where else ""
    )
    caption += drawn_of(layers, all_layers, targets, all_targets, "analysis/spectra.csv has all")
    first, last = (drawn[drawn["index"] == i]["sigma"] for i in (1, 2))
    alt = f"Log-log line charts of singular values for layers {', '.join(map(str, layers))}"
    if len(last) and first.mean() > 0:
        alt += f": the second is {last.mean() / first.mean():.2f} of the first on average"
    content = page.aid("A steep line is an update in few directions, whatever its rank.")
    content += page.figure("spectra", caption, alt + ".")
    pictures = {"spectra": Picture(figures.spectra(drawn, layers, main), drawn)}
    return Section("Spectra of the updates", content, pictures)


def ranks(table: pd.DataFrame, main: str, also: pd.DataFrame | None = None) -> Section:
    """The ranks computed from the spectra.

    Args:
      table: from `tables.spectra`, with a column `main`.
      also: further numbers of the matrices: member, path, and a column per number, named by its
        heading.
    """
    columns = ["norm", "effective", "stable", "energy90", "numerical"]
    means = table.groupby([main, "target"], sort=True, dropna=False)[columns].mean().reset_index()
    ends = means.groupby(main, dropna=False)["effective"].mean()
    alt = (
        "Line charts of effective and stable rank: the effective rank is "
        f"{ends.iloc[0]:.1f} at {words.axis(main)} {page.show(ends.index[0])}"
    )
    if len(ends) > 1:
        alt += f" and {ends.iloc[-1]:.1f} at {page.show(ends.index[-1])}"
    caption = "Ranks of ΔW: lines are means, dots single matrices (layers, seeds)."
    header = [words.axis(main), "target", "‖ΔW‖", "effective rank", "stable rank"]
    header += ["90% energy rank", "numerical rank"]
    if also is not None:
        extra = [name for name in also if name not in ("member", "path")]
        joined = table.merge(also, on=["member", "path"], how="left")
        of_extra = joined.groupby([main, "target"], sort=True, dropna=False)[extra].mean()
        means, header = means.join(of_extra, on=[main, "target"]), header + extra
        columns = columns + extra
    rows = [
        [row[main], row["target"], page.Fixed(row["norm"], 3)]
        + [page.Fixed(row[name], 2) for name in columns[1:]]
        for _, row in means.iterrows()
    ]
    content = page.aid(
        "Below the dashed line, part of the rank is unused."
        if pd.to_numeric(table["rank"], errors="coerce").notna().any()
        else "Low: the update uses few directions, although nothing restricts it to them."
    )
    if text := unchanged(table):
        content += page.note(text)
    content += page.figure("update_ranks", caption, alt + ".")
    content += page.table(header, rows, "Means over layers and seeds.")
    pictures = {"update_ranks": Picture(figures.update_ranks(table, main), table)}
    return Section("Effective rank", content, pictures)
