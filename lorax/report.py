"""A run directory as one page to look at: python -m lorax.report RUN [RUN...]

Writes analysis/*.csv and *.npz (every number shown), figures/*.png and report.html, a single file
that opens from disk. It reads nothing but the run directory, and the base model's kernels for the
amplification table where they can be loaded; so a report can be redrawn at any time.
"""

import argparse
import base64
import html
import io
import json
import os
import pathlib
import string
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from lorax.analysis import (
    Band,
    calibration,
    compare,
    expected_similarity,
    gaussian_similarity,
    intrinsic,
    plot_calibration,
    plot_updates,
    plots,
    runs,
    updates,
)
from lorax.files import write_bytes

TEMPLATE = pathlib.Path(__file__).with_name("report.html.tmpl")
MAX_LAYERS = 4  # rows of a figure; the tables hold every layer
MAX_PAIRS = 16  # of seeds, that a mean similarity is taken over
SMALL_RANK = 8  # the paper's figure 3 compares r = 8 with r = 64
Bases = dict[str, dict[str, np.ndarray]]


class Comparison(NamedTuple):
    """Subspace similarity between two sorts of members."""

    name: str  # of its files
    title: str
    phi: dict[str, dict[str, np.ndarray]]  # by path and kind, (r1, r2), mean over pairs
    size: dict[str, dict[str, int]]  # dimension of the space, by path and kind
    pairs: int
    ranks: tuple[int, int]
    control: Band  # of A's directions


def write(
    run_directory: str | os.PathLike,
    base_kernels: dict[str, np.ndarray] | None = None,
    no_kernels: str = "the base model's kernels were not given",
) -> pathlib.Path:
    """Analyse a run directory and write its report; the path of report.html.

    Args:
      run_directory: see `lorax.analysis.runs`; the run need not be finished.
      base_kernels: frozen kernels (in, out) by path ("h/0/attn/q"), for the amplification table.
      no_kernels: why there are none, said in their place.

    Raises what `lorax.analysis.runs.load` raises.
    """
    # The matrices are small and many: threads of the linear algebra only wait for each other.
    with threadpool_limits(1, user_api="blas"):
        run = runs.load(run_directory)
        if (run.config.get("config", {}).get("search") or {}).get("threshold"):
            return _write_search(run)
        return _write(run, base_kernels, no_kernels)


def _write(
    run: runs.Run, base_kernels: dict[str, np.ndarray] | None, no_kernels: str
) -> pathlib.Path:
    table = runs.summary(run)
    by = runs.axes(run, table)
    main, loss = by.main or "rank", runs.loss_name(run)
    scores = runs.scores(run)
    settings = runs.settings(table, by, scores)
    answer = runs.answer(settings, main)

    # What the figures of updates show: the best setting's neighbours along the main axis.
    usable = table[table["status"] != "diverged"]
    found, missing = updates.adapters(run, usable.index)
    line = "" if answer is None else answer.best["line"]
    shown = usable.loc[[m for m in found if _on_line(usable.loc[m], answer, by)]]
    dense = updates.deltas(run, missing)
    missing = {member: why for member, why in missing.items() if member not in dense}
    sigmas, ranks = updates.spectra(found, dense)
    comparisons = [] if main == "method" else _comparisons(shown, found)

    _save_table(run, "members", table.drop(columns="setting"))
    _save_table(run, "settings", settings.drop(columns="line"))
    base = _base_loss(table)
    context = (run, table, by, settings, answer, base)
    figures = {"learning_curves": plots.learning_curves(run.metrics, table, by.main, loss)}
    if by.main is not None:
        figures["rank_curve"] = plots.rank_curve(settings, table, main, base, answer, loss)
    planted = _calibration_section(run, table, sigmas, ranks, figures)
    facts = ("What was run", _facts_section(run, table, by))
    listed = [("Members", _members_section(table, scores))]
    listed += [("Learning curves", _learning_section(table))]
    # Of several planted tasks no loss says anything of another.
    if planted and len(calibration.tasks(table)) > 1:
        figures.pop("rank_curve", None)
        return _save_page(run, [*planted, facts, *listed], figures)
    sections = [
        ("Answer", _answer_section(*context)),
        facts,
        (
            "Loss" if by.main is None else "Loss against " + _words(main),
            _curve_section(settings, by, answer, scores),
        ),
        *_methods_section(run, table, settings, by, ranks, figures),
        *_evidence_section(run, table, figures),
        *planted,
        *listed,
    ]
    if found:
        _save_table(run, "spectra", sigmas)
        _save_table(run, "ranks", ranks)
        if len(shown):
            labelled = _label(sigmas, shown, main), _label(ranks, shown, main)
            layers = _spread(sorted(set(ranks["layer"])))
            figures["spectra"] = plot_updates.spectra(labelled[0], layers, main)
            figures["update_ranks"] = plot_updates.update_ranks(labelled[1], main)
            sections.append(("Spectra of the updates", _spectra_section(line, layers)))
            sections.append(("Effective rank", _ranks_section(labelled[1], main)))
        figures |= _similarity_figures(comparisons)
        _save_similarity(run, comparisons)
        sections.append(("Subspace similarity", _similarity_section(comparisons, shown)))
        amplified, reason = _amplified(run, found, base_kernels, no_kernels)
        if amplified is not None:
            _save_table(run, "amplification", amplified)
        sections.append(("Amplification", _amplification_section(amplified, reason, shown, main)))
    if missing:
        sections.append(("Not analysed", _missing_section(table, missing)))
    sections.append(("Method notes", NOTES))
    return _save_page(run, sections, figures)


