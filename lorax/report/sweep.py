"""Sections of a sweep: what came out of it, what was run, its members."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorax.analysis import (
    calibration,
    compare,
    plot_calibration,
    plot_updates,
    plots,
    runs,
    updates,
)
from lorax.report import page, words
from lorax.report.page import Picture, Section

MAX_PANELS = 12  # of learning curves


class Sweep(NamedTuple):
    """A run and what its losses say."""

    run: runs.Run
    table: pd.DataFrame  # of `runs.summary`
    by: runs.Axes
    scores: list[str]
    settings: pd.DataFrame  # of `runs.settings`
    answer: runs.Answer | None
    base: float  # the unadapted base's eval loss; NaN where it is unknown or the members' differ

    @property
    def main(self) -> str:
        """The field on the x axis of its curve."""
        return self.by.main or "rank"


def read(run: runs.Run) -> Sweep:
    """The tables of a run that its sections are made of."""
    table = runs.summary(run)
    by, scores = runs.axes(run, table), runs.scores(run)
    settings = runs.settings(table, by, scores)
    answer = runs.answer(settings, by.main or "rank")
    losses = table["base_loss"].dropna()
    same = len(losses) > 0 and np.ptp(losses) <= 1e-3 * losses.abs().max()
    base = float(losses.mean()) if same else float("nan")
    return Sweep(run, table, by, scores, settings, answer, base)


# ----------------------------------------------------------------------------------------- answer


def answer(sweep: Sweep) -> Section:
    """What came out, in a sentence, with how strong it is and what is missing: diverged members, an
    unfinished run, a scale that differs between ranks."""
    run, table, by, _, settings, found, base = sweep
    parts = [
        f'<div class="answer"><p><strong>{page.escape(_headline(by, found, base))}</strong></p>'
    ]
    if found is not None:
        parts.append(f"<p>{page.escape(_strength(by, settings, found))}</p>")
    parts.append("</div>")
    if run.status.get("state") in runs.UNFINISHED:
        parts.append(page.note("This run is not finished: all figures are provisional."))
    diverged = table[table["status"] == "diverged"]
    if len(diverged):
        names = ", ".join(
            f"{m['name']}{words.at_step(m['diverged_at'])}" for _, m in diverged.iterrows()
        )
        parts.append(page.note(f"Diverged, and left out of every mean and analysis: {names}."))
    parts.append(_scale_note(by, settings))
    if np.isnan(base) and table["base_loss"].notna().any():
        text = "The unadapted base's loss differs between members; no line is drawn."
        parts.append(page.note(text))
    return Section("Answer", "".join(parts))


def _headline(by: runs.Axes, answer: runs.Answer | None, base: float) -> str:
    if answer is None:
        return "There is no final eval loss yet: no member has been evaluated after step 0."
    best, smallest = answer.best, answer.smallest
    unadapted = f"; base {base:.3f}" if np.isfinite(base) else ""
    if by.main is None:
        return f"One setting: final eval loss {words.mean(best)}{unadapted}."
    if by.main != "rank" or not answer.known:
        which = f"Lowest final eval loss at {words.setting(best, by)}"
        return f"{which}: {words.mean(best)}{unadapted}."
    if smallest.name == best.name:
        which = "The best rank is also the smallest within one standard error"
        return f"{which}: {words.setting(best, by)} (eval loss {words.mean(best)}{unadapted})."
    return (
        f"Smallest rank within one standard error of the best: {words.setting(smallest, by)} "
        f"(eval loss {words.mean(smallest)} against {words.mean(best)} at "
        f"{words.setting(best, by)}{unadapted})."
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
        names = "; ".join(words.setting(row, by) for _, row in within.iterrows())
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


# ------------------------------------------------------------------------------------- what was run


def facts(run: runs.Run, table: pd.DataFrame, by: runs.Axes, redraw: str) -> Section:
    """What was run: base, task, axes, device, versions, and the command that repeats it. redraw:
    the one that draws the page again."""
    config = run.config.get("config", {})
    task = config.get("task", "")
    task = task.get("name", "") if isinstance(task, dict) else task
    seeds = table["seed"].nunique()
    steps = run.status.get("steps", table["final_step"].max())
    swept = [name for name in (by.main, *by.others) if name]
    varied = "; ".join(f"{words.axis(name)}: {words.listed(table[name])}" for name in swept)
    targets = words.listed(table["targets"]) if "targets" in table else ""
    methods = words.listed(table["method"])
    base = config.get("base") or "an unnamed base"
    lead = (
        f"{len(table)} member{words.plural(len(table))} ({methods}) of {base}, trained on "
        f"{task or 'an unnamed task'} for {steps} steps with {seeds} seed{words.plural(seeds)}"
        + (f", over {varied}." if varied else ", all with the same setting.")
    )
    command = run.config.get("command")
    command = " ".join(command) if isinstance(command, list) else command
    versions = run.config.get("versions") or {}
    known = {
        "Base": config.get("base"),
        "Base weights (sha256)": run.config.get("base_sha256"),
        "Task": task,
        "Targets": targets,
        "Steps": steps,
        "Members": f"{len(table)} ({(table['status'] == 'finished').sum()} finished, "
        f"{(table['status'] == 'diverged').sum()} diverged)",
        "Seeds": words.listed(table["seed"]),
        "Device": run.config.get("device"),
        "Wall time": words.duration(run.status.get("wall_seconds")),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Git revision": run.config.get("git"),
        "Command": command,
        "Redraw this page": redraw,
        "Resolved config": "config.json, beside this page",
    }
    code = ("Command", "Redraw this page", "Git revision", "Base weights (sha256)")
    return Section("What was run", page.paragraph(lead) + page.facts(known, code))


def members(table: pd.DataFrame, scores: list[str]) -> Section:
    """The sortable table of `runs.summary`, a row a member; scores: columns of it that the task
    measures."""
    header = ["name", "trainable parameters", "scale s", "final eval loss", "best eval loss"]
    header += [*scores, "status"]
    rows = [
        [m["name"], m["trainable_params"], m["scale"], page.Fixed(m["final_loss"])]
        + [page.Fixed(m["best_loss"]), *(page.Fixed(m[name]) for name in scores)]
        + [m["status"] + words.at_step(m["diverged_at"])]
        for _, m in table.iterrows()
    ]
    caption = "Every member; press a heading to sort. The best loss is that over all evals."
    content = page.table(header, rows, caption, sortable=True, classes=list(table["status"]))
    return Section("Members", content, files={"members.csv": table.drop(columns="setting")})


# ------------------------------------------------------------------------------------------- losses


def curve(sweep: Sweep) -> Section:
    """Loss against the main axis, and the table of settings."""
    _, table, by, scores, settings, found, base = sweep
    main = sweep.main
    pictures, drawn = {}, page.paragraph(
        "Every member has the same setting, the seed apart: there is no curve."
    )  # fmt: skip
    if by.main is not None:
        loss = runs.loss_name(sweep.run)
        figure = plots.rank_curve(settings, table, main, base, found, loss)
        pictures["rank_curve"] = Picture(figure, _curve_numbers(sweep))
        one_seed = not (settings["n"] > 1).any()
        bars = "One seed, so there are no error bars." if one_seed else "Bars: one standard error."
        caption = f"Final eval loss against {words.axis(main)}; dots are single seeds. {bars}"
        alt = f"Line chart of final eval loss by {words.axis(main)}"
        if found is not None:
            alt += f": lowest at {words.setting(found.best, by)}, {words.mean(found.best)}"
        drawn = page.aid("Lower is better; the ring is the answer above.")
        drawn += page.figure("rank_curve", caption, alt + ".")
    names = [main, *by.others]
    header = [*(words.axis(name) for name in names), "scale s", "trainable parameters"]
    header += ["final eval loss", "standard error", *scores, "n", "diverged"]
    rows = [
        [*(words.cell(name, row[name]) for name in names), row["scale"], row["trainable_params"]]
        + [page.Fixed(row["mean"]), page.Fixed(row["se"])]
        + [*(page.Fixed(row[name]) for name in scores), row["n"], row["diverged"]]
        for _, row in settings.iterrows()
    ]
    chosen = None
    if found is not None:
        chosen = (found.smallest if main == "rank" else found.best).name
    classes = ["chosen" if index == chosen else "" for index in settings.index]
    caption = "Means over seeds; the shaded row is the answer above."
    title = "Loss" if by.main is None else "Loss against " + words.axis(main)
    content = drawn + page.table(header, rows, caption, classes=classes)
    return Section(title, content, pictures)


def _curve_numbers(sweep: Sweep) -> pd.DataFrame:
    """What `plots.rank_curve` draws: a row a mean, then a row a seed."""
    names = [sweep.main, *sweep.by.others]
    means = sweep.settings[[*names, "mean", "se", "n"]].rename(columns={"mean": "loss"})
    seeds = sweep.table[[*names, "seed", "final_loss"]].rename(columns={"final_loss": "loss"})
    return pd.concat([means.assign(shows="mean"), seeds.assign(shows="seed")], ignore_index=True)


def learning(run: runs.Run, table: pd.DataFrame, by: runs.Axes, which: str = "") -> Section:
    """Eval loss against step: each member, and the mean over seeds of each setting.

    table: rows of `runs.summary`, of the members to show; which: what these are, where not all.
    """
    lines = pd.Series([runs.fields(row, by.others) for _, row in table.iterrows()], table.index)
    if lines.nunique() > MAX_PANELS:
        best = table["final_loss"].groupby(lines).min().nsmallest(MAX_PANELS).index
        which += f" Of {lines.nunique()} settings of {_and(map(words.axis, by.others))} the "
        which += f"{len(best)} that reach the lowest loss; members.csv has all."
        table = table[lines.isin(best)]
    figure = plots.learning_curves(run.metrics, table, by, runs.loss_name(run))
    axes = [name for name in (by.main, *by.others) if name]
    kept = table[["name", *axes, "status"]].rename(columns={"name": "member_name"})
    evals = run.metrics[run.metrics["split"] == "eval"][["member", "step", "loss"]]
    evals = evals.join(kept, on="member", how="inner")
    numbers = evals.assign(shows="member")
    means = evals[evals["status"] != "diverged"]
    if len(means):
        means = means.groupby([*axes, "step"], dropna=False)["loss"].mean().reset_index()
        numbers = pd.concat([numbers, means.assign(shows="mean")], ignore_index=True)
    caption = "Eval loss against step. Thick: means over seeds; thin: members."
    if by.others:
        caption += f" A panel each: {_and(map(words.axis, by.others))}."
    caption += which
    if (table["status"] == "diverged").any():
        caption += " Diverged members are dashed and may leave the frame."
    alt = "Line charts of eval loss by step"
    if table["final_loss"].notna().any():
        low, high = table["final_loss"].min(), table["final_loss"].max()
        alt += f": the members end between {low:.3f} and {high:.3f}"
    content = page.figure("learning_curves", caption, alt + ".")
    return Section("Learning curves", content, {"learning_curves": Picture(figure, numbers)})


def _and(names: Iterable[str]) -> str:
    """ "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def methods(sweep: Sweep, ranks: pd.DataFrame) -> list[Section]:
    """The methods side by side, where the sweep has several."""
    _, table, by, _, settings, *_ = sweep
    if by.main != "method" or settings["mean"].isna().all():
        return []
    compared = compare.methods(table, settings, by, ranks)
    bars = " Bars: one standard error." if compared["se"].notna().any() else ""
    caption = f"Each method at its best setting.{bars} Dashed: full fine-tuning, where it was run."
    best = compared.iloc[0]
    alt = f"Dot chart of final eval loss by method: {best['method']} is lowest, {words.mean(best)}."
    figure = page.figure("methods", caption, alt)
    header = ["method", "trainable parameters", *(f"best {words.axis(name)}" for name in by.others)]
    header += ["eval loss (nats)", "standard error", "n", "diverged", "optimiser bytes"]
    header += ["step (ms)", "effective rank of ΔW"]
    rows = [
        [
            row["method"],
            row["trainable_params"],
            *(words.cell(name, row[name]) for name in by.others),
        ]
        + [page.Fixed(row["mean"]), page.Fixed(row["se"]), row["n"], row["diverged"]]
        + [row["optimizer_bytes"], page.Fixed(row["step_ms"], 1), page.Fixed(row["effective"], 1)]
        for _, row in compared.iterrows()
    ]
    caption = "Best first. Time and optimiser bytes are one member's share of its group's."
    content = figure + page.table(header, rows, caption, sortable=True)
    pictures = {"methods": Picture(plots.methods(compared), compared)}
    return [Section("Methods", content, pictures, {"methods.csv": compared})]


