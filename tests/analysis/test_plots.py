"""Figures say what the tables say: lines through the means, labelled axes, no global state."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic import BASE_LOSS, make_run, make_search

from lorax.analysis import figures, intrinsic, runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return runs.load(make_run(directory, ranks=(1, 2, 4, 8), diverged=(1,)))


@pytest.fixture(scope="module")
def tables(run):
    table = runs.summary(run)
    settings = runs.settings(table, runs.axes(run, table))
    return table, settings, runs.best_setting(settings)


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def draws(figure):
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue().startswith(b"\x89PNG")


def test_rank_curve(tables):
    table, settings, best = tables
    figure = figures.rank_curve(settings, table, "rank", BASE_LOSS, best)
    axes = figure.axes[0]
    lines = [line.get_xydata() for line in axes.lines]
    means = settings[["rank", "mean"]].to_numpy(float)
    assert any(line.shape == means.shape and np.allclose(line, means) for line in lines)
    assert "rank" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    assert axes.get_xscale() == "log"
    assert any("base" in label for label in labels(axes))
    assert [text.get_text() for text in axes.texts] == ["rank 4: the answer"]
    assert draws(figure)


def test_base_is_drawn_where_it_fits(tables):
    table, settings, best = tables
    figure = figures.rank_curve(settings, table, "rank", 1.7, best)
    assert any(np.all(np.equal(line.get_ydata(), 1.7)) for line in figure.axes[0].lines)
    figure = figures.rank_curve(settings, table, "rank", float("nan"), best)
    assert not any("base" in label for label in labels(figure.axes[0]))


def test_one_seed_has_no_error_bars(tmp_path):
    table = runs.summary(runs.load(make_run(tmp_path / "run", seeds=(0,))))
    settings = runs.settings(table, runs.Axes("rank", ()))
    figure = figures.rank_curve(settings, table, "rank", BASE_LOSS, runs.best_setting(settings))
    axes = figure.axes[0]
    assert not axes.containers[0].has_yerr
    assert "the answer" in axes.texts[0].get_text()
    assert not any("standard error" in label for label in labels(axes))


def test_an_axis_of_names(tables):
    table, _, _ = tables
    table = table.assign(init=["kaiming", "gaussian"] * 4)
    settings = runs.settings(table, runs.Axes("init", ()))
    figure = figures.rank_curve(settings, table, "init", BASE_LOSS, runs.best_setting(settings))
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["gaussian", "kaiming"] and draws(figure)
    # No line leads from one name to another.
    means = settings["mean"].to_list()
    drawn = [line for line in figure.axes[0].lines if list(line.get_ydata()) == means]
    assert [line.get_linestyle() for line in drawn] == ["None"]


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
