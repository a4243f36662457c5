"""Figures of searches, and the intervals that charts compute."""

import pandas as pd
import pytest
from drawn import marks, number, texts
from scipy import stats
from synthetic import make_search

from lorax.analysis import figures, intrinsic, runs
from lorax.analysis.figures import style, vega

ACCURACY = "final validation accuracy (fraction)"


def test_the_intervals_of_charts_are_those_of_t():
    table = pd.DataFrame({"value": [1.0, 2.0, 4.0], "of": "a"})
    chart = style.with_intervals(vega.Chart(table), "value", ["of"]).mark("rule")
    (mark,) = marks(chart.encode(x="low:Q", x2="high:Q"), "rule")
    low, high = stats.t.interval(0.95, 2, table["value"].mean(), stats.sem(table["value"]))
    assert (number(mark["low"]), number(mark["high"])) == pytest.approx((low, high), abs=1e-3)


def test_intrinsic(tmp_path):
    run = runs.load(make_search(tmp_path, conditions=(False, True), lora_ranks=(1, 10)))
    points = intrinsic.points(run)
    found = intrinsic.estimate(points, 0.9, "accuracy")
    figure = figures.intrinsic(points, found)
    said = texts(figure)
    d = found["d"].iloc[0]
    assert {f"shuffle=False: d90 = {d:.0f}", "shuffle=True: d90 > 1,000"} <= set(said)
    assert {ACCURACY, "dimension d; parameters of LoRA", "random subspace", "LoRA"} <= set(said)
    means = [mark for mark in marks(figure, "symbol") if f"mean {ACCURACY}" in mark]
    of_subspaces = [mark for mark in means if mark["of"] == "random subspace"]
    first = {
        mark["trainable parameters"]: number(mark[f"mean {ACCURACY}"]) for mark in of_subspaces[:3]
    }
    assert first == {"10": 0.43, "100": 0.73, "1,000": 1.0}
    assert all(mark["seeds"] == "3" for mark in of_subspaces)
    levels = {
        mark["line"]: number(mark[ACCURACY]) for mark in marks(figure, "rule") if "line" in mark
    }
    assert levels == {"full fine-tuning": 1, "needed": pytest.approx(0.9)}
    (ring,) = [mark for mark in marks(figure, "symbol") if "estimate" in mark]
    assert number(ring["estimate"]) == pytest.approx(d, rel=1e-3)
    (band,) = marks(figure, "rect")  # the shuffled pixels have no estimate
    assert number(band["95% interval from"]) == pytest.approx(found["low"].iloc[0], rel=1e-3)
    hidden = points.loc[points["seed"] == 2, "member"]
    means = [mark for mark in marks(figure, "symbol", hidden) if f"mean {ACCURACY}" in mark]
    assert {mark["seeds"] for mark in means} == {"2"}


def test_a_search_by_loss_with_one_seed(tmp_path):
    run = runs.load(make_search(tmp_path, seeds=(0,)))
    run.config["config"]["search"]["metric"] = "loss"
    points = intrinsic.points(run)
    figure = figures.intrinsic(points, intrinsic.estimate(points, 0.95, "loss"))
    said = texts(figure)
    assert "final validation loss (nats)" in said and any(text.startswith("d95 =") for text in said)
    assert not [mark for mark in marks(figure, "rect") if number(mark["to"]) > 0]
