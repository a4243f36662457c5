"""Paired statistics: identities, and simulations of sweeps with known truth."""

import numpy as np
import pytest
from scipy import stats

from lorax.analysis import compare

ROWS = 100


def sweep(rng, means, seeds, rows=ROWS, by_seed=0.0, by_row=0.0, rest=0.0):
    """Losses (S, K, N) of settings with true `means`. Every seed and every row moves all settings
    alike, and each setting by `by_seed` and `by_row` (standard deviations) on its own."""
    settings = len(means)
    losses = np.asarray(means, float)[:, None, None] + rest * rng.standard_normal(
        (settings, seeds, rows)
    )
    losses += by_seed * rng.standard_normal((settings, seeds, 1)) + 0.02 * rng.standard_normal(
        (1, seeds, 1)
    )
    return losses + by_row * rng.standard_normal((settings, 1, rows)) + rng.standard_normal(rows)


def first(losses):
    return losses[..., 0]


def difference(losses):
    return losses[..., 0] - losses[..., 1]


# --------------------------------------------------------------------------------------- identities


def test_intervals_over_seeds_are_students_t():
    values = np.array([1.0, 1.2, 1.7, 0.9])
    found = compare.interval(values)
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    np.testing.assert_allclose([found.low, found.high], expected)
    a, b = values, values[::-1] + 0.1
    test = stats.ttest_rel(a, b)
    found = compare.paired(a, b, level=0.9)
    np.testing.assert_allclose((found.value, found.p), ((a - b).mean(), test.pvalue))
    np.testing.assert_allclose(found[1:3], test.confidence_interval(0.9))


def test_one_seed_has_no_interval():
    found = compare.interval([1.5])
    assert found.value == 1.5 and np.isnan([found.low, found.high, found.p]).all()
    assert found.over == ""
    with pytest.raises(ValueError, match="at least one, all finite"):
        compare.interval([])
    with pytest.raises(ValueError, match="of the same seeds"):
        compare.paired([1.0, 2.0], [1.0])


def test_holm():
    # Holm 1979: p times 4, 3, 2, 1 in ascending order, made monotone.
    np.testing.assert_allclose(
        compare.holm([0.01, 0.04, 0.03, 0.005, np.nan]), [0.03, 0.06, 0.06, 0.02, np.nan]
    )


def test_the_variance_is_that_of_the_two_way_layout():
    rng = np.random.default_rng(0)
    losses = sweep(rng, [1.0, 2.0], 4, by_seed=0.1, by_row=0.5, rest=0.5)
    found = compare.bootstrap(losses, np.ones(ROWS), draws=100)
    x = losses[0] - losses[1]
    seeds, rows = x.mean(1), x.mean(0)
    rest = x - seeds[:, None] - rows + x.mean()
    by_seed, by_row = ROWS * seeds.var(ddof=1), 4 * rows.var(ddof=1)
    by_rest = (rest**2).sum() / (3 * (ROWS - 1))
    np.testing.assert_allclose(np.var(difference(found.over_seeds)), by_seed / (4 * ROWS))
    expected = (by_seed + by_row - by_rest) / (4 * ROWS)
    np.testing.assert_allclose(np.var(difference(found.over_both)), expected)
    again = compare.bootstrap(losses, np.ones(ROWS), draws=200, seed=1)
    np.testing.assert_allclose(again.interval(difference)[:3], found.interval(difference)[:3])


def test_without_noise_of_rows_the_interval_is_students_t():
    rng = np.random.default_rng(1)
    losses = sweep(rng, [1.0, 2.0], 3, by_seed=0.1)
    found = compare.bootstrap(losses, np.full(ROWS, 7.0) / 7, draws=100).interval(difference)
    expected = compare.paired(*losses.mean(-1))
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-6)
    np.testing.assert_allclose(found.p, expected.p, rtol=1e-6)
    alone = compare.bootstrap(losses.mean(-1, keepdims=True), [1.0], draws=100)
    assert alone.interval(difference).over == "seeds"  # rows are not known
    np.testing.assert_allclose(alone.interval(difference)[:3], expected[:3], rtol=1e-6)