def _write_search(run: runs.Run) -> pathlib.Path:
    """The report of a search for the intrinsic dimension."""
    search = run.config["config"]["search"]
    table = runs.summary(run)
    by = runs.Axes("method", tuple(intrinsic.conditions(run, table)))
    loss = runs.loss_name(run)
    points = intrinsic.points(run)
    found = pd.DataFrame()
    figures = {"learning_curves": plots.learning_curves(run.metrics, table, by.main, loss)}
    if (points["kind"] == "subspace").any():
        found = intrinsic.estimate(points, search["threshold"], search["metric"])
        figures["intrinsic"] = plots.intrinsic(points, found, loss)
    _save_table(run, "members", table.drop(columns="setting"))
    _save_table(run, "intrinsic", found)
    _save_table(run, "intrinsic_points", points)
    sections = [
        ("Intrinsic dimension", _intrinsic_section(run, table, points, found)),
        *_calibration_section(run, table, pd.DataFrame(), pd.DataFrame(), figures),
        ("What was run", _facts_section(run, table, by)),
        ("Members", _members_section(table, runs.scores(run))),
        ("Learning curves", _learning_section(table)),
        ("Method notes", SEARCH_NOTES),
    ]
    return _save_page(run, sections, figures)


def _save_page(
    run: runs.Run, sections: list[tuple[str, str]], figures: dict[str, Figure]
) -> pathlib.Path:
    images = {name: _png(figure) for name, figure in figures.items()}
    for name, image in images.items():
        write_bytes(run.directory / "figures" / f"{name}.png", image)
    page = _page(run, sections, images)
    return write_bytes(run.directory / "report.html", page.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: write the report of each run named; 1 where one can't be read."""
    parser = argparse.ArgumentParser(prog="python -m lorax.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", nargs="+", help="a run directory")
    for directory in parser.parse_args(arguments).run:
        try:
            config = runs.load(directory).config
            print(write(directory, *_load_kernels(config)))
        except (FileNotFoundError, ValueError) as error:
            print(f"lorax.report: {error}", file=sys.stderr)
            return 1
    return 0


# ------------------------------------------------------------------------------------ computations


def _load_kernels(config: dict[str, Any]) -> tuple[dict[str, np.ndarray] | None, str]:
    """The base's kernels, or None and the reason. Analysis needs no model code otherwise."""
    name = config.get("config", {}).get("base")
    if not name:
        return None, "config.json names no base model"
    try:
        from lorax.models import kernels, load

        return {path: np.asarray(w) for path, w in kernels(load(name)).items()}, ""
    except Exception as error:  # whatever it is, the rest of the report stands without
        return None, f"the base model {name} could not be loaded: {type(error).__name__}: {error}"


def _on_line(member: pd.Series, answer: runs.Answer | None, by: runs.Axes) -> bool:
    """Whether the member differs from the best setting in the main axis and the seed alone."""
    if answer is None:
        return True
    return all(_same(member[name], answer.best[name]) for name in by.others)


def _same(x: Any, y: Any) -> bool:
    return x == y or (pd.isna(x) and pd.isna(y))


def _comparisons(shown: pd.DataFrame, found: dict[int, Any]) -> list[Comparison]:
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
        ("ranks_same_seed", f"r = {small} and r = {large}, same seed", small,
         [(m, n) for m, n in crossed if seed[m] == seed[n]]),
        ("ranks_across_seeds", f"r = {small} and r = {large}, across seeds", small,
         [(m, n) for m, n in crossed if seed[m] != seed[n]]),
        ("between_seeds", f"two seeds at r = {large}", large, seeds),
    )  # fmt: skip
    cache: dict[int, Bases] = {}

    def basis(member: int) -> Bases:
        if member not in cache:
            cache[member] = updates.bases(found[member])
        return cache[member]

    comparisons = []
    for name, title, rank, pairs in plan:
        pairs = pairs[:MAX_PAIRS]
        if not pairs:
            continue
        members = [(basis(m), basis(n)) for m, n in pairs]
        phi = updates.similarity(members)
        if phi:
            one = members[0][0]
            size = {path: {kind: u.shape[0] for kind, u in one[path].items()} for path in phi}
            first_path = next(iter(phi))
            control = gaussian_similarity(0, size[first_path]["A"], *phi[first_path]["A"].shape)
            ranks = (rank, large)
            comparisons.append(Comparison(name, title, phi, size, len(pairs), ranks, control))
    return comparisons


