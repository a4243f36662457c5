"""Sections on subspace similarity: whether two updates use the same directions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorax.analysis import Band, chance_similarity, expected_similarity, figures, tables
from lorax.analysis.figures.maps import CELLS, SMALL
from lorax.report import page, words
from lorax.report.page import Picture, Section
from lorax.report.sections.spectra import OVER_LAYERS, PANELS
from lorax.report.selection import layers_in_words, pages

MAX_MAPS = 6  # comparisons with maps; the tables have all
SMALL_RANK = 8  # the paper's figure 3 compares r = 8 with r = 64
EXPLANATION = (
    "φ(i, j) = ‖U₁ᵢᵀ U₂ⱼ‖²/min(i, j) is 1 if the top i directions of one update are contained in "
    "the top j of the other (or vice versa), and max(i, j)/n on average for random subspaces of "
    "an n-dimensional space."
)
DENSE = f"For an update without factors, these are its leading {tables.LEADING} directions."
OF = {"A": "A", "dW in": "ΔW's input side"}  # kinds, as captions name them


class Comparison(NamedTuple):
    """Subspace similarity between two sets of updates."""

    name: str  # of its files
    title: str
    phi: dict[str, dict[str, np.ndarray]]  # by path and kind, (r1, r2), mean over pairs
    size: dict[str, dict[str, int]]  # dimension of the space, by path and kind
    pairs: int
    ranks: tuple[int, int]
    control: Band  # for the first matrix's first kind

    @property
    def kind(self) -> str:
        """Whose directions its maps show: A's, as in the paper, if all updates have an A."""
        return "A" if all("A" in kinds for kinds in self.phi.values()) else "dW in"


def of_sweep(
    shown: pd.DataFrame,
    found: Mapping[int, tables.Updates],
    apart: Sequence[str] = (),
    svds: Mapping[int, tables.SVDs] | None = None,
) -> list[Comparison]:
    """A small and a large rank, with the same seed and across seeds; and two seeds at the largest.

    Args:
      shown: the members, a row each; `rank` is missing for methods without one.
      found: their updates, factors or dense.
      apart: fields that are equal within a pair (rank and seed are never among them); each
        combination of their values gets its own comparisons.
      svds: from `tables.update_svds`, if already computed.
    """
    svds = tables.update_svds({m: found[m] for m in shown.index}) if svds is None else svds
    bases = {member: tables.bases(found[member], svds=svds[member]) for member in shown.index}
    fields = [name for name in apart if name != "rank" and shown[name].astype(str).nunique() > 1]
    if not fields:
        return _of_setting(shown, bases)
    comparisons = []
    for _, members in shown.groupby([shown[name].astype(str) for name in fields], sort=False):
        first = members.iloc[0]
        where = ", ".join(f"{words.axis(n)} = {page.show(words.cell(n, first[n]))}" for n in fields)
        for comparison in _of_setting(members, bases):
            name = f"{comparison.name}_{page.slug(where)}"
            comparisons.append(comparison._replace(name=name, title=f"{comparison.title}, {where}"))
    return comparisons


def _of_setting(shown: pd.DataFrame, bases: Mapping[int, tables.Bases]) -> list[Comparison]:
    """The comparisons of members that differ only in rank and seed."""
    available = sorted(shown["rank"].dropna().unique())
    large = available[-1] if available else None
    below = available[:-1]
    small = max([rank for rank in below if 1 < rank <= SMALL_RANK], default=0)
    small = small or next((rank for rank in below if rank > 1), 0) or (below[-1] if below else 0)
    first = shown[shown["rank"] == small]
    second = shown[shown["rank"] == large] if available else shown
    seed, of_large = shown["seed"], f" at r = {large:g}" if available else ""
    crossed = [(m, n) for m in first.index for n in second.index]
    seeds = [(m, n) for m in second.index for n in second.index if seed[m] < seed[n]]
    ranks = f"r = {small:g} and r = {large:g}" if crossed else ""
    plan = (
        ("ranks_same_seed", f"{ranks}, same seed",
         [(m, n) for m, n in crossed if seed[m] == seed[n]]),
        ("ranks_across_seeds", f"{ranks}, across seeds",
         [(m, n) for m, n in crossed if seed[m] != seed[n]]),
        ("between_seeds", f"two seeds{of_large}", seeds),
    )  # fmt: skip
    comparisons = (
        compare(name, title, [(bases[m], bases[n]) for m, n in pairs])
        for name, title, pairs in plan
    )
    return [comparison for comparison in comparisons if comparison is not None]


