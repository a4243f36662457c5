"""Subspace similarity: planted overlaps, chance, and the paper's definition on real adapters."""

import numpy as np
import pytest
from scipy import stats
from scipy.linalg import subspace_angles
from support import DATA

from lorax.analysis import (
    basis_similarity,
    chance_similarity,
    expected_similarity,
    output_similarity,
    principal_angles,
    subspace_similarity,
    update_similarity,
)
from lorax.interop import peft
from lorax.models import gpt2

ROBERTA = DATA / "adapters" / "lora_roberta_mnli" / "roberta_base_lora_mnli.npz"
GPT2 = DATA / "adapters" / "peft_gpt2_lora"


def from_definition(A1, A2):
    """Section 7.2, literally: A (r, in), its right singular vectors, one (i, j) at a time."""
    v1 = np.linalg.svd(np.asarray(A1, np.float64), full_matrices=False)[2].T
    v2 = np.linalg.svd(np.asarray(A2, np.float64), full_matrices=False)[2].T
    phi = np.zeros((v1.shape[1], v2.shape[1]))
    for i in range(1, v1.shape[1] + 1):
        for j in range(1, v2.shape[1] + 1):
            phi[i - 1, j - 1] = np.linalg.norm(v1[:, :i].T @ v2[:, :j]) ** 2 / min(i, j)
    return phi


def graded(basis):
    """A matrix whose left singular vectors are the basis, in its order."""
    r = basis.shape[1]
    mix = np.linalg.qr(np.random.default_rng(9).standard_normal((r, r)))[0]
    return basis * np.linspace(2.0, 1.0, r) @ mix


def test_identical_subspaces():
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 5)))[0]
    phi = subspace_similarity(graded(basis), graded(basis))
    np.testing.assert_allclose(phi, 1, atol=1e-9)


def test_orthogonal_subspaces():
    eye = np.eye(20)
    np.testing.assert_allclose(basis_similarity(eye[:, :4], eye[:, 4:10]), 0, atol=1e-12)


def test_planted_overlap():
    """The first direction in common and nothing else: phi(i, j) = 1 / min(i, j)."""
    eye = np.eye(20)
    a1, a2 = graded(eye[:, :4]), graded(eye[:, [0, 10, 11, 12, 13, 14]])
    i, j = np.arange(1, 5)[:, None], np.arange(1, 7)[None]
    phi = subspace_similarity(a1, a2)
    np.testing.assert_allclose(phi, 1 / np.minimum(i, j), atol=1e-9)
    # The same planted on the output side, where b (r, out) has it in its rows.
    np.testing.assert_allclose(output_similarity(a1.T, a2.T), phi, atol=1e-9)


def test_planted_angle():
    angle = 0.3
    u1 = np.eye(6)[:, :1]
    u2 = np.cos(angle) * np.eye(6)[:, :1] + np.sin(angle) * np.eye(6)[:, 1:2]
    assert basis_similarity(u1, u2)[0, 0] == pytest.approx(np.cos(angle) ** 2, abs=1e-9)


@pytest.mark.parametrize("r1", [4, 6])
def test_planted_principal_angles(r1):
    """Small angles as well, where a cosine has lost them: 1e-7 is 5e-15 below 1."""
    rng = np.random.default_rng(10)
    angles = np.array([0.0, 1e-7, 0.3, np.pi / 2])
    q = np.linalg.qr(rng.standard_normal((15, 12)))[0]
    u1, u2 = q[:, :r1], np.cos(angles) * q[:, :4] + np.sin(angles) * q[:, 8:]
    # Any bases of the two spans.
    u1 = u1 @ np.linalg.qr(rng.standard_normal((r1, r1)))[0]
    u2 = u2 @ np.linalg.qr(rng.standard_normal((4, 4)))[0]
    np.testing.assert_allclose(principal_angles(u1, u2), angles, rtol=0, atol=1e-12)
    np.testing.assert_allclose(principal_angles(u2, u1), angles, rtol=0, atol=1e-12)


