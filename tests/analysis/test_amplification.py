"""Table 7 of the LoRA paper: its identities, and planted amplification."""

import numpy as np
import pytest

from lorax.analysis import amplification

RNG = np.random.default_rng(0)
W = RNG.standard_normal((40, 30))
FACTORS = RNG.standard_normal((40, 4)), RNG.standard_normal((4, 30)), 0.5


def test_w_in_its_own_directions_is_its_leading_singular_values():
    sigma = np.linalg.svd(W, compute_uv=False)
    got = amplification(W, FACTORS, 4)
    assert got.w_in_w == pytest.approx(np.sqrt(np.sum(sigma[:4] ** 2)), abs=1e-9)
    assert amplification(W, FACTORS, 30).w_in_w == pytest.approx(np.linalg.norm(W), abs=1e-9)


def test_random_directions_follow_the_formula():
    r, (d_in, d_out) = 8, W.shape
    draws = [amplification(W, FACTORS, r, rng=seed).w_in_random for seed in range(200)]
    expected = r * np.linalg.norm(W) / np.sqrt(d_in * d_out)
    assert np.sqrt(np.mean(np.square(draws))) == pytest.approx(expected, rel=0.02)


def test_definition_from_the_dense_update():
    a, b, s = FACTORS
    delta = s * a @ b
    u, sigma, vt = np.linalg.svd(delta)
    inside = np.linalg.norm(u[:, :3].T @ W @ vt[:3].T)
    for update in (FACTORS, delta):
        got = amplification(W, update, 3)
        assert got.delta_norm == pytest.approx(np.linalg.norm(delta), abs=1e-9)
        assert got.w_in_delta == pytest.approx(inside, abs=1e-9)
        assert got.factor == pytest.approx(np.linalg.norm(delta) / inside, abs=1e-9)


def test_planted_factor():
    """W has 0.1 in a direction that the update strengthens by 2: twenty times as much."""
    w = np.diag([5.0, 3.0, 0.1, 1.0])
    a, b = np.eye(4)[:, 2:3], np.eye(4)[2:3]
    got = amplification(w, (a, b, 2.0), 1)
    assert got.w_in_delta == pytest.approx(0.1, abs=1e-12)
    assert got.factor == pytest.approx(20, abs=1e-9)
    assert got.w_in_w == pytest.approx(5, abs=1e-12)


def test_an_update_equal_to_w_amplifies_by_one():
    u, sigma, vt = np.linalg.svd(W, full_matrices=False)
    top = u[:, :5] * sigma[:5], vt[:5]
    got = amplification(W, top, 5)
    assert got.factor == pytest.approx(1, abs=1e-9)
    assert got.w_in_delta == pytest.approx(got.w_in_w, abs=1e-9)


def test_transposing_changes_nothing():
    a, b, s = FACTORS
    one, other = amplification(W, FACTORS, 4), amplification(W.T, (b.T, a.T, s), 4)
    for field in ("delta_norm", "w_in_delta", "w_in_w", "factor"):
        assert getattr(one, field) == pytest.approx(getattr(other, field), abs=1e-9)


def test_known_singular_values_save_the_work():
    sigma = np.linalg.svd(W, compute_uv=False)
    assert amplification(W, FACTORS, 4, w_sigma=sigma) == amplification(W, FACTORS, 4)


def test_no_update_amplifies_nothing():
    got = amplification(W, (np.ones((40, 2)), np.zeros((2, 30)), 1.0), 2)
    assert got.delta_norm == got.w_in_delta == 0 and np.isnan(got.factor)  # 0 / 0 is no number
    assert amplification(np.zeros((40, 30)), FACTORS, 4).factor == float("inf")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="rank 31"):
        amplification(W, FACTORS, 31)
    with pytest.raises(ValueError, match=r"\(30, 40\)"):
        amplification(W.T, FACTORS, 4)


def test_batched_equals_one_by_one():
    w = RNG.standard_normal((2, 3, 12, 9))
    a, b = RNG.standard_normal((2, 3, 12, 2)), RNG.standard_normal((2, 3, 2, 9))
    s = RNG.uniform(0.5, 2, (2, 3))
    s[1, 0] = 0
    got = amplification(w, (a, b, s), 2)
    for at in np.ndindex(2, 3):
        alone = amplification(w[at], (a[at], b[at], s[at]), 2)
        for one, other in zip(got, alone, strict=True):
            assert one[at] == pytest.approx(other, abs=1e-9, nan_ok=True)
    assert np.isnan(got.factor[1, 0])