def test_rows_count_by_their_tokens():
    rng = np.random.default_rng(2)
    losses, weights = sweep(rng, [1.0, 2.0], 3, by_row=0.5), rng.integers(1, 20, ROWS)
    sums = losses * weights
    found = compare.bootstrap(sums, weights, draws=100)
    np.testing.assert_allclose(found.losses, (sums.sum(-1) / weights.sum()).mean(-1))
    # The jackknife over rows has the same variance up to 1 / N.
    left_out = [
        difference(np.delete(sums, n, -1).sum((1, 2)) / np.delete(weights, n).sum() / 3)
        for n in range(ROWS)
    ]
    jackknife = np.var(left_out) * (ROWS - 1)
    np.testing.assert_allclose(np.var(difference(found.over_rows)), jackknife, rtol=0.1)


def test_one_seed_knows_only_its_rows():
    rng = np.random.default_rng(3)
    losses = sweep(rng, [1.0, 2.0, 2.0], 1, by_row=0.5)
    found = compare.bootstrap(losses, np.ones(ROWS), draws=100).interval(difference)
    expected = compare.interval(losses[0, 0] - losses[1, 0])
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-6)
    assert found.over == "rows"
    result = compare.noninferior(losses, np.ones(ROWS), [1, 2, 3], np.full(ROWS, 4.0))
    assert result.decision == "undecided" and result.choice is None and result.best == 0
    assert result.why == "1 seed: at least 3 are needed to decide"
    assert not result.good.any() and np.isnan(result.p).all()


def test_a_setting_with_a_diverged_seed_is_not_eligible():
    rng = np.random.default_rng(4)
    losses = sweep(rng, [1.0, 1.0, 2.0], 3, by_seed=0.01)
    losses[0, 1] = np.nan  # the survivors are the best
    found = compare.bootstrap(losses, np.ones(ROWS), draws=100)
    assert np.isnan(found.losses[0]) and np.isnan(found.interval(difference).low)
    result = compare.noninferior(losses, np.ones(ROWS), [1, 2, 3], np.full(ROWS, 4.0))
    assert (result.choice, result.best) == (1, 1)
    assert not result.good[0] and not result.worse[0] and np.isnan(result.p[0])
    # Of two rates the one without a diverged seed is taken, though the other's survivors are lower.
    judged = losses[:2].mean(-1)[None]
    found = compare.bootstrap(losses[None, :2], np.ones(ROWS), judged, draws=100)
    assert found.chosen == [1]
    found = compare.bootstrap(losses[None, :1], np.ones(ROWS), judged[:, :1], draws=100)
    assert found.chosen == [-1] and np.isnan(found.losses[0])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"need \(S, K, N\) or \(S, R, K, N\)"):
        compare.bootstrap(np.ones((2, 3, 4)), np.ones(5))
    with pytest.raises(ValueError, match="not all 0"):
        compare.bootstrap(np.ones((2, 3, 4)), np.zeros(4))
    with pytest.raises(ValueError, match=r"validation \(2, 3\): need \(2, 2, 3\)"):
        compare.bootstrap(np.ones((2, 2, 3, 4)), np.ones(4), np.ones((2, 3)))
    with pytest.raises(ValueError, match="start: needed"):
        compare.noninferior(np.ones((2, 3, 4)), np.ones(4), [1, 2])
    with pytest.raises(ValueError, match="costs"):
        compare.noninferior(np.ones((2, 3, 4)), np.ones(4), [1], np.ones(4))


# ------------------------------------------------------------------------------- which are as good


def test_the_rules_of_the_answer_by_hand():
    # p[s, b] of "s is not as good as b", cheapest first.
    p = np.array([[0, 0.01, 0.02], [0.3, 0, 0.004], [0.001, 0.03, 0]])
    # b = 0: both are dearer: Holm of 0.3 and 0.001. b = 1: one on each side, 0.01 and 0.03, twice
    # or, as the other passes at alpha / 2 from 0.02 on, 0.03. b = 2: a sequence: 0.004, 0.02.
    np.testing.assert_allclose(compare.adjusted(p), [0.02, 0.3, 0.03])


