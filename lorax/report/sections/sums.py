"""Sections on adapters: how small they can be, and what their sum keeps of each."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lorax.analysis import tables
from lorax.report import page
from lorax.report.page import Fixed, Section
from lorax.xray import keeping, together


def smaller(sigmas: pd.DataFrame, updates: Mapping[str, tables.Updates]) -> list[Section]:
    """How far every adapter can be shrunk; no section if all are 0. sigmas: of `tables.spectra`."""
    rows, files = [], []
    several = len(updates) > 1
    for name, of_adapter in updates.items():
        values = sigmas[sigmas["member"] == name].groupby("path", sort=False)["sigma"]
        by_path = {path: group.to_numpy() for path, group in values}
        shapes = {path: shape[:2] for path, shape in tables.shapes_of(of_adapter).items()}
        for choice in keeping.kept(by_path, shapes):
            row = {"adapter": name, "to": choice.words, "error": choice.error}
            row |= {"directions": sum(choice.ranks.values())}
            row |= {"largest_rank": max(choice.ranks.values()), "parameters": choice.parameters}
            files.append(row)
            cells = [choice.words, *[name] * several, Fixed(choice.error, 3)]
            rows.append([*cells, *(row[x] for x in ("directions", "largest_rank", "parameters"))])
    if not rows:
        return []
    header = ["shrunk to", *["adapter"] * several, "relative error", "directions"]
    header += ["largest rank", "parameters"]
    text = (
        "What keeping the leading directions of ΔW costs: ‖ΔW − ΔWₖ‖/‖ΔW‖ of all matrices "
        "together. A rank is the same for all matrices; an error takes the fewest directions, the "
        "largest singular values of all matrices. python -m lorax.convert shrink writes one."
    )
    content = page.aid(text) + page.table(header, rows, "Smaller versions.", sortable=True)
    return [Section("How small it can be", content, {}, {"smaller.csv": pd.DataFrame(files)})]


def sums(updates: Mapping[str, tables.Updates]) -> Section:
    """What the sum of several adapters keeps of each."""
    title = "In one sum"
    matrices = together.common(updates)
    if not matrices:
        text = "Not computed: no matrix has the same name and shape in two of the adapters."
        return Section(title, page.paragraph(text))
    compared = page.progress(together.compare(updates, matrices), "adding", len(matrices))
    compared = list(compared)
    pairs = [pair for of_matrix, _ in compared for pair in of_matrix]
    added = [of_matrix for _, of_matrix in compared]
    content = page.aid(
        "All adapters added with weight 1. Kept: the part of an update that its sum with the "
        "others still has along it, ⟨ΔW, S⟩/‖ΔW‖²; below 1 the others cancel some of it, above 1 "
        "they add to it. Disturbed: what the others add on the inputs that an update reads, "
        "relative to the update."
    )
    rows = [
        [row.name, row.matrices, Fixed(row.kept, 3), Fixed(row.disturbed, 3)]
        + [Fixed(row.by_chance, 3)]
        for row in together.in_sum(added)
    ]
    header = ["adapter", "matrices", "kept", "disturbed by others", "by chance"]
    content += page.table(header, rows, "Of each adapter, over the matrices that others have too.")
    header = ["adapter", "and", "matrices", "cosine of ΔW", "± by chance"]
    rows = [
        [row.first, row.second, row.matrices, Fixed(row.cosine, 3), Fixed(row.chance, 4)]
        for row in together.whole(pairs)
    ]
    caption = "The cosine of two updates, of all matrices as one vector; chance: one deviation."
    content += page.table(header, rows, caption, sortable=True)
    table = _by_matrix(added)
    worst = table.sort_values("kept").head(12)
    rows = [
        [row.path, row.adapter, *(Fixed(x, 3) for x in (row.kept, row.disturbed, row.by_chance))]
        for row in worst.itertuples()
    ]
    header = ["matrix", "adapter", "kept", "disturbed by others", "by chance"]
    caption = "The matrices in which the sum keeps least; analysis/sums.csv has all."
    content += page.table(header, rows, caption, sortable=True)
    cosines = pd.DataFrame([pair._asdict() for pair in pairs]).drop(columns=["inner", "norms"])
    return Section(title, content, {}, {"sums.csv": table, "cosines.csv": cosines})


def _by_matrix(added: Sequence[together.Added]) -> pd.DataFrame:
    """A row per matrix and adapter: kept, disturbed, by_chance, and the norm of the sum."""
    rows = []
    for one in added:
        layer, target = tables.layer_and_target(one.layer)
        for i, name in enumerate(one.names):
            row = {"path": one.layer, "layer": layer, "target": target, "adapter": name}
            row |= {"norm": float(np.sqrt(one.total.inner[i, i])), "norm_of_sum": one.total.norm}
            row |= {x: float(getattr(one.total, x)[i]) for x in ("kept", "disturbed", "by_chance")}
            rows.append(row)
    return pd.DataFrame(rows)
