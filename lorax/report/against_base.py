"""Sections that set the updates against the frozen weights: table 7, figure 8, intruders, and the
spectrum of W itself."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lorax.analysis import plot_updates, updates
from lorax.interop.peft import Factors
from lorax.report import page, words
from lorax.report.bases import Kernels
from lorax.report.page import Fixed, Picture, Section
from lorax.report.similarity import long
from lorax.report.updates import label, spread

SECONDS = 10.0  # for the decompositions of W; where all layers take longer, some are chosen
FLOPS = 4e9  # of a singular value decomposition, a second, on one core
MAX_VALUES = 4  # of the main axis, whose members are looked at one by one
INTRUDERS_OF = (1, 10)  # leading directions of W + dW
EPSILON = 0.5  # of the table; the figure has all
TOP = 0.1  # W's leading directions, as a share; figure 8's text speaks of them
TITLE = "Against the base"
NEEDS = (
    "Amplification (the paper's table 7), ΔW against W (figure 8), intruder dimensions and the "
    "spectrum of W need the base's weights."
)
COLUMNS = {
    "delta_norm": "‖ΔW‖",
    "w_in_delta": "‖UᵀWV‖ in ΔW's directions",
    "w_in_w": "W's own",
    "w_in_random": "random",
    "factor": "amplification",
}


def sections(
    found: Mapping[object, Mapping[str, Factors]],
    dense: Mapping[object, Mapping[str, np.ndarray]],
    kernels: Kernels | None,
    why: str,
    shown: pd.DataFrame,
    main: str,
) -> list[Section]:
    """All of them, or one that says what is missing.

    Args:
      found, dense: updates by member, with and without factors.
      kernels: the base's, or None and `why` there are none.
      shown: a row a member that figures show: member, and the column `main`.
    """
    if kernels is None:
        return [Section(TITLE, page.paragraph(f"Not computed: {why}. {NEEDS}"))]
    if not len(shown):
        text = "Not computed: no member of the best setting's line has an update."
        return [Section(TITLE, page.paragraph(text))]
    members = {**found, **dense}
    paths = dict.fromkeys(path for member in shown.index for path in members[member])
    strange = next((path for path in paths if path not in kernels), None)
    if strange is not None:
        text = f"{strange}: adapted, but not among the base's kernels"
        return [Section(TITLE, page.paragraph(_unfit(text)))]
    layers = affordable(paths, kernels)
    paths = [path for path in paths if updates.place(path)[0] in layers]
    chosen = {
        member: {path: own[path] for path in paths if path in own}
        for member, own in members.items()
    }
    factors = {member: chosen[member] for member in found}
    few = _few(shown, main)
    try:
        svds = updates.base_svds(kernels, paths)
        return [
            *_amplification(factors, kernels, svds, shown, main),
            _figure8({m: chosen[m] for m in few.index}, kernels, svds, few, main),
            *_intruders({m: chosen[m] for m in few.index}, kernels, svds, few, main),
            _spectrum({path: kernels[path] for path in paths}, svds),
        ]
    except (KeyError, ValueError) as error:
        return [Section(TITLE, page.paragraph(_unfit(error.args[0])))]


def _unfit(reason: str) -> str:
    return f"Not computed: the base's kernels do not fit the adapters: {reason}."


def affordable(paths: Sequence[str], kernels: Kernels) -> list[int]:
    """The layers whose kernels can be decomposed within SECONDS, evenly spread; one at least."""
    cost: dict[int, float] = {}
    for path in paths:
        short, wide = sorted(kernels[path].shape)
        layer = updates.place(path)[0]
        cost[layer] = cost.get(layer, 0.0) + 12 * short**2 * wide / FLOPS
    layers = sorted(cost)
    for most in (len(layers), 4, 2, 1):
        chosen = spread(layers, most)
        if sum(cost[layer] for layer in chosen) <= SECONDS or most == 1:
            return chosen
    return layers


def _few(shown: pd.DataFrame, main: str) -> pd.DataFrame:
    """One member, the first, of a few values of the main axis."""
    first = shown.drop_duplicates(main)
    order = first.sort_values(main).index if first[main].notna().all() else first.index
    return first.loc[spread(list(order), MAX_VALUES)]


# ------------------------------------------------------------------------------------ amplification


def _amplification(factors, kernels, svds, shown: pd.DataFrame, main: str) -> list[Section]:
    """Table 7 for every member with factors, of which the shown ones' are in the page."""
    amplified = updates.amplifications(factors, kernels, svds)
    if not len(amplified):
        return []
    here = label(amplified, shown, main)
    if not len(here):
        return []
    columns = list(COLUMNS)
    finite = here.assign(factor=here["factor"].replace(np.inf, np.nan))
    means = finite.groupby(["target", main], sort=True)[columns].mean().reset_index()
    by_layer = finite.groupby(["target", main, "layer"], sort=True)[columns].mean().reset_index()
    heads = [words.axis(main), *COLUMNS.values()]
    whole = page.table(
        ["target", *heads],
        [[r["target"], r[main], *(Fixed(r[c], 3) for c in columns)] for _, r in means.iterrows()],
        "Table 7: Frobenius norms, means over layers and seeds.",
    )
    single = page.table(
        ["target", "layer", *heads],
        [
            [r["target"], r["layer"], r[main], *(Fixed(r[c], 3) for c in columns)]
            for _, r in by_layer.iterrows()
        ],
        "Table 7 by layer, means over seeds; press a heading to sort.",
        sortable=True,
    )
    median = here["factor"].median()
    content = page.aid(
        "Amplification = ‖ΔW‖/‖UᵀWV‖ with ΔW's own directions: large where the update strengthens "
        "what the base hardly has; W in random directions is what chance would give."
    )
    pictures = {}
    if here[main].nunique() > 1:
        caption = "Table 7 drawn: medians over matrices and seeds, bars from quartile to quartile."
        alt = (
            f"Line charts of norms and of amplification by {words.axis(main)}: the median "
            f"amplification is {median:.3g}."
        )
        content += page.figure("amplification", caption, alt)
        pictures["amplification"] = Picture(plot_updates.table7(here, main), here)
    content += whole + page.fold("Every layer", single)
    best = by_layer.groupby(["layer", "target"])["factor"].mean().reset_index(name="value")
    if best["value"].notna().any() and best["layer"].nunique() > 1:
        top = best.loc[best["value"].idxmax()]
        caption = "Amplification of every matrix, mean over what is in the table above."
        alt = (
            f"Grid of amplification by target and layer: highest, {top['value']:.3g}, for "
            f"{top['target']} in layer {top['layer']}."
        )
        content += page.figure("amplification_layers", caption, alt, folded="The same as a map")
        grid = plot_updates.layer_grid(best, "amplification")
        pictures["amplification_layers"] = Picture(grid, best)
    return [Section("Amplification", content, pictures, {"amplification.csv": amplified})]


