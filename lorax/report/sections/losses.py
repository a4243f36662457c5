"""Sections on the losses of a sweep: by the main axis, by step, by method."""

from collections.abc import Iterable

import pandas as pd

from lorax.analysis import figures, runs, settings_compared
from lorax.report import page, words
from lorax.report.page import Picture, Section
from lorax.report.sections.outcome import Sweep

MAX_PANELS = 12  # of learning curves


def curve(sweep: Sweep) -> Section:
    """Loss against the main axis, and the table of settings."""
    table, by, scores, settings = sweep.table, sweep.by, sweep.scores, sweep.settings
    main = sweep.main
    pictures, drawn = {}, page.paragraph(
        "All members have the same setting except for the seed, so there is no curve."
    )  # fmt: skip
    if by.main is not None:
        loss = runs.loss_name(sweep.run)
        figure = figures.rank_curve(settings, table, main, sweep.base, sweep.chosen, loss)
        pictures["rank_curve"] = Picture(figure, _curve_numbers(sweep))
        one_seed = not (settings["n"] > 1).any()
        bars = "One seed, so no error bars." if one_seed else "Bars: one standard error."
        caption = f"Final eval loss against {words.axis(main)}; dots are single seeds. {bars}"
        alt = f"Line chart of final eval loss by {words.axis(main)}"
        if sweep.best is not None:
            alt += f": lowest at {words.setting(sweep.best, by)}, {words.mean(sweep.best)}"
        drawn = page.aid("Lower is better. The ring marks the answer above.")
        drawn += page.figure("rank_curve", caption, alt + ".")
    names = [main, *by.others, *by.tuned]
    header = [*(words.axis(name) for name in names), "scale s", "trainable parameters"]
    header += ["final eval loss", "standard error", *scores, "n", "diverged"]
    rows = [
        [*(words.cell(name, row[name]) for name in names), row["scale"], row["trainable_params"]]
        + [page.Fixed(row["mean"]), page.Fixed(row["se"])]
        + [*(page.Fixed(row[name]) for name in scores), row["n"], row["diverged"]]
        for _, row in settings.iterrows()
    ]
    chosen = None if sweep.chosen is None else sweep.chosen.name
    classes = ["chosen" if index == chosen else "" for index in settings.index]
    caption = "Means over seeds. The shaded row is the answer above."
    title = "Loss" if by.main is None else "Loss against " + words.axis(main)
    content = drawn + page.table(header, rows, caption, classes=classes)
    return Section(title, content, pictures)


def _curve_numbers(sweep: Sweep) -> pd.DataFrame:
    """What `figures.rank_curve` draws: a row per mean, then a row per seed."""
    names = [sweep.main, *sweep.by.others, *sweep.by.tuned]
    means = sweep.settings[[*names, "mean", "se", "n"]].rename(columns={"mean": "loss"})
    seeds = sweep.table[[*names, "seed", "final_loss"]].rename(columns={"final_loss": "loss"})
    return pd.concat([means.assign(shows="mean"), seeds.assign(shows="seed")], ignore_index=True)


def learning(run: runs.Run, table: pd.DataFrame, by: runs.Axes, which: str = "") -> Section:
    """Eval loss against step: each member, and the mean over seeds of each setting.

    table: rows of `runs.summary` for the members to show. which: a sentence on which they are, if
    not all.
    """
    lines = pd.Series([runs.fields(row, by.others) for _, row in table.iterrows()], table.index)
    if lines.nunique() > MAX_PANELS:
        best = table["final_loss"].groupby(lines).min().nsmallest(MAX_PANELS).index
        which += f" Shown: the {len(best)} of {lines.nunique()} settings of "
        which += f"{_and(map(words.axis, by.others))} with the lowest loss; members.csv has all."
        table = table[lines.isin(best)]
    figure = figures.learning_curves(run.metrics, table, by, runs.loss_name(run))
    axes = list(by.names)
    fields = table[["name", *axes, "status"]].rename(columns={"name": "member_name"})
    evals = run.metrics[run.metrics["split"] == "eval"][["member", "step", "loss"]]
    evals = evals.join(fields, on="member", how="inner")
    numbers = evals.assign(shows="member")
    means = evals[evals["member"].isin(runs.averaged(table, by))]
    if len(means):
        means = means.groupby([*axes, "step"], dropna=False)["loss"].mean().reset_index()
        numbers = pd.concat([numbers, means.assign(shows="mean")], ignore_index=True)
    caption = "Eval loss against step. Thick: means over seeds; thin: members."
    if by.others:
        caption += f" One panel for each {_and(map(words.axis, by.others))}."
    caption += which
    if (table["status"] == "diverged").any():
        caption += " Diverged members are dashed and may leave the frame."
    if stopped := (table["status"] == "stopped").sum():
        values = _and(map(words.axis, by.tuned))
        caption += f" Dashed, in no mean: {stopped} members, stopped for a better {values}."
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
    """The methods side by side, if the sweep has several."""
    table, by, settings = sweep.table, sweep.by, sweep.settings
    if by.main != "method" or runs.eligible(settings).empty:
        return []
    compared = settings_compared.methods(table, settings, by, ranks)
    bars = " Bars: one standard error." if compared["se"].notna().any() else ""
    caption = f"Each method at its best setting.{bars} Dashed: full fine-tuning, if it was run."
    best = compared.iloc[0]
    alt = f"Dot chart of final eval loss by method: {best['method']} is lowest, {words.mean(best)}."
    figure = page.figure("methods", caption, alt)
    axes = (*by.others, *by.tuned)
    header = ["method", "trainable parameters", *(f"best {words.axis(n)}" for n in axes)]
    header += ["eval loss (nats)", "standard error", "n", "diverged", "optimiser bytes"]
    header += ["step (ms)", "effective rank of ΔW"]
    rows = [
        [
            row["method"],
            row["trainable_params"],
            *(words.cell(name, row[name]) for name in axes),
        ]
        + [page.Fixed(row["mean"]), page.Fixed(row["se"]), row["n"], row["diverged"]]
        + [row["optimizer_bytes"], page.Fixed(row["step_ms"], 1), page.Fixed(row["effective"], 1)]
        for _, row in compared.iterrows()
    ]
    caption = (
        "Best first. Step time and optimiser bytes are those of the group, divided by its members."
    )
    content = figure + page.table(header, rows, caption, sortable=True)
    pictures = {"methods": Picture(figures.methods(compared), compared)}
    return [Section("Methods", content, pictures, {"methods.csv": compared})]
