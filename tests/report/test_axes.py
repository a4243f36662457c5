"""Sweeps over fields that may be None: trained is not the same as lost in a figure."""

import json

import pandas as pd
import pytest
from reading import Page
from synthetic import STEPS, kernels, make_run, make_search

from lorax import config, report
from lorax.analysis import runs
from lorax.analysis.figures import layout
from lorax.report.pages import several_runs
from lorax.report.sections import losses

#: axis -> a value beside None, as members.jsonl has it
VALUES = {
    "layers": [0],
    "n_train": 64,
    "targets": ["q"],
    "target_rank": 2,
    "tokens": 4,
    "quant": "nf4",
    "dim": 10,
    "projection": "dense",
    "granularity": "tensor",
    "inputs": 9,
    "planted_rank": [1, 2],
    "blocks": 2,
    "block_size": 16,
    "frequencies": 100,
    "numbers": 8,
    "tying": 0.5,
    "mini_rank": 2,
    "mask": "magnitude",
}


def swept(directory, axis, values, **more):
    """A run over two values of `axis` (and two seeds), of which the first is the best."""
    make_run(directory, lrs=(1e-3, 2e-3), **{"ranks": (4,)} | more)
    lines = (directory / "members.jsonl").read_text().splitlines()
    members = [json.loads(line) for line in lines]
    for member in members:
        value = values[member["lr"] == 2e-3]
        name = f"{axis}={value},rank={member['rank']},seed={member['seed']}"
        member |= {"lr": 1e-3, "name": name, axis: value}
    (directory / "members.jsonl").write_text("".join(json.dumps(m) + "\n" for m in members))
    config = json.loads((directory / "config.json").read_text())
    config["config"]["sweep"] = {axis: values, "seed": [0, 1]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_every_optional_axis_is_tried():
    defaults = config.flat(config.default())
    optional = {axis for axis, key in config.axes().items() if defaults[key] is None}
    assert set(VALUES) == optional - set(runs.SEEDS)


@pytest.mark.parametrize("axis", VALUES)
def test_an_axis_may_hold_none(axis, tmp_path, undrawn):
    """With None as the best value and as another."""
    values = [None, VALUES[axis]]
    for name, order in (("best", values), ("other", values[::-1])):
        directory = swept(tmp_path / name, axis, order)
        text = report.write(directory, kernels()).read_text()
        said = runs.in_words(values[0], axis)
        assert f"Loss against {axis.replace('_', ' ').replace('n train', 'training ex')}" in text
        settings = pd.read_csv(directory / "analysis" / "settings.csv")
        assert sorted(settings["mean"].round(9)) == [1.2, 1.3] and (settings["n"] == 2).all()
        best = said if name == "best" else runs.in_words(runs._words(VALUES[axis]))
        headline = text.split('class="answer"><p><strong>')[1].split("<")[0]
        if axis in ("n_train", "quant", "inputs", "planted_rank"):  # these can't be compared
            assert f"<h3>{axis} {best}</h3>" in text
        else:
            assert f"{axis} {best} (" in headline, headline
        for figure in ("rank_curve", "learning_curves", "spectra", "update_ranks", "intruders"):
            assert (directory / "figures" / f"{figure}.csv").exists(), figure
    text = several_runs.write(
        [tmp_path / "best", tmp_path / "other"], tmp_path / "both"
    ).read_text()
    assert "Methods" in Page(text).headings


def test_numbers_and_words_on_one_axis(tmp_path, undrawn):
    directory = swept(tmp_path, "planted_rank", [3, [1, 2]])
    assert "planted rank = 3" in report.write(directory, kernels()).read_text()


@pytest.mark.parametrize("axis", ["quant", "n_train"])
def test_none_beside_other_axes(axis, tmp_path, undrawn):
    directory = swept(tmp_path, axis, [None, VALUES[axis]], ranks=(2, 4))
    text = report.write(directory).read_text()
    word = {"quant": "none", "n_train": "all"}[axis]
    assert f"r = 4 with {axis}={word}" in text
    points = pd.read_csv(directory / "figures" / "learning_curves.csv", keep_default_na=False)
    last = points[(points["shows"] == "mean") & (points["step"] == points["step"].max())]
    said = {"quant": "nf4", "n_train": "64.0"}[axis]
    assert len(last) == 4 and set(last[axis].astype(str)) == {"", said}


def test_a_mean_is_over_seeds_alone(tmp_path, undrawn):
    """Learning curves of a sweep over ranks, rates and alphas: a thick line a setting."""
    directory = make_run(
        tmp_path, ranks=(2, 4), lrs=(1e-3, 2e-3), alphas=(8.0, 16.0), adapters=False
    )
    text = report.write(directory).read_text()
    assert "Thick: means over seeds; thin: members. Colours: rank. One panel for each " in text
    points = pd.read_csv(directory / "figures" / "learning_curves.csv")
    means = points[points["shows"] == "mean"].set_index(["rank", "alpha", "lr", "step"])["loss"]
    members = points[points["shows"] == "member"]
    assert len(means) == 8 * 3 and len(members) == 16 * 3
    each = members.groupby(["rank", "alpha", "lr", "step"])["loss"]
    assert (each.size() == 2).all()
    pd.testing.assert_series_equal(means.sort_index(), each.mean().sort_index(), atol=1e-12)


def test_learning_curves_of_a_search_keep_sizes_and_rates_apart(tmp_path, undrawn):
    """At the best rate of each size: what learns at no other rate is in no mean."""
    directory = make_search(tmp_path, lora_ranks=(1, 10))
    report.write(directory)
    points = pd.read_csv(directory / "figures" / "learning_curves.csv")
    members = points[points["shows"] == "member"]
    means = points[points["shows"] == "mean"]
    sizes = members.groupby(["method", "trainable_params"])["member"].nunique()
    assert sizes.to_dict() == {
        ("full", 1000): 3, ("lora", 20): 3, ("lora", 200): 3,
        ("subspace", 10): 3, ("subspace", 100): 3, ("subspace", 1000): 3,
    }  # fmt: skip
    names = members["member_name"]
    assert names.str.contains("lr=0.1,").sum() + names.str.contains("lr=0.01,").sum() == len(names)
    assert len(means) == 6 * 3


def test_panels_that_do_not_fit_are_folded(tmp_path, undrawn):
    lrs = tuple(n * 1e-3 for n in range(1, 15))
    directory = make_run(tmp_path, ranks=(2, 4), seeds=(0,), lrs=lrs, adapters=False)
    text = report.write(directory).read_text()
    assert "Panels 1 to 7 of 14." in text and "<summary>Panels 8 to 14 of 14</summary>" in text
    assert "One panel for each learning rate, the lowest loss first." in text
    files = {path.name for path in (directory / "figures").iterdir()}
    assert {"learning_curves.csv", "learning_curves_2.csv"} <= files
    points = pd.read_csv(directory / "figures" / "learning_curves.csv")
    assert points["lr"].nunique() == 14


def test_what_a_missing_value_means():
    assert runs.in_words(None, "n_train") == runs.in_words(float("nan"), "layers") == "all"
    assert runs.in_words(None, "quant") == runs.in_words(None, "dim") == "none"
    row = pd.Series({"quant": None, "rank": None, "n_train": float("nan")})
    assert runs.fields(row, row.index) == "quant=none, n_train=all"


def test_thinned_curves_are_said_beside_full_fine_tuning(tmp_path, monkeypatch):
    """It has no rank, and its evaluations count like all others."""
    directory = make_run(tmp_path, ranks=(1, 4), seeds=(0,))
    rows = [json.loads(line) for line in (directory / "members.jsonl").read_text().splitlines()]
    rows[1] |= {"method": "full", "rank": None}
    (directory / "members.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = runs.load(directory)
    monkeypatch.setattr(layout, "FEWEST_STEPS", 2)
    monkeypatch.setattr(layout, "MOST_POINTS", 2 * len(STEPS) - 1)
    section = losses.learning(run, runs.summary(run), runs.Axes("rank", ()))
    assert "Only some evaluations are drawn" in section.content
