"""The section on the members: their filter, and a table with a row for each."""

import json
from collections.abc import Iterable

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.analysis import runs
from lorax.report import page, words
from lorax.report.page import Section

MOST_VALUES = 12  # of an axis, each with a switch; if there are more numbers, a range is chosen
SEEDS = ("seed", "data_seed")


def members(run: runs.Run, table: pd.DataFrame, by: runs.Axes, scores: list[str]) -> Section:
    """The sortable table of `runs.summary`, a row per member, below a filter for the table and the
    figures.

    Args:
      by: the axes in which the members differ.
      scores: the columns of the table that the task measures.
    """
    axes = [name for name in (*by.fields, *SEEDS, "status") if name in table]
    axes = [name for name in axes if table[name].astype(str).nunique() > 1]
    header = ["member", *map(words.axis, axes), "trainable parameters", "scale s"]
    further = {name: name.replace("forgetting_", "forgetting of ") for name in table.columns}
    further = {name: title for name, title in further.items() if name != title}
    further |= {"final_kl": "KL from the base"} if "final_kl" in table else {}
    header += ["validation loss", "best validation loss", *scores, *further.values()]
    header += ["status"] * ("status" not in axes)
    rows = []
    for number, m in table.iterrows():
        row = [_number(run, number), *(_cell(m, name) for name in axes)]
        row += [m["trainable_params"], m["scale"]]
        row += [page.Fixed(m["final_loss"]), page.Fixed(m["best_loss"])]
        row += [*(page.Fixed(m[name]) for name in (*scores, *further))]
        rows.append(row + [_cell(m, "status")] * ("status" not in axes))
    caption = (
        "All members; click a heading to sort. The best loss is the lowest of all evals. A "
        "member's number leads to its adapter."
    )
    attributes = [
        {"data-member": number, "data-axes": json.dumps(_values(table, number, axes))}
        for number in table.index
    ]
    content = _filter(table, axes) + page.table(
        header, rows, caption, sortable=True, classes=list(table["status"]), attributes=attributes
    )
    return Section("Members", content, files={"members.csv": table.drop(columns="setting")})


def _number(run: runs.Run, number: int) -> page.Link | int:
    """A member's number, as a link to its folder if it has one."""
    folder = rundir.adapter(run.directory, number)
    if not folder.is_dir():
        return number
    return page.Link(number, f"{folder.relative_to(run.directory).as_posix()}/")


def _cell(member: pd.Series, name: str):
    if name == "status":
        return words.status(member)
    return words.cell(name, member[name])


def _values(table: pd.DataFrame, number: int, axes: Iterable[str]) -> dict[str, float | str]:
    """What the filter compares: a member's value on every axis, and its loss; "" if missing."""
    member = table.loc[number]
    values = {
        name: float(member[name]) if _is_range(table[name]) else runs.in_words(member[name], name)
        for name in axes
    }
    loss = member["final_loss"]
    return values | {"final_loss": float(loss) if np.isfinite(loss) else ""}


def _is_range(column: pd.Series) -> bool:
    numeric = pd.api.types.is_numeric_dtype(column) and column.notna().all()
    return numeric and column.nunique() > MOST_VALUES


def _filter(table: pd.DataFrame, axes: Iterable[str]) -> str:
    """A control for every axis: a switch for each value, or the ends of a range."""
    controls = [
        _range(name, words.axis(name), table[name])
        if _is_range(table[name])
        else _switches(name, words.axis(name), table[name])
        for name in axes
    ]
    controls.append(_range("final_loss", "validation loss", table["final_loss"].dropna()))
    return (
        '<form class="filter" aria-label="Filter of members" hidden>'
        "<p>Choose values to see only their members, in the table and in the figures that have a "
        "number for each. Texts and other tables are on all members.</p>"
        f"{''.join(controls)}<p><output>All {len(table)} members are shown</output> "
        '<button type="reset">Show all</button></p></form>'
    )


def _switches(name: str, title: str, column: pd.Series) -> str:
    values = sorted(set(column.dropna()), key=lambda value: (isinstance(value, str), value))
    values += [None] * bool(column.isna().any())
    shown = "".join(
        f'<label><input type="checkbox" name="{page.escape(name)}" value="{word}">'
        f"<span>{word}</span></label>"
        for word in dict.fromkeys(page.escape(runs.in_words(value, name)) for value in values)
    )
    return _control(title, shown)


def _range(name: str, title: str, column: pd.Series) -> str:
    shown = "".join(
        f'<label>{word} <input type="number" step="any" name="{page.escape(name)}" '
        f'data-end="{end}" placeholder="{value:.4g}"></label>'
        for word, end, value in (("from", "low", column.min()), ("to", "high", column.max()))
    )
    return _control(title, shown) if column.nunique() > 1 else ""


def _control(title: str, shown: str) -> str:
    title = page.escape(title)
    return (
        f'<fieldset><legend>{title}</legend><span class="axis" aria-hidden="true">{title}</span>'
        f'<div class="values">{shown}</div></fieldset>'
    )
