"""Sections that compare the updates with the frozen weights: table 7, figure 8, intruders, and the
spectrum of W itself.

Each kernel is decomposed once for all members and freed before the next one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorax.analysis import figures, tables
from lorax.analysis.figures.maps import CELLS
from lorax.devices import cores
from lorax.report import page, words
from lorax.report.bases import Kernels
from lorax.report.page import Fixed, Picture, Section
from lorax.report.sections.shared_directions import long
from lorax.report.sections.spectra import OVER_LAYERS
from lorax.report.selection import label, spread, unchanged

INTRUDERS_OF = (1, 10)  # leading directions of W + dW
EPSILON = 0.5  # in the table; the figure has all
TOP = 0.1  # share of W's directions that figure 8's text is about
FIRST = 4  # dW's leading directions that figure 8's text is about
SVD = 5e-10  # seconds on one core per short^2 * wide, for the thin SVD of a kernel
LEADING = 3e-8  # seconds per short * wide, for the leading directions of W + dW
CORES = min(8, cores())  # each holds a stack of kernels and their SVDs in memory
LONG = 60.0  # seconds; longer comparisons are announced
TITLE = "Against the base"
NEEDS = (
    "Amplification (the paper's table 7), ΔW against W (figure 8), intruder dimensions and the "
    "spectrum of W need the base's weights."
)
COLUMNS = {
    "delta_norm": "‖ΔW‖",
    "w_in_delta": "‖UᵀWV‖ in ΔW's directions",
    "w_in_w": "W's own",
    "by_chance": "by chance",
    "over_chance": "over chance",
    "factor": "amplification",
}
Members = Mapping[object, tables.Updates]


class Compared(NamedTuple):
    """The updates compared with the kernels. All tables except W's own begin with member and
    path."""

    amplified: pd.DataFrame  # from `tables.amplifications`: every member with factors
    held: pd.DataFrame  # phi of dW's first and W's top directions, by side; shown members
    phi: dict[object, dict[str, np.ndarray]]  # of one matrix, by member: all of figure 8
    intruders: pd.DataFrame  # from `tables.intruder_table`; shown members
    sigmas: pd.DataFrame  # from `tables.base_spectra`
    ranks: pd.DataFrame


def sections(
    members: Members,
    kernels: Kernels | None,
    why: str,
    shown: pd.DataFrame,
    main: str,
    layers: int | None = None,
    delta_svds: Mapping[object, tables.SVDs] | None = None,
) -> list[Section]:
    """All these sections, or one that says what is missing.

    Args:
      members: {member: its updates}.
      kernels: the base's, or None, with `why` as the reason.
      shown: one row per member that figures show: member, and the column `main`.
      layers: how many layers to compare, evenly spaced; None: all.
      delta_svds: from `tables.update_svds`; None: each update is decomposed with its kernel.
    """
    if kernels is None:
        return [Section(TITLE, page.paragraph(f"Not computed: {why}. {NEEDS}"))]
    paths = list(dict.fromkeys(path for member in shown.index for path in members[member]))
    if not paths:
        text = "Not computed: no member in the figures has an update."
        return [Section(TITLE, page.paragraph(text))]
    if reason := _misfit(members, kernels):
        text = f"Not computed: the base's kernels don't fit the adapters: {reason}."
        return [Section(TITLE, page.paragraph(text))]
    paths, limit = limited(paths, layers)
    if limit:
        page.CONSOLE.print(f"against the base: {limit}")
    if not paths:
        return [Section(TITLE, page.paragraph(f"Not computed: {limit}. {NEEDS}"))]
    _announce(paths, kernels, len(shown))
    drawn = _middle({member: members[member] for member in shown.index}, paths)
    compared = compare(members, kernels, paths, shown, drawn, delta_svds)
    parts = [
        *_amplification(compared.amplified, members, shown, main),
        _figure8(compared, drawn, shown, main),
        *_intruders(compared.intruders, shown, main),
        _spectrum(compared.sigmas, compared.ranks),
    ]
    return [_limited(section, limit) for section in parts] if limit else parts


def _misfit(members: Members, kernels: Kernels) -> str:
    """What is wrong with the first update that doesn't fit its kernel; "" if all fit."""
    reasons = (
        tables.misfit_of(path, shape, kernels)
        for updates in members.values()
        for path, shape in tables.shapes_of(updates).items()
    )
    return next(filter(None, reasons), "")


