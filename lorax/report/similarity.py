"""Sections on subspace similarity: whether two updates make use of the same directions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorax.analysis import Band, expected_similarity, gaussian_similarity, plot_updates, updates
from lorax.interop.peft import Factors
from lorax.report import page
from lorax.report.page import Picture, Section
from lorax.report.updates import MAX_LAYERS, MAX_TARGETS, spread

MAX_PAIRS = 16  # of seeds, that a mean similarity is taken over
MAX_MAPS = 6  # comparisons that get maps of their own; the tables have all
SMALL_RANK = 8  # the paper's figure 3 compares r = 8 with r = 64
EXPLANATION = (
    "φ(i, j) = ‖U₁ᵢᵀ U₂ⱼ‖²/min(i, j): 1 where the top i directions of one update lie within the "
    "top j of the other (or the reverse), and max(i, j)/n on average for random subspaces of an "
    "n-dimensional space."
)


class Comparison(NamedTuple):
    """Subspace similarity between two sorts of updates."""

    name: str  # of its files
    title: str
    phi: dict[str, dict[str, np.ndarray]]  # by path and kind, (r1, r2), mean over pairs
    size: dict[str, dict[str, int]]  # dimension of the space, by path and kind
    pairs: int
    ranks: tuple[int, int]
    control: Band  # of the first matrix's first kind


def of_sweep(shown: pd.DataFrame, found: dict[int, dict[str, Factors]]) -> list[Comparison]:
    """Small against large rank, same seed and across seeds, and two seeds at the largest."""
    available = sorted(shown["rank"].unique())
    if not available:
        return []
    large = available[-1]
    below = [rank for rank in available if rank < large]
    small = max([rank for rank in below if 1 < rank <= SMALL_RANK], default=0)
    small = small or next((rank for rank in below if rank > 1), 0) or (below[-1] if below else 0)

    first = shown[shown["rank"] == small]
    second = shown[shown["rank"] == large]
    crossed = [(m, n) for m in first.index for n in second.index]
    seed = shown["seed"]
    seeds = [(m, n) for m in second.index for n in second.index if seed[m] < seed[n]]
    plan = (
        ("ranks_same_seed", f"r = {small} and r = {large}, same seed",
         [(m, n) for m, n in crossed if seed[m] == seed[n]]),
        ("ranks_across_seeds", f"r = {small} and r = {large}, across seeds",
         [(m, n) for m, n in crossed if seed[m] != seed[n]]),
        ("between_seeds", f"two seeds at r = {large}", seeds),
    )  # fmt: skip
    needed = {member for *_, pairs in plan for pair in pairs[:MAX_PAIRS] for member in pair}
    bases = {member: updates.bases(found[member]) for member in sorted(needed)}
    made = (
        compare(name, title, [(bases[m], bases[n]) for m, n in pairs[:MAX_PAIRS]])
        for name, title, pairs in plan
    )
    return [comparison for comparison in made if comparison is not None]


def compare(name: str, title: str, pairs: Sequence[tuple[dict, dict]]) -> Comparison | None:
    """Mean similarity over pairs of `updates.bases`; None where they have no matrix in common."""
    phi = updates.similarity(pairs) if pairs else {}
    if not phi:
        return None
    one = pairs[0][0]
    size = {path: {kind: one[path][kind].shape[0] for kind in kinds} for path, kinds in phi.items()}
    first = next(iter(phi))
    kind = next(iter(phi[first]))
    ranks = phi[first][kind].shape
    control = gaussian_similarity(0, size[first][kind], *ranks)
    return Comparison(name, title, phi, size, len(pairs), ranks, control)


def section(comparisons: Sequence[Comparison], absent: Sequence[str] = ()) -> Section:
    """Maps and tables of every comparison. absent: what there is not, and why."""
    parts = [
        page.paragraph(
            f"{EXPLANATION} The maps show A's directions, as the paper does; the tables add B's "
            "and those of ΔW itself."
        ),
        page.aid("Brighter than the control: directions that both updates share beyond chance."),
    ]
    if any(c.name == "ranks_same_seed" for c in comparisons):
        text = (
            "Every rank starts from an A of its own, within a seed too, so no overlap here is "
            "there from the start. Members of one seed see the same batches in the same order."
        )
        parts.append(page.note(text))
    pictures = {}
    if comparisons:
        pictures["similarity"] = _diagonals(comparisons)
        caption = "φ(i, i) of A, mean over matrices; the band is what random directions give."
        alt = "Line chart of φ(i, i): " + "; ".join(map(_corners, comparisons)) + "."
        parts.append(page.figure("similarity", caption, alt))
    for comparison in comparisons:
        name = f"similarity_{comparison.name}"
        pictures[name], layer = paper(comparison)
        pictures[f"{name}_layers"] = maps(comparison)
        many = f"mean over {comparison.pairs} pairs" if comparison.pairs > 1 else "one pair"
        place = f"layer {layer}" if layer >= 0 else "the embeddings"
        which = "Figure 4" if comparison.ranks[0] == comparison.ranks[1] else "Figure 3"
        caption = f"{which}: φ(i, j) of A between {comparison.title}, {many}, in {place}."
        parts.append(f"<h3>Between {page.escape(comparison.title)}</h3>")
        parts.append(page.figure(name, caption, f"Heat maps of φ: {_corners(comparison)}."))
        parts.append(_table(comparison))
        caption = f"The same layer by layer, between {comparison.title}; last panel: chance."
        alt = f"Heat maps of φ by layer: {_corners(comparison)}."
        parts.append(page.figure(f"{name}_layers", caption, alt, folded="Layer by layer"))
    if comparisons and len({updates.place(path)[0] for path in comparisons[0].phi}) > 1:
        first = comparisons[0]
        values = updates.corners(first.phi, "A")
        top = values.loc[values["value"].idxmax()]
        caption = f"φ(1, 1) of A for every matrix, between {first.title}."
        alt = (
            f"Grid of φ(1, 1) by target and layer: highest, {top['value']:.2f}, for {top['path']}."
        )
        parts.append(page.figure("similarity_grid", caption, alt, folded="Every matrix"))
        grid = plot_updates.layer_grid(values, "φ(1, 1)")
        pictures["similarity_grid"] = Picture(grid, values)
    parts += [page.paragraph(text) for text in absent]
    files = _files(comparisons) if comparisons else {}
    return Section("Subspace similarity", "".join(parts), pictures, files)


def across(comparisons: Sequence[Comparison], absent: Sequence[str]) -> Section:
    """Of several runs or adapters: one table of all comparisons, the maps behind a line each."""
    parts = [
        page.paragraph(
            f"{EXPLANATION} Directions are those of ΔW itself, which every method has: its input "
            "side, and its output side."
        ),
        page.aid(
            "What two runs share beyond what two seeds of one run share is owed to what they have "
            "in common; what lies by chance is shared by any two updates."
        ),
    ]
    rows = []
    for comparison in comparisons:
        for kind in updates.KINDS[2:]:
            found = [phi[kind] for phi in comparison.phi.values()]
            n = np.mean([size[kind] for size in comparison.size.values()])
            i, j = found[0].shape
            first, last = (np.mean([phi[c] for phi in found]) for c in ((0, 0), (-1, -1)))
            rows.append(
                [comparison.title, "input" if kind.endswith("in") else "output", len(found)]
                + [comparison.pairs, page.Fixed(first, 3), page.Fixed(1 / n, 3), f"{i}, {j}"]
                + [page.Fixed(last, 3), page.Fixed(max(i, j) / n, 3)]
            )
    header = ["between", "side", "matrices", "pairs", "φ(1, 1)", "by chance", "i, j of all"]
    header += ["φ of all", "by chance"]
    if rows:
        caption = "Means over matrices and pairs of members, at each run's best setting."
        parts.append(page.table(header, rows, caption, sortable=True))
    pictures = {}
    if comparisons:
        pictures["similarity"] = _diagonals(comparisons, "dW in")
        caption = "φ(i, i) of ΔW's input side, mean over matrices; the band is chance."
        alt = "Line chart of φ(i, i): "
        alt += "; ".join(_corners(comparison, "dW in") for comparison in comparisons) + "."
        parts.append(page.figure("similarity", caption, alt))
    for comparison in comparisons[:MAX_MAPS]:
        name = f"similarity_{comparison.name}"
        caption = f"φ(i, j) of ΔW's input side between {comparison.title}; last panel: chance."
        alt = f"Heat maps of φ by layer: {_corners(comparison, 'dW in')}."
        unfold = f"Layer by layer: {comparison.title}"
        parts.append(page.figure(name, caption, alt, folded=unfold))
        pictures[name] = maps(comparison, "dW in")
    parts += [page.paragraph(text) for text in absent]
    files = _files(comparisons) if comparisons else {}
    return Section("Subspace similarity", "".join(parts), pictures, files)


def absent_of_sweep(comparisons: Sequence[Comparison], main: str) -> list[str]:
    """Which of a sweep's comparisons there are not. main: its main axis."""
    if main == "method":
        return [
            "Not available in a sweep over methods; python -m lorax.report RUN RUN compares the "
            "directions of two runs."
        ]
    names, said = {comparison.name for comparison in comparisons}, []
    if not names & {"ranks_same_seed", "ranks_across_seeds"}:
        said.append("Between ranks: not available, the sweep has one rank.")
    if "between_seeds" not in names:
        said.append("Between seeds: not available, there is one seed at the largest rank.")
    return said


