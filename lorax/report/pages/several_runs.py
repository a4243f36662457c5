"""The report of several runs: their results, and how their configs differ."""

import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from lorax import rundir
from lorax.analysis import compare, figures, intrinsic, runs, tables
from lorax.report import notes, page, words
from lorax.report.page import Picture, Section
from lorax.report.pages import dimension
from lorax.report.sections import outcome, shared_directions
from lorax.report.sections.outcome import Sweep

LEAD = "Several runs side by side."
MAX_LENGTH = 60  # of a directory's name
EVALUATED = ("eval.examples", "train.seq_len")  # keys that with task.* choose the rows of a loss
TRAINED = ("train.batch_size", "task.n_train")  # keys that with the steps say how much it is


def write(
    directories: Sequence[str | os.PathLike], out: str | os.PathLike | None = None
) -> pathlib.Path:
    """Analyse runs and write the page that compares them; the path of report.html.

    Args:
      directories: of the runs, two or more.
      out: where the page goes; without it runs/compare-<their names>.

    Raises what `lorax.analysis.runs.load` raises, before anything is written.
    """
    with threadpool_limits(1, user_api="blas"):
        named = dict(zip(names(directories), map(runs.load, directories), strict=True))
        directory = pathlib.Path("runs") / default_name("compare", named) if out is None else out
        directory = pathlib.Path(directory)
        sweeps = {name: outcome.read(run) for name, run in named.items()}
        searches = {name: run for name, run in named.items() if dimension.is_search(run)}
        trained = {name: of for name, of in sweeps.items() if name not in searches}
        command = page.command(directories, out=directory)
        sections = [
            *page.attempt("Runs", _overview, sweeps, searches, directory, command),
            *page.attempt("Curves", _curves, trained),
            *page.attempt("Methods", _methods, trained),
            *page.attempt("Intrinsic dimension", _dimensions, searches),
            *page.attempt("Members", _members, sweeps),
            *page.attempt("Subspace similarity", _similarity, trained),
            notes.section(notes.LOSSES, notes.UPDATES, *[notes.SEARCHES] * bool(searches)),
        ]
        return page.save(directory, ", ".join(named), LEAD, sections, command)


def names(directories: Sequence[str | os.PathLike]) -> list[str]:
    """Names for the runs: the last parts of their paths, as many as make them different.

    Raises ValueError where a directory is named twice.
    """
    parts = [pathlib.Path(directory).resolve().parts for directory in directories]
    if len(set(parts)) < len(parts):
        twice = next(directory for directory, own in zip(directories, parts, strict=True)
                     if parts.count(own) > 1)  # fmt: skip
        raise ValueError(f"{twice}: given twice; a comparison takes different directories")
    for length in itertools.count(1):
        found = ["/".join(own[-length:]) for own in parts]
        if len(set(found)) == len(found):
            return found


def default_name(sort: str, of: Sequence[str]) -> str:
    """The name of a report's directory: the sort of report, and what it is of."""
    name = re.sub(r"[^\w.-]+", "_", f"{sort}-" + "-".join(of))
    if len(name) <= MAX_LENGTH:
        return name
    return name[: MAX_LENGTH - 9] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]


# --------------------------------------------------------------------------------- runs and members


def _overview(
    sweeps: dict[str, Sweep],
    searches: dict[str, runs.Run],
    directory: pathlib.Path,
    command: str,
) -> Section:
    """The runs, and how their configs differ. command: redraws the page."""
    rows = [_summary(name, of, name in searches) for name, of in sweeps.items()]
    configs = {name: of.run.config.get("config", {}) for name, of in sweeps.items()}
    own = []
    for name, of in sweeps.items():
        if (of.run.directory / rundir.REPORT).exists():
            link = os.path.relpath(of.run.directory / rundir.REPORT, directory)
            own.append(f'<li><a href="{page.escape(link)}">{page.escape(name)}</a></li>')
    parts = ['<div class="answer">', *_headlines(sweeps, searches), "</div>"]
    if len({(row["task"], row["base"]) for row in rows}) > 1:
        text = (
            "These runs have different tasks or bases. Losses of different tasks can't be "
            "compared: look at where a curve bends, not at how high it is."
        )
        parts.append(page.note(text))
    differences = compare.differences(configs)
    steps = {row["run"]: row["steps"] for row in rows}
    parts += map(page.note, _unlike(differences, steps))
    unfinished = [row["run"] for row in rows if row["state"] in rundir.UNFINISHED]
    if unfinished:
        parts.append(page.note(f"Not finished, so provisional: {', '.join(unfinished)}."))
    caption = "The runs, each at its best setting: the lowest mean over seeds."
    parts.append(page.table(list(rows[0]), [list(row.values()) for row in rows], caption))
    parts.append("<h3>Differences</h3>")
    if len(differences):
        caption = "Keys of config.json that differ. All others are the same in all runs."
        cells = differences.to_numpy().tolist()
        parts.append(page.table(list(differences.columns), cells, caption))
    else:
        parts.append(page.paragraph("None: their configs are the same."))
    if own:
        parts.append(f"<p>Their own reports:</p><ul>{''.join(own)}</ul>")
    parts.append(page.facts({"Redraw this page": command}, ["Redraw this page"]))
    values = [
        {name: x.value if isinstance(x, page.Fixed) else x for name, x in row.items()}
        for row in rows
    ]
    files = {"runs.csv": pd.DataFrame(values), "differences.csv": differences}
    return Section("Runs", "".join(parts), files=files)