def limited(paths: Sequence[str], layers: int | None) -> tuple[list[str], str]:
    """(the paths in `layers` evenly spaced layers; which layers, in words). Without a limit all
    paths and "". Matrices outside all layers (an embedding) count as one layer."""
    all_layers = sorted({tables.layer_and_target(path)[0] for path in paths})
    if layers is None or layers >= len(all_layers):
        return list(paths), ""
    if layers == 0:
        return [], f"0 of {len(all_layers)} layers were requested"
    chosen = spread(all_layers, layers)
    listed = ", ".join("none" if layer < 0 else str(layer) for layer in chosen)
    limit = f"{layers} of {len(all_layers)} layers, as requested: {listed}"
    return [path for path in paths if tables.layer_and_target(path)[0] in chosen], limit


def _limited(section: Section, limit: str) -> Section:
    """The section, with its limit added on top, in every caption and in its tables."""
    content = page.note(f"For {limit}.") + section.content
    for end in ("</caption>", ' <span class="files">'):
        content = content.replace(end, f" For {page.escape(limit)}.{end}")
    files = {name: table.assign(limit=limit) for name, table in section.files.items()}
    pictures = {
        name: picture._replace(numbers=picture.numbers.assign(limit=limit))
        for name, picture in section.pictures.items()
    }
    return section._replace(content=content, files=files, pictures=pictures)


def _announce(paths: Sequence[str], kernels: Kernels, members: int) -> None:
    """Announce a comparison that will take long, and how to shorten it."""
    seconds = 0.0
    for path in paths:
        short, wide = sorted(tables.kernel_shape(kernels, path))
        seconds += SVD * short**2 * wide + LEADING * 3 * members * short * wide
    seconds /= CORES
    if seconds > LONG:
        text = (
            f"decomposing {len(paths)} matrices of the base and comparing them with {members} "
            f"members takes about {words.duration(seconds)}; --layers=N of lorax.report, or "
            "analysis.layers of a config, limits it to N layers"
        )
        page.CONSOLE.print(text)


def compare(
    members: Members,
    kernels: Kernels,
    paths: Sequence[str],
    shown: pd.DataFrame,
    drawn: str,
    delta_svds: Mapping[object, tables.SVDs] | None = None,
) -> Compared:
    """All comparisons of the paths, on several cores, one stack of kernels at a time.

    drawn: the path whose whole phi is kept. delta_svds: as for `sections`.
    """

    def compare_stack(numbered: tuple[int, list[str]]) -> Compared:
        number, chunk = numbered
        w = {path: kernels[path] for path in chunk}  # read once
        every = {
            member: {path: updates[path] for path in chunk if path in updates}
            for member, updates in members.items()
        }
        of_shown = {member: every[member] for member in shown.index}
        of_updates = tables.update_svds(every) if delta_svds is None else delta_svds
        both = {"svds": tables.base_svds(w, chunk), "delta_svds": of_updates}
        phi = {
            member: tables.against_base({member: updates}, w, [member], **both)
            for member, updates in of_shown.items()
            if updates
        }
        held = [row for member, by_path in phi.items() for row in _held(member, by_path)]
        rng = np.random.default_rng([0, number])
        return Compared(
            tables.amplifications(every, w, **both),
            pd.DataFrame(held),
            {member: by_path[drawn] for member, by_path in phi.items() if drawn in by_path},
            tables.intruder_table(of_shown, w, INTRUDERS_OF, rng=rng, **both),
            *tables.base_spectra(w, both["svds"]),
        )

    shapes = {path: tables.kernel_shape(kernels, path) for path in paths}
    stacks = list(tables.stacks(shapes))
    with ThreadPoolExecutor(CORES) as pool:
        parts = pool.map(compare_stack, enumerate(stacks))
        parts = list(page.progress(parts, "against the base", len(stacks)))
    order = {name: n for n, name in enumerate([*members, *paths])}
    joined = []
    for field in zip(*parts, strict=True):
        if isinstance(field[0], dict):
            joined.append({member: phi for part in field for member, phi in part.items()})
            continue
        table = pd.concat([part for part in field if len(part)] or field[:1], ignore_index=True)
        keys = [name for name in ("member", "path") if name in table]
        ordered = (
            table.sort_values(keys, key=lambda x: x.map(order), kind="stable") if keys else table
        )
        joined.append(ordered.reset_index(drop=True))
    return Compared(*joined)


