"""The analysis door: a function of an update gets its numbers, its line for what is wrong."""

import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import quick
from reading import Page
from synthetic import kernels, make_adapter, make_run, planted_factors

from lorax import config, outside, report, search
from lorax.analysis import runs, tables
from lorax.interop.peft import Factors
from lorax.report.__main__ import main

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLE = str(ROOT / "docs" / "examples" / "analysis.py")
CONDITION, AGAINST = f"{EXAMPLE}:condition_number", f"{EXAMPLE}:against_w"


def largest(update):
    """The largest singular value."""
    return update.singular_values[0]


def picky(update):
    if update.layer == 1:
        raise KeyError("no such layer")
    return {"scale": update.scale, "nothing": math.nan if update.target == "v" else 1}


def of_w(update):
    return np.vdot(update.dw, update.w)


# ---------------------------------------------------------------------------------------- an update


@pytest.mark.parametrize("dense", [False, True])
def test_an_update_offers_the_same_with_factors_and_without(dense):
    factors = planted_factors(2, 0, 1.5)["h/1/attn/q"]
    dw = factors.s * factors.a.astype(float) @ factors.b
    w = np.ones(dw.shape)
    update = tables.Update(3, "h/1/attn/q", dw if dense else factors, w)
    np.testing.assert_allclose(update.dw, dw, atol=1e-12)
    u, sigma, vt = update.svd
    np.testing.assert_allclose(u * sigma @ vt, dw, atol=1e-6)
    np.testing.assert_allclose(update.singular_values, sigma, atol=1e-6)
    assert (update.layer, update.target, update.shape) == (1, "q", dw.shape)
    assert (update.factors is None) == dense and update.w.sum() == dw.size
    assert update.rank == (min(dw.shape) if dense else 2)
    assert update.scale == (1.0 if dense else factors.s)


def test_lorax_own_statistics_go_the_same_road():
    updates = {0: planted_factors(2, 0, 1.0), 1: planted_factors(1, 1, 1.0)}
    _, ranks = tables.spectra(updates)
    norm = lambda update: np.sqrt((update.dw**2).sum())
    norm.__name__ = "frobenius"
    of = tables.statistics(updates, [norm])["frobenius"]
    assert list(of.table) == ["member", "path", "layer", "target", "frobenius"]
    np.testing.assert_allclose(of.table["frobenius"], ranks["norm"], rtol=1e-6)
    assert not of.missing


def test_what_has_no_number_says_why():
    a = np.zeros((4, 1), np.float32)
    updates = {0: planted_factors(2, 0, 1.0) | {"h/0/mlp/up": Factors(a, a.T, 1.0)}}
    measured = tables.statistics(updates, [picky, of_w, largest], kernels())
    of = measured["picky"]
    assert of.columns == ["scale", "nothing"]
    failed = of.table["layer"] == 1
    assert (
        of.table.loc[failed, "scale"].isna().all() and of.table.loc[~failed, "scale"].notna().all()
    )
    assert of.missing[0, "h/1/attn/q"] == "KeyError: 'no such layer'"
    assert of.missing[0, "h/0/attn/v"] == "nothing is NaN"
    assert measured["of_w"].missing == {
        (0, "h/0/mlp/up"): "needs the base's weights: the base has no h/0/mlp/up"
    }
    assert not measured["largest"].missing
    assert measured["largest"].table["largest"].iloc[-1] == 0


@pytest.mark.parametrize(
    "value, says",
    [
        ("a", "text is str; expected a number"),
        (np.ones(2), r"text is ndarray \(2,\); expected a number"),
        (1j, "text is complex; expected a number"),
        ({"layer": 1.0}, "called 'layer', which can't be a column name"),
        ({3: 1.0}, "called 3, which can't be a column name"),
    ],
)
def test_another_value_is_no_number(value, says):
    text = lambda update: value
    text.__name__ = "text"
    of = tables.statistics({0: planted_factors(1, 0, 1.0)}, [text])["text"]
    assert pd.Series(of.missing.values()).str.contains(says).all()
    assert len(of.missing) == len(of.table) and of.table["text"].isna().all()


def test_numbers_may_be_whole_and_arrays_of_one():
    rank = lambda update: np.array([update.rank])
    rank.__name__ = "width"
    of = tables.statistics({0: planted_factors(2, 0, 1.0)}, [rank])["width"]
    assert list(of.table["width"]) == [2] * len(of.table) and of.table["width"].dtype == int


