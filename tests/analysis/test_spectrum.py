"""Ranks read off a spectrum, against constructed inputs and dense SVDs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import data

from lorax.analysis import (
    effective_rank,
    energy_rank,
    factor_svd,
    leading_svd,
    numerical_rank,
    randomised_svd,
    stable_rank,
)
from lorax.spectrum import updated_svd


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


@pytest.mark.parametrize("shape", [(60, 45), (45, 60)])
def test_randomised_svd_finds_a_planted_low_rank_exactly(shape):
    a, b, u, v = planted(np.array([5.0, 2.0, 0.5]), *shape)
    got = randomised_svd(a @ b, 3)
    np.testing.assert_allclose(got.sigma, [5, 2, 0.5], atol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(got.u * u, axis=0)), 1, atol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(got.vt.T * v, axis=0)), 1, atol=1e-9)
    np.testing.assert_allclose(got.upper, got.sigma, atol=1e-7)
    assert got.residual < 1e-7 * 5.4


@pytest.mark.parametrize("iterations, oversamples", [(0, 0), (0, 10), (4, 10)])
@pytest.mark.parametrize("fall", [0.0, 0.5, 2.0])
def test_randomised_svd_knows_its_errors(fall, iterations, oversamples):
    """Spectra i^-fall: whatever it found, the true values lie between sigma and upper."""
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.standard_normal((n, 50)))[0] for n in (80, 50))
    true = np.arange(1.0, 51) ** -fall
    matrix = u * true @ v.T
    for seed in range(10):
        got = randomised_svd(matrix, 6, oversamples=oversamples, iterations=iterations, rng=seed)
        assert np.all(got.sigma <= true[:6] + 1e-12) and np.all(true[:6] <= got.upper + 1e-12)
        dense = np.linalg.norm(matrix - got.u * got.sigma @ got.vt)
        assert got.residual == pytest.approx(dense, abs=1e-7)
        np.testing.assert_allclose(got.u.T @ got.u, np.eye(6), atol=1e-9)
    if fall == 2 and iterations:
        np.testing.assert_allclose(got.sigma, true[:6], atol=1e-5)


def test_randomised_svd_of_all_directions_is_exact():
    matrix = np.random.default_rng(4).standard_normal((9, 7))
    got = randomised_svd(matrix, 7, iterations=0)
    np.testing.assert_allclose(got.sigma, np.linalg.svd(matrix, compute_uv=False), atol=1e-9)
    again = randomised_svd(matrix, 7, iterations=0, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(got.u, again.u)


def test_both_svds_agree_on_a_trained_update():
    with np.load(data("adapters/lora_roberta_mnli/roberta_base_lora_mnli.npz")) as stored:
        name = "roberta.encoder.layer.0.attention.self.value.lora_"
        a, b = stored[name + "A"].T, stored[name + "B"].T  # (768, 8), (8, 768)
    got = randomised_svd(a.astype(float) @ b, 8)
    np.testing.assert_allclose(got.sigma, factor_svd(a, b)[1], rtol=0, atol=1e-5)
    assert got.residual < 1e-5


def test_randomised_svd_names_bad_input():
    with pytest.raises(ValueError, match="k 8: from 1 to 7"):
        randomised_svd(np.ones((9, 7)), 8)
    with pytest.raises(ValueError, match="matrix"):
        randomised_svd(np.ones((2, 9, 7)), 2)
    with pytest.raises(ValueError, match="oversamples -1"):
        randomised_svd(np.ones((9, 7)), 2, oversamples=-1)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (3, 2, 10, 10)])
def test_leading_svd_is_the_svds(shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    for k in (1, 5, min(shape[-2:])):
        u, sigma, vt = leading_svd(matrix, k)
        np.testing.assert_allclose(sigma, np.linalg.svd(matrix)[1][..., :k], atol=1e-9)
        back = np.swapaxes(u, -1, -2) @ matrix @ np.swapaxes(vt, -1, -2)
        np.testing.assert_allclose(back, sigma[..., None] * np.eye(k), atol=1e-9)
        for basis in (np.swapaxes(u, -1, -2) @ u, vt @ np.swapaxes(vt, -1, -2)):
            np.testing.assert_allclose(basis, np.broadcast_to(np.eye(k), basis.shape), atol=1e-9)


def test_leading_svd_of_small_singular_values():
    """Below sqrt(eps) of the first, where a Gram matrix knows nothing."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((n, 6)))[0] for n in (20, 15))
    sigma = np.array([1, 1e-3, 1e-5, 1e-8, 1e-10, 1e-12])
    found = leading_svd(u * sigma @ v.T, 6)
    np.testing.assert_allclose(found[1], sigma, rtol=1e-3)
    np.testing.assert_allclose(np.abs(np.sum(found[0] * u, 0))[:5], 1, atol=1e-5)
    assert not leading_svd(np.zeros((4, 3)), 2)[1].any()
    with pytest.raises(ValueError, match="k 4: from 1 to 3"):
        leading_svd(np.zeros((4, 3)), 4)


@pytest.mark.parametrize("shape", [(260, 260), (260, 320), (320, 260)])
@pytest.mark.parametrize("strength", [0.0, 0.1, 3.0, 1e6])
def test_an_updated_matrix_needs_no_decomposition_of_its_own(shape, strength):
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(s) for s in (shape, (shape[0], 3), (3, shape[1])))
    w_svd = np.linalg.svd(w, full_matrices=False)
    u, sigma, vt = updated_svd(w_svd, (a, b, strength), 5)
    expected = np.linalg.svd(w + strength * a @ b, full_matrices=False)
    np.testing.assert_allclose(sigma, expected[1][:5], rtol=1e-10)
    same = np.sum(u * expected[0][:, :5], axis=0) * np.sum(vt * expected[2][:5], axis=1)
    np.testing.assert_allclose(same, 1, atol=1e-8)  # of one sign on both sides, too
    few = leading_svd(w + strength * a @ b, 5)  # of few in a large matrix
    np.testing.assert_allclose(few[1], expected[1][:5], rtol=1e-10)
    np.testing.assert_allclose(np.abs(np.sum(few[2] * vt, axis=1)), 1, atol=1e-8)