def test_the_margin_is_a_share_of_the_improvement():
    rng = np.random.default_rng(5)
    losses = sweep(rng, [1.012, 1.0], 3, by_seed=1e-3, by_row=0.01)
    start, weights = np.full(ROWS, 3.0), np.ones(ROWS)
    best = losses[1].mean()
    for share, good in ((0.01, True), (0.002, False)):
        result = compare.noninferior(losses, weights, [1, 2], start, share=share)
        assert result.good[0] == good
        np.testing.assert_allclose(result.margin, share * (3 - best))
        lacks = (losses[0] - losses[1]).mean() / (3 - best)
        assert lacks < result.lacks[0] < 0.01
        # The bound for the share is where the test flips.
    flips = [compare.noninferior(losses, weights, [1, 2], start, share=result.lacks[0] + d)
             for d in (-1e-5, 1e-5)]  # fmt: skip
    assert [found.good[0] for found in flips] == [False, True]
    fixed = compare.noninferior(losses, weights, [1, 2], margin=result.bound[0] + 1e-6)
    assert fixed.good[0] and np.isnan(fixed.lacks).all()


def test_what_is_shown_to_be_worse():
    rng = np.random.default_rng(6)
    losses = sweep(rng, [1.5, 1.1, 1.0], 3, by_seed=1e-3, by_row=0.01)
    result = compare.noninferior(losses, np.ones(ROWS), [3, 2, 1], np.full(ROWS, 3.0))
    assert result.worse.tolist() == [True, True, False]
    assert result.choice == 2 and result.decision == "decided" and result.why == ""


def test_many_settings_hide_no_clear_difference():
    # With a correction for all 56 pairs the setting at 1.1 would be undecided.
    rng = np.random.default_rng(3)
    means = [2.9, 2.0, 1.6, 1.5, 1.5, 1.1, 0.95, 0.935]
    losses = sweep(rng, means, 3, by_seed=0.012, by_row=0.01)
    result = compare.noninferior(losses, np.ones(ROWS), range(8), np.full(ROWS, 4.5))
    assert result.worse.tolist() == [True] * 6 + [False] * 2 and not result.good[6]
    alone = compare.noninferior(losses[:1], np.ones(ROWS), [1], np.full(ROWS, 4.5))
    assert not alone.worse[0] and alone.choice == 0


# -------------------------------------------------------------------------------------- simulations

# Variance of a mean that is due to seeds, rows and the rest.
SHARES = {"seeds": (1, 0, 0), "rows": (0, 1, 0), "both": (1, 1, 1), "mostly rows": (0.1, 1, 0.3)}


@pytest.mark.parametrize("seeds, rows", [(3, 100), (5, 300), (10, 150)])
def test_intervals_cover_95_of_100(seeds, rows):
    rng = np.random.default_rng(seeds)
    covered, plain, each = [], [], 400
    for by_seed, by_row, rest in SHARES.values():
        noise = {
            "by_seed": np.sqrt(by_seed * seeds) / 10,
            "by_row": np.sqrt(by_row * rows) / 10,
            "rest": np.sqrt(rest * seeds * rows) / 10,
        }
        inside = []
        for _ in range(each):
            losses = sweep(rng, [1.0, 2.0], seeds, rows, **noise)
            draws = compare.bootstrap(losses, np.ones(rows), draws=50)
            found = draws.interval(difference)
            inside.append(found.low <= -1 <= found.high)
            half = 1.96 * np.std(difference(draws.over_both))
            plain.append(abs(found.value + 1) <= half)
        assert 0.92 <= np.mean(inside) <= 0.98  # the standard error of 400 is 0.011
        covered += inside
    assert 0.93 <= np.mean(covered) <= 0.97
    assert seeds > 3 or np.mean(plain) < 0.92  # what the calibration is for


GAPS = {
    "plateau": [0, 0, 0, 0, 0, 0],
    "at the margin": [1, 1, 1, 1, 1, 0],
    "two near ties": [20, 1, 1, 0, 0.1, 3],
}