def _amplified(
    run: runs.Run,
    found: dict[int, Any],
    kernels: dict[str, np.ndarray] | None,
    reason: str,
) -> tuple[pd.DataFrame | None, str]:
    if kernels is None:
        return None, reason
    if (run.config.get("config", {}).get("sweep") or {}).get("base"):
        return None, "the members of this sweep do not share a base model"
    try:
        return updates.amplifications(found, kernels), ""
    except (KeyError, ValueError) as error:
        return None, f"the base's kernels do not fit the adapters: {error.args[0]}"


def _base_loss(table: pd.DataFrame) -> float:
    """The unadapted base's eval loss; NaN where it is unknown or the members' differ."""
    losses = table["base_loss"].dropna()
    same = len(losses) > 0 and np.ptp(losses) <= 1e-3 * losses.abs().max()
    return float(losses.mean()) if same else float("nan")


def _label(rows: pd.DataFrame, shown: pd.DataFrame, main: str) -> pd.DataFrame:
    """The shown members' rows, with the main axis and the rank as columns."""
    kept = rows[rows["member"].isin(shown.index)].drop(columns=[main], errors="ignore")
    labelled = kept.merge(shown[["member", main]], on="member")
    if labelled[main].isna().any():
        labelled[main] = [
            "all" if _is_missing(value) else value for value in labelled[main].astype(object)
        ]
    return labelled


def _spread(layers: list[int]) -> list[int]:
    """At most MAX_LAYERS of them, evenly spread, the first and the last among them."""
    if len(layers) <= MAX_LAYERS:
        return layers
    return [layers[round(x)] for x in np.linspace(0, len(layers) - 1, MAX_LAYERS)]


# ----------------------------------------------------------------------------------------- sections


def _answer_section(
    run: runs.Run,
    table: pd.DataFrame,
    by: runs.Axes,
    settings: pd.DataFrame,
    answer: runs.Answer | None,
    base: float,
) -> str:
    parts = [f'<div class="answer"><p><strong>{_escape(_headline(by, answer, base))}</strong></p>']
    if answer is not None:
        parts.append(f"<p>{_escape(_strength(by, settings, answer))}</p>")
    parts.append("</div>")
    unfinished = run.status.get("state") == "running"
    if unfinished:
        parts.append(_note("This run is not finished: all figures are provisional."))
    diverged = table[table["status"] == "diverged"]
    if len(diverged):
        names = ", ".join(
            f"{m['name']}{_at_step(m['diverged_at'])}" for _, m in diverged.iterrows()
        )
        text = f"Diverged, and left out of every mean and analysis: {names}."
        parts.append(_note(text))
    parts.append(_scale_note(by, settings))
    if np.isnan(base) and table["base_loss"].notna().any():
        parts.append(_note("The unadapted base's loss differs between members; no line is drawn."))
    return "".join(parts)


def _headline(by: runs.Axes, answer: runs.Answer | None, base: float) -> str:
    if answer is None:
        return "There is no final eval loss yet: no member has been evaluated after step 0."
    best, smallest = answer.best, answer.smallest
    unadapted = f"; base {base:.3f}" if np.isfinite(base) else ""
    if by.main is None:
        return f"One setting: final eval loss {_mean(best)}{unadapted}."
    if by.main != "rank" or not answer.known:
        which = f"Lowest final eval loss at {_setting(best, by)}"
        return f"{which}: {_mean(best)}{unadapted}."
    if smallest.name == best.name:
        which = (
            f"The best rank is also the smallest within one standard error: {_setting(best, by)}"
        )
        return f"{which} (eval loss {_mean(best)}{unadapted})."
    return (
        f"Smallest rank within one standard error of the best: {_setting(smallest, by)} "
        f"(eval loss {_mean(smallest)} against {_mean(best)} at {_setting(best, by)}{unadapted})."
    )


def _strength(by: runs.Axes, settings: pd.DataFrame, answer: runs.Answer) -> str:
    best = answer.best
    n = int(best["n"])
    if not answer.known:
        text = "There is one seed at the best setting, so there is no error bar"
        if by.main == "rank":
            text += ", and whether a smaller rank does as well can't be said"
        return text + ". Sweep over seeds to know."
    text = f"± is the standard error of the mean over n = {n} seeds"
    if n < 4:
        text += f"; from {n} values it is itself only a rough estimate"
    text += "."
    if by.main == "rank" and best["rank"] == settings["rank"].max() and len(settings) > 1:
        text += " The best is the largest rank tried, so a still larger one may do better."
    if by.main is not None and by.main != "rank":
        limit = best["mean"] + best["se"]
        within = settings[settings["mean"] <= limit]
        names = "; ".join(_setting(row, by) for _, row in within.iterrows())
        text += f" Within one standard error of it: {names}."
    if by.others:
        text += (
            " The best of several settings is chosen on the same eval set, so it flatters a little."
        )
    return text