def test_principal_angles_are_scipys():
    rng = np.random.default_rng(11)
    u1 = np.linalg.qr(rng.standard_normal((2, 3, 20, 5)))[0]
    u2 = np.linalg.qr(rng.standard_normal((2, 3, 20, 8)))[0]
    got = principal_angles(u1, u2)
    assert got.shape == (2, 3, 5)
    for i, j in np.ndindex(2, 3):
        expected = subspace_angles(u1[i, j], u2[i, j])[::-1]
        np.testing.assert_allclose(got[i, j], expected, rtol=0, atol=1e-9)


def test_phi_is_the_mean_squared_cosine():
    rng = np.random.default_rng(12)
    u1, u2 = (np.linalg.qr(rng.standard_normal((20, 6)))[0] for _ in range(2))
    phi = basis_similarity(u1, u2)
    for i in range(1, 7):
        mean = np.mean(np.cos(principal_angles(u1[:, :i], u2[:, :i])) ** 2)
        assert phi[i - 1, i - 1] == pytest.approx(mean, abs=1e-12)


def test_a_direction_that_does_not_exist_is_orthogonal_to_all():
    e = np.eye(8)
    one = np.stack([e[0], np.cos(0.3) * e[1] + np.sin(0.3) * e[7], 0 * e[0]], axis=1)
    for other in (e[:, :2], e[:, :3], e[:, :5]):
        expected = [0, 0.3, np.pi / 2][: other.shape[1]]
        np.testing.assert_allclose(principal_angles(one, other), expected, atol=1e-12)
        np.testing.assert_allclose(principal_angles(other, one), expected, atol=1e-12)
    with pytest.raises(ValueError, match="different spaces"):
        principal_angles(np.eye(4, 2), np.eye(5, 2))


def test_batched_equals_one_by_one():
    rng = np.random.default_rng(3)
    a1, a2 = rng.standard_normal((2, 3, 12, 4)), rng.standard_normal((2, 3, 12, 5))
    phi = subspace_similarity(a1, a2)
    assert phi.shape == (2, 3, 4, 5)
    np.testing.assert_allclose(phi[1, 2], subspace_similarity(a1[1, 2], a2[1, 2]), atol=1e-12)


def test_update_directions_are_those_of_the_dense_update():
    rng = np.random.default_rng(4)
    one = rng.standard_normal((15, 3)), rng.standard_normal((3, 11)), 2.0
    other = rng.standard_normal((15, 4)), rng.standard_normal((4, 11)), 0.5
    dense = [a @ b for a, b, _ in (one, other)]
    u = [np.linalg.svd(d)[0][:, :r] for d, r in zip(dense, (3, 4), strict=True)]
    v = [np.linalg.svd(d)[2].T[:, :r] for d, r in zip(dense, (3, 4), strict=True)]
    np.testing.assert_allclose(update_similarity(one, other), basis_similarity(*u), atol=1e-9)
    np.testing.assert_allclose(
        update_similarity(one, other, "out"), basis_similarity(*v), atol=1e-9
    )


def test_no_update_is_similar_to_nothing():
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((10, 3)), rng.standard_normal((3, 10))
    zero = update_similarity((a, np.zeros((3, 10))), (a, b))
    np.testing.assert_array_equal(zero, 0)


def test_zero_padding_adds_no_direction():
    rng = np.random.default_rng(6)
    a = rng.standard_normal((12, 3))
    padded = np.concatenate([a, np.zeros((12, 2))], axis=1)
    phi = subspace_similarity(padded, a)
    np.testing.assert_allclose(phi[:3], subspace_similarity(a, a), atol=1e-9)
    np.testing.assert_allclose(phi[3:, :3] * np.minimum([[4], [5]], [1, 2, 3]), [[1, 2, 3]] * 2,
                               atol=1e-9)  # fmt: skip