def _held(member: object, phi: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict]:
    """phi(j, i) of dW's first and W's top directions: a row per matrix and side."""
    rows = []
    for path, sides in phi.items():
        layer, target = tables.layer_and_target(path)
        for side, name in (("in", "input"), ("out", "output")):
            j = min(FIRST, len(sides[side]))
            i = max(1, round(TOP * sides[side].shape[1]))
            row = {"member": member, "path": path, "layer": layer, "target": target, "side": name}
            row |= {"j_of_dW": j, "i_of_W": i, "phi": sides[side][j - 1, i - 1]}
            rows.append({**row, "by_chance": sides[f"{side} chance"][j - 1, i - 1]})
    return rows


def _middle(members: Mapping[object, Mapping], paths: Sequence[str]) -> str:
    """A matrix of the middle layer, among the matrices that most members adapt."""
    counts = Counter(path for updates in members.values() for path in updates if path in paths)
    common = [path for path in paths if counts[path] == max(counts.values())]
    layers = sorted({tables.layer_and_target(path)[0] for path in common})
    layer = layers[len(layers) // 2]
    return next(path for path in common if tables.layer_and_target(path)[0] == layer)


# ------------------------------------------------------------------------------------ amplification


def _amplification(
    amplified: pd.DataFrame, members: Members, shown: pd.DataFrame, main: str
) -> list[Section]:
    """Table 7 for every member with factors; the page shows only the members in `shown`."""
    without = [member for member in shown.index if not tables.has_factors(members[member])]
    lacking = (
        f"Not computed for {len(without)} of {len(shown)} members: U and V have as many directions "
        "as the adapter's rank, and an update without factors has no such rank."
    )
    shown_rows = label(amplified, shown, main) if len(amplified) else amplified
    if not len(shown_rows):
        return [Section("Amplification", page.paragraph(lacking))] if without else []
    columns = list(COLUMNS)
    finite = shown_rows.assign(factor=shown_rows["factor"].replace(np.inf, np.nan))
    infinite = int(np.isinf(shown_rows["factor"]).sum())
    means = tables.over_layers(finite, ["target", main], columns)
    by_layer = finite.groupby(["target", main, "layer"], sort=True)[columns].mean().reset_index()
    median = shown_rows["factor"].median()
    content = page.paragraph(lacking) if without else ""
    content += page.aid(
        "Over chance: the norm of W in ΔW's directions, ‖UᵀWV‖, over that in random ones. Above 1, "
        "the update lies where the base is strong. The paper's amplification ‖ΔW‖/‖UᵀWV‖ grows "
        "with ‖ΔW‖, and so with the learning rate; this number doesn't."
    )
    if text := unchanged(shown_rows.assign(norm=shown_rows["delta_norm"])):
        content += page.note(f"{text} Their amplification is 0/0 and left out of all means.")
    if infinite:
        content += page.note(
            f"In {infinite} of {len(shown_rows)} matrices W is zero in ΔW's directions: their "
            "amplification is infinite and left out of all means."
        )
    pictures = {}
    if shown_rows[main].nunique() > 1:
        caption = (
            "The paper's table 7 as a figure, by target. Dots are layers, means over members; "
            f"lines are means over layers; dashed: 1. {OVER_LAYERS}"
        )
        over = shown_rows["over_chance"].mean()
        alt = (
            f"Line charts of amplification and of W in ΔW's directions over chance by "
            f"{words.axis(main)}: the median amplification is "
            f"{page.show(float(f'{median:.3g}'))}, and W is {over:.2f} times chance on average."
        )
        content += page.figure("amplification", caption, alt)
        pictures["amplification"] = Picture(figures.table7(shown_rows, main), shown_rows)
    content += _table7(means, by_layer, main)
    grids, drawn = _grids(by_layer, main)
    content, pictures = content + grids, pictures | drawn
    return [Section("Amplification", content, pictures, {"amplification.csv": amplified})]


def _grids(by_layer: pd.DataFrame, main: str) -> tuple[str, dict[str, Picture]]:
    """Every matrix at the largest value of the main axis, folded."""
    content, pictures = "", {}
    last = by_layer[main].iloc[-1]  # the largest rank
    for column, title in (("over_chance", "over chance"), ("factor", "amplification")):
        best = by_layer.loc[by_layer[main] == last, ["layer", "target", column]]
        best = best.rename(columns={column: "value"})
        if best["value"].isna().all() or best["layer"].nunique() == 1:
            continue
        top = best.loc[best["value"].idxmax()]
        caption = (
            f"{title.capitalize()} of every matrix at {_title(main, last)}, means over members."
        )
        alt = (
            f"Grid of {title} by target and layer: highest, {top['value']:.3g}, for "
            f"{top['target']} in layer {top['layer']}."
        )
        name = "amplification_layers" if column == "factor" else "over_chance_layers"
        content += page.figure(name, caption, alt, folded=f"Every matrix: {title}")
        pictures[name] = Picture(figures.layer_grid(best, title), best)
    return content, pictures


def _table7(means: pd.DataFrame, by_layer: pd.DataFrame, main: str) -> str:
    """Table 7 over all layers, and folded, by layer."""
    heads, columns = [words.axis(main), *COLUMNS.values()], list(COLUMNS)
    norms = columns[:-2]
    whole = page.table(
        ["target", *heads],
        [
            [r["target"], r[main], *(Fixed(r[c], 3) for c in norms)]
            + [Fixed(r[c], 3, r[f"{c}_half"]) for c in ("over_chance", "factor")]
            for _, r in means.iterrows()
        ],
        f"Table 7: Frobenius norms, means over layers and members. {OVER_LAYERS}",
    )
    single = page.table(
        ["target", "layer", *heads],
        [
            [r["target"], r["layer"], r[main], *(Fixed(r[c], 3) for c in columns)]
            for _, r in by_layer.iterrows()
        ],
        "Table 7 by layer, means over members; click a heading to sort.",
        sortable=True,
    )
    return whole + page.fold("By layer", single)


# ----------------------------------------------------------------------------------------- figure 8


def _figure8(compared: Compared, path: str, shown: pd.DataFrame, main: str) -> Section:
    """How much of dW's directions W's leading directions contain; as maps for one path."""
    held = label(compared.held, shown, main)
    keys = ["target", main, "side", "j_of_dW", "i_of_W"]
    means = tables.over_layers(held, keys, ["phi", "by_chance"])
    drawn, chance = _by_value(compared.phi, held, main)
    numbers = [long(phi, shows=title, path=path) for title, phi in drawn.items()]
    numbers.append(long(chance, shows="random directions", path=path))
    renamed = {"i": "j_of_dW", "j": "i_of_W"}
    numbers = pd.concat(numbers, ignore_index=True).rename(columns=renamed)
    caption = (
        f"As figure 8 of the paper: φ between the directions of ΔW and those of W for {path}, "
        f"input side, means over members; W's top {TOP:.0%} are above the dashed line. Of more "
        f"than {CELLS} directions, as many are drawn, evenly spaced."
    )
    value, by_chance = held["phi"].mean(), held["by_chance"].mean()
    alt = (
        f"Heat maps of φ between ΔW and W: W's top {TOP:.0%} of directions and ΔW's first "
        f"{FIRST} have a φ of {value:.2f} on average, {by_chance:.2f} by chance."
    )
    content = page.aid(
        "Dark above the dashed line: the update does not repeat the base's strongest directions."
    )
    content += page.figure("against_base", caption, alt)
    header = ["target", words.axis(main), "side", "ΔW's j, W's i", "φ", "by chance"]
    rows = [
        [r["target"], r[main], r["side"], f"{r['j_of_dW']}, {r['i_of_W']}"]
        + [page.Fixed(r["phi"], 3, r["phi_half"]), Fixed(r["by_chance"], 3)]
        for _, r in means.iterrows()
    ]
    caption = (
        f"ΔW's first directions against W's top {TOP:.0%}, means over layers and members; "
        f"analysis/against_base.csv has every matrix. {OVER_LAYERS}"
    )
    content += page.table(header, rows, caption)
    figure = figures.against_base(drawn, chance, TOP)
    pictures = {"against_base": Picture(figure, numbers)}
    if held["layer"].nunique() > 1:
        content += _every_matrix(held, main, pictures)
    return Section("ΔW against W", content, pictures, {"against_base.csv": compared.held})


def _every_matrix(held: pd.DataFrame, main: str, pictures: dict[str, Picture]) -> str:
    """A folded map of figure 8's number over chance for every matrix at the last value of `main`;
    adds it to `pictures`."""
    last = held[main].max() if pd.api.types.is_numeric_dtype(held[main]) else held[main].iloc[-1]
    chosen = held[(held[main] == last) & (held["side"] == "input")]
    grid = chosen.assign(value=chosen["phi"] / chosen["by_chance"])
    grid = grid.groupby(["layer", "target"], sort=False)["value"].mean().reset_index()
    top = grid.loc[grid["value"].idxmax()]
    caption = (
        f"φ between ΔW's first {FIRST} directions and W's top {TOP:.0%} over chance, input side, "
        f"for every matrix at {_title(main, last)}, means over members."
    )
    alt = (
        f"Grid of φ over chance by target and layer: highest, {top['value']:.3g}, for "
        f"{top['target']} in layer {top['layer']}."
    )
    pictures["against_base_layers"] = Picture(figures.layer_grid(grid, "φ over chance"), grid)
    return page.figure("against_base_layers", caption, alt, folded="Every matrix")


def _by_value(
    phi: Mapping[object, Mapping[str, np.ndarray]], held: pd.DataFrame, main: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(figure 8's input side by value of the main axis: means over members, up to their smallest
    rank; the chance level up to the largest rank)."""
    values: dict[str, list[np.ndarray]] = {}
    members = held[held["member"].isin(list(phi))].drop_duplicates("member")
    members = members.sort_values(main) if pd.api.types.is_numeric_dtype(members[main]) else members
    for _, row in members.iterrows():
        values.setdefault(_title(main, row[main]), []).append(phi[row["member"]]["in"])
    means = {
        title: np.mean([x[: min(map(len, members))] for x in members], axis=0)
        for title, members in values.items()
    }
    return means, max((x["in chance"] for x in phi.values()), key=len)


def _title(main: str, value: object) -> str:
    return f"{'r' if main == 'rank' else words.axis(main)} = {page.show(value)}"


# ---------------------------------------------------------------------------------------- intruders


def _intruders(table: pd.DataFrame, shown: pd.DataFrame, main: str) -> list[Section]:
    """Intruder dimensions against epsilon, with the norm-matched control."""
    if not len(table):
        return []
    labelled = label(table, shown, main)
    k = int(table["k"].max())
    sums = labelled[(labelled["k"] == k) & np.isclose(labelled["epsilon"], EPSILON)]
    sums = sums.groupby([main, "member"], sort=True)
    sums = sums.agg(
        intruders=("intruders", "sum"), control=("control", "sum"), matrices=("path", "nunique")
    )
    sums = sums.groupby(main).agg(
        intruders=("intruders", "mean"),
        control=("control", "mean"),
        matrices=("matrices", "mean"),
        members=("matrices", "size"),
    )
    sums = sums.reset_index()
    most = sums.loc[sums["intruders"].idxmax()]
    caption = (
        f"Intruders among the {k} leading output directions of W + ΔW, summed over the matrices of "
        "a member; means over members, with 95% intervals over members. Dotted: an update with the "
        "same singular values in random directions, without intervals."
    )
    alt = (
        f"Line chart of intruder dimensions by epsilon: at {EPSILON} there are up to "
        f"{most['intruders']:.1f} of {k * most['matrices']:.0f}, with random directions "
        f"{most['control']:.1f}."
    )
    content = page.aid(
        "An intruder is a leading direction of W + ΔW whose cosine with every direction of W is "
        "below ε. With 0 intruders the update only rotated existing directions."
    )
    content += page.figure("intruders", caption, alt)
    header = [
        words.axis(main),
        f"intruders at ε = {EPSILON}",
        "norm-matched control",
        "of",
        "members",
    ]
    rows = [
        [r[main], Fixed(r["intruders"], 1), Fixed(r["control"], 1), round(k * r["matrices"])]
        + [int(r["members"])]
        for _, r in sums.iterrows()
    ]
    note = "Means over members; analysis/intruders.csv has every member, matrix, ε and k."
    content += page.table(header, rows, note)
    drawn = labelled[labelled["k"] == k]
    figure = figures.intruder_counts(labelled, k, main)
    pictures = {"intruders": Picture(figure, drawn)}
    return [Section("Intruder dimensions", content, pictures, {"intruders.csv": table})]


# -------------------------------------------------------------------------------------- W by itself


def _spectrum(sigmas: pd.DataFrame, ranks: pd.DataFrame) -> Section:
    """The spectrum of W, and its rank deficiency."""
    columns = ["effective", "stable", "energy90", "numerical", "deficiency"]
    means = tables.over_layers(ranks, ["target"], columns)
    most = ranks.loc[ranks["deficiency"].idxmax()]
    lacking = int((ranks["deficiency"] > 0).sum())
    alt = (
        f"Line charts of the singular values of W by target: {lacking} of {len(ranks)} matrices "
        f"are rank deficient, by at most {most['deficiency']}."
    )
    caption = "Singular values of the base's adapted matrices, one line per layer."
    content = page.aid("Deficiency is the number of directions in which W is zero in float32.")
    content += page.figure("base_spectrum", caption, alt, folded="Singular values of W")
    header = ["target", "effective rank", "stable rank", "90% energy rank", "numerical rank"]
    header += ["deficiency"]
    rows = [
        [r["target"], *(page.Fixed(r[c], 1, r[f"{c}_half"]) for c in columns)]
        for _, r in means.iterrows()
    ]
    note = f"Means over layers; analysis/base_ranks.csv has every matrix. {OVER_LAYERS}"
    content += page.table(header, rows, note)
    pictures = {"base_spectrum": Picture(figures.base_spectrum(sigmas), sigmas)}
    files = {"base_spectra.csv": sigmas, "base_ranks.csv": ranks}
    return Section("Spectrum of W", content, pictures, files)