def _scale_note(by: runs.Axes, settings: pd.DataFrame) -> str:
    scales = settings["scale"].dropna()
    if by.main != "rank" or not len(scales) or (scales <= 0).any():
        return ""
    spread = max(
        (rows["scale"].max() / rows["scale"].min() for _, rows in settings.groupby("line")),
        default=1.0,
    )
    if spread < 1 + 1e-6:
        return ""
    text = (
        f"The scale s of the update differs between ranks, by a factor of {spread:.4g} from "
        "largest to smallest: differences between ranks mix capacity with scale. To tell "
        "them apart, set "
        "<code>--config.method.scaling=fixed</code> (one s for all) or <code>rslora</code> (α/√r), "
        "sweep over <code>scaling</code>, or sweep the learning rate at every rank."
    )
    return f'<p class="note">{text}</p>'


def _intrinsic_section(
    run: runs.Run, table: pd.DataFrame, points: pd.DataFrame, found: pd.DataFrame
) -> str:
    if found.empty:
        return '<div class="answer"><p><strong>No subspace has been trained yet.</strong></p></div>'
    lines = []
    for _, row in found.iterrows():
        about = f"{row['condition']}: " if row["condition"] else ""
        lines.append(f"<p><strong>{_escape(about + intrinsic.headline(row))}</strong></p>")
    parts = [f'<div class="answer">{"".join(lines)}</div>']
    if run.status.get("state") == "running":
        parts.append(_note("This run is not finished: all figures are provisional."))
    diverged = int((points["status"] == "diverged").sum())
    if diverged:
        parts.append(
            _note(
                f"{diverged} member{_s(diverged)} diverged and count{'s' * (diverged == 1)} as if "
                "nothing had been learned; the table of members names them."
            )
        )
    called, metric = intrinsic.name(found["threshold"].iloc[0]), found["metric"].iloc[0]
    measured = runs.loss_name(run) if metric == "loss" else _words(metric)
    caption = (
        f"{measured[0].upper()}{measured[1:]} against the "
        "dimension of the subspace, at the best learning rate of each dimension. Dots are single "
        "seeds, bars one standard error. Dashed: full fine-tuning; dotted: what is needed; "
        f"upright: {called}, with its 95% interval shaded."
    )
    parts.append(_figure("intrinsic", caption, f"Line charts of {metric} by dimension."))
    cells = [intrinsic.shown(row) for _, row in found.iterrows()]
    caption = (
        f"{called} is the geometric mean of the seeds' own crossings; the smallest d tested whose "
        "mean over seeds reaches what is needed is the published definition. LoRA parameters: how "
        "many LoRA needs for the same."
    )
    parts.append(_table(list(cells[0]), [list(row.values()) for row in cells], caption))
    seeds = [
        f"<li>{_escape(row['condition'] or row['method'])}: {_escape(row['by_seed'])}</li>"
        for _, row in found.iterrows()
        if row["by_seed"]
    ]
    parts.append(f"<p>{called} of each seed:</p><ul>{''.join(seeds)}</ul>" if seeds else "")
    parts.append(
        "<p>analysis/intrinsic_points.csv has every dimension, learning rate and seed.</p>"
    )
    return "".join(parts)


def _facts_section(run: runs.Run, table: pd.DataFrame, by: runs.Axes) -> str:
    config = run.config.get("config", {})
    task = config.get("task", "")
    task = task.get("name", "") if isinstance(task, dict) else task
    seeds = table["seed"].nunique()
    steps = run.status.get("steps", table["final_step"].max())
    swept = [name for name in (by.main, *by.others) if name]
    varied = "; ".join(f"{_words(name)}: {_listed(table[name])}" for name in swept)
    targets = _listed(table["targets"]) if "targets" in table else ""
    methods = _listed(table["method"])
    base = config.get("base") or "an unnamed base"
    lead = (
        f"{len(table)} member{_s(len(table))} ({methods}) of {base}, trained on "
        f"{task or 'an unnamed task'} for {steps} steps with {seeds} seed{_s(seeds)}"
        + (f", over {varied}." if varied else ", all with the same setting.")
    )
    command = run.config.get("command")
    command = " ".join(command) if isinstance(command, list) else command
    versions = run.config.get("versions") or {}
    facts = {
        "Base": config.get("base"),
        "Base weights (sha256)": run.config.get("base_sha256"),
        "Task": task,
        "Targets": targets,
        "Steps": steps,
        "Members": f"{len(table)} ({(table['status'] == 'finished').sum()} finished, "
        f"{(table['status'] == 'diverged').sum()} diverged)",
        "Seeds": _listed(table["seed"]),
        "Device": run.config.get("device"),
        "Wall time": _duration(run.status.get("wall_seconds")),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Git revision": run.config.get("git"),
        "Command": command,
        "Redraw this page": f"python -m lorax.report {run.directory}",
        "Resolved config": "config.json, beside this page",
    }
    code = {"Command", "Redraw this page", "Git revision", "Base weights (sha256)"}
    rows = [
        f"<dt>{name}</dt><dd>{'<code>' if name in code else ''}{_escape(value)}"
        f"{'</code>' if name in code else ''}</dd>"
        for name, value in facts.items()
        if value not in (None, "", {})
    ]
    return f"<p>{_escape(lead)}</p><dl>{''.join(rows)}</dl>"


