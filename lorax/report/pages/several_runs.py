"""The report of several runs: their results, and how their configs differ."""

import functools
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from lorax import naming, rundir
from lorax.analysis import figures, intrinsic, runs, settings_compared, tables
from lorax.report import notes, page, words
from lorax.report.page import Picture, Section
from lorax.report.pages import dimension
from lorax.report.sections import outcome, shared_directions
from lorax.report.sections.outcome import Sweep

LEAD = "Several runs side by side."
EVALUATED = ("eval.examples", "train.seq_len")  # with task.*: keys that select the eval rows
TRAINED = ("train.batch_size", "task.n_train")  # with the steps: keys that set the training budget
Read = Callable[[], tuple[pd.DataFrame, pd.DataFrame]]  # reads a search once: `dimension.read`


def write(
    directories: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    share: pathlib.Path | None = None,
) -> pathlib.Path:
    """Analyse runs and write the page that compares them. Returns the path of report.html.

    Args:
      directories: the runs' directories, two or more.
      out: where to write the page; by default runs/compare-<their names>.
      share: write the page as one file here instead.

    Raises what `lorax.analysis.runs.load` raises, before anything is written.
    """
    with threadpool_limits(1, user_api="blas"):
        named = dict(zip(naming.names(directories), map(runs.load, directories), strict=True))
        directory = (
            pathlib.Path("runs") / naming.default_name("compare", named) if out is None else out
        )
        directory = pathlib.Path(directory)
        sweeps = {name: outcome.read(run) for name, run in named.items()}
        searches = {
            name: functools.cache(functools.partial(dimension.read, run))
            for name, run in named.items()
            if dimension.is_search(run)
        }
        trained = {name: of for name, of in sweeps.items() if name not in searches}
        command = page.command(directories, out=directory)
        sections = [
            *page.attempt("Runs", _overview, sweeps, searches, directory, command),
            *page.attempt("Curves", _curves, trained),
            *page.attempt("Methods", _methods, trained),
            *page.attempt("Intrinsic dimension", _dimensions, sweeps, searches),
            *page.attempt("Members", _members, sweeps),
            *page.attempt("Subspace similarity", _similarity, trained),
            notes.section(notes.LOSSES, notes.UPDATES, *[notes.SEARCHES] * bool(searches)),
        ]
        return page.save(directory, ", ".join(named), LEAD, sections, command, share)


# --------------------------------------------------------------------------------- runs and members


def _overview(
    sweeps: dict[str, Sweep],
    searches: dict[str, Read],
    directory: pathlib.Path,
    command: str,
) -> Section:
    """The runs, and how their configs differ. command: redraws the page."""
    rows = [_summary(name, sweep, searches.get(name)) for name, sweep in sweeps.items()]
    configs = {name: sweep.run.config.get("config", {}) for name, sweep in sweeps.items()}
    links = []
    for name, sweep in sweeps.items():
        if (sweep.run.directory / rundir.REPORT).exists():
            link = os.path.relpath(sweep.run.directory / rundir.REPORT, directory)
            links.append(f'<li><a href="{page.escape(link)}">{page.escape(name)}</a></li>')
    parts = ['<div class="answer">', *_headlines(sweeps, searches), "</div>"]
    if len({(row["task"], row["base"]) for row in rows}) > 1:
        text = (
            "These runs have different tasks or bases. Losses of different tasks can't be "
            "compared: look at where a curve bends, not at how high it is."
        )
        parts.append(page.note(text))
    differences = settings_compared.differences(configs)
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
    if links:
        parts.append(f"<p>Reports of the single runs:</p><ul>{''.join(links)}</ul>")
    parts.append(page.facts({"Redraw this page": command}, commands=["Redraw this page"]))
    values = [
        {name: x.value if isinstance(x, page.Fixed) else x for name, x in row.items()}
        for row in rows
    ]
    files = {"runs.csv": pd.DataFrame(values), "differences.csv": differences}
    return Section("Runs", "".join(parts), files=files)