def _summary(name: str, of: Sweep, is_search: bool) -> dict[str, object]:
    """A run's row of the table of runs."""
    config, best = of.run.config.get("config", {}), None if of.answer is None else of.answer.best
    reached = "–" if best is None else words.setting(best, of.by)
    if is_search:  # it has dimensions, not a best setting
        best, reached = None, "; ".join(map(intrinsic.brief, _found(of.run)))
    task = config.get("task", "")
    base = words.listed(of.table["base"]) if "base" in of.table else config.get("base")
    return {
        "run": name,
        "base": base,
        "task": task.get("name", "") if isinstance(task, dict) else task,
        "methods": words.listed(of.table["method"]),
        "members": len(of.table),
        "seeds": of.table["seed"].nunique(),
        "steps": of.run.status.get("steps", of.table["final_step"].max()),
        "best setting": reached,
        "final eval loss": page.Fixed(np.nan if best is None else best["mean"]),
        "standard error": page.Fixed(np.nan if best is None else best["se"]),
        "base's loss": page.Fixed(of.base),
        "state": of.run.status.get("state", "unknown"),
    }


def _unlike(differences: pd.DataFrame, steps: dict[str, int]) -> list[str]:
    """Why losses of runs of one task may not be comparable: other rows, or more training.

    differences: of `compare.differences`. steps: of each run.
    """
    said = []
    listed = lambda of: "; ".join(
        f"{name}: {page.show(value) or '–'}" for name, value in of.items()
    )
    rows = differences.set_index("key").to_dict("index")
    for key in [
        key for key in rows if key in EVALUATED or re.match(r"task\.(?!name|n_train)", key)
    ]:
        said.append(
            f"The runs differ in {key} ({listed(rows[key])}), so their losses may be measured on "
            "different rows: a difference in loss need not be a difference in what was learned."
        )
    trained = {key: rows[key] for key in TRAINED if key in rows}
    trained |= {"steps": steps} if len(set(steps.values())) > 1 else {}
    for key, values in trained.items():
        said.append(
            f"The runs differ in {key} ({listed(values)}): a lower loss may be due to more "
            "training alone."
        )
    return said


def _headlines(sweeps: dict[str, Sweep], searches: dict[str, runs.Run]) -> list[str]:
    lines = []
    for name, of in sweeps.items():
        if name in searches:
            text = "; ".join(map(dimension.headline, _found(of.run)))
            text = text or "no subspace has been trained yet"
        elif of.answer is None:
            text = "no member has been evaluated after step 0"
        else:
            best = of.answer.best
            text = f"final eval loss {words.mean(best)}"
            text += f" at {words.setting(best, of.by)}" * (of.by.main is not None)
        text = page.escape(text.rstrip("."))
        lines.append(f"<p><strong>{page.escape(name)}</strong>: {text}.</p>")
    return lines


def _found(run: runs.Run) -> list[pd.Series]:
    """The estimates of a search: a row per condition."""
    return [row for _, row in dimension.read(run)[1].iterrows()]


def _members(sweeps: dict[str, Sweep]) -> Section:
    """Every member of every run."""
    every = pd.concat(
        [of.table.drop(columns="setting").assign(run=name) for name, of in sweeps.items()],
        ignore_index=True,
    )
    scores = list(dict.fromkeys(name for of in sweeps.values() for name in of.scores))
    every = every[["run", *(name for name in every if name != "run")]]
    header = ["name", "run", "method", "rank", "learning rate", "trainable parameters", "scale s"]
    header += ["final eval loss", "best eval loss", *scores, "status"]
    for name in ("rank", "lr", "scale"):
        every[name] = every.get(name)
    rows = [
        [m["name"], m["run"], m["method"], m["rank"], m["lr"], m["trainable_params"], m["scale"]]
        + [page.Fixed(m["final_loss"]), page.Fixed(m["best_loss"])]
        + [*(page.Fixed(m[name]) for name in scores), m["status"] + words.at_step(m["diverged_at"])]
        for _, m in every.iterrows()
    ]
    caption = "Every member of every run; press a heading to sort."
    content = page.table(header, rows, caption, sortable=True, classes=list(every["status"]))
    return Section("Members", content, files={"members.csv": every})