def compare(name: str, title: str, pairs: Sequence[tuple[dict, dict]]) -> Comparison | None:
    """Mean similarity over pairs of `tables.bases`; None if they have no matrix in common."""
    phi = tables.similarity(pairs) if pairs else {}
    size = {
        path: {kind: pairs[0][0][path][kind].shape[0] for kind in kinds}
        for path, kinds in phi.items()
    }
    return comparison(name, title, phi, size, len(pairs)) if phi else None


def comparison(name: str, title: str, phi: dict, size: dict, pairs: int = 1) -> Comparison:
    """The comparison with a `tables.similarity` that is not empty. size: the dimension of the
    space, by path and kind."""
    first = next(iter(phi))
    kind = next(iter(phi[first]))
    ranks = phi[first][kind].shape
    control = chance_similarity(size[first][kind], *ranks)
    return Comparison(name, title, phi, size, pairs, ranks, control)


def of_pairs(
    updates: Mapping[str, tables.Updates], name: str = "", title: str = ""
) -> dict[tuple[str, str], Comparison | None]:
    """The comparison of every two adapters; None if they have no matrix of one name and shape."""
    found = {}
    for pair, phi in tables.pairwise(updates).items():
        shapes = tables.shapes_of(updates[pair[0]])
        sides = {path: (*shapes[path][:2],) * 2 for path in phi}  # of `tables.KINDS`
        size = {
            path: {kind: sides[path][tables.KINDS.index(kind)] for kind in kinds}
            for path, kinds in phi.items()
        }
        found[pair] = comparison(name, title, phi, size) if phi else None
    return found


def fitting(first: tables.Bases, second: tables.Bases) -> tuple[tables.Bases, tables.Bases]:
    """The matrices that both have in the same shape."""
    kinds = tables.KINDS[2:]
    paths = [
        path
        for path in first
        if path in second
        and all(len(first[path][kind]) == len(second[path][kind]) for kind in kinds)
    ]
    return {path: first[path] for path in paths}, {path: second[path] for path in paths}


def section(comparisons: Sequence[Comparison], absent: Sequence[str] = ()) -> Section:
    """Maps and tables of every comparison. absent: which comparisons are missing, and why."""
    which = {comparison.kind for comparison in comparisons}
    lead = "The maps show A's directions, as in the paper; the tables add those of B and ΔW."
    if "dW in" in which:
        lead = f"The maps show the directions of {OF['dW in']}; the tables have both. {DENSE}"
    parts = [
        page.paragraph(f"{EXPLANATION} {lead}"),
        page.aid(
            "Brighter than the control: the two updates share more directions than by chance."
        ),
    ]
    if any(c.name.startswith("ranks_same_seed") for c in comparisons):
        text = (
            "Each rank starts from its own A, even with the same seed, so none of this overlap was "
            "present at the start. Members of one seed see the same batches in the same order."
        )
        parts.append(page.note(text))
    pictures = {}
    if comparisons:
        parts.append(_similarity(comparisons, pictures))
    for number, comparison in enumerate(comparisons):
        parts.append(f"<h3>Between {page.escape(comparison.title)}</h3>")
        if number < MAX_MAPS:
            parts.append(_maps(comparison, pictures))
        parts.append(_table(comparison))
    if len(comparisons) > MAX_MAPS:
        parts.append(page.note(_fewer_maps(comparisons)))
    if comparisons and len({tables.layer_and_target(path)[0] for path in comparisons[0].phi}) > 1:
        first = comparisons[0]
        values = tables.corners(first.phi, first.kind)
        top = values.loc[values["value"].idxmax()]
        caption = f"φ(1, 1) of {OF[first.kind]} for every matrix, between {first.title}."
        alt = (
            f"Grid of φ(1, 1) by target and layer: highest, {top['value']:.2f}, for {top['path']}."
        )
        parts.append(page.figure("similarity_grid", caption, alt, folded="Every matrix"))
        grid = figures.layer_grid(values, "φ(1, 1)")
        pictures["similarity_grid"] = Picture(grid, values)
    parts += [page.paragraph(text) for text in absent]
    files = _files(comparisons) if comparisons else {}
    return Section("Subspace similarity", "".join(parts), pictures, files)


