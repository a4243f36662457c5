"""python -m lorax.report: what it takes for what, and what it says of a mistake."""

import io
import re
import shutil

import pytest
from synthetic import make_adapter, make_run

from lorax.console import console
from lorax.report import bases, page
from lorax.report.__main__ import main


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A run, another, an adapter and some directories that are neither."""
    folder = tmp_path_factory.mktemp("here")
    make_run(folder / "run", ranks=(1,), adapters=False)
    make_run(folder / "other", ranks=(2,), adapters=False)
    make_run(folder / "torn", ranks=(1,), adapters=False)
    (folder / "torn" / "members.jsonl").unlink()
    make_adapter(folder / "adapter", 0, base="elsewhere")
    make_adapter(folder / "narrow", 0, base="elsewhere", width=64)
    (folder / "empty").mkdir()
    (folder / "own").mkdir()
    (folder / "own" / "method.json").write_text("{}")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder


def test_one_run_goes_into_its_directory(here, capsys, monkeypatch, undrawn):
    monkeypatch.setattr(bases, "of_config", lambda config: (None, "not in this test"))
    assert main([str(here / "run")]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("One setting") and last == str(here / "run" / "report.html")
    (here / "run" / "report.html").unlink()
    shutil.rmtree(here / "run" / "figures")
    shutil.rmtree(here / "run" / "analysis")


def test_several_go_where_it_says(here, capsys, monkeypatch, tmp_path, undrawn):
    monkeypatch.chdir(tmp_path)
    assert main([str(here / "run"), str(here / "other")]) == 0
    assert capsys.readouterr().out.strip() == "runs/compare-run-other/report.html"
    assert (tmp_path / "runs/compare-run-other/report.html").exists()
    assert main([str(here / "adapter"), f"--out={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")


def test_a_terminal_sees_how_far_it_is(here, capsys, monkeypatch, tmp_path, undrawn):
    said = io.StringIO()
    screen = console(file=said, force_terminal=True, width=100)
    monkeypatch.setattr(page, "CONSOLE", screen)
    assert main([str(here / "adapter"), f"--out={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")
    assert f"analysing {here / 'adapter'}" in said.getvalue().replace("\n", "")
    assert "drawing" in said.getvalue() and "100%" in said.getvalue()


MISTAKES = {
    "nowhere": (["nowhere"], "nowhere: no such run directory or adapter"),
    "a typing error": (["runn"], "did you mean '.*run'"),
    "neither": (["empty"], "empty: neither a run directory .* nor an adapter"),
    "our own format": (["own"], "lorax's own format: report on its run instead"),
    "a model": (["model"], "looks like a model: pass it as --base"),
    "torn": (["torn"], "members.jsonl: no such file"),
    "mixed": (["run", "adapter"], "run is a run, .*adapter is an adapter: give runs or adapters"),
    "twice": (["run", "run"], "run: given twice"),
    "no such base": (["adapter", "--base=./nowhere"], "base: no directory ./nowhere"),
    "another base": (["narrow", "--base=gpt2-nano"], r"is \(64, 64\), .* is \(128, 128\)"),
    "layers below none": (
        ["adapter", "--layers=-1"],
        "--layers=-1: a number of layers, 0 for none",
    ),
    "layers of several": (["run", "other", "--layers=1"], "--layers is for adapters or one run"),
    "an adapter twice": (["adapter", "narrow", "adapter"], "adapter: given twice"),
    "alpha of PEFT": (["adapter", "--alpha=8"], "--alpha is for loralib's checkpoints"),
    "alpha of a run": (["run", "--alpha=8"], "--alpha is for loralib's checkpoints"),
    "base of several": (["run", "other", "--base=gpt2-nano"], "--base is for adapters or one run"),
    "out of one run": (["run", "--out=x"], "--out: the report of one run goes into its directory"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    here, name, capsys, monkeypatch, tmp_path, undrawn
):
    monkeypatch.chdir(here)
    before = sorted(here.rglob("*"))
    arguments, said = MISTAKES[name]
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert re.search(said, output.err), output.err
    assert sorted(here.rglob("*")) == before


def test_a_failure_under_way_is_1(here, capsys, undrawn, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    assert main([str(here / "adapter"), f"--out={tmp_path / 'file' / 'x'}"]) == 1
    assert "lorax.report: " in capsys.readouterr().err
