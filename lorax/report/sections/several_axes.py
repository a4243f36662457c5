"""Sections on several axes at once: maps of two of them, loss against parameters, all members."""

import pandas as pd

from lorax.analysis import figures, runs, settings_compared
from lorax.analysis.figures import layout as layouts
from lorax.report import page, words
from lorax.report.page import Picture, Section
from lorax.report.sections import losses
from lorax.report.sections.outcome import Sweep, axes_of_adapters


def maps(sweep: Sweep) -> list[Section]:
    """The loss over every two numeric axes. The first map is open, the others are folded."""
    by, table, unit = axes_of_adapters(sweep), sweep.table, runs.loss_unit(sweep.run)
    pairs = layouts.pairs(table, by)
    if not pairs:
        return []
    contents, pictures = [], {}
    for y, x in pairs:
        layout = layouts.map_layout(table, by, y, x)
        points = table[table[x].notna() & table[y].notna()]
        points = layouts.at_best(points, layout.shown, layout.best)
        panels = layouts.distinct(points[layout.panel]) if layout.panel else []
        said = _map_caption(table, layout, points)
        alt = f"Heat map of final loss by {words.axis(y)} and {words.axis(x)}."
        draw = lambda part, layout=layout: figures.setting_map(table, layout, unit, part)
        drawn = losses.numbers(points, list(dict.fromkeys(layout.names)))
        name = page.slug(f"map_{y}_{x}")
        content, made = losses.paged(name, panels, draw, said, alt, drawn)
        contents.append((f"{words.axis(y)} and {words.axis(x)}", content))
        pictures |= made
    (title, first), *others = contents
    content = first + "".join(page.fold(f"By {name}", other) for name, other in others)
    return [Section(f"Loss by {title}", content, pictures)]


def _map_caption(table: pd.DataFrame, layout: layouts.Layout, points: pd.DataFrame) -> str:
    """Of a map."""
    found, (x, y) = runs.measured(table), map(words.axis, layout[:2])
    sizes = points.groupby(list(dict.fromkeys(layout.names)), dropna=False).size()
    mean = "the loss of one seed" if sizes.max() == 1 else f"means over {sizes.max()} seeds"
    said = f"Final {found.split} loss by {y} and {x}: {mean}. Framed: the best {x} for each {y}"
    said += ", among cells of which all seeds reached the end. An arrow: it is the first or the "
    said += "last of its row, so a better one may lie beyond the grid. "
    said += losses.places(layout._replace(colour=None))
    return " ".join([said.strip(), losses.split(table, True)])


def sizes(sweep: Sweep) -> list[Section]:
    """Loss against trainable parameters, with the settings that no other beats."""
    by, table = axes_of_adapters(sweep), sweep.table
    found = runs.measured(table)
    if by.main is None or table["trainable_params"].nunique() < 2 or table[found.loss].isna().all():
        return []
    names = by.fields
    layout = layouts.layout(table[table["method"] != "full"], by)
    figure = figures.size_curve(table, names, layout.colour, runs.loss_unit(sweep.run))
    kept = frontier(sweep)
    said = (
        f"Final {found.split} loss against trainable parameters: a dot for each setting, its mean "
        "over seeds. The line joins the settings that no other beats with as many parameters or "
        "fewer, among those of which all seeds reached the end; these are named"
    )
    said += ", with 95% intervals over seeds." if (kept["n"] > 1).any() else "."
    if layout.colour:
        said += f" Colours: {words.axis(layout.colour)}."
    said = " ".join([said, losses.split(table, False)])
    alt = f"Scatter chart of final loss by trainable parameters; {len(kept)} settings are on the "
    alt += "frontier."
    axes = ["method", *(name for name in names if name != "method")]
    header = ["trainable parameters", *map(words.axis, axes)]
    header += [f"{found.split} loss", "95% from", "to", "seeds"]
    rows = [
        [row["trainable_params"], *(words.cell(name, row[name]) for name in axes)]
        + [page.Fixed(row[name]) for name in ("mean", "low", "high")]
        + [row["n"]]
        for _, row in kept.iterrows()
    ]
    content = page.figure("size_curve", said, alt)
    content += page.table(header, rows, "The settings on the line.")
    pictures = {"size_curve": Picture(figure, losses.numbers(table, names))}
    return [Section("Loss against parameters", content, pictures, {"frontier.csv": kept})]


def frontier(sweep: Sweep) -> pd.DataFrame:
    """The settings that no other beats with as many trainable parameters or fewer: their axes,
    method, trainable_params, mean, low, high, n. A setting of which a seed is lost is not among
    them."""
    by = axes_of_adapters(sweep)
    others = [*by.others, *["method"] * ("method" not in by.names)]
    by = runs.Axes(by.main, tuple(others), by.tuned)
    whole = runs.eligible(runs.settings(sweep.table, by))
    whole = settings_compared.on_test(whole, sweep.table, by)
    whole = settings_compared.with_interval(whole)
    kept = layouts.frontier(list(whole["trainable_params"]), list(whole["mean"]))
    columns = [*by.fields, "trainable_params", "mean", "low", "high", "n"]
    return whole.loc[kept, columns].sort_values("trainable_params", kind="stable")


def parallel(sweep: Sweep) -> list[Section]:
    """Every member as a line through its values on all axes."""
    table, by = sweep.table, axes_of_adapters(sweep)
    names = by.fields
    if not names or len(table) < 3:
        return []
    found = runs.measured(table)
    columns = ["member", *names, "trainable_params", found.loss, "status"]
    said = (
        "Every member is a line through its values; the colour is its final "
        f"{found.split} loss. Dashed: without a final loss, as it diverged, was stopped or is not "
        "finished. " + losses.split(table, False)
    )
    best = table[found.loss].idxmin() if table[found.loss].notna().any() else None
    alt = "Parallel coordinates of all members"
    alt += f": the lowest loss is that of {table['name'][best]}." if best is not None else "."
    figure = figures.parallel(table, names, runs.loss_unit(sweep.run))
    content = page.figure("parallel", said, alt)
    return [Section("All members", content, {"parallel": Picture(figure, table[columns])})]