def _similarity(
    comparisons: Sequence[Comparison], pictures: dict[str, Picture], kind: str = ""
) -> str:
    """The figure of phi(i, i) of all comparisons; adds it to `pictures`. kind: whose directions; by
    default those of each comparison's maps."""
    pictures["similarity"] = _diagonals(comparisons, kind)
    of_kinds = " and ".join(OF[k] for k in sorted({kind or c.kind for c in comparisons}))
    caption = (
        f"φ(i, i) of {of_kinds}, means over layers (a layer is the mean over its targets and the "
        "pairs of members), with 95% intervals over layers. Dashed: chance, with its 5% to 95%."
    )
    corners = "; ".join(_corners(comparison, kind) for comparison in comparisons)
    return page.figure("similarity", caption, f"Line chart of φ(i, i): {corners}.")


def _maps(comparison: Comparison, pictures: dict[str, Picture]) -> str:
    """The figures of one comparison; adds them to `pictures`."""
    name = f"similarity_{comparison.name}"
    pictures[name], layer = paper(comparison)
    place = f"layer {layer}" if layer >= 0 else "the embeddings"
    which = 4 if comparison.ranks[0] == comparison.ranks[1] else 3
    caption = (
        f"As figure {which} of the paper: φ(i, j) of {OF[comparison.kind]} between "
        f"{comparison.title}, "
        f"{_over_pairs(comparison)}, in {place}; last: chance. Of more than {CELLS} directions, as "
        "many are drawn, evenly spaced."
    )
    drawn = page.figure(name, caption, f"Heat maps of φ: {_corners(comparison)}.")
    layers = f"{name}_layers"
    return drawn + _layer_by_layer(layers, comparison, comparison.kind, "Layer by layer", pictures)


