"""Several runs on a page: what they differ in, and what they have in common."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from drawn import marks, texts
from reading import Page
from synthetic import WIDTH, make_run, make_search, planted_factors

from lorax import naming
from lorax.analysis import figures, runs, settings_compared, update_similarity
from lorax.report.pages import several_runs


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Two sweeps over rank and alpha, the second with one rank; a search."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "one", ranks=(1, 4, 8))
    make_run(folder / "two", ranks=(4,), alphas=(8.0, 32.0))
    make_search(folder / "search", dims=(10, 1000))
    return folder / "one", folder / "two", folder / "search"


@pytest.fixture
def written(directories, tmp_path, undrawn):
    return tmp_path, several_runs.write(directories, tmp_path).read_text()


def test_everything_is_on_the_page(written, directories):
    directory, text = written
    page = Page(text)
    assert not page.open and page.headings[0] == "one, two, search"
    titles = ["Runs", "Differences", "Curves", "Methods", "Intrinsic dimension", "Members"]
    assert page.headings[1:] == [*titles, "Subspace similarity", "Method notes"]
    rows = {row["run"]: row for row in page.table("run", "best setting", "state")}
    assert rows["one"]["best setting"] == "r = 4" and rows["one"]["validation loss"] == "1.2000"
    assert rows["two"]["best setting"] == "alpha = 8" and rows["search"]["task"] == "digits"
    assert rows["search"]["best setting"].startswith("d90")
    differ = {row["key"]: row for row in page.table("key", "one", "two")}
    assert differ["sweep.rank"]["one"] == "[1, 4, 8]" and differ["sweep.rank"]["two"] == "[4]"
    assert "search.threshold" in differ and "sweep.seed" in differ
    members = page.table("run", "name", "status")
    count = lambda d: len((d / "members.jsonl").read_text().splitlines())
    assert len(members) == sum(map(count, directories))
    stored = pd.read_csv(directory / "analysis" / "members.csv")
    assert stored["run"].value_counts().to_dict() == {d.name: count(d) for d in directories}
    assert "have different tasks or bases" in text and "d90 = " in text
    # Nothing was written into the runs.
    assert not (directories[0] / "report.html").exists()


def test_every_figure_has_its_numbers(written):
    figures = written[0] / "figures"
    names = {path.stem for path in figures.iterdir()}
    pairs = {"similarity_one-one", "similarity_one-two", "similarity_two-two"}
    assert names == {"curves", "methods", "intrinsic", "similarity"} | pairs
    assert {p.name for p in figures.iterdir()} == {f"{name}.csv" for name in names}
    curves = pd.read_csv(figures / "curves.csv")
    assert set(curves["axis"]) == {"rank", "alpha", "trainable_params"}
    of = lambda run, axis: curves[(curves["run"] == run) & (curves["axis"] == axis)]
    assert of("one", "rank")["x"].tolist() == [1, 4, 8] and of("two", "rank")["x"].tolist() == [4]
    np.testing.assert_allclose(of("one", "rank")["mean"], [1.6, 1.2, 1.2], atol=1e-12)
    # At a rank it is the best alpha that counts.
    np.testing.assert_allclose(of("two", "rank")["mean"], [1.2], atol=1e-12)
    np.testing.assert_allclose(of("two", "alpha")["mean"], [1.2, 1.4], atol=1e-12)


def test_similarity_between_runs_is_that_of_their_best(written):
    with np.load(written[0] / "analysis" / "similarity.npz") as stored:
        phi = stored["one-two/h/1/attn/v/dW out"]
    one, two = ([planted_factors(4, seed, s) for seed in (0, 1)] for s in (4.0, 2.0))
    path = "h/1/attn/v"
    pairs = itertools.product(one, two)
    expected = np.mean([update_similarity(f[path], g[path], "out") for f, g in pairs], axis=0)
    np.testing.assert_allclose(phi, expected, atol=1e-9)
    rows = {(r["between"], r["side"]): r for r in Page(written[1]).table("between", "side")}
    row = rows["one and two", "output"]
    assert row["matrices"] == "6" and row["pairs"] == "4"
    assert row["by chance"] == f"{4 / WIDTH:.3f}" and float(row["φ(1, 1)"]) > 0.9


def test_nothing_in_common_is_said(tmp_path, undrawn):
    make_run(tmp_path / "a", ranks=(2,), seeds=(0,))
    make_run(tmp_path / "b", ranks=(2,), seeds=(0,), adapters=False)
    text = several_runs.write([tmp_path / "a", tmp_path / "b"], tmp_path / "out").read_text()
    assert "two seeds of a: not available: its best setting has only one member" in text
    assert "b: " in text and "no such file" in text
    assert "Curves" not in Page(text).headings  # one value on every axis


def test_names_that_give_one_file_name_are_told_apart(tmp_path, undrawn):
    runs = [tmp_path / "a_b" / "c", tmp_path / "a" / "b_c", tmp_path / "d" / "c"]
    for directory in runs:
        make_run(directory, ranks=(2,))
    assert naming.names(runs)[:2] == ["a_b/c", "a/b_c"]
    several_runs.write(runs, tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "analysis" / "similarity.csv")
    assert table["comparison"].nunique() == 6  # three runs with each other, and with themselves
    assert set(table.groupby("comparison")["path"].nunique()) == {6}


def test_names_tell_runs_apart(tmp_path):
    assert naming.names([tmp_path / "a/x", tmp_path / "b/x"]) == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="given twice"):
        naming.names([tmp_path / "a", tmp_path / "b" / ".." / "a"])
    name = naming.default_name("compare", [f"run_{i}" for i in range(40)])
    assert len(name) <= naming.MAX_LENGTH and name.startswith("compare-run_0-run_1-")


def test_curve_takes_the_best_of_the_rest(tmp_path):
    run = runs.load(make_run(tmp_path, ranks=(1, 4), lrs=(1e-3, 2e-3), adapters=False))
    table = runs.summary(run)
    found = settings_compared.curve(table, runs.axes(run, table), "lr")
    np.testing.assert_allclose(found["mean"], [1.2, 1.3], atol=1e-12)
    assert set(found["line"]) == {"rank=4"}
    assert settings_compared.curve(table, runs.axes(run, table), "dim").empty


def test_a_setting_with_a_diverged_seed_is_nowhere_the_best(tmp_path):
    run = runs.load(make_run(tmp_path, ranks=(1, 4), lrs=(1e-3, 2e-3), adapters=False))
    table = runs.summary(run)
    by = runs.axes(run, table)
    best = table["final_loss"].idxmin()
    broken = table.assign(final_loss=table["final_loss"] - 1.0 * (table["rank"] == 4))
    broken.loc[best, ["final_loss", "status"]] = [np.nan, "diverged"]
    of_rank = settings_compared.curve(broken, by, "rank")
    rate = {1e-3, 2e-3} - {table.loc[best, "lr"]}
    assert of_rank.loc[of_rank["x"] == 4, "line"].tolist() == [f"lr={rate.pop():g}"]
    named = broken.assign(method=broken["lr"].astype(str))
    settings = runs.settings(named, runs.Axes("method", ("rank",)))
    kept = settings_compared.best_of_methods(settings)
    assert (kept["diverged"] == 0).all() and len(kept) == 2


def test_more_parameters_are_on_the_curve_only_where_they_are_better(tmp_path):
    run = runs.load(make_run(tmp_path, ranks=(1, 4), lrs=(1e-3,), adapters=False))
    table = runs.summary(run)
    by = runs.axes(run, table)
    assert len(settings_compared.curve(table, by, "trainable_params")) == 2
    worse = table.assign(final_loss=table["final_loss"] + (table["rank"] == 4))
    (kept,) = settings_compared.curve(worse, by, "trainable_params")["x"]
    assert kept == table.loc[table["rank"] == 1, "trainable_params"].iloc[0]


def test_no_line_joins_unlike_methods(tmp_path, undrawn):
    """Rank 1 is lora's, rank 4 dora's: two points, and nothing between them."""
    for name in ("one", "two"):
        directory = make_run(tmp_path / name, ranks=(1, 4), adapters=False)
        edit(directory, lambda row: row | {"method": "lora" if row["rank"] == 1 else "dora"})
    several_runs.write([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    numbers = pd.read_csv(tmp_path / "out" / "figures" / "curves.csv")
    lines = numbers[numbers["axis"] == "rank"].groupby(["run", "part"])["x"].apply(list).to_dict()
    assert lines == {(run, f"method={method}"): [rank] for run in ("one", "two")
                     for method, rank in (("lora", 1), ("dora", 4))}  # fmt: skip
    figure = figures.curves(numbers.assign(line=""), "loss")
    assert {", ".join(line) for line in lines} <= set(texts(figure))
    # A line of one point has no length.
    assert len(marks(figure, "line")) == len(marks(figure, "symbol"))


def test_losses_of_unlike_runs_are_not_compared_in_silence(tmp_path, undrawn):
    one, two = (make_run(tmp_path / name, ranks=(1,), adapters=False) for name in ("one", "two"))
    text = several_runs.write([one, two], tmp_path / "out").read_text()
    assert "The runs differ in" not in text and "is ahead where" not in text
    assert "An interval holds for one mean." in text
    config = json.loads((two / "config.json").read_text())
    config["config"] |= {"eval": {"examples": 64}, "train": {"batch_size": 4}}
    config["config"]["task"] |= {"path": "other.txt"}
    (two / "config.json").write_text(json.dumps(config))
    status = json.loads((two / "status.json").read_text())
    (two / "status.json").write_text(json.dumps(status | {"steps": 200}))
    text = several_runs.write([one, two], tmp_path / "out").read_text()
    for said in (
        "The runs differ in eval.examples (one: –; two: 64), so their losses may be measured on",
        "The runs differ in task.path (one: –; two: &quot;other.txt&quot;), so",
        "The runs differ in train.batch_size (one: –; two: 4): a lower loss may be due to more",
        "The runs differ in steps (one: 100; two: 200): a lower loss",
    ):
        assert said in text, said


def edit(directory, change):
    """Change every member of a run."""
    rows = [json.loads(line) for line in (directory / "members.jsonl").read_text().splitlines()]
    lines = (json.dumps(change(row)) + "\n" for row in rows)
    (directory / "members.jsonl").write_text("".join(lines))


def test_differences():
    found = settings_compared.differences(
        {"x": {"a": 1, "b": {"c": [1]}}, "y": {"a": 1, "b": {"c": [2]}}}
    )
    assert json.loads(found.to_json(orient="records")) == [{"key": "b.c", "x": "[1]", "y": "[2]"}]
    assert settings_compared.differences({"x": {"a": 1}, "y": {"a": 1}}).empty