def _summary(name: str, sweep: Sweep, search: Read | None) -> dict[str, object]:
    """A run's row of the table of runs."""
    config, best = sweep.run.config.get("config", {}), sweep.best
    reached = "–" if best is None else words.setting(best, sweep.by)
    if search is not None:  # it has dimensions, not a best setting
        best, reached = None, "; ".join(map(intrinsic.brief, _found(search)))
    base = words.listed(sweep.table["base"]) if "base" in sweep.table else config.get("base")
    return {
        "run": name,
        "base": base,
        "task": words.task(config),
        "methods": words.listed(sweep.table["method"]),
        "members": len(sweep.table),
        "seeds": sweep.table["seed"].nunique(),
        "steps": sweep.run.status.get("steps", sweep.table["final_step"].max()),
        "best setting": reached,
        "validation loss": page.Fixed(np.nan if best is None else best["mean"]),
        "standard error": page.Fixed(np.nan if best is None else best["se"]),
        "base's loss": page.Fixed(sweep.base),
        "state": sweep.run.status.get("state", "unknown"),
    }


def _unlike(differences: pd.DataFrame, steps: dict[str, int]) -> list[str]:
    """Why losses of runs on one task may not be comparable: different rows or more training.

    differences: from `settings_compared.differences`. steps: of each run.
    """
    texts = []
    listed = lambda values_by_run: "; ".join(
        f"{name}: {page.show(value) or '–'}" for name, value in values_by_run.items()
    )
    rows = differences.set_index("key").to_dict("index")
    for key in [
        key for key in rows if key in EVALUATED or re.match(r"task\.(?!name|n_train)", key)
    ]:
        texts.append(
            f"The runs differ in {key} ({listed(rows[key])}), so their losses may be measured on "
            "different rows: a difference in loss need not be a difference in what was learned."
        )
    trained = {key: rows[key] for key in TRAINED if key in rows}
    trained |= {"steps": steps} if len(set(steps.values())) > 1 else {}
    for key, values in trained.items():
        texts.append(
            f"The runs differ in {key} ({listed(values)}): a lower loss may be due to more "
            "training alone."
        )
    return texts


def _headlines(sweeps: dict[str, Sweep], searches: dict[str, Read]) -> list[str]:
    lines = []
    for name, sweep in sweeps.items():
        if name in searches:
            text = "; ".join(map(dimension.headline, _found(searches[name])))
            text = text or "no subspace has been trained yet"
        elif sweep.best is None:
            text = "no setting has a validation loss for all its seeds"
        else:
            text = f"validation loss {words.mean(sweep.best)}"
            text += f" at {words.setting(sweep.best, sweep.by)}" * (sweep.by.main is not None)
        text = page.escape(text.rstrip("."))
        lines.append(f"<p><strong>{page.escape(name)}</strong>: {text}.</p>")
    return lines


def _found(search: Read) -> list[pd.Series]:
    """The estimates of a search: a row per condition."""
    return [row for _, row in search()[1].iterrows()]


def _members(sweeps: dict[str, Sweep]) -> Section:
    """Every member of every run."""
    table = pd.concat(
        [sweep.table.drop(columns="setting").assign(run=name) for name, sweep in sweeps.items()],
        ignore_index=True,
    )
    scores = list(dict.fromkeys(name for sweep in sweeps.values() for name in sweep.scores))
    table = table[["run", *(name for name in table if name != "run")]]
    header = ["name", "run", "method", "rank", "learning rate", "trainable parameters", "scale s"]
    header += ["validation loss", "best validation loss", *scores, "status"]
    for name in ("rank", "lr", "scale"):
        table[name] = table.get(name)
    rows = [
        [m["name"], m["run"], m["method"], m["rank"], m["lr"], m["trainable_params"], m["scale"]]
        + [page.Fixed(m["final_loss"]), page.Fixed(m["best_loss"])]
        + [*(page.Fixed(m[name]) for name in scores), words.status(m)]
        for _, m in table.iterrows()
    ]
    caption = "Every member of every run; click a heading to sort."
    content = page.table(header, rows, caption, sortable=True, classes=list(table["status"]))
    return Section("Members", content, files={"members.csv": table})


# ------------------------------------------------------------------------------------------- losses


def _loss(sweeps: dict[str, Sweep]) -> str:
    """The name of the losses, with their unit if all runs have the same."""
    units = {runs.loss_unit(sweep.run) for sweep in sweeps.values()}
    return f"loss ({units.pop()})" if len(units) == 1 else "loss"