# ------------------------------------------------------------------------------------------- losses


def _loss(sweeps: dict[str, Sweep]) -> str:
    """What the losses are called, with their unit if all runs have the same."""
    units = {runs.loss_name(of.run) for of in sweeps.values()}
    return units.pop() if len(units) == 1 else "eval loss"


def _curves(sweeps: dict[str, Sweep]) -> list[Section]:
    """Loss against rank, alpha, learning rate and size, if the runs have several values of it."""
    found = []
    for axis in compare.CURVES:
        of_axis = [
            compare.curve(of.table, of.by, axis).assign(run=name, axis=axis)
            for name, of in sweeps.items()
        ]
        of_axis = pd.concat([rows for rows in of_axis if len(rows)] or [pd.DataFrame({"x": []})])
        if of_axis["x"].nunique() > 1:
            found.append(of_axis)
    if not found:
        return []
    columns = ["axis", "run", "part", "x", "mean", "se", "n", "line"]
    numbers = pd.concat(found, ignore_index=True)[columns]
    drawn = ", ".join(words.axis(axis) for axis in dict.fromkeys(numbers["axis"]))
    lowest = numbers.loc[numbers["mean"].idxmin()]
    caption = (
        "Final eval loss: a line for each method of each run (and for each base, task or number of "
        "training examples), with all other axes at their best for each value. Against the number "
        "of parameters, only points that beat all smaller ones. Bars: one standard error."
    )
    alt = (
        f"Line charts of final eval loss against {drawn}: the lowest is {lowest['mean']:.3f} of "
        f"{lowest['run']} at {words.axis(lowest['axis'])} {page.show(lowest['x'])}."
    )
    content = page.aid(
        "Lower is better. Where a line is flat, a larger value does not help."
    ) + page.figure("curves", caption, alt)
    header = ["run", "of", "against", "value", "final eval loss", "standard error", "n"]
    header += ["at its best"]
    rows = [
        [
            r["run"],
            r["part"] or "–",
            words.axis(r["axis"]),
            r["x"],
            page.Fixed(r["mean"]),
            page.Fixed(r["se"]),
            r["n"],
        ]
        + [r["line"] or "–"]
        for _, r in numbers.iterrows()
    ]
    table = page.table(header, rows, "The points of the curves.", sortable=True)
    content += page.fold("The points as a table", table)
    figure = figures.curves(numbers, _loss(sweeps))
    return [Section("Curves", content, {"curves": Picture(figure, numbers)})]


def _methods(sweeps: dict[str, Sweep]) -> list[Section]:
    """Every method of every run at its best setting."""
    found = []
    for name, of in sweeps.items():
        others = tuple(axis for axis in (of.by.main, *of.by.others) if axis and axis != "method")
        by = runs.Axes("method", others)
        settings = runs.settings(of.table, by)
        if settings["mean"].notna().any():
            compared = compare.methods(of.table, settings, by, pd.DataFrame())
            found.append(compared.assign(run=name, setting=_said(compared, others)))
    if not found:
        return []
    names_of = ["run", "method", "setting", "trainable_params", "mean", "se", "n", "diverged"]
    names_of += ["optimizer_bytes", "step_ms"]
    numbers = pd.concat([rows[names_of] for rows in found], ignore_index=True)
    best = numbers.loc[numbers["mean"].idxmin()]
    caption = "Each method of each run at its best setting. Bars: one standard error."
    alt = (
        f"Dot chart of final eval loss by method and run: {best['method']} of {best['run']} is "
        f"lowest, {words.mean(best)}."
    )
    header = ["method", "run", "best setting", "trainable parameters", "final eval loss"]
    header += ["standard error", "n", "diverged", "optimiser bytes", "step (ms)"]
    rows = [
        [r["method"], r["run"], r["setting"], r["trainable_params"], page.Fixed(r["mean"])]
        + [page.Fixed(r["se"]), r["n"], r["diverged"], r["optimizer_bytes"]]
        + [page.Fixed(r["step_ms"], 1)]
        for _, r in numbers.sort_values("mean", kind="stable").iterrows()
    ]
    content = page.aid(
        "Lower is better. Bars that don't overlap prove nothing: for two equal methods this "
        "happens by chance in one case of three with two seeds, of four with three, and of six "
        "with many. "
        "With three seeds, means differ by twice both bars together in one case of twenty."
    )
    content += page.figure("methods", caption, alt)
    content += page.table(header, rows, "Best first; press a heading to sort.", sortable=True)
    figure = figures.methods_of_runs(numbers, _loss(sweeps))
    pictures = {"methods": Picture(figure, numbers)}
    return [Section("Methods", content, pictures, {"methods.csv": numbers})]


