"""Sections on the losses of a sweep: by an axis, by step, by method."""

from collections.abc import Callable, Sequence

import pandas as pd

from lorax.analysis import figures, runs, settings_compared
from lorax.analysis.answer.words import listed
from lorax.analysis.figures import layout as layouts
from lorax.analysis.figures.layout import Layout
from lorax.report import page, selection, words
from lorax.report.page import Picture, Section
from lorax.report.sections.outcome import Sweep, axes_of_adapters

NOT_REACHED = "Hollow dots: a seed diverged or was stopped, and is not in the mean."


# ----------------------------------------------------------------------------------- what is drawn


def paged(
    name: str,
    panels: Sequence,
    draw: Callable[[list | None], object],
    caption: str,
    alt: str,
    numbers: pd.DataFrame,
) -> tuple[str, dict[str, Picture]]:
    """The figure as HTML and pictures; if it has more panels than fit one, further ones are folded
    below it.

    Args:
      name: of the picture; those of the further ones are numbered.
      panels: all of them; [] if the figure has none.
      draw: makes the figure of some panels, or for None of all.
      numbers: what all of them draw.
    """
    parts = selection.pages(panels, layouts.MOST_PANELS) if panels else [None]
    content, pictures, first = "", {}, 1
    for n, part in enumerate(parts):
        key = name if n == 0 else f"{name}_{n + 1}"
        pictures[key] = Picture(draw(part if len(parts) > 1 else None), numbers)
        more, last = "", first + len(part or [None]) - 1
        said = caption
        if len(parts) > 1:
            said += f" Panels {first} to {last} of {len(panels)}."
            more = f"Panels {first} to {last} of {len(panels)}" if n else ""
        content += page.figure(key, said, alt, folded=more)
        first = last + 1
    return content, pictures


def seeds(table: pd.DataFrame, names: Sequence[str]) -> str:
    """How many seeds the settings have, as a caption says it."""
    sizes = table.groupby(list(names), dropna=False).size()
    low, high = sizes.min(), sizes.max()
    if high == 1:
        return "One seed for each setting, so there are no intervals."
    count = f"{low} to {high}" if low < high else str(high)
    return (
        f"Dots: means over {count} seeds; bars: 95% intervals over seeds (Student's t); "
        "small dots: seeds."
    )


def split(table: pd.DataFrame, chosen: bool) -> str:
    """Which rows the losses are from, and what was chosen on which. chosen: something was."""
    found = runs.measured(table)
    on = "Losses are those of the test rows."
    if found.split != "test":
        on = "Losses are those of the validation rows; this run has no test rows."
        return on + " What is at its best was chosen on the same rows." * chosen
    return on + " What is at its best was chosen on the validation rows." * chosen


def places(layout: Layout) -> str:
    """Which axis is drawn how."""
    said = []
    if layout.colour:
        said.append(f"Colours: {words.axis(layout.colour)}.")
    if layout.panel:
        said.append(f"Panels: {words.axis(layout.panel)}.")
    if layout.best:
        best = listed(map(words.axis, layout.best))
        are = "are" if len(layout.best) > 1 else "is"
        said.append(f"At each of these, {best} {are} at the best: the lowest mean validation loss.")
    return " ".join(said)


def lines(sweep: Sweep, layout: Layout) -> str:
    """The dashed lines, and what lies beyond the axis."""
    points, others = layouts.curve_members(sweep.table, layout)
    names = list(dict.fromkeys(layouts.line_names(others, points, layout.x)))
    base, found = runs.base_loss(sweep.table), runs.measured(sweep.table)
    dashed = ["the unadapted base"] * (base is not None)
    dashed += [f"{name}, at its best" for name in names]
    said = f"Dashed: {listed(dashed)}." if dashed else ""
    drawn = pd.concat([points, others])[found.loss]
    if (drawn > layouts.extent(drawn, base)[1]).any():
        said += " Losses far above the base's are drawn at the edge."
    return said