def _curve_section(
    settings: pd.DataFrame, by: runs.Axes, answer: runs.Answer | None, scores: list[str]
) -> str:
    main = by.main or "rank"
    chosen = None
    if answer is not None:
        chosen = (answer.smallest if main == "rank" else answer.best).name
    one_seed = not (settings["n"] > 1).any()
    bars = "One seed, so there are no error bars." if one_seed else "Bars: one standard error."
    caption = f"Final eval loss against {_words(main)}; dots are single seeds. {bars}"
    figure = "<p>Every member has the same setting, the seed apart: there is no curve.</p>"
    if by.main is not None:
        figure = _figure("rank_curve", caption, f"Line chart of final eval loss by {_words(main)}.")
    names = [main, *by.others]
    header = [*(_words(name) for name in names), "scale s", "trainable parameters"]
    header += ["final eval loss", "standard error", *scores, "n", "diverged"]
    rows = [
        [*(row[name] for name in names), row["scale"], row["trainable_params"]]
        + [_Fixed(row["mean"]), _Fixed(row["se"]), *(_Fixed(row[name]) for name in scores)]
        + [row["n"], row["diverged"]]
        for _, row in settings.iterrows()
    ]
    classes = ["chosen" if index == chosen else "" for index in settings.index]
    caption = "Means over seeds; the shaded row is the answer above."
    return figure + _table(header, rows, caption, classes=classes)


def _members_section(table: pd.DataFrame, scores: list[str]) -> str:
    header = ["name", "trainable parameters", "scale s", "final eval loss", "best eval loss"]
    header += [*scores, "status"]
    rows = [
        [m["name"], m["trainable_params"], m["scale"], _Fixed(m["final_loss"])]
        + [_Fixed(m["best_loss"]), *(_Fixed(m[name]) for name in scores)]
        + [m["status"] + _at_step(m["diverged_at"])]
        for _, m in table.iterrows()
    ]
    caption = "Every member; press a heading to sort. The best loss is that over all evals."
    return _table(header, rows, caption, sortable=True, classes=list(table["status"]))


def _methods_section(run, table, settings, by, ranks, figures: dict) -> list[tuple[str, str]]:
    """The methods side by side, where the sweep has several; adds its figure and its table."""
    if by.main != "method" or settings["mean"].isna().all():
        return []
    compared = compare.methods(table, settings, by, ranks)
    _save_table(run, "methods", compared)
    figures["methods"] = plots.methods(compared)
    bars = " Bars: one standard error." if compared["se"].notna().any() else ""
    caption = f"Each method at its best setting.{bars} Dashed: full fine-tuning, where it was run."
    figure = _figure("methods", caption, "Dot chart of final eval loss by method.")
    header = ["method", "trainable parameters", *(f"best {_words(name)}" for name in by.others)]
    header += ["eval loss (nats)", "standard error", "n", "diverged", "optimiser bytes"]
    header += ["step (ms)", "effective rank of ΔW"]
    rows = [
        [row["method"], row["trainable_params"], *(row[name] for name in by.others)]
        + [_Fixed(row["mean"]), _Fixed(row["se"]), row["n"], row["diverged"]]
        + [row["optimizer_bytes"], _Fixed(row["step_ms"], 1), _Fixed(row["effective"], 1)]
        for _, row in compared.iterrows()
    ]
    caption = "Best first. Time and optimiser bytes are one member's share of its group's."
    return [("Methods", figure + _table(header, rows, caption, sortable=True))]


def _evidence_section(run, table: pd.DataFrame, figures: dict) -> list[tuple[str, str]]:
    """What evidence said of each matrix, where it chose targets or ranks; adds its figure."""
    ranking = updates.sensitivity(run)
    if ranking is None:
        return []
    first = ranking["member"].iloc[0]
    shown = ranking[ranking["member"] == first].sort_values("score", ascending=False)
    figures["sensitivity"] = plot_updates.sensitivity(shown)
    name = table.loc[first, "name"]
    caption = (
        "Squared gradient that an adapter can reach, for each parameter that it trains, as a share "
        f"of all matrices'; the numbers are the ranks that were chosen. Member {name}."
    )
    figure = _figure("sensitivity", caption, "Heat map of scores by layer and target.")
    rows = [
        [row["path"], row["rank"], row["energy"], _Fixed(row["share"], 3), row["score"]]
        for _, row in shown.iterrows()
    ]
    header = [
        "matrix",
        "rank",
        "gradient energy ‖g‖²",
        "low-rank share",
        "energy × share ÷ parameters",
    ]
    note = (
        "Before training, on the member's first batches. analysis/sensitivity.csv has all members."
    )
    return [("Which matrices matter", figure + _table(header, rows, note, sortable=True))]


def _calibration_section(run, table, sigmas, ranks, figures: dict) -> list[tuple[str, str]]:
    """What the estimators say of a planted task against the truth; adds its figure and table."""
    found = calibration.estimates(run, table, sigmas, ranks)
    if found.empty:
        return []
    _save_table(run, "calibration", found)
    figures["calibration"] = plot_calibration.calibration(found)
    alt = "Scatter plots of estimate against planted truth, one an estimator."
    figure = _figure("calibration", calibration.CAPTION, alt)
    header, rows = calibration.shown(calibration.summary(found))
    return [("Calibration", figure + _table(header, rows, calibration.NOTE, sortable=True))]