@pytest.mark.parametrize("name", GAPS)
def test_the_choice_errs_at_most_at_its_level(name):
    rng = np.random.default_rng(7)
    gaps, start, each = np.array(GAPS[name]) / 100, np.full(ROWS, 2.0), 150
    wrong, decided, named, one_error = [], [], [], []
    for seeds in (3, 5):
        for _ in range(each):
            losses = sweep(rng, 1 + gaps, seeds, by_seed=2e-3, by_row=0.01, rest=0.01)
            found = compare.noninferior(losses, np.ones(ROWS), range(6), start, draws=50)
            decided.append(found.decision == "decided")
            wrong.append(decided[-1] and gaps[found.choice] >= 0.01)
            named.append((found.worse & (gaps < 0.01)).any())
            means = losses.mean(-1)
            error = stats.sem(means[means.mean(1).argmin()])
            one_error.append(gaps[means.mean(1) <= means.mean(1).min() + error][0] >= 0.01)
    limit = 0.05 + 2 * np.sqrt(0.05 * 0.95 / len(wrong))
    assert np.mean(wrong) <= limit and np.mean(named) <= limit
    assert np.mean(decided) > 0.5
    # The rule of one standard error errs on the same data.
    assert name == "plateau" or np.mean(one_error) > 0.3


def test_the_choice_of_the_rate_is_part_of_it():
    # Setting 0 has five rates that are equally good and lose the margin; setting 1 has one.
    rng = np.random.default_rng(8)
    truth = np.array([[1.01] * 5, [1.0, *[1.3] * 4]])
    start, each, weights = np.full(ROWS, 2.0), 200, np.ones(ROWS)
    wrong, covered, lucky = [], [], []
    for _ in range(each):
        cells = sweep(rng, truth.ravel(), 5, 2 * ROWS, by_seed=3e-3, by_row=3e-3)
        judged = cells[..., ROWS:].mean(-1).reshape(2, 5, 5)  # the other rows
        args = cells[..., :ROWS].reshape(2, 5, 5, ROWS), weights
        found = compare.noninferior(*args, [1, 2], start, judged, draws=200)
        wrong.append(found.choice == 0)
        drawn = compare.bootstrap(*args, judged, draws=200)
        interval = drawn.interval(difference)
        covered.append(interval.low <= 0.01 <= interval.high)
        taken = cells[[drawn.chosen[0], 5 + drawn.chosen[1]], :, :ROWS]
        lucky.append(compare.noninferior(taken, weights, [1, 2], start, draws=50).choice == 0)
    limit = 0.05 + 2 * np.sqrt(0.05 * 0.95 / each)
    assert np.mean(wrong) <= limit < np.mean(lucky)  # the latter as if nothing had been chosen
    assert np.mean(covered) >= 0.9


@pytest.mark.parametrize("seeds", [3, 5])
def test_power_is_how_often_an_equal_setting_is_found(seeds):
    rng = np.random.default_rng(9)
    seed_sd, row_sd, margin, each = 0.004, 0.02, 0.01, 300
    found = []
    for _ in range(each):
        losses = sweep(rng, [1.0, 1.0], seeds, by_seed=seed_sd / 2**0.5, by_row=row_sd / 2**0.5)
        result = compare.noninferior(losses, np.ones(ROWS), [1, 2], margin=margin, draws=50)
        found.append(result.good[0])
    row_se = row_sd / np.sqrt(ROWS)
    expected = compare.power(seed_sd, row_se, margin, seeds, ROWS, alpha=0.05)
    assert 0.5 < expected < 0.999
    assert abs(np.mean(found) - expected) < 0.07  # three standard errors


def test_needed_seeds():
    args = 0.01, 0.001, 0.01, ROWS
    needed = compare.needed_seeds(*args)
    assert needed > 3
    sd, se, margin, rows = args
    assert compare.power(sd, se, margin, needed, rows) >= 0.8
    assert compare.power(sd, se, margin, needed - 1, rows) < 0.8
    assert compare.needed_seeds(0.01, 0.01, 0.01, ROWS) is None  # too few rows
    assert np.isnan(compare.power(*args[:3], 2, ROWS))