def _said(settings: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    return [runs.fields(row, axes) or "–" for _, row in settings.iterrows()]


def _dimensions(searches: dict[str, runs.Run]) -> list[Section]:
    """d90 of every search, in panels side by side."""
    every: list[tuple[pd.DataFrame, pd.DataFrame]] = []
    for name, run in searches.items():
        points, found = dimension.read(run)
        if len(found):
            label = lambda text, name=name: f"{name}, {text}" if text else name
            points = points.assign(shared=points["shared"].map(label))
            points["condition"] = points["condition"].map(label)
            every.append((points, found.assign(condition=found["condition"].map(label))))
    if not every:
        return []
    points, found = (pd.concat(of, ignore_index=True) for of in zip(*every, strict=True))
    sections = []
    for metric, of_metric in found.groupby("metric", sort=False):
        loss = " and ".join(dict.fromkeys(runs.loss_name(run) for run in searches.values()))
        measured = loss if metric == "loss" else words.axis(metric)
        name = "intrinsic" if found["metric"].nunique() == 1 else f"intrinsic_{metric}"
        content, picture = dimension.curves(points, of_metric, measured, loss, name)
        content += dimension.estimates(of_metric)
        title = "Intrinsic dimension" + f" by {metric}" * (found["metric"].nunique() > 1)
        files = {"intrinsic.csv": found, "intrinsic_points.csv": points}
        sections.append(Section(title, content, {name: picture}, files))
    return sections


# --------------------------------------------------------------------------------------- directions


def _similarity(sweeps: dict[str, Sweep]) -> list[Section]:
    """Directions shared by the runs' best members, and by two seeds of one run."""
    bases, absent = {}, []
    for name, of in sweeps.items():
        bases[name], why = _best_bases(of)
        if not bases[name]:
            absent.append(f"{name}: {why}.")
    present = [name for name in bases if bases[name]]
    if not present:
        return []
    comparisons = []
    for one, other in itertools.combinations_with_replacement(present, 2):
        if one == other:
            pairs = list(itertools.combinations(bases[one], 2))
            title = f"two seeds of {one}"
        else:
            pairs = list(itertools.product(bases[one], bases[other]))
            title = f"{one} and {other}"
        common = [fitting(u, v) for u, v in pairs]
        name = default_name("similarity", [one, other]).removeprefix("similarity-")
        name = page.unused(name, [comparison.name for comparison in comparisons])
        found = shared_directions.compare(name, title, [pair for pair in common if pair[0]])
        if found is not None:
            comparisons.append(found)
        elif one != other:
            absent.append(f"{title}: no matrix of one shape that both adapt.")
        else:
            absent.append(
                f"{title}: not available, its best setting has one member with an update."
            )
    bases_of = {of.run.config.get("base_sha256") for of in sweeps.values()}
    if len(bases_of) > 1:
        absent.append(
            "The runs' bases have different weights, so these are directions of different "
            "networks, which may agree by chance alone."
        )
    return [shared_directions.across(comparisons, absent)]


def _best_bases(of: Sweep) -> tuple[list[tables.Bases], str]:
    """(directions of the members of the best setting, "") or ([], the reason)."""
    if of.answer is None:
        return [], "no member has been evaluated after step 0"
    same = compare.of_setting(of.table, of.answer.best, of.by)
    best = of.table.index[same & (of.table["status"] != "diverged")]
    found, missing = tables.updates(of.run, best)
    why = next(iter(missing.values()), "its best setting has no member with an update")
    return [tables.bases(own) for own in found.values()], why


def fitting(one: tables.Bases, other: tables.Bases) -> tuple[tables.Bases, tables.Bases]:
    """The matrices that both have, in one shape."""
    kinds = tables.KINDS[2:]
    paths = [
        path
        for path in one
        if path in other and all(len(one[path][kind]) == len(other[path][kind]) for kind in kinds)
    ]
    return {path: one[path] for path in paths}, {path: other[path] for path in paths}
