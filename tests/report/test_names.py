"""Names that someone gave are text: on the screen, in figures, pages and tables."""

import ast
import io
import json
import pathlib

import pandas as pd
import pytest
from drawn import texts
from reading import Page
from rich.table import Table
from synthetic import make_run

import lorax
from lorax import report
from lorax.analysis import figures, runs
from lorax.console import console
from lorax.terminal import Screen

#: markup that would vanish or fail, a picture, mathematics, tags, a label that would be hidden
NAMES = (
    "re:h/attn/[qv]/kernel",
    "re:h[/]attn[/](q|v)[/]kernel",
    "[bold]a[/bold] :smile:",
    "re:.*q$|re:.*v$",
    "<b>&amp;</b>",
    "_hidden",
)


@pytest.mark.parametrize("name", NAMES)
def test_tables_titles_and_lines_on_the_screen_are_text(name, tmp_path, capsys):
    said = io.StringIO()
    screen = console(file=said, width=200, force_terminal=True, color_system=None)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    screen.print(table)
    screen.print(name)
    assert said.getvalue().count(name) == 4
    with Screen() as shown:
        shown.say(name)
        terminal = shown.terminal([{"member": 0, "name": name, "trainable_params": 1}])
        terminal.finished({"member": 0, "name": name, "eval_loss": 1.0})
        shown.table(runs.load(named(tmp_path / "run", name)))
        found = pd.DataFrame([ESTIMATE | {"condition": name}])
        shown.dimensions(found)
    out = "".join(c for c in capsys.readouterr().out if c not in " │\n")
    assert out.count(name.replace(" ", "")) >= 3  # and once in a column, where it may be wrapped


ESTIMATE = {"method": "subspace", "metric": "loss", "threshold": 0.9, "verdict": "below"}
ESTIMATE |= dict.fromkeys(("baseline", "needed", "d", "low", "high", "smallest"), 1.0)
ESTIMATE |= {"seeds": 1, "n": 1, "tested_min": 1, "tested_max": 2, "full_params": 9}
ESTIMATE |= {"full_over_d": 9.0, "lora_params": float("nan"), "lora_verdict": ""}


def test_there_is_one_console():
    """Every other one takes what users name for markup."""
    root = pathlib.Path(lorax.__file__).parent
    made = [
        file.relative_to(root)
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Console"
    ]
    assert made == [pathlib.Path("console.py")]


def named(directory, name):
    """A run of two members, whose targets are `name` and "q v"."""
    make_run(directory, ranks=(4,), lrs=(1e-3, 2e-3), seeds=(0,))
    lines = (directory / "members.jsonl").read_text().splitlines()
    members = [json.loads(line) for line in lines]
    for member, targets in zip(members, (name, "q v"), strict=True):
        member |= {"lr": 1e-3, "name": f"targets={targets}", "targets": [targets]}
    (directory / "members.jsonl").write_text("".join(json.dumps(m) + "\n" for m in members))
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_a_report_of_such_names_is_drawn(name, tmp_path):
    directory = named(tmp_path / "run", name)
    text = report.write(directory).read_text()
    seen = Page(text)
    assert not seen.open
    rows = seen.table("member", "targets")
    assert [row["targets"] for row in rows] == [name, "q v"]
    stored = pd.read_csv(directory / "analysis" / "settings.csv")
    assert name in set(stored["targets"])


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_in_every_legend_and_title(name):
    other = "other"
    found = pd.DataFrame({"run": [name, other], "method": [name, other], "mean": [1.0, 2.0]})
    found = found.assign(se=float("nan"), n=1, axis="rank", part="", x=[1, 2], line="")
    assert texts(figures.methods_of_runs(found, "loss")).count(name) >= 2  # legend and tick
    assert name in texts(figures.curves(found, "loss"))
    ranks = pd.DataFrame({"target": [name, other], "member": [name, other], "layer": 0})
    ranks = ranks.assign(norm=1.0, effective=1.0, stable=1.0, rank=1, method=[name, other])
    assert name in texts(figures.by_layer(ranks))  # the adapter
    assert f"{name}: norm of ΔW" in texts(figures.by_layer(ranks))  # the target
    assert name in texts(figures.update_ranks(ranks, "method"))
    phi = {name: pd.DataFrame([[1.0]]).to_numpy(), other: pd.DataFrame([[1.0]]).to_numpy()}
    assert name in texts(figures.diagonal(phi, lorax.analysis.Band(*[phi[name]] * 3)))
    values = pd.DataFrame({"target": [name, other], "layer": 0, "value": [1.0, 2.0]})
    assert name in texts(figures.layer_grid(values, "value"))


def test_a_bar_does_not_end_a_cell_of_markdown(capsys):
    from lorax.planning import tables

    tables.show([tables.Table("a|b", ("", "r"), [("re:(q|v)", "1")])], markdown=True)
    title, _, head, rule, row = capsys.readouterr().out.strip().splitlines()
    assert title == r"**a\|b**" and row == r"| re:(q\|v) | 1 |" and rule == "| --- | ---: |"