def _layer_by_layer(
    name: str, comparison: Comparison, kind: str, folded: str, pictures: dict[str, Picture]
) -> str:
    """Folded maps of every matrix, in one figure or several called `name`; adds them to
    `pictures`."""
    content, layers = "", sorted({tables.layer_and_target(path)[0] for path in comparison.phi})
    targets = {tables.layer_and_target(path)[1] for path in comparison.phi}
    parts = pages(layers, max(1, PANELS // len(targets)))
    for number, part in enumerate(parts, 1):
        figure = name + f"_{number}" * (len(parts) > 1)
        pictures[figure] = maps(comparison, kind, part)
        caption = (
            f"φ(i, j) of {OF[kind]} between {comparison.title}, {_over_pairs(comparison)}, in "
            f"{layers_in_words(part)}; last: chance. Of more than {SMALL} directions, as many are "
            "drawn, evenly spaced."
        )
        alt = f"Heat maps of φ by layer: {_corners(comparison, kind)}."
        more = f", {layers_in_words(part)}" * (len(parts) > 1)
        content += page.figure(figure, caption, alt, folded=folded + more)
    return content


def _over_pairs(comparison: Comparison) -> str:
    count = comparison.pairs
    return f"mean over {count} pairs of members" if count > 1 else "one pair of members"


def _fewer_maps(comparisons: Sequence[Comparison]) -> str:
    return (
        f"Maps are shown for the first {MAX_MAPS} of {len(comparisons)} comparisons. The tables, "
        "analysis/similarity.csv and similarity.npz have all of them."
    )


def across(comparisons: Sequence[Comparison], absent: Sequence[str]) -> Section:
    """For several runs: one table of all comparisons, and their folded maps."""
    parts = [
        page.paragraph(
            f"{EXPLANATION} Directions are those of ΔW itself, which every method has, on the "
            f"input and the output side. {DENSE}"
        ),
        page.aid(
            "Compare the similarity of two runs with that of two seeds of one run and with the "
            "chance level, which any two updates have."
        ),
    ]
    rows = [
        [comparison.title, row["side"], row["matrices"], comparison.pairs]
        + [page.Fixed(row["phi_1_1"], 3), page.Fixed(row["chance_1_1"], 3)]
        + [f"{row['i']}, {row['j']}", page.Fixed(row["phi"], 3, row["half"])]
        + [page.Fixed(row["by_chance"], 3)]
        for comparison in comparisons
        for row in of_sides(comparison)
    ]
    header = ["between", "side", "matrices", "pairs", "φ(1, 1)", "by chance", "i, j at most"]
    header += ["φ(i, j)", "by chance"]
    if rows:
        caption = (
            "Means over layers and pairs of members, each run at its best setting; i and j are all "
            f"directions. {OVER_LAYERS}"
        )
        parts.append(page.table(header, rows, caption, sortable=True))
    pictures = {}
    if comparisons:
        parts.append(_similarity(comparisons, pictures, "dW in"))
    for comparison in comparisons[:MAX_MAPS]:
        unfold = f"Layer by layer: {comparison.title}"
        name = f"similarity_{comparison.name}"
        parts.append(_layer_by_layer(name, comparison, "dW in", unfold, pictures))
    if len(comparisons) > MAX_MAPS:
        parts.append(page.note(_fewer_maps(comparisons)))
    parts += [page.paragraph(text) for text in absent]
    files = _files(comparisons) if comparisons else {}
    return Section("Subspace similarity", "".join(parts), pictures, files)


def of_sides(comparison: Comparison, **about: Any) -> list[dict[str, Any]]:
    """A row for each side of dW: `about`, side, matrices, phi(1, 1) and phi of all directions (i,
    j) with half the width of its 95% interval over layers, and their levels of chance. The numbers
    are means over layers."""
    rows = []
    for kind in tables.KINDS[2:]:
        table = pd.DataFrame(
            {
                "side": "input" if kind.endswith("in") else "output",
                "layer": tables.layer_and_target(path)[0],
                "phi_1_1": phi[kind][0, 0],
                "phi": phi[kind][-1, -1],
                "chance_1_1": 1 / comparison.size[path][kind],
                "by_chance": min(1, max(phi[kind].shape) / comparison.size[path][kind]),
            }
            for path, phi in comparison.phi.items()
        )
        columns = ["phi_1_1", "chance_1_1", "phi", "by_chance"]
        mean = tables.over_layers(table, ["side"], columns).iloc[0]
        shapes = [phi[kind].shape for phi in comparison.phi.values()]
        i, j = (max(sizes) for sizes in zip(*shapes, strict=True))
        row = {**about, "side": mean["side"], "matrices": len(table), "i": i, "j": j}
        rows.append(row | {"half": mean["phi_half"]} | {name: mean[name] for name in columns})
    return rows


def absent_of_sweep(
    comparisons: Sequence[Comparison], main: str, table: pd.DataFrame, shown: pd.DataFrame
) -> list[str]:
    """Which comparisons a sweep doesn't have, and why.

    Args:
      main: the sweep's main axis.
      table: all members.
      shown: the members whose updates were compared.
    """
    if main == "method":
        return [
            "Not available in a sweep over methods. python -m lorax.report RUN RUN compares the "
            "directions of two runs."
        ]
    names, reasons = {comparison.name for comparison in comparisons}, []
    if not any(name.startswith("ranks_") for name in names):
        reasons.append(f"Between ranks: not available: {_one_rank(table, shown)}.")
    if not any(name.startswith("between_seeds") for name in names):
        reasons.append(f"Between seeds: not available: {_one_seed(table, shown)}.")
    return reasons


def _one_rank(table: pd.DataFrame, shown: pd.DataFrame) -> str:
    if table["rank"].isna().all():
        return f"{words.listed(table['method'])} has no rank"
    if table["rank"].nunique() == 1:
        return "the sweep has one rank"
    if shown["rank"].nunique() > 1:
        return "the updates of its ranks have no matrix in common"
    return f"only {len(shown)} of {len(table)} members are compared here, and they have one rank"


def _one_seed(table: pd.DataFrame, shown: pd.DataFrame) -> str:
    if table["seed"].nunique() == 1:
        return "the sweep has one seed"
    large = shown[shown["rank"] == shown["rank"].max()] if shown["rank"].notna().any() else shown
    if large["seed"].nunique() > 1:
        return "their updates have no matrix in common"
    at = " of the largest rank" * bool(shown["rank"].nunique() > 1)
    return (
        f"only {len(shown)} of {len(table)} members are compared here, and those{at} have one seed"
    )


def paper(comparison: Comparison) -> tuple[Picture, int]:
    """(the paper's figure for the middle layer: figure 3 between two ranks, 4 between two seeds;
    the layer)."""
    layers = sorted({tables.layer_and_target(path)[0] for path in comparison.phi})
    layer, control = layers[len(layers) // 2], comparison.control.mean
    drawn = _of_layers(comparison, comparison.kind, [layer])
    if comparison.ranks[0] == comparison.ranks[1]:
        return Picture(figures.figure4(drawn, control), _cells(drawn, control)), layer
    return Picture(figures.figure3(drawn, control), _cells(drawn, control)), layer


def maps(comparison: Comparison, kind: str, layers: Sequence[int]) -> Picture:
    """Heat maps of every matrix of these layers."""
    drawn, control = _of_layers(comparison, kind, layers), comparison.control.mean
    first, second = (f"top directions, r = {rank}" for rank in comparison.ranks)
    figure = figures.similarity_maps(drawn, control, f"i: {first}", f"j: {second}")
    return Picture(figure, _cells(drawn, control))


def _of_layers(
    comparison: Comparison, kind: str, layers: Sequence[int]
) -> dict[tuple[int, str], np.ndarray]:
    """phi by (layer, target), layer by layer."""
    places = {tables.layer_and_target(path): phi[kind] for path, phi in comparison.phi.items()}
    return {place: places[place] for layer in layers for place in places if place[0] == layer}


def _cells(drawn: dict, control: np.ndarray) -> pd.DataFrame:
    rows = [long(phi, layer=layer, target=target) for (layer, target), phi in drawn.items()]
    rows.append(long(control, layer=np.nan, target="chance"))
    return pd.concat(rows, ignore_index=True)


def _diagonals(comparisons: Sequence[Comparison], kind: str = "") -> Picture:
    """phi(i, i) of all comparisons in one figure, with the longest band."""
    lines, rows = {}, []
    for comparison in comparisons:
        of_kind = {path: phi[kind or comparison.kind] for path, phi in comparison.phi.items()}
        length = min(min(phi.shape) for phi in of_kind.values())
        layers: dict[int, list] = {}
        for path, phi in of_kind.items():
            layers.setdefault(tables.layer_and_target(path)[0], []).append(phi[:length, :length])
        lines[comparison.title] = np.stack([np.mean(of_layer, 0) for of_layer in layers.values()])
        for layer, phi in zip(layers, lines[comparison.title], strict=True):
            about = {"shows": comparison.title, "layer": layer}
            rows.append(pd.DataFrame({**about, "i": range(1, length + 1), "phi": np.diag(phi)}))
    band = max((c.control for c in comparisons), key=lambda band: min(band.mean.shape))
    for name, part in band._asdict().items():
        diagonal = np.diagonal(part)
        i = np.arange(1, len(diagonal) + 1)
        rows.append(pd.DataFrame({"shows": f"chance, {name}", "i": i, "phi": diagonal}))
    return Picture(figures.diagonal(lines, band), pd.concat(rows, ignore_index=True))


def long(phi: np.ndarray, **about: Any) -> pd.DataFrame:
    """phi (r1, r2) as a table with a row per cell."""
    i, j = np.indices(phi.shape) + 1
    return pd.DataFrame({**about, "i": i.ravel(), "j": j.ravel(), "phi": phi.ravel()})


def at(phi: np.ndarray, i: int, j: int) -> float:
    """phi(i, j), with i and j limited to the number of directions."""
    return float(phi[min(i, phi.shape[0]) - 1, min(j, phi.shape[1]) - 1])


def _corners(comparison: Comparison, kind: str = "") -> str:
    """A comparison's corner values, in words."""
    kind = kind or comparison.kind
    first = np.mean([phi[kind][0, 0] for phi in comparison.phi.values()])
    last = np.mean([phi[kind][-1, -1] for phi in comparison.phi.values()])
    mean = comparison.control.mean
    return (
        f"between {comparison.title} φ(1, 1) is {first:.2f} on average ({mean[0, 0]:.2f} by "
        f"chance) and φ of all directions {last:.2f} ({mean[-1, -1]:.2f} by chance)"
    )


def _table(comparison: Comparison) -> str:
    r1, r2 = comparison.ranks
    points = list(dict.fromkeys([(1, 1), (r1, r1), (r1, r2)]))
    header = ["target", "directions of"]
    for i, j in points:
        header += [f"φ({i}, {j})", "by chance"]
    names = [f"phi_{i}_{j}" for i, j in points]
    table, sizes = [], {}
    for path, kinds in comparison.phi.items():
        layer, target = tables.layer_and_target(path)
        for kind, phi in kinds.items():
            sizes.setdefault((target, kind), comparison.size[path][kind])
            values = [at(phi, i, j) for i, j in points]
            table.append((target, kind, layer, *values))
    table = pd.DataFrame(table, columns=["target", "kind", "layer", *names])
    means = tables.over_layers(table, ["target", "kind"], names).set_index(["target", "kind"])
    rows = []
    for (target, kind), n in sizes.items():
        mean, row = means.loc[(target, kind)], [target, kind.replace("dW", "ΔW")]
        for (i, j), name in zip(points, names, strict=True):
            chance = expected_similarity(min(i, n), min(j, n), n)
            row += [page.Fixed(mean[name], 3, mean[f"{name}_half"]), page.Fixed(chance, 3)]
        rows.append(row)
    caption = f"Means over layers; by chance: max(i, j)/n. {OVER_LAYERS}"
    return page.table(header, rows, caption)


def _files(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Every map as an array, and a table of corner values with the chance level."""
    arrays: dict[str, np.ndarray] = {}
    rows = []
    for comparison in comparisons:
        for path, kinds in comparison.phi.items():
            for kind, phi in kinds.items():
                arrays[f"{comparison.name}/{path}/{kind}"] = phi
                r1, r2 = phi.shape
                n = comparison.size[path][kind]
                layer, target = tables.layer_and_target(path)
                rows.append(
                    {
                        "comparison": comparison.name,
                        "path": path,
                        "layer": layer,
                        "target": target,
                        "directions": kind,
                        "rank1": comparison.ranks[0],
                        "rank2": comparison.ranks[1],
                        "pairs": comparison.pairs,
                        "phi_1_1": phi[0, 0],
                        "phi_r1_r1": at(phi, r1, r1),
                        "phi_r1_r2": phi[-1, -1],
                        "expected_1_1": expected_similarity(1, 1, n),
                        "expected_r1_r1": expected_similarity(r1, r1, n),
                        "expected_r1_r2": expected_similarity(r1, r2, n),
                    }
                )
        for field, values in comparison.control._asdict().items():
            arrays[f"{comparison.name}/chance/{field}"] = values
    return {"similarity.csv": pd.DataFrame(rows), "similarity.npz": arrays}