# ------------------------------------------------------------------------------------ in the config


def test_a_function_in_a_config_is_spelled():
    c = config.default()
    c.analysis.also = (largest, CONDITION)
    member = config.members(c)[0]
    assert member.config.analysis.also[1] == CONDITION
    assert member.config.analysis.also[0].endswith("test_statistics.py:largest")
    assert outside.resolve(member.config.analysis.also[0]) is largest


BAD = {
    "spectra": ("def spectra(update): return 1", "lorax has a spectra of its own"),
    "norm": ("def norm(update): return 1", "lorax has a norm of its own"),
    "two": ("def two(update, w): return 1", r"two\(update, w\) given, must take one argument"),
    "none": ("def none(): return 1", r"none\(\) given, must take one argument"),
    "misspelled": ("def mispelled(update): return 1", "has no function 'misspelled'.*mean"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_statistic_is_refused(name, tmp_path):
    source, says = BAD[name]
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=f"analysis.also: .*{says}"):
        tables.read_statistics([f"{tmp_path}/mine.py:{name}"])


def test_two_of_one_name_and_another_spelling_are_refused(tmp_path):
    (tmp_path / "mine.py").write_text("def condition_number(update): return 1")
    with pytest.raises(ValueError, match="two statistics are called condition_number"):
        tables.read_statistics([CONDITION, f"{tmp_path}/mine.py:condition_number"])
    c = config.default()
    c.analysis.also = ("condition_number",)
    with pytest.raises(ValueError, match=r"analysis.also: \('condition_number',\) given"):
        config.members(c)
    c.analysis.also, c.search.threshold = (CONDITION,), 0.9
    with pytest.raises(ValueError, match="analysis.also: a search's report shows no updates"):
        search.members(c)


# -------------------------------------------------------------------------------------- in a report


def test_a_report_has_its_section_figure_column_and_table(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(1, 2))
    text = report.write(directory, kernels(), also=[CONDITION, AGAINST]).read_text()
    seen = Page(text)
    assert {"Condition number", "Against w"} <= set(seen.headings)
    assert "The largest singular value of dW over the smallest" in text
    stored = pd.read_csv(directory / "analysis" / "against_w.csv")
    assert list(stored) == ["member", "path", "layer", "target", "cosine", "relative size"]
    assert len(stored) == 4 * 6 and stored.notna().all(axis=None)
    run, row = runs.load(directory), stored.iloc[7]
    update = tables.Update(0, row["path"], run.update(row["member"])[row["path"]])
    size = np.linalg.norm(update.dw) / np.linalg.norm(kernels()[row["path"]])
    assert row["relative size"] == pytest.approx(size, rel=1e-6)
    drawn = pd.read_csv(directory / "figures" / "against_w.csv")
    assert set(drawn["rank"]) == {1, 2}
    rows = seen.table("effective rank", "condition number", "against w: cosine")
    numbers = pd.read_csv(directory / "analysis" / "condition_number.csv")
    ranks = pd.read_csv(directory / "analysis" / "ranks.csv")
    of_rank = numbers[(ranks["rank"] == 2) & (ranks["target"] == "q")]["condition_number"]
    (shown,) = [row for row in rows if (row["rank"], row["target"]) == ("2", "q")]
    assert float(shown["condition number"].partition(" ± ")[0]) == pytest.approx(
        of_rank.mean(), abs=0.005
    )


def test_redrawn_without_its_file_the_numbers_stay_and_no_code_is_run(tmp_path, undrawn):
    """config.json is data: what it names is not run."""
    source = tmp_path / "mine.py"
    source.write_text("def mine(update): return update.layer")
    directory = make_run(tmp_path / "run", ranks=(1,))
    saved = json.loads((directory / "config.json").read_text())
    saved["config"].setdefault("analysis", {})["also"] = [f"{source}:mine", f"{source}:spectra"]
    (directory / "config.json").write_text(json.dumps(saved))
    assert "Mine" not in Page(report.write(directory).read_text()).headings
    report.write(directory, also=[f"{source}:mine"])
    before = (directory / "analysis" / "mine.csv").read_bytes()
    source.write_text("raise SystemExit")
    assert "Mine" in Page(report.write(directory).read_text()).headings
    assert (directory / "analysis" / "mine.csv").read_bytes() == before


def test_a_statistic_that_fails_is_a_line_on_the_page(tmp_path, undrawn):
    source = tmp_path / "mine.py"
    source.write_text("def mine(update): return 1 / update.layer")
    directory = make_run(tmp_path / "run", ranks=(1,))
    text = report.write(directory, also=[f"{source}:mine", AGAINST]).read_text()
    assert "No number for 4 of 12 matrices. h/0/attn/q of member 0 and 3 more: " in text
    assert "ZeroDivisionError" in text
    assert "needs the base&#x27;s weights: the base model&#x27;s kernels were not given" in text
    assert "There are no numbers to draw." in text


def test_the_command_takes_it_for_a_run_and_an_adapter(tmp_path, undrawn, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", ranks=(1,))
    make_run(tmp_path / "other", ranks=(1,))
    make_adapter(tmp_path / "adapter", 0, base="elsewhere")
    assert main(["run", "--also", CONDITION]) == 0
    assert f"--also={CONDITION}" in (tmp_path / "run/report.html").read_text()
    assert main(["adapter", f"--also={CONDITION}", "--out=out"]) == 0
    text = (tmp_path / "out/report.html").read_text()
    assert "Condition number" in Page(text).headings
    assert Page(text).table("matrix", "condition number")
    for given, says in (
        (["run", "other", f"--also={CONDITION}"], "--also is for adapters or one run"),
        (["run", "--also=none.py:f"], "analysis.also: 'none.py' is no Python file"),
        (["run", "--also=f"], "analysis.also: 'f' given, must be FILE.py:function"),
    ):
        capsys.readouterr()
        assert main(given) == 2 and says in capsys.readouterr().err


SMALL = (
    *("--config.train.steps=2", "--config.train.batch_size=2", "--config.train.seq_len=100"),
    *("--config.train.warmup=0", "--config.eval.every=2", "--config.eval.examples=8"),
    "--config.eval.test=8",
    *("--config.eval.batch_size=8", "--config.task.n_train=32", "--config.sweep.rank=(1,)"),
    *("--config.sweep.seed=(0,)", "--config.analysis.layers=0"),
)


def test_the_example_runs_from_its_file(tmp_path):
    """One file outside the package: two statistics, and the study that computes them."""
    flags = " ".join(f"--{name}={value}" for name, value in quick.OPTIONS.items())
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-m", "lorax.run", f"--config={EXAMPLE}", *SMALL, "--workdir=run"]
    go = lambda *more: subprocess.run(
        [*command, *more], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    refused = go(f"--config.analysis.also=('{EXAMPLE}:condition',)")
    assert refused.returncode == 2 and not (tmp_path / "run").exists()
    assert "has no function 'condition'" in refused.stderr and refused.stderr.count("\n") == 1
    done = go()
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]["analysis"]["also"]
    assert [name.rpartition(":")[2] for name in saved] == ["condition_number", "against_w"]
    for name in ("condition_number", "against_w"):
        table = pd.read_csv(tmp_path / "run" / "analysis" / f"{name}.csv")
        assert len(table) > 4 and table.notna().all(axis=None)
        assert (tmp_path / "run" / "figures" / f"{name}.csv").exists()
    text = (tmp_path / "run/report.html").read_text()
    assert {"Condition number", "Against w"} <= set(Page(text).headings)
    assert "could not be made" not in text


def test_a_statistic_with_the_name_of_the_axis_keeps_its_numbers(tmp_path, undrawn):
    """In the figure, and in the table of ranks, next to the axis."""
    file = tmp_path / "own.py"
    file.write_text("def alpha(update):\n    return update.singular_values[0]\n")
    run = make_run(tmp_path / "run", ranks=(2,), alphas=(8.0, 16.0))
    page = Page(report.draw(run, also=[f"{file}:alpha"]).read_text())
    assert not (run / "errors.txt").exists()
    own = pd.read_csv(run / "analysis" / "alpha.csv")
    drawn = pd.read_csv(run / "figures" / "alpha.csv")
    pd.testing.assert_series_equal(drawn["alpha of yours"], own["alpha"], check_names=False)
    assert set(drawn["alpha"]) == {8.0, 16.0}
    assert any("alpha of yours" in table[0] for table in page.tables)
