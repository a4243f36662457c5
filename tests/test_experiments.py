"""Every experiment says what it claims, how it was run and what came of it; its files are there."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pandas as pd
import pytest

from experiments import plotting
from lorax.analysis import compare

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(
    path.name
    for path in (ROOT / "experiments").iterdir()
    if path.is_dir() and path.name[0] not in "._"
)
SCRIPTS = sorted((ROOT / "experiments").rglob("*.py"))
#: Claims whose figure is drawn from their CSVs; the figure of intruders is a script of its own.
FIGURES = sorted(file.parent.name for file in (ROOT / "experiments").glob("*/figure.py"))
FIGURES.remove("intruders")
#: How gpt2-nano was made, and a page of other folders' numbers: no claims of their own.
NO_CLAIM = ("dit_digits", "gpt2_nano", "lora_paper")
HEADINGS = ("Claim", "Command", "Verdict")
WITH_RULE = ("Claim", "Rule", "Command", "Verdict")
IMAGES, TABLES = r"!\[[^\]]*\]\(([^)]+)\)", r"`([\w./-]+\.csv)`"


def readme(folder) -> str:
    return (ROOT / "experiments" / folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_experiment_has_its_claim_command_and_verdict(folder):
    text = readme(folder)
    assert text.startswith("# ")
    if folder in NO_CLAIM:
        return
    at = []
    headings = WITH_RULE if (ROOT / "experiments" / folder / "rule.py").is_file() else HEADINGS
    for heading in headings:  # "**Claim.**", "**Claims.**", "**Verdict: reproduced.**"
        found = re.search(rf"^\*\*{heading}s?\b", text, flags=re.MULTILINE)
        assert found, f"{folder}: no **{heading}.**"
        at.append(found.start())
    assert at == sorted(at), f"{folder}: {', '.join(headings)} in this order"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_command_names_files_that_are_there(folder):
    commands = re.findall(r"^ {4}python .*(?:\\\n.*)*", readme(folder), flags=re.MULTILINE)
    assert commands, f"{folder}: no command"
    for command in commands:
        files = re.findall(r"(?:configs|experiments)/[\w/]+\.py", command)
        modules = re.findall(r"-m (experiments\.[\w.]+)", command)
        files += [f"{module.replace('.', '/')}.py" for module in modules]
        assert files or "-m lorax." in command, f"{folder}: {command}"
        for file in files:
            assert (ROOT / file).is_file(), f"{folder}: {file}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_a_readme_names_is_there_and_what_is_there_is_named(folder):
    text, here = readme(folder), ROOT / "experiments" / folder
    images, tables = re.findall(IMAGES, text), re.findall(TABLES, text)
    assert images or not list(here.glob("*.csv")), f"{folder}: no figure"
    here_named = [name for name in tables if "/" not in name]
    if (here / "rule.py").is_file():  # tables of a rule that was not run come with its numbers
        here_named = []
    for name in [*images, *here_named]:
        assert (here / name).is_file(), f"{folder}: {name}"
    unnamed = {path.name for path in here.glob("*.csv")} - set(tables)
    unnamed |= {path.name for path in here.glob("*.png")} - set(images)
    assert not unnamed, f"{folder}: README.md does not name {unnamed}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_what_a_script_takes_from_lorax_is_there(script):
    """Scripts run when somebody redraws a figure; what they call may have moved since."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "lorax":
            package = importlib.import_module(node.module)
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found = getattr(package, alias.name, None) or importlib.import_module(name)
                if inspect.ismodule(found):
                    modules[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            assert module is None or hasattr(module, node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("claim", FIGURES)
def test_a_figure_without_numbers_says_what_makes_them(claim, tmp_path, monkeypatch):
    figure = importlib.import_module(f"experiments.{claim}.figure")
    monkeypatch.setattr(figure, "HERE", tmp_path / claim)
    with pytest.raises(
        SystemExit, match=f"no numbers yet; python -m experiments.rerun {claim} --w"
    ):
        figure.main()


def test_a_figure_has_every_seed_the_margins_and_what_is_withdrawn(tmp_path):
    three = compare.interval([1.0, 2.0, 4.0])
    rows = [
        plotting.Row("kept", three, (1.0, 2.0, 4.0), (0.5,)),
        plotting.Row("not kept", three, doubt="one learning rate"),
    ]
    with plotting.drawn(tmp_path / "x.png", 2) as grid:
        left, right = grid[0]
        plotting.intervals(left, rows)
        plotting.line(right, 0, pd.DataFrame([[1.0, 2.0, 4.0]], index=[8]), "LoRA")
        plotting.line(right, 1, pd.DataFrame([[2.0, 2.0, 2.0]], index=[8]), "DoRA", "at the edge")
        plotting.legend(grid)
        means, dots = left.lines[0], [line for line in left.lines if line.get_marker() == "."]
        assert list(means.get_xdata()) == [three.value] and means.get_fillstyle() == "full"
        assert list(dots[0].get_xdata()) == [1.0, 2.0, 4.0]
        assert [text.get_text() for text in left.get_yticklabels()] == [
            "kept",
            "not kept\n(withdrawn)",
        ]
        assert any(line.get_fillstyle() == "none" for line in left.lines)
        margins = [tuple(path.vertices[:, 0]) for c in left.collections for path in c.get_paths()]
        assert (0.5, 0.5) in margins
        seeds = [line.get_ydata()[0] for line in right.lines if line.get_marker() == "."]
        assert seeds == [1.0, 2.0, 4.0, 2.0, 2.0, 2.0]
        assert [bar[0].get_fillstyle() for bar in right.containers] == ["full", "none"]
        (legend,) = left.figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["LoRA", "DoRA"]
    assert (tmp_path / "x.png").stat().st_size