def caption(sweep: Sweep, layout: Layout, start: str) -> str:
    """The caption of a figure of means over seeds: `start`, then what is where, what is averaged
    over what, and which rows the losses are from."""
    points, _ = layouts.curve_members(sweep.table, layout)
    lost = NOT_REACHED if points["status"].isin(runs.WITHOUT_RESULT).any() else ""
    parts = [start, places(layout), seeds(points, layout.names), lost, lines(sweep, layout)]
    return " ".join(filter(None, [*parts, split(sweep.table, bool(layout.best))]))


def numbers(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """What a figure of final losses draws: a row per mean over seeds with its 95% interval, then a
    row per seed."""
    names, loss = list(names), runs.measured(table).loss
    means = runs.settings(
        table.assign(final_loss=table[loss]), runs.Axes(names[0], tuple(names[1:]))
    )
    means = settings_compared.with_interval(means)[[*names, "mean", "low", "high", "n", "diverged"]]
    each = table[[*names, "member", "seed", "status", loss]].rename(columns={loss: "loss"})
    means = means.rename(columns={"mean": "loss"}).assign(shows="mean")
    return pd.concat([means, each.assign(shows="seed")], ignore_index=True)


# ----------------------------------------------------------------------------------------- sections


def curve(sweep: Sweep) -> Section:
    """Loss against an axis of the sweep, and the table of settings."""
    by = axes_of_adapters(sweep)
    if by.main is None:
        text = "All members have the same setting except for the seed, so there is no curve."
        return Section("Loss", page.paragraph(text) + settings(sweep))
    table, unit = sweep.table, runs.loss_unit(sweep.run)
    layout = layouts.layout(table[table["method"] != "full"], by)
    points, _ = layouts.curve_members(table, layout)
    x = words.axis(layout.x)
    said = caption(sweep, layout, f"Final {runs.measured(table).split} loss against {x}.")
    alt = f"Chart of final {runs.measured(table).split} loss by {x}"
    if sweep.best is not None:
        alt += f": lowest at {words.setting(sweep.best, sweep.by)}"
    panels = layouts.distinct(points[layout.panel]) if layout.panel else []
    draw = lambda part: figures.rank_curve(table, layout, unit, sweep.chosen, part)
    drawn, pictures = paged(
        "rank_curve", panels, draw, said, alt + ".", numbers(points, layout.names)
    )
    aid = "Lower is better." + " The ring marks the answer above." * (sweep.chosen is not None)
    content = page.aid(aid) + drawn + settings(sweep)
    return Section("Loss against " + x, content, pictures)


def settings(sweep: Sweep) -> str:
    """The table of all settings, with means over seeds."""
    found = runs.measured(sweep.table)
    names = [sweep.main, *sweep.by.others, *sweep.by.tuned]
    shown = settings_compared.with_interval(sweep.settings)
    header = [*(words.axis(name) for name in names), "scale s", "trainable parameters"]
    header += ["validation loss", "95% from", "to"]
    columns = ["mean", "low", "high"]
    if found.split == "test":
        tests = settings_compared.on_test(sweep.settings, sweep.table, sweep.by)
        tests = settings_compared.with_interval(tests)
        for name in columns:
            shown[f"test {name}"] = tests[name]
        header += ["test loss", "95% from", "to"]
        columns += ["test mean", "test low", "test high"]
    header += [*sweep.scores, "seeds", "diverged"]
    rows = [
        [*(words.cell(name, row[name]) for name in names), row["scale"], row["trainable_params"]]
        + [page.Fixed(row[name]) for name in (*columns, *sweep.scores)]
        + [row["n"], row["diverged"]]
        for _, row in shown.iterrows()
    ]
    chosen = None if sweep.chosen is None else sweep.chosen.name
    classes = ["chosen" if index == chosen else "" for index in shown.index]
    said = "Means over seeds, with 95% intervals over seeds (Student's t)."
    said += " The shaded row is the answer above." * (chosen is not None)
    return page.table(header, rows, said, classes=classes)


def learning(run: runs.Run, table: pd.DataFrame, by: runs.Axes, which: str = "") -> Section:
    """Loss on the validation rows against step: each member, and the mean over seeds of each
    setting.

    table: rows of `runs.summary` for the members to show. which: a sentence on which they are, if
    not all.
    """
    unit, panels = runs.loss_unit(run), pd.Series(layouts.panel_of(table, by), table.index)
    order = list(dict.fromkeys(panels))
    if len(order) > layouts.MOST_PANELS:  # the best ones are not folded
        order = list(table["final_loss"].groupby(panels).min().sort_values(kind="stable").index)
    if order == [""]:
        order = []
    fields = by.fields
    evals = run.metrics[run.metrics["split"] == "eval"][["member", "step", "loss"]]
    of_members = table[["name", *fields, "status"]].rename(columns={"name": "member_name"})
    evals = evals.join(of_members, on="member", how="inner")
    drawn = evals.assign(shows="member")
    means = evals[evals["member"].isin(runs.averaged(table, by))]
    if len(means):
        means = means.groupby([*fields, "step"], dropna=False)["loss"].mean().reset_index()
        drawn = pd.concat([drawn, means.assign(shows="mean")], ignore_index=True)
    said = "Validation loss against step. Thick: means over seeds; thin: members."
    if by.main:
        said += f" Colours: {words.axis(by.main)}."
    if by.others:
        said += f" One panel for each {listed(map(words.axis, by.others))}"
        said += ", the lowest loss first." if len(order) > layouts.MOST_PANELS else "."
    said += which
    if (table["status"] == "diverged").any():
        said += " Diverged members are dashed, end in a bar and are in no mean."
    if stopped := (table["status"] == "stopped").sum():
        said += f" A bar marks where members were stopped: {stopped}, for a better "
        said += f"{listed(map(words.axis, by.tuned))}; they are in no mean."
    measured = evals[["member", "step", "loss"]].dropna()
    if len(layouts.thinned(measured)) < len(measured):
        said += " Only some evaluations are drawn, evenly spaced; metrics.jsonl has all."
    alt = "Line charts of validation loss by step"
    if table["final_loss"].notna().any():
        low, high = table["final_loss"].min(), table["final_loss"].max()
        alt += f": the members end between {low:.3f} and {high:.3f}"
    draw = lambda part: figures.learning_curves(run.metrics, table, by, unit, part or order or None)
    content, pictures = paged("learning_curves", order, draw, said, alt + ".", drawn)
    return Section("Learning curves", content, pictures)


def methods(sweep: Sweep, ranks: pd.DataFrame) -> list[Section]:
    """The methods side by side, if the sweep has several."""
    table, by, settings = sweep.table, sweep.by, sweep.settings
    if by.main != "method" or runs.eligible(settings).empty:
        return []
    compared = settings_compared.with_interval(
        settings_compared.methods(table, settings, by, ranks)
    )
    axes_at_best = (*by.others, *by.tuned)
    layout = Layout("method", best=axes_at_best)
    start = f"Final {runs.measured(table).split} loss of each method at its best setting."
    best = compared.iloc[0]
    alt = f"Dot chart of final loss by method: {best['method']} is lowest, {words.mean(best)}."
    figure = page.figure("methods", caption(sweep, layout, start), alt)
    header = ["method", "trainable parameters", *(f"best {words.axis(n)}" for n in axes_at_best)]
    found = runs.measured(table)
    header += [f"{found.split} loss", "95% from", "to", "seeds", "diverged", "optimiser bytes"]
    header += ["step (ms)", "effective rank of ΔW"]
    rows = [
        [
            row["method"],
            row["trainable_params"],
            *(words.cell(name, row[name]) for name in axes_at_best),
        ]
        + [page.Fixed(row["mean"]), page.Fixed(row["low"]), page.Fixed(row["high"])]
        + [row["n"], row["diverged"], row["optimizer_bytes"], page.Fixed(row["step_ms"], 1)]
        + [page.Fixed(row["effective"], 1)]
        for _, row in compared.iterrows()
    ]
    said = (
        "Best first. Step time and optimiser bytes are those of the group, divided by its members."
    )
    content = figure + page.table(header, rows, said, sortable=True)
    drawn = figures.rank_curve(table, layout, runs.loss_unit(sweep.run))
    points, _ = layouts.curve_members(table, layout)
    pictures = {"methods": Picture(drawn, numbers(points, layout.names))}
    return [Section("Methods", content, pictures, {"methods.csv": compared})]
