"""Sections on the updates themselves: singular values and the ranks computed from them."""

import pandas as pd

from lorax.analysis import figures, tables
from lorax.report import page, words
from lorax.report.page import Picture, Section
from lorax.report.selection import layers_in_words, pages, unchanged

PANELS = 48  # of a folded figure: more matrices have several
OVER_LAYERS = (
    "95% intervals are over layers: a layer counts once, as its mean over members, because "
    "matrices of one layer are not independent."
)


def spectra(sigmas: pd.DataFrame, main: str, where: str = "") -> Section:
    """Singular values by index: by target, and folded, of every matrix.

    sigmas: from `tables.spectra`, with a column `main` that distinguishes the lines. where: which
    members these are, if not all.
    """
    if not (sigmas["sigma"] > 0).any():
        text = "There is nothing to draw: all singular values are zero."
        return Section("Spectra of the updates", page.paragraph(text))
    targets, layers = sigmas["target"].nunique(), sorted(set(sigmas["layer"]))
    shown = f" Shown for {where}; analysis/spectra.csv has all." if where else ""
    several = "layers and members" if len(layers) > 1 else "members"
    caption = (
        "Singular values of ΔW (of s·a·b for an update with factors), one panel per target: means "
        f"over {several}." + shown
    )
    first, second = (sigmas[sigmas["index"] == i]["sigma"] for i in (1, 2))
    alt = f"Log-log line charts of singular values by target for {len(layers)} layers"
    if len(second) and first.mean() > 0:
        alt += f": the second is {second.mean() / first.mean():.2f} of the first on average"
    content = page.aid("A steep line is an update in few directions, whatever its rank.")
    content += page.figure("spectra", caption, alt + ".")
    pictures = {"spectra": Picture(figures.spectra(sigmas, main), sigmas)}
    parts = pages(layers, max(1, PANELS // targets)) if len(layers) > 1 else []
    for number, part in enumerate(parts, 1):
        name = "spectra_layers" + f"_{number}" * (len(parts) > 1)
        rows = sigmas[sigmas["layer"].isin(part)]
        caption = f"The same for every matrix of {layers_in_words(part)}: means over members."
        alt = f"Log-log line charts of singular values in {layers_in_words(part)}."
        folded = f"Every matrix: {layers_in_words(part)}"
        content += page.figure(name, caption + shown, alt, folded=folded)
        pictures[name] = Picture(figures.spectra(rows, main, each=True), rows)
    return Section("Spectra of the updates", content, pictures)


def ranks(table: pd.DataFrame, main: str, also: pd.DataFrame | None = None) -> Section:
    """The ranks computed from the spectra.

    Args:
      table: from `tables.spectra`, with a column `main`.
      also: further numbers of the matrices: member, path, and a column per number, named by its
        heading.
    """
    columns = ["norm", "effective", "stable", "energy90", "numerical"]
    header = [words.axis(main), "target", "‖ΔW‖", "effective rank", "stable rank"]
    header += ["90% energy rank", "numerical rank"]
    joined = table
    if also is not None:
        extra = [name for name in also if name not in ("member", "path")]
        joined = table.merge(also, on=["member", "path"], how="left")
        header, columns = header + extra, columns + extra
    means = tables.over_layers(joined, [main, "target"], columns)
    ends = means.groupby(main, dropna=False)["effective"].mean()
    alt = (
        "Line charts of effective and stable rank: the effective rank is "
        f"{ends.iloc[0]:.1f} at {words.axis(main)} {page.show(ends.index[0])}"
    )
    if len(ends) > 1:
        alt += f" and {ends.iloc[-1]:.1f} at {page.show(ends.index[-1])}"
    caption = (
        "Ranks of ΔW by target. Dots are layers, means over members; lines are means over layers. "
        f"{OVER_LAYERS}"
    )
    rows = [
        [row[main], row["target"], page.Fixed(row["norm"], 3, row["norm_half"])]
        + [page.Fixed(row[name], 2, row[f"{name}_half"]) for name in columns[1:]]
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
    content += page.table(header, rows, f"Means over layers and members. {OVER_LAYERS}")
    pictures = {"update_ranks": Picture(figures.update_ranks(table, main), table)}
    return Section("Effective rank", content, pictures)
