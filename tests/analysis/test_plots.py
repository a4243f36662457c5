"""Figures say what the tables say: lines through the means, labelled axes, no global state."""

import io

import altair as alt
import numpy as np
import pandas as pd
import pytest
from drawn import marks, texts
from matplotlib.figure import Figure
from scipy import stats
from synthetic import BASE_LOSS, make_run, make_search

from lorax.analysis import figures, intrinsic, runs
from lorax.analysis.figures import style


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return runs.load(make_run(directory, ranks=(1, 2, 4, 8), diverged=(1,)))


@pytest.fixture(scope="module")
def tables(run):
    table = runs.summary(run)
    settings = runs.settings(table, runs.axes(run, table))
    return table, settings, runs.best_setting(settings)


def draws(figure):
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue().startswith(b"\x89PNG")


def test_rank_curve(tables):
    table, settings, best = tables
    figure = figures.rank_curve(settings, table, "rank", BASE_LOSS, best)
    means = [mark for mark in marks(figure, "symbol") if "seeds" in mark]
    title = "mean of eval loss (nats)"
    assert [float(mark[title]) for mark in means] == pytest.approx(settings["mean"], abs=1e-4)
    # Rank 1 has one seed that did not diverge, and no interval.
    assert [mark["seeds"] for mark in means] == ["1", "2", "2", "2"]
    low = [mark["95% interval from"] for mark in means]
    assert low[0] == "null" and float(low[1]) < float(means[1][title])
    said = texts(figure)
    assert "rank r of the adapter" in said and "final eval loss (nats)" in said
    assert any("base" in text for text in said)
    (ring,) = [mark for mark in marks(figure) if "ringed" in mark]
    assert ring["rank r of the adapter"] == "4"


def test_means_are_those_of_the_members_that_are_shown(tables):
    table, settings, best = tables
    figure = figures.rank_curve(settings, table, "rank", BASE_LOSS, best)
    hidden = table.index[table["seed"] == 1]
    members = [mark for mark in marks(figure, "symbol", hidden) if "member" in mark]
    assert [mark["seed"] for mark in members] == ["0"] * 4
    means = [mark for mark in marks(figure, "symbol", hidden) if "seeds" in mark]
    of_seed_0 = table.loc[table["seed"] == 0, "final_loss"]
    drawn = [float(mark["mean of eval loss (nats)"]) for mark in means]
    assert drawn == pytest.approx(of_seed_0, abs=1e-4)


def test_base_is_drawn_where_it_fits(tables):
    table, settings, best = tables
    figure = figures.rank_curve(settings, table, "rank", 1.7, best)
    assert [mark["base"] for mark in marks(figure, "rule") if "base" in mark] == ["1.7"]
    figure = figures.rank_curve(settings, table, "rank", float("nan"), best)
    assert not any("base" in text for text in texts(figure))


def test_one_seed_has_no_interval(tmp_path):
    table = runs.summary(runs.load(make_run(tmp_path / "run", seeds=(0,))))
    settings = runs.settings(table, runs.Axes("rank", ()))
    figure = figures.rank_curve(settings, table, "rank", BASE_LOSS, runs.best_setting(settings))
    assert all(mark["low"] == "null" for mark in marks(figure, "rule") if "low" in mark)
    assert "answer" in [mark.get("ringed") for mark in marks(figure)]


def test_an_axis_of_names(tables):
    table, _, _ = tables
    table = table.assign(init=["kaiming", "gaussian"] * 4)
    settings = runs.settings(table, runs.Axes("init", ()))
    figure = figures.rank_curve(settings, table, "init", BASE_LOSS, runs.best_setting(settings))
    assert {"gaussian", "kaiming"} <= set(texts(figure))
    assert not marks(figure, "line")  # none leads from one name to another


def test_the_intervals_of_charts_are_those_of_t():
    table = pd.DataFrame({"value": [1.0, 2.0, 4.0], "of": "a"})
    chart = style.with_intervals(alt.Chart(table), "value", ["of"]).mark_rule()
    (mark,) = marks(chart.encode(x="low:Q", x2="high:Q"), "rule")
    low, high = stats.t.interval(0.95, 2, table["value"].mean(), stats.sem(table["value"]))
    drawn = float(mark["low"].replace("\N{MINUS SIGN}", "-")), float(mark["high"])
    assert drawn == pytest.approx((low, high), abs=1e-3)


def test_learning_curves_leave_diverged_members_out_of_the_mean(run, tables):
    figure = figures.learning_curves(run.metrics, tables[0], runs.Axes("rank", ()))
    axes = figure.axes[0]
    mean = next(line for line in axes.lines if line.get_label() == "rank 1")
    seed_0 = run.metrics[(run.metrics["member"] == 0) & (run.metrics["split"] == "eval")]
    np.testing.assert_allclose(mean.get_ydata(), seed_0["loss"], atol=1e-12)
    assert len(axes.lines) == 8 + 4 and draws(figure)


def test_intrinsic(tmp_path):
    run = runs.load(make_search(tmp_path, conditions=(False, True), lora_ranks=(1, 10)))
    points = intrinsic.points(run)
    found = intrinsic.estimate(points, 0.9, "accuracy")
    figure = figures.intrinsic(points, found)
    plain, shuffled = figure.axes
    assert plain.get_title() == f"shuffle=False\nd90 = {found['d'].iloc[0]:.0f}"
    assert shuffled.get_title() == "shuffle=True\nd90 > 1,000"
    assert plain.get_xscale() == "log"
    assert figure.get_supxlabel().startswith("dimension d of the subspace")
    assert figure.get_supylabel() == "final eval accuracy (fraction)"
    mean = plain.containers[0].lines[0].get_xydata()
    np.testing.assert_allclose(mean, [(10, 0.43), (100, 0.73), (1000, 1.0)], atol=1e-9)
    levels = {line.get_label(): line.get_ydata()[0] for line in plain.lines}
    assert levels["full fine-tuning"] == 1 and levels["needed"] == pytest.approx(0.9)
    ring = next(line for line in plain.lines if line.get_label() == "d90")
    np.testing.assert_allclose(ring.get_xydata(), [(found["d"].iloc[0], 0.9)], atol=1e-9)
    (band,) = plain.patches
    assert band.get_x() == pytest.approx(found["low"].iloc[0])
    assert not shuffled.patches and len(shuffled.containers) == 2
    words = {text.get_text() for text in figure.legends[0].get_texts()}
    assert words == {"random subspace", "LoRA", "full fine-tuning", "needed", "d90", "95% interval"}
    assert draws(figure)


def test_a_search_by_loss_with_one_seed(tmp_path):
    run = runs.load(make_search(tmp_path, seeds=(0,)))
    run.config["config"]["search"]["metric"] = "loss"
    points = intrinsic.points(run)
    figure = figures.intrinsic(points, intrinsic.estimate(points, 0.95, "loss"))
    (axes,) = figure.axes
    assert figure.get_supylabel() == "final eval loss (nats)" and axes.get_title().startswith(
        "d95 ="
    )
    assert not axes.containers[0].has_yerr and not axes.patches and draws(figure)