def _splits(sweeps: dict[str, Sweep]) -> str:
    """Which rows the losses are from."""
    of_runs: dict[str, list[str]] = {}
    for name, sweep in sweeps.items():
        of_runs.setdefault(runs.measured(sweep.table).split, []).append(name)
    if len(of_runs) == 1:
        return f"Losses are those of the {next(iter(of_runs))} rows."
    said = "; ".join(f"{split} rows: {', '.join(names)}" for split, names in of_runs.items())
    return f"Losses are not all of the same split. {said}."


def _curves(sweeps: dict[str, Sweep]) -> list[Section]:
    """Loss against rank, alpha, learning rate and size, if the runs have several values of them."""
    curves_by_axis = []
    for axis in settings_compared.CURVES:
        of_axis = [
            settings_compared.curve(sweep.table, sweep.by, axis).assign(run=name, axis=axis)
            for name, sweep in sweeps.items()
        ]
        of_axis = pd.concat([rows for rows in of_axis if len(rows)] or [pd.DataFrame({"x": []})])
        if of_axis["x"].nunique() > 1:
            curves_by_axis.append(of_axis)
    if not curves_by_axis:
        return []
    columns = ["axis", "run", "part", "x", "mean", "se", "n", "line"]
    numbers = pd.concat(curves_by_axis, ignore_index=True)[columns]
    numbers = settings_compared.with_interval(numbers)
    drawn = ", ".join(words.axis(axis) for axis in dict.fromkeys(numbers["axis"]))
    lowest = numbers.loc[numbers["mean"].idxmin()]
    caption = (
        "Final loss: a line for each method of each run (and for each base, task or number of "
        "training examples). All other axes are at their best for each value, by the mean "
        "validation loss. Against the number of parameters, only points are shown that beat all "
        "smaller ones. Dots: means over seeds; bars: 95% intervals over seeds (Student's t). "
        + _splits(sweeps)
    )
    alt = (
        f"Line charts of validation loss against {drawn}: the lowest is {lowest['mean']:.3f} of "
        f"{lowest['run']} at {words.axis(lowest['axis'])} {page.show(lowest['x'])}."
    )
    content = page.aid(
        "Lower is better. Where a line is flat, a larger value does not help."
    ) + page.figure("curves", caption, alt)
    header = ["run", "of", "against", "value", "final loss", "95% from", "to", "seeds"]
    header += ["at its best"]
    rows = [
        [
            r["run"],
            r["part"] or "–",
            words.axis(r["axis"]),
            r["x"],
            page.Fixed(r["mean"]),
            page.Fixed(r["low"]),
            page.Fixed(r["high"]),
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
    tables = []
    for name, sweep in sweeps.items():
        axes = tuple(axis for axis in sweep.by.names if axis != "method")
        by = runs.Axes("method", axes, sweep.by.tuned)
        settings = runs.settings(sweep.table, by)
        if len(runs.eligible(settings)):
            compared = settings_compared.methods(sweep.table, settings, by, pd.DataFrame())
            tables.append(compared.assign(run=name, setting=_said(compared, axes)))
    if not tables:
        return []
    names_of = ["run", "method", "setting", "trainable_params", "mean", "se", "n", "diverged"]
    names_of += ["optimizer_bytes", "step_ms"]
    numbers = pd.concat([rows[names_of] for rows in tables], ignore_index=True)
    numbers = settings_compared.with_interval(numbers)
    best = numbers.loc[numbers["mean"].idxmin()]
    caption = (
        "Final loss of each method of each run at its best setting, by the mean validation loss. "
        "Dots: means over seeds; bars: 95% intervals over seeds (Student's t). " + _splits(sweeps)
    )
    alt = (
        f"Dot chart of validation loss by method and run: {best['method']} of {best['run']} is "
        f"lowest, {words.mean(best)}."
    )
    header = ["method", "run", "best setting", "trainable parameters", "final loss"]
    header += ["95% from", "to", "seeds", "diverged", "optimiser bytes", "step (ms)"]
    rows = [
        [r["method"], r["run"], r["setting"], r["trainable_params"], page.Fixed(r["mean"])]
        + [page.Fixed(r["low"]), page.Fixed(r["high"]), r["n"], r["diverged"]]
        + [r["optimizer_bytes"]]
        + [page.Fixed(r["step_ms"], 1)]
        for _, r in numbers.sort_values("mean", kind="stable").iterrows()
    ]
    content = page.aid(
        "Lower is better. An interval holds for one mean. Whether two settings of a run differ is "
        "a question of their differences by seed, which the run's own page answers."
    )
    content += page.figure("methods", caption, alt)
    content += page.table(header, rows, "Best first; click a heading to sort.", sortable=True)
    figure = figures.methods_of_runs(numbers, _loss(sweeps))
    pictures = {"methods": Picture(figure, numbers)}
    return [Section("Methods", content, pictures, {"methods.csv": numbers})]


def _said(settings: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    return [runs.fields(row, axes) or "–" for _, row in settings.iterrows()]


def _dimensions(sweeps: dict[str, Sweep], searches: dict[str, Read]) -> list[Section]:
    """d90 of every search, in panels side by side."""
    every: list[tuple[pd.DataFrame, pd.DataFrame]] = []
    for name, search in searches.items():
        points, estimated = search()
        if len(estimated):
            label = lambda text, name=name: f"{name}, {text}" if text else name
            points = points.assign(shared=points["shared"].map(label))
            points["condition"] = points["condition"].map(label)
            every.append((points, estimated.assign(condition=estimated["condition"].map(label))))
    if not every:
        return []
    points, estimated = (
        pd.concat(tables, ignore_index=True) for tables in zip(*every, strict=True)
    )
    sections, of_searches = [], [sweeps[name].run for name in searches]
    for metric, of_metric in estimated.groupby("metric", sort=False):
        loss = " and ".join(dict.fromkeys(runs.loss_name(run) for run in of_searches))
        measured = loss if metric == "loss" else words.axis(metric)
        name = "intrinsic" if estimated["metric"].nunique() == 1 else f"intrinsic_{metric}"
        unit = " and ".join(dict.fromkeys(runs.loss_unit(run) for run in of_searches))
        content, picture = dimension.curves(points, of_metric, measured, unit, name)
        content += dimension.estimates(of_metric)
        title = "Intrinsic dimension" + f" by {metric}" * (estimated["metric"].nunique() > 1)
        files = {"intrinsic.csv": estimated, "intrinsic_points.csv": points}
        sections.append(Section(title, content, {name: picture}, files))
    return sections


# --------------------------------------------------------------------------------------- directions


def _similarity(sweeps: dict[str, Sweep]) -> list[Section]:
    """Directions shared by the runs' best members and by two seeds of one run."""
    bases, absent = {}, []
    for name, sweep in sweeps.items():
        bases[name], why = _best_bases(sweep)
        if not bases[name]:
            absent.append(f"{name}: {why}.")
    present = [name for name in bases if bases[name]]
    if not present:
        return []
    comparisons = []
    for first, second in itertools.combinations_with_replacement(present, 2):
        if first == second:
            pairs = list(itertools.combinations(bases[first], 2))
            title = f"two seeds of {first}"
        else:
            pairs = list(itertools.product(bases[first], bases[second]))
            title = f"{first} and {second}"
        common = [shared_directions.fitting(u, v) for u, v in pairs]
        name = naming.default_name("similarity", [first, second]).removeprefix("similarity-")
        name = page.unused(name, [comparison.name for comparison in comparisons])
        compared = shared_directions.compare(name, title, [pair for pair in common if pair[0]])
        if compared is not None:
            comparisons.append(compared)
        elif first != second:
            absent.append(f"{title}: no matrix that both adapt has the same shape in both.")
        else:
            absent.append(
                f"{title}: not available: its best setting has only one member with an update."
            )
    bases_of = {sweep.run.config.get("base_sha256") for sweep in sweeps.values()}
    if len(bases_of) > 1:
        absent.append(
            "The runs' bases have different weights, so these are directions in different "
            "networks, which may agree by chance alone."
        )
    return [shared_directions.across(comparisons, absent)]


def _best_bases(sweep: Sweep) -> tuple[list[tables.Bases], str]:
    """(directions of the members of the best setting, "") or ([], the reason)."""
    if sweep.best is None:
        return [], "no setting has a validation loss for all its seeds"
    same = settings_compared.of_setting(sweep.table, sweep.best, sweep.by)
    members = sweep.table.index[same & ~sweep.table["status"].isin(runs.WITHOUT_RESULT)]
    updates, missing = tables.updates(sweep.run, members)
    reason = next(iter(missing.values()), "its best setting has no member with an update")
    return [tables.bases(update) for update in updates.values()], reason