def paper(comparison: Comparison) -> tuple[Picture, int]:
    """The paper's figure of a layer halfway, with that layer: 3 between two ranks, 4 between two
    seeds."""
    layers = sorted({updates.place(path)[0] for path in comparison.phi})
    layer = layers[len(layers) // 2]
    drawn = _chosen(comparison, "A", [layer])
    if comparison.ranks[0] == comparison.ranks[1]:
        figure = plot_updates.figure4(drawn, comparison.control.mean)
    else:
        figure = plot_updates.figure3(drawn, comparison.control.mean)
    return Picture(figure, _cells(drawn, comparison.control.mean)), layer


def maps(comparison: Comparison, kind: str = "A") -> Picture:
    """Heat maps by layer and target."""
    layers = sorted({updates.place(path)[0] for path in comparison.phi})
    drawn = _chosen(comparison, kind, spread(layers, MAX_LAYERS))
    one, other = comparison.ranks
    figure = plot_updates.similarity_maps(
        drawn,
        comparison.control.mean,
        f"i: top directions, r = {one}",
        f"j: top directions, r = {other}",
    )
    return Picture(figure, _cells(drawn, comparison.control.mean))


def _chosen(comparison: Comparison, kind: str, layers: Sequence[int]) -> dict:
    """phi by (layer, target) of these layers, and of as many targets as a figure takes."""
    every = [updates.place(path) for path in comparison.phi]
    targets = spread(list(dict.fromkeys(target for _, target in every)), MAX_TARGETS)
    return {
        place: kinds[kind]
        for place, kinds in zip(every, comparison.phi.values(), strict=True)
        if place[0] in layers and place[1] in targets
    }


def _cells(drawn: dict, control: np.ndarray) -> pd.DataFrame:
    rows = [long(phi, layer=layer, target=target) for (layer, target), phi in drawn.items()]
    rows.append(long(control, layer=np.nan, target="Gaussian control"))
    return pd.concat(rows, ignore_index=True)


def _diagonals(comparisons: Sequence[Comparison], kind: str = "A") -> Picture:
    """phi(i, i) of all comparisons in one figure, with the band of the one that goes furthest."""
    lines, rows = {}, []
    for comparison in comparisons:
        length = min(min(phi[kind].shape) for phi in comparison.phi.values())
        every = [np.diagonal(phi[kind])[:length] for phi in comparison.phi.values()]
        mean = np.mean(every, axis=0)
        lines[comparison.title] = np.diag(mean)
        i = np.arange(1, length + 1)
        rows.append(pd.DataFrame({"shows": comparison.title, "i": i, "phi": mean}))
    band = max((c.control for c in comparisons), key=lambda band: min(band.mean.shape))
    for name, part in band._asdict().items():
        own = np.diagonal(part)
        i = np.arange(1, len(own) + 1)
        rows.append(pd.DataFrame({"shows": f"chance, {name}", "i": i, "phi": own}))
    return Picture(plot_updates.diagonal(lines, band), pd.concat(rows, ignore_index=True))


def long(phi: np.ndarray, **about: Any) -> pd.DataFrame:
    """phi (r1, r2) as a row a cell."""
    i, j = np.indices(phi.shape) + 1
    return pd.DataFrame({**about, "i": i.ravel(), "j": j.ravel(), "phi": phi.ravel()})


def at(phi: np.ndarray, i: int, j: int) -> float:
    """phi(i, j), as far as there are directions."""
    return float(phi[min(i, phi.shape[0]) - 1, min(j, phi.shape[1]) - 1])


def _corners(comparison: Comparison, kind: str = "A") -> str:
    """What a comparison comes to, in words."""
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
    rows = []
    for target in dict.fromkeys(updates.place(path)[1] for path in comparison.phi):
        paths = [path for path in comparison.phi if updates.place(path)[1] == target]
        for kind in comparison.phi[paths[0]]:
            row: list[Any] = [target, kind.replace("dW", "ΔW")]
            for i, j in points:
                phi = np.mean([at(comparison.phi[path][kind], i, j) for path in paths])
                n = comparison.size[paths[0]][kind]
                chance = expected_similarity(min(i, n), min(j, n), n)
                row += [page.Fixed(phi, 3), page.Fixed(chance, 3)]
            rows.append(row)
    return page.table(header, rows, "Means over layers. By chance: max(i, j)/n.")


def _files(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Every map as an array, and a line for each with its corner values and what chance gives."""
    arrays: dict[str, np.ndarray] = {}
    rows = []
    for comparison in comparisons:
        for path, kinds in comparison.phi.items():
            for kind, phi in kinds.items():
                arrays[f"{comparison.name}/{path}/{kind}"] = phi
                r1, r2 = phi.shape
                n = comparison.size[path][kind]
                layer, target = updates.place(path)
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
            arrays[f"{comparison.name}/gaussian/{field}"] = values
    return {"similarity.csv": pd.DataFrame(rows), "similarity.npz": arrays}
