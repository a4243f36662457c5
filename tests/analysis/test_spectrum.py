"""Ranks read off a spectrum, against constructed inputs and dense SVDs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.analysis import effective_rank, energy_rank, factor_svd, numerical_rank, stable_rank


def planted(sigma, d_in=12, d_out=9, seed=0):
    """Factors of a matrix with exactly these singular values, and its singular vectors."""
    rng = np.random.default_rng(seed)
    r = len(sigma)
    u = np.linalg.qr(rng.standard_normal((d_in, r)))[0]
    v = np.linalg.qr(rng.standard_normal((d_out, r)))[0]
    mix = rng.standard_normal((r, r))
    return u * sigma @ mix, np.linalg.inv(mix) @ v.T, u, v


def test_factor_svd_finds_planted_values_and_directions():
    sigma = np.array([5.0, 2.0, 0.5])
    a, b, u, v = planted(sigma)
    got_u, got_sigma, got_vt = factor_svd(a, b, 2.0)
    np.testing.assert_allclose(got_sigma, 2 * sigma, atol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(got_u * u, axis=0)), 1, atol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(got_vt.T * v, axis=0)), 1, atol=1e-9)


@pytest.mark.parametrize("shape", [(10, 3, 7), (5, 8, 7), (9, 8, 4), (3, 8, 3)])
def test_factor_svd_is_the_svd_of_the_product(shape):
    d_in, r, d_out = shape
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 3, d_in, r)), rng.standard_normal((2, 3, r, d_out))
    s = rng.uniform(0.5, 2, (2, 3))
    u, sigma, vt = factor_svd(a, b, s)
    k = min(shape)
    assert u.shape == (2, 3, d_in, k) and sigma.shape == (2, 3, k) and vt.shape == (2, 3, k, d_out)
    dense = s[..., None, None] * (a @ b)
    np.testing.assert_allclose((u * sigma[..., None, :]) @ vt, dense, atol=1e-9)
    np.testing.assert_allclose(sigma, np.linalg.svd(dense, compute_uv=False)[..., :k], atol=1e-9)
    np.testing.assert_allclose(np.swapaxes(u, -1, -2) @ u, np.broadcast_to(np.eye(k), (2, 3, k, k)),
                               atol=1e-9)  # fmt: skip


def test_jax_arrays_do_as_well():
    a = jax.random.normal(jax.random.key(0), (8, 2))
    b = jax.random.normal(jax.random.key(1), (2, 8))
    _, sigma, _ = factor_svd(a, b, jnp.float32(0.5))
    dense = 0.5 * np.asarray(a) @ np.asarray(b)
    np.testing.assert_allclose(sigma, np.linalg.svd(dense, compute_uv=False)[:2], atol=1e-5)


def test_equal_values_count_as_many():
    sigma = np.full(5, 0.3)
    assert effective_rank(sigma) == pytest.approx(5, abs=1e-9)
    assert stable_rank(sigma) == pytest.approx(5, abs=1e-9)
    assert energy_rank(sigma, 0.9) == 5 and energy_rank(sigma, 0.8) == 4
    assert numerical_rank(sigma, (8, 8)) == 5
    # Ten values of 0.1: the rounded sum of nine lies below the rounded 90%.
    assert energy_rank(np.full(10, 0.1), 0.9) == 9


def test_known_spectrum():
    sigma = np.array([3.0, 1.0])
    p = np.array([0.75, 0.25])
    assert effective_rank(sigma) == pytest.approx(np.exp(-np.sum(p * np.log(p))), abs=1e-12)
    assert stable_rank(sigma) == pytest.approx(10 / 9, abs=1e-12)
    # The first holds 9/10 of the energy: that is enough for 0.9, and not for any more.
    assert energy_rank(sigma, 0.9) == 1 and energy_rank(sigma, 0.901) == 2


def test_scale_changes_no_rank():
    sigma = np.random.default_rng(2).uniform(0.1, 1, (4, 6))
    for rank in (effective_rank, stable_rank, energy_rank, lambda s: numerical_rank(s, (9, 9))):
        np.testing.assert_allclose(rank(sigma), rank(1e-6 * sigma), rtol=1e-9)
        assert rank(sigma).shape == (4,)


def test_numerical_rank_ignores_rounding():
    eps = np.finfo(np.float32).eps
    sigma = np.array([1.0, 20 * eps, 5 * eps])
    assert numerical_rank(sigma, (10, 4)) == 2
    assert numerical_rank(sigma, (10, 4), np.float64) == 3


def test_no_update_has_rank_zero():
    _, sigma, _ = factor_svd(np.ones((6, 2)), np.zeros((2, 5)))
    for rank in (effective_rank, stable_rank, energy_rank):
        assert rank(sigma) == 0 and rank(np.zeros(0)) == 0
    assert numerical_rank(sigma, (6, 5)) == 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="factors"):
        factor_svd(np.ones((4, 2)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="tau"):
        energy_rank(np.ones(3), 90)