def test_chance_is_a_beta_distribution():
    # phi(1, 1) is a squared cosine
    band = chance_similarity(128, 3, 5)
    np.testing.assert_allclose((band.mean[0, 0], band.high[0, 0]), (0.0078, 0.0299), atol=5e-5)
    np.testing.assert_allclose(
        band.high[0], stats.beta.ppf(0.95, np.arange(1, 6) / 2, (128 - np.arange(1, 6)) / 2)
    )
    i, j = np.arange(1, 4)[:, None], np.arange(1, 6)[None]
    np.testing.assert_allclose(band.mean, expected_similarity(i, j, 128))


@pytest.mark.parametrize("n", [6, 32])
def test_random_adapters_have_its_mean_and_quantiles(n):
    draws = 4000
    pairs = np.random.default_rng(8).standard_normal((2, draws, n, 4))
    phi = subspace_similarity(pairs[0], pairs[1])
    band = chance_similarity(n, 4, 4)
    np.testing.assert_allclose(phi.mean(0), band.mean, rtol=0, atol=4 * phi.std() / draws**0.5)
    for quantile, share in ((band.low, 0.05), (band.high, 0.95)):
        np.testing.assert_allclose((phi <= quantile).mean(0), share, rtol=0, atol=0.03)
    if n == 6:  # 3 and 4, or 4 and 4 directions of 6 share one or two
        assert band.low[3, 3] > 0.5 and phi[:, 3, 3].min() >= 0.5 - 1e-9


def test_all_directions_are_always_shared():
    band = chance_similarity(3, 4, 4)
    for part in band:
        np.testing.assert_allclose(part[2:], 1.0)


def test_different_spaces_are_refused():
    with pytest.raises(ValueError, match="different spaces"):
        subspace_similarity(np.ones((4, 2)), np.ones((5, 2)))
    with pytest.raises(ValueError, match="side"):
        update_similarity(
            (np.ones((4, 1)), np.ones((1, 4))), (np.ones((4, 1)), np.ones((1, 4))), "x"
        )


@pytest.mark.skipif(not ROBERTA.exists(), reason="needs the shared data folder")
def test_definition_on_the_authors_own_adapter():
    with np.load(ROBERTA) as stored:
        name = "roberta.encoder.layer.{}.attention.self.query.lora_"
        A = [stored[name.format(layer) + "A"] for layer in (0, 11)]  # (8, 768)
        B = [stored[name.format(layer) + "B"] for layer in (0, 11)]  # (768, 8)
    got = subspace_similarity(A[0].T, A[1].T)
    np.testing.assert_allclose(got, from_definition(*A), rtol=0, atol=1e-5)
    got = output_similarity(B[0].T, B[1].T)
    np.testing.assert_allclose(got, from_definition(B[0].T, B[1].T), rtol=0, atol=1e-5)


@pytest.mark.skipif(not GPT2.exists(), reason="needs the shared data folder")
def test_definition_on_a_peft_adapter():
    factors = peft.load(GPT2, gpt2.hf_tensors(gpt2.Config())).factors
    a1, a2 = factors["h/0/attn/q"].a, factors["h/5/attn/q"].a
    got = subspace_similarity(a1, a2)
    np.testing.assert_allclose(got, from_definition(a1.T, a2.T), rtol=0, atol=1e-5)
    # q and k of a split c_attn share one A: the same input space.
    shared = subspace_similarity(a1, factors["h/0/attn/k"].a)
    np.testing.assert_allclose(np.diag(shared), 1, atol=1e-9)
    q1, q2 = np.linalg.qr(a1.astype(float))[0], np.linalg.qr(a2.astype(float))[0]
    expected = subspace_angles(a1.astype(float), a2.astype(float))[::-1]
    np.testing.assert_allclose(principal_angles(q1, q2), expected, rtol=0, atol=1e-5)