def _learning_section(table: pd.DataFrame) -> str:
    caption = "Eval loss against step. Thick: means over seeds; thin: members."
    if (table["status"] == "diverged").any():
        caption += " Diverged members are dashed and may leave the frame."
    return _figure("learning_curves", caption, "Line chart of eval loss by step.")


def _spectra_section(line: str, layers: list[int]) -> str:
    where = f" Shown for {line}; analysis/spectra.csv has all." if line else ""
    caption = f"Singular values of ΔW = s·a·b, computed from the factors.{where}"
    alt = f"Log-log line charts of singular values for layers {', '.join(map(str, layers))}."
    return _figure("spectra", caption, alt)


def _ranks_section(ranks: pd.DataFrame, main: str) -> str:
    caption = "Ranks that ΔW makes use of; lines are means, dots single matrices (layers, seeds)."
    figure = _figure("update_ranks", caption, "Line charts of effective and stable rank.")
    columns = ["norm", "effective", "stable", "energy90", "numerical"]
    means = ranks.groupby([main, "target"], sort=True, dropna=False)[columns].mean().reset_index()
    rows = [
        [row[main], row["target"], _Fixed(row["norm"], 3)]
        + [_Fixed(row[name], 2) for name in columns[1:]]
        for _, row in means.iterrows()
    ]
    header = [_words(main), "target", "‖ΔW‖", "effective rank", "stable rank"]
    header += ["90% energy rank", "numerical rank"]
    return figure + _table(header, rows, "Means over layers and seeds.")


def _similarity_section(comparisons: list[Comparison], shown: pd.DataFrame) -> str:
    parts = [
        "<p>φ(i, j) = ‖U₁ᵢᵀ U₂ⱼ‖²/min(i, j): 1 where the top i directions of one update lie "
        "within the top j of the other (or the reverse), and max(i, j)/n on average for random "
        "subspaces of an n-dimensional space. The maps show A's directions, as the paper does; the "
        "tables add B's and those of ΔW itself.</p>"
    ]
    if any(c.name == "ranks_same_seed" for c in comparisons):
        text = (
            "Every rank starts from an A of its own, within a seed too, so no overlap here is "
            "there from the start. Members of one seed see the same batches in the same order."
        )
        parts.append(_note(text))
    for comparison in comparisons:
        r1, r2 = comparison.ranks
        many = f", mean over {comparison.pairs} pairs" if comparison.pairs > 1 else ", one pair"
        caption = f"φ(i, j) of A between {comparison.title}{many}; last panel: chance."
        alt = f"Heat maps of subspace similarity between {comparison.title}."
        parts.append(f"<h3>Between {_escape(comparison.title)}</h3>")
        parts.append(_figure(f"similarity_{comparison.name}", caption, alt))
        points = list(dict.fromkeys([(1, 1), (r1, r1), (r1, r2)]))
        header = ["target", "directions of"]
        for i, j in points:
            header += [f"φ({i}, {j})", "by chance"]
        rows = []
        targets = dict.fromkeys(updates.place(path)[1] for path in comparison.phi)
        for target in targets:
            paths = [path for path in comparison.phi if updates.place(path)[1] == target]
            for kind in updates.KINDS:
                row: list[Any] = [target, kind.replace("dW", "ΔW")]
                for i, j in points:
                    phi = np.mean([_at(comparison.phi[path][kind], i, j) for path in paths])
                    n = comparison.size[paths[0]][kind]
                    chance = expected_similarity(min(i, n), min(j, n), n)
                    row += [_Fixed(phi, 3), _Fixed(chance, 3)]
                rows.append(row)
        parts.append(_table(header, rows, "Means over layers. By chance: max(i, j)/n."))
    names = {comparison.name for comparison in comparisons}
    if not names & {"ranks_same_seed", "ranks_across_seeds"}:
        parts.append("<p>Between ranks: not available, the sweep has one rank.</p>")
    if "between_seeds" not in names:
        parts.append("<p>Between seeds: not available, there is one seed at the largest rank.</p>")
    return "".join(parts)