# ---------------------------------------------------------------------- evidence, and planted tasks


def evidence(run: runs.Run, table: pd.DataFrame) -> list[Section]:
    """What evidence said of each matrix, where it chose targets or ranks."""
    ranking = updates.sensitivity(run)
    if ranking is None:
        return []
    first = ranking["member"].iloc[0]
    shown = ranking[ranking["member"] == first].sort_values("score", ascending=False)
    name = table.loc[first, "name"]
    caption = (
        "Squared gradient that an adapter can reach, for each parameter that it trains, as a share "
        f"of all matrices'; the numbers are the ranks that were chosen. Member {name}."
    )
    alt = f"Heat map of scores by layer and target: highest for {shown['path'].iloc[0]}."
    figure = page.figure("sensitivity", caption, alt)
    rows = [
        [row["path"], row["rank"], row["energy"], page.Fixed(row["share"], 3), row["score"]]
        for _, row in shown.iterrows()
    ]
    header = ["matrix", "rank", "gradient energy ‖g‖²", "low-rank share"]
    header += ["energy × share ÷ parameters"]
    text = (
        "Before training, on the member's first batches. analysis/sensitivity.csv has all members."
    )
    content = figure + page.table(header, rows, text, sortable=True)
    pictures = {"sensitivity": Picture(plot_updates.sensitivity(shown), shown)}
    return [Section("Which matrices matter", content, pictures)]


def planted(
    run: runs.Run, table: pd.DataFrame, sigmas: pd.DataFrame, ranks: pd.DataFrame
) -> list[Section]:
    """What the estimators say of a planted task against the truth."""
    found = calibration.estimates(run, table, sigmas, ranks)
    if found.empty:
        return []
    alt = "Scatter plots of estimate against planted truth, one an estimator."
    figure = page.figure("calibration", calibration.CAPTION, alt)
    header, rows = calibration.shown(calibration.summary(found))
    content = figure + page.table(header, rows, calibration.NOTE, sortable=True)
    pictures = {"calibration": Picture(plot_calibration.calibration(found), found)}
    return [Section("Calibration", content, pictures, {"calibration.csv": found})]