# ----------------------------------------------------------------------------------------- figure 8


def _figure8(chosen, kernels, svds, few: pd.DataFrame, main: str) -> Section:
    """How much of dW's directions W's leading ones hold."""
    phi = {
        member: updates.against_base({member: own}, kernels, [member], svds=svds)
        for member, own in chosen.items()
    }
    path = _middle([path for of in phi.values() for path in of])
    titles = {member: _title(main, few.loc[member, main]) for member in phi}
    drawn = {titles[m]: of[path]["in"] for m, of in phi.items() if path in of}
    widest = max((of[path] for of in phi.values() if path in of), key=lambda x: len(x["in"]))
    figure = plot_updates.against_base(drawn, widest["in chance"], TOP)
    numbers = [long(values, shows=title) for title, values in drawn.items()]
    numbers.append(long(widest["in chance"], shows="random directions"))
    renamed = {"i": "j_of_dW", "j": "i_of_W"}
    numbers = pd.concat(numbers, ignore_index=True).rename(columns=renamed)
    rows, held = [], []
    for member, of in phi.items():
        for target in dict.fromkeys(updates.place(p)[1] for p in of):
            own = [of[p] for p in of if updates.place(p)[1] == target]
            for side in ("in", "out"):
                j = min(4, len(own[0][side]))
                i = max(1, round(TOP * own[0][side].shape[1]))
                value = np.mean([x[side][j - 1, i - 1] for x in own])
                chance = np.mean([x[f"{side} chance"][j - 1, i - 1] for x in own])
                held.append((value, chance))
                name = "input" if side == "in" else "output"
                rows.append([target, few.loc[member, main], name, f"{j}, {i}"])
                rows[-1] += [Fixed(value, 3), Fixed(chance, 3)]
    value, chance = np.mean(held, axis=0)
    caption = (
        f"Figure 8: φ between the directions of ΔW and those of W for {path}, input side; W's top "
        f"{TOP:.0%} lie above the dashed line."
    )
    alt = (
        f"Heat maps of φ between ΔW and W: W's top {TOP:.0%} of directions and ΔW's first four "
        f"have {value:.2f} in common on average, {chance:.2f} by chance."
    )
    content = page.aid(
        "Dark above the dashed line: the update does not repeat the directions that are strongest "
        "in the base."
    )
    content += page.figure("against_base", caption, alt)
    header = ["target", words.axis(main), "side", "ΔW's j, W's i", "φ", "by chance"]
    caption = f"ΔW's first directions against W's top {TOP:.0%}, means over layers."
    content += page.table(header, rows, caption)
    return Section("ΔW against W", content, {"against_base": Picture(figure, numbers)})