def _amplification_section(
    amplified: pd.DataFrame | None, reason: str, shown: pd.DataFrame, main: str
) -> str:
    if amplified is None:
        return f"<p>Not computed: {_escape(reason)}.</p>"
    here = _label(amplified, shown, main)
    layers = sorted(set(here["layer"]))
    if not layers:
        return "<p>Not computed: no member of the best setting's line has an adapter.</p>"
    layer = layers[len(layers) // 2]
    columns = ["delta_norm", "w_in_delta", "w_in_w", "w_in_random", "factor"]
    here = here[here["layer"] == layer]
    means = here.groupby(["target", main], sort=True, dropna=False)[columns].mean().reset_index()
    rows = [
        [row["target"], row[main], *(_Fixed(row[name], 3) for name in columns)]
        for _, row in means.iterrows()
    ]
    header = ["target", _words(main), "‖ΔW‖", "‖UᵀWV‖ in ΔW's directions", "W's own"]
    header += ["random", "amplification"]
    place = f"layer {layer}" if layer >= 0 else "the embeddings"
    caption = (
        f"Frobenius norms for {place}, means over seeds; every layer is in "
        "analysis/amplification.csv. Amplification = ‖ΔW‖/‖UᵀWV‖ with ΔW's directions: large where "
        "the update strengthens what the base hardly has."
    )
    return _table(header, rows, caption)


def _missing_section(table: pd.DataFrame, missing: dict[int, str]) -> str:
    items = [f"<li>{_escape(table['name'][m])}: {_escape(why)}</li>" for m, why in missing.items()]
    return f"<p>Members without LoRA factors that could be read:</p><ul>{''.join(items)}</ul>"


NOTES = """
<ul>
<li><b>One-standard-error rule.</b> The smallest rank whose mean final eval loss is at most the
lowest mean plus that mean's standard error (standard deviation over seeds, n − 1, divided by √n).
It asks for the simplest setting that the data can't tell from the best, and is no test of
equality.</li>
<li><b>Loss.</b> Cross entropy in nats, per completion token or, of a classifier, per example
(squared error where it predicts values); the base's is the eval at step 0.</li>
<li><b>Subspace similarity.</b> LoRA,
<a href="https://arxiv.org/abs/2106.09685">arXiv 2106.09685</a>, section 7.2: singular vectors of A
on the input side (appendix G says left; for A (r × in) the right ones are meant). Control:
Gaussian matrices of the same shape.</li>
<li><b>Amplification.</b> The same paper, section 7.3 and table 7, with the adapter's own rank.
The random column is about r‖W‖/√(in·out).</li>
<li><b>Effective rank.</b> exp of the entropy of σ/Σσ (Roy and Vetterli, EUSIPCO 2007).
<b>Stable rank.</b> Σσ²/σ₁². <b>90% energy rank.</b> Fewest σ that hold 90% of Σσ²
(<a href="https://arxiv.org/abs/2405.09673">arXiv 2405.09673</a>, section 4.6).
<b>Numerical rank.</b> How many σ exceed max(in, out)·ε·σ₁, ε of float32.</li>
<li><b>Scale.</b> ΔW = s·a·b with s = α/r, or α/√r
(<a href="https://arxiv.org/abs/2312.03732">arXiv 2312.03732</a>), or fixed; spectra and norms
include it, directions do not depend on it.</li>
</ul>
"""

SEARCH_NOTES = """
<ul>
<li><b>Intrinsic dimension.</b> θ = θ₀ + Pθ_d with P frozen and random: the smallest d that reaches
a share (90% for d90) of full fine-tuning (Li et al.,
<a href="https://arxiv.org/abs/1804.08838">arXiv 1804.08838</a>, section 2; Aghajanyan et al.,
<a href="https://arxiv.org/abs/2012.13255">arXiv 2012.13255</a>). Of a score the share is that of
its value; of a loss, that of its improvement over no training, which is our reading.</li>
<li><b>Full fine-tuning.</b> The best of its learning rates by the mean over seeds.</li>
<li><b>Learning rate.</b> Chosen for each dimension by the mean over seeds, on the same eval set, so
it flatters both sides a little.</li>
<li><b>Crossing.</b> Each seed's values are made monotone in d by isotonic regression and followed
linearly in log d to what is needed. Estimate: geometric mean over seeds; interval: Student's t on
log d, n − 1 degrees of freedom. It covers the seeds alone, not the choice of the data or of the
learning rates.</li>
<li><b>Refinement.</b> Dimensions between the largest up to which every seed fails and the smallest
from which on every seed succeeds, at the two best learning rates of the nearest one before.</li>
</ul>
"""


# ------------------------------------------------------------------------------- files and figures


def _similarity_figures(comparisons: list[Comparison]) -> dict[str, Figure]:
    figures = {}
    for comparison in comparisons:
        paths = list(comparison.phi)
        layers = _spread(sorted({updates.place(path)[0] for path in paths}))
        maps = {
            updates.place(path): comparison.phi[path]["A"]
            for path in paths
            if updates.place(path)[0] in layers
        }
        one, other = comparison.ranks
        figures[f"similarity_{comparison.name}"] = plot_updates.similarity_maps(
            maps,
            comparison.control.mean,
            f"i: top directions, r = {one}",
            f"j: top directions, r = {other}",
        )
    return figures


def _save_similarity(run: runs.Run, comparisons: list[Comparison]) -> None:
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
                        "phi_r1_r1": _at(phi, r1, r1),
                        "phi_r1_r2": phi[-1, -1],
                        "expected_1_1": expected_similarity(1, 1, n),
                        "expected_r1_r1": expected_similarity(r1, r1, n),
                        "expected_r1_r2": expected_similarity(r1, r2, n),
                    }
                )
        for field, values in comparison.control._asdict().items():
            arrays[f"{comparison.name}/gaussian/{field}"] = values
    if rows:
        _save_table(run, "similarity", pd.DataFrame(rows))
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_bytes(run.directory / "analysis" / "similarity.npz", buffer.getvalue())


