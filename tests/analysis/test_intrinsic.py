"""Constructed curves with a known crossing, and what a search would do about them."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic import make_search

from lorax import search
from lorax.analysis import intrinsic, runs

GAIN = {10: 0.5, 100: 0.8, 1000: 1.0}  # accuracy by d; 0.9 is reached at 10^2.5


def table(values, full=1.0, condition="", params=5000):
    """Points {(dim, lr or None, seed): value} beside full fine-tuning that reaches `full`."""
    rows = []
    for (dim, lr, seed), value in values.items():
        rows.append(("subspace", condition, "subspace", dim, lr or 0.1, seed, dim, value))
    for lr, seed in itertools.product((0.01, 0.02), (0, 1)):
        rows.append(("full", "", "full", np.nan, lr, seed, params, full - (lr == 0.02)))
    names = ("kind", "condition", "method", "dim", "lr", "seed", "params", "value")
    found = pd.DataFrame(rows, columns=names)
    return found.assign(member=range(len(found)), shared="", start=0.1, status="finished")


def curve(gain=GAIN, seeds=(0,), shift=0.0):
    return {(d, None, s): v + shift * s for d, v in gain.items() for s in seeds}


def only(points, threshold=0.9, metric="accuracy"):
    (row,) = (row for _, row in intrinsic.estimate(points, threshold, metric).iterrows())
    return row


# ---------------------------------------------------------------------------------------- crossing


def test_a_crossing_is_interpolated_in_log_d():
    found = intrinsic.crossing([10, 100, 1000], [0.5, 0.8, 1.0], 0.9, "accuracy")
    assert found.verdict == "reached" and found.size == pytest.approx(10**2.5, rel=1e-12)
    at_a_point = intrinsic.crossing([10, 100, 1000], [0.5, 0.9, 1.0], 0.9, "accuracy")
    assert at_a_point.size == pytest.approx(100, rel=1e-12)
    falling = intrinsic.crossing([10, 100, 1000], [2.0, 1.4, 1.0], 1.2, "loss")
    assert falling.size == pytest.approx(10**2.5, rel=1e-12)


def test_a_curve_that_is_not_monotone_is_pooled():
    """0.9 and 0.7 become 0.8 each: the crossing lies between the pool and the last."""
    found = intrinsic.crossing([1, 10, 100, 1000], [0.1, 0.9, 0.7, 1.0], 0.85, "accuracy")
    assert found.size == pytest.approx(10**2.25, rel=1e-12)
    assert intrinsic.crossing([1, 10], [0.9, 0.1], 0.8, "accuracy").verdict == "not reached"


@pytest.mark.parametrize(
    ("level", "metric", "verdict"),
    [
        (0.4, "accuracy", "below"),
        (1.1, "accuracy", "not reached"),
        (1.1, "loss", "below"),
        (0.4, "loss", "not reached"),
    ],
)
def test_what_lies_outside_is_said(level, metric, verdict):
    values = [0.5, 0.8, 1.0] if metric == "accuracy" else [1.0, 0.8, 0.5]
    found = intrinsic.crossing([10, 100, 1000], values, level, metric)
    assert found.verdict == verdict and np.isnan(found.size)


def test_needed():
    assert intrinsic.needed(0.1, 0.8, 0.9, "accuracy") == pytest.approx(0.72, rel=1e-12)
    assert intrinsic.needed(3.0, 1.0, 0.9, "loss") == pytest.approx(1.2, rel=1e-12)


# ---------------------------------------------------------------------------------------- interval


def test_an_interval_by_hand():
    """Logs 1, 2, 3 (base 10): deviation 1, t of two degrees 4.3027, so 2 +- 4.3027 / sqrt(3)."""
    size, low, high = intrinsic.interval([10, 100, 1000])
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert size == pytest.approx(100, rel=1e-12)
    assert (math.log10(low), math.log10(high)) == pytest.approx((2 - half, 2 + half), abs=1e-9)
    assert (
        intrinsic.interval([7])[0] == pytest.approx(7)
        and np.isnan(intrinsic.interval([7])[1:]).all()
    )


def test_the_error_of_the_baseline_is_in_the_interval():
    points = table(curve(seeds=(0, 1, 2), shift=0.02))
    alone = only(points)
    best = (points["kind"] == "full") & (points["lr"] == 0.01)
    moved = points.assign(
        value=points["value"] + best * (0.04 * points["seed"] - 0.02)
    )  # 0.98, 1.02
    row = only(moved)
    assert row["baseline_se"] == pytest.approx(0.02) and row["d"] == pytest.approx(alone["d"])
    # The mean curve is 0.82, 1.02 at 100, 1000: 0.9 x 0.02 moves its crossing by 0.018 / 0.2.
    logs = [2.5, 2 + 0.08 / 0.2, 2 + 0.06 / 0.2]
    parts = np.var(logs, ddof=1) / 3, (0.018 / 0.2) ** 2
    error, share = math.sqrt(sum(parts)), parts[0] / sum(parts)
    half = math.log10(row["high"] / row["low"]) / 2
    tails = share * stats.t.sf(half / error, 2) + (1 - share) * stats.t.sf(half / error, 1)
    assert tails == pytest.approx(0.025, rel=1e-6)
    assert half > math.log10(alone["high"] / alone["low"]) / 2


def test_one_seed_of_the_baseline_gives_no_interval():
    points = table(curve(seeds=(0, 1, 2), shift=0.02))
    row = only(points[(points["kind"] == "subspace") | (points["seed"] == 0)])
    assert row["verdict"] == "reached" and np.isnan([row["low"], row["high"]]).all()
    assert "(one seed of full fine-tuning, so no interval)" in intrinsic.headline(row)


def test_seeds_give_the_estimate_and_its_interval():
    row = only(table(curve(seeds=(0, 1, 2), shift=0.02)))
    logs = [2.5, 2 + 0.08 / 0.2, 2 + 0.06 / 0.2]
    half = stats.t.ppf(0.975, 2) * np.std(logs, ddof=1) / math.sqrt(3)
    assert row["verdict"] == "reached" and row["n"] == row["seeds"] == 3
    assert math.log10(row["d"]) == pytest.approx(np.mean(logs), abs=1e-9)
    assert math.log10(row["low"]) == pytest.approx(np.mean(logs) - half, abs=1e-9)
    assert math.log10(row["high"]) == pytest.approx(np.mean(logs) + half, abs=1e-9)
    assert row["smallest"] == 1000 and row["full_over_d"] == pytest.approx(5000 / row["d"])
    assert "95% CI" in intrinsic.headline(row) and "3 seeds" in intrinsic.headline(row)


def test_one_seed_has_no_interval():
    row = only(table(curve()))
    assert row["d"] == pytest.approx(10**2.5) and np.isnan(row["low"])
    assert intrinsic.headline(row) == (
        "d90 = 316 (one seed, so no interval) of D = 5,000: 6.3% of the parameters."
    )


def test_not_reached_and_below():
    row = only(table(curve({10: 0.2, 100: 0.3})))
    assert row["verdict"] == "not reached" and np.isnan(row["d"]) and np.isnan(row["smallest"])
    assert intrinsic.brief(row) == "d90 > 100"
    row = only(table(curve({10: 0.95, 100: 1.0})))
    assert row["verdict"] == "below" and row["smallest"] == 10
    assert intrinsic.brief(row) == "d90 ≤ 10"


def test_where_only_some_seeds_cross_the_means_do_and_it_is_said():
    values = curve({10: 0.5, 100: 0.8, 1000: 1.0}) | {(d, None, 1): 0.89 for d in (10, 100, 1000)}
    row = only(table(values))
    assert row["verdict"] == "partly reached" and (row["n"], row["seeds"]) == (1, 2)
    # Means 0.695, 0.845, 0.945.
    assert math.log10(row["d"]) == pytest.approx(2 + 0.055 / 0.1, abs=1e-9)
    assert np.isnan(row["low"]) and row["by_seed"] == "seed 0: 316.2; seed 1: not reached"
    assert "1 of 2 seeds" in intrinsic.headline(row)


def test_the_learning_rate_is_chosen_for_each_dimension():
    values = {(d, lr, 0): v - 0.3 * (lr != best) for (d, v), best in
              zip(GAIN.items(), (0.1, 0.2, 0.1), strict=True) for lr in (0.1, 0.2)}  # fmt: skip
    points = table(values)
    best = intrinsic.tuned(points[points["kind"] == "subspace"], "dim", "accuracy")
    assert best["lr"].tolist() == [0.1, 0.2, 0.1]
    assert only(points)["d"] == pytest.approx(10**2.5)


def test_a_lucky_seed_does_not_choose_the_learning_rate():
    rows = pd.DataFrame({"lr": [0.1, 0.1, 0.2], "value": [0.7, 0.8, 0.9]})
    assert intrinsic.rates(rows, "accuracy") == [0.1, 0.2]
    assert intrinsic.rates(rows.iloc[1:], "accuracy") == [0.2, 0.1]
    assert intrinsic.rates(rows.iloc[1:], "loss") == [0.1, 0.2]


def test_the_baseline_is_the_best_mean_over_learning_rates():
    points = table(curve(), full=0.8)
    points.loc[(points["kind"] == "full") & (points["lr"] == 0.02), "value"] = [0.95, 0.6]
    found = intrinsic.baseline(points, "", "accuracy")
    assert found["baseline"] == pytest.approx(0.8) and found["baseline_lr"] == 0.01
    assert found["baseline_n"] == 2 and found["full_params"] == 5000


@pytest.mark.parametrize("full", [0.1, None])
def test_without_a_baseline_nothing_is_claimed(full):
    points = table(curve(), full=full or 1.0)
    points = points[points["kind"] == "subspace"] if full is None else points
    row = only(points)
    assert row["verdict"] == "no baseline" and np.isnan(row["d"]) and row["n"] == 0
    assert "unknown" in intrinsic.headline(row) and set(intrinsic.shown(row))
    assert search.refine(points, 0.9, "accuracy", 4, (0,)) == []


# ------------------------------------------------------------------------------------------ refine


def dims_of(asked):
    return list(dict.fromkeys(point["dim"] for point in asked))


def test_refine_goes_into_the_bracket_with_all_seeds_at_the_two_best_rates():
    values = {(d, lr, 0): v - drop for d, v in GAIN.items()
              for lr, drop in ((0.1, 0.02), (0.2, 0.0), (0.4, 0.3))}  # fmt: skip
    asked = search.refine(table(values), 0.9, "accuracy", 4, (0, 1))
    assert dims_of(asked) == [100, 158, 251, 398, 631, 1000]
    assert asked[:4] == [
        {"like": 0, "dim": 100, "lr": lr, "seed": seed} for lr in (0.1, 0.2) for seed in (0, 1)
    ]
    assert len(asked) == 6 * 2 * 2


def test_refine_takes_the_rates_of_the_nearest_dimension():
    best = {10: 0.4, 100: 0.1, 1000: 0.2}
    values = {(d, lr, 0): v - abs(math.log2(lr / best[d])) / 50 for d, v in GAIN.items()
              for lr in (0.1, 0.2, 0.4)}  # fmt: skip
    asked = search.refine(table(values), 0.9, "accuracy", 2, (0,))
    rates = {d: [p["lr"] for p in asked if p["dim"] == d] for d in dims_of(asked)}
    assert rates == {100: [0.1, 0.2], 215: [0.1, 0.2], 464: [0.1, 0.2], 1000: [0.1, 0.2]}
    values |= {(1000, 0.4, 0): 0.99, (1000, 0.1, 0): 0.95}
    asked = search.refine(table(values), 0.9, "accuracy", 2, (0,))
    assert [p["lr"] for p in asked if p["dim"] == 464] == [0.2, 0.4]


def test_a_bracket_holds_all_that_is_in_doubt():
    gain = {1: 0.1, 10: 0.95, 100: 0.5, 1000: 1.0}
    assert dims_of(search.refine(table(curve(gain)), 0.9, "accuracy", 2, (0,))) == [
        1, 10, 100, 1000
    ]  # fmt: skip
    tight = curve({4: 0.1, 5: 1.0})
    assert dims_of(search.refine(table(tight), 0.9, "accuracy", 4, (0,))) == [4, 5]


@pytest.mark.parametrize(
    ("gain", "dims"),
    [
        ({10: 0.1, 40: 0.2}, [40, 160]),
        ({10: 0.1, 2000: 0.2}, []),  # the next would be more than all parameters
        ({10: 0.95, 40: 1.0}, [2, 10]),
        ({2: 0.95, 40: 1.0}, [1, 2]),
        ({1: 0.95, 40: 1.0}, []),
    ],
)
def test_outside_the_grid_one_dimension_is_added(gain, dims):
    assert dims_of(search.refine(table(curve(gain)), 0.9, "accuracy", 4, (0,))) == dims


def test_each_condition_is_refined_by_itself():
    one = table(curve(), condition="shuffle=False")
    other = table(curve({10: 0.1, 100: 0.5, 1000: 0.6}), condition="shuffle=True")
    other = other[other["kind"] == "subspace"].assign(member=lambda t: t["member"] + len(one))
    points = pd.concat([one, other], ignore_index=True)
    asked = search.refine(points, 0.9, "accuracy", 1, (0,))
    assert dims_of([p for p in asked if p["like"] == 0]) == [100, 316, 1000]
    assert dims_of([p for p in asked if p["like"] == len(one)]) == []
    assert intrinsic.estimate(points, 0.9, "accuracy")["verdict"].tolist() == [
        "reached", "not reached"
    ]  # fmt: skip


# --------------------------------------------------------------------------------- a run directory


def test_points_of_a_run(tmp_path):
    directory = make_search(tmp_path, conditions=(False, True), lora_ranks=(1,), diverged=(0,))
    points = intrinsic.points(runs.load(directory))
    assert points["kind"].value_counts().to_dict() == {"subspace": 36, "full": 12, "lora": 12}
    assert set(points["condition"]) == {"shuffle=False", "shuffle=True"}
    assert points["start"].tolist() == pytest.approx([0.1] * len(points))
    assert points.loc[0, "status"] == "diverged" and points.loc[0, "value"] == 0.1
    assert points.loc[1, "value"] == pytest.approx(0.43)


def test_the_planted_dimension_is_found(tmp_path):
    points = intrinsic.points(runs.load(make_search(tmp_path, lora_ranks=(1, 10, 100))))
    row = only(points)
    # Of seed 0 alone the curve is a straight line; the others' bends where it reaches 1.
    assert row["by_seed"].startswith("seed 0: 464.2")
    assert 380 < row["d"] < 470 and row["low"] < row["d"] < row["high"]
    assert row["lora_verdict"] == "reached"
    assert row["lora_params"] == pytest.approx(2 * row["d"], rel=1e-6)


def test_losses_go_by_the_improvement(tmp_path):
    """A loss of 2 - accuracy from 1.9 to 1: needed is 1.09, an accuracy of 0.91."""
    run = runs.load(make_search(tmp_path, seeds=(0,)))
    run.config["config"]["search"]["metric"] = "loss"
    row = only(intrinsic.points(run), metric="loss")
    assert row["needed"] == pytest.approx(1.09)
    assert math.log10(row["d"]) == pytest.approx(2 + 0.21 / 0.3, abs=1e-6)


def test_members_that_are_not_done_are_left_out(tmp_path):
    run = runs.load(make_search(tmp_path))
    del run.status["members"]["3"]
    assert 3 not in intrinsic.points(run)["member"].tolist()