def _middle(paths: Sequence[str]) -> str:
    """A matrix of a layer halfway, the first of its targets."""
    layers = sorted({updates.place(path)[0] for path in paths})
    layer = layers[len(layers) // 2]
    return next(path for path in paths if updates.place(path)[0] == layer)


def _title(main: str, value: object) -> str:
    return f"{'r' if main == 'rank' else words.axis(main)} = {page.show(value)}"


# ---------------------------------------------------------------------------------------- intruders


def _intruders(chosen, kernels, svds, few: pd.DataFrame, main: str) -> list[Section]:
    """Intruder dimensions over epsilon, with the norm-matched control."""
    found = {m: own for m, own in chosen.items() if isinstance(next(iter(own.values())), Factors)}
    dense = {m: own for m, own in chosen.items() if m not in found}
    table = updates.intruder_table(found, dense, kernels, INTRUDERS_OF, svds=svds)
    if not len(table):
        return []
    table = label(table, few, main)
    k = int(table["k"].max())
    sums = table[(table["k"] == k) & np.isclose(table["epsilon"], EPSILON)]
    sums = sums.groupby([main, "member"], sort=True)
    sums = sums.agg(
        intruders=("intruders", "sum"), control=("control", "sum"), matrices=("path", "nunique")
    ).reset_index()
    most = sums.loc[sums["intruders"].idxmax()]
    caption = (
        f"Intruders among the {k} leading output directions of W + ΔW, summed over matrices; "
        "dotted: an update of the same singular values in random directions."
    )
    alt = (
        f"Line chart of intruder dimensions by epsilon: at {EPSILON} there are up to "
        f"{most['intruders']:.0f} of {k * most['matrices']:.0f}, with random directions "
        f"{most['control']:.1f}."
    )
    content = page.aid(
        "An intruder is a leading direction of W + ΔW that has a cosine below ε with every "
        "direction of W: 0 means that the update only turned what was there."
    )
    content += page.figure("intruders", caption, alt)
    header = [words.axis(main), f"intruders at ε = {EPSILON}", "norm-matched control", "of"]
    rows = [
        [r[main], int(r["intruders"]), Fixed(r["control"], 1), int(k * r["matrices"])]
        for _, r in sums.iterrows()
    ]
    note = "One member for each; analysis/intruders.csv has every matrix, ε and k."
    content += page.table(header, rows, note)
    drawn = table[table["k"] == k]
    figure = plot_updates.intruder_counts(table, k, main)
    pictures = {"intruders": Picture(figure, drawn)}
    return [Section("Intruder dimensions", content, pictures, {"intruders.csv": table})]


# -------------------------------------------------------------------------------------- W by itself


def _spectrum(kernels: Kernels, svds) -> Section:
    """The spectrum of W, and the rank that it lacks."""
    sigmas, ranks = updates.base_spectra(kernels, svds)
    columns = ["effective", "stable", "energy90", "numerical", "deficiency"]
    means = ranks.groupby("target", sort=False)[columns].mean().reset_index()
    most = ranks.loc[ranks["deficiency"].idxmax()]
    lacking = int((ranks["deficiency"] > 0).sum())
    alt = (
        f"Line charts of the singular values of W by target: {lacking} of {len(ranks)} matrices "
        f"lack rank, at most {most['deficiency']}."
    )
    caption = "Singular values of the base's adapted matrices, a line a layer."
    content = page.aid(
        "Deficiency is how many directions W lacks in float32: an update into those is new to it."
    )
    content += page.figure("base_spectrum", caption, alt, folded="Singular values of W")
    header = ["target", "effective rank", "stable rank", "90% energy rank", "numerical rank"]
    header += ["deficiency"]
    rows = [[r["target"], *(Fixed(r[c], 1) for c in columns)] for _, r in means.iterrows()]
    note = "Means over layers; analysis/base_ranks.csv has every matrix."
    content += page.table(header, rows, note)
    layers = spread(sorted(set(sigmas["layer"])), plot_updates.MOST_LINES)
    drawn = sigmas[sigmas["layer"].isin(layers)]
    pictures = {"base_spectrum": Picture(plot_updates.base_spectrum(sigmas, layers), drawn)}
    files = {"base_spectra.csv": sigmas, "base_ranks.csv": ranks}
    return Section("Spectrum of W", content, pictures, files)