def _save_table(run: runs.Run, name: str, table: pd.DataFrame) -> None:
    write_bytes(run.directory / "analysis" / f"{name}.csv", table.to_csv(index=False).encode())


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Once laid out at its resolution it stays so: drawing would find the same layout, twice.
    figure.set_dpi(150)
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _page(run: runs.Run, sections: list[tuple[str, str]], images: dict[str, bytes]) -> str:
    slug = {title: title.lower().replace(" ", "-") for title, _ in sections}
    contents = "".join(f'<li><a href="#{slug[t]}">{_escape(t)}</a></li>' for t, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{slug[t]}"><h2 id="{slug[t]}">{_escape(t)}</h2>'
        f"{content}</section>\n"
        for t, content in sections
    )
    for name, image in images.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{_base64(image)}"')
    name = run.directory.resolve().name
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_escape(name),
        lead="Low-rank adaptation: what was learned, and in how many directions.",
        contents=contents,
        sections=body,
        footer="Written by lorax.report; the numbers are in analysis/, the figures in figures/.",
    )


# -------------------------------------------------------------------------------------------- html


class _Fixed(NamedTuple):
    """A number to show with so many digits after the point."""

    value: Any
    digits: int = 4


def _table(
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    caption: str,
    sortable: bool = False,
    classes: Sequence[str] | None = None,
) -> str:
    rows = [list(row) for row in rows]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    cells = []
    for title, number in zip(header, numeric, strict=True):
        text = f'<button type="button">{_escape(title)}</button>' if sortable else _escape(title)
        sort = ' aria-sort="none"' if sortable else ""
        cells.append(f'<th scope="col"{_class(number)}{sort}>{text}</th>')
    body = []
    for row, name in zip(rows, classes or [""] * len(rows), strict=True):
        line = []
        for column, value in enumerate(row):
            tag, scope = ("th", ' scope="row"') if column == 0 else ("td", "")
            # Full precision is what sorting goes by; nothing for a missing number.
            plain = value.value if isinstance(value, _Fixed) else value
            data = f' data-value="{_escape(_plain(plain))}"' if sortable else ""
            attributes = scope + _class(numeric[column]) + data
            line.append(f"<{tag}{attributes}>{_escape(_show(value))}</{tag}>")
        body.append(f'<tr class="{_escape(name)}">{"".join(line)}</tr>' if name else
                    f"<tr>{''.join(line)}</tr>")  # fmt: skip
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_escape(caption)}">'
        f"<table{' class=sortable' if sortable else ''}><caption>{_escape(caption)}</caption>"
        f"<thead><tr>{''.join(cells)}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _figure(name: str, caption: str, alt: str) -> str:
    return (
        f'<figure><div><img src="{name}" alt="{_escape(alt)}"></div>'
        f"<figcaption>{_escape(caption)}</figcaption></figure>"
    )


def _note(text: str) -> str:
    return f'<p class="note">{_escape(text)}</p>'


def _escape(value: Any) -> str:
    return html.escape(value if isinstance(value, str) else _show(value), quote=True)


def _class(number: bool) -> str:
    return ' class="n"' if number else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (_Fixed, int, float, np.number)) or value is None


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, (float, np.floating)) and np.isnan(value))


def _plain(value: Any) -> str:
    return "" if _is_missing(value) else str(value)


def _show(value: Any) -> str:
    if isinstance(value, _Fixed):
        return "–" if _is_missing(value.value) else f"{value.value:.{value.digits}f}"
    if _is_missing(value):
        return "–"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value) if not isinstance(value, (dict, list)) else json.dumps(value)


def _mean(row: pd.Series) -> str:
    spread = f" ± {row['se']:.3f}" if np.isfinite(row["se"]) else ""
    return f"{row['mean']:.3f}{spread}"


def _setting(row: pd.Series, by: runs.Axes) -> str:
    main = by.main or "rank"
    value = "all" if _is_missing(row[main]) else _show(row[main])
    name = "r" if main == "rank" else _words(main)
    return f"{name} = {value}" + (f" with {row['line']}" if row["line"] else "")


def _words(name: str) -> str:
    return {"lr": "learning rate", "n_train": "training examples"}.get(name, name.replace("_", " "))


def _listed(column: pd.Series) -> str:
    values = list(dict.fromkeys("all" if _is_missing(value) else _show(value) for value in column))
    return ", ".join(values)


def _at(phi: np.ndarray, i: int, j: int) -> float:
    """phi(i, j), as far as there are directions."""
    return float(phi[min(i, phi.shape[0]) - 1, min(j, phi.shape[1]) - 1])


def _at_step(step: Any) -> str:
    return "" if _is_missing(step) else f" at step {int(step)}"


def _duration(seconds: Any) -> str:
    if _is_missing(seconds):
        return ""
    minutes, seconds = divmod(round(float(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


if __name__ == "__main__":
    sys.exit(main())
