"""Intruder dimensions: planted ones, the paper's definition, and the controls."""

import numpy as np
import pytest
from support import data

from lorax.analysis import intervene, intruders, norm_matched
from lorax.interop import peft
from lorax.models import gpt2

MNLI = "adapters/lora_roberta_mnli/roberta_base_lora_mnli.npz"
HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def from_definition(W0, dW, k, side="left"):
    """Section 3, literally: W (out, in), one singular vector and one cosine at a time."""
    x = np.linalg.svd(W0, full_matrices=False)
    y = np.linalg.svd(W0 + dW, full_matrices=False)
    x, y = (x[0].T, y[0].T) if side == "left" else (x[2], y[2])
    return np.array([max(abs(float(yj @ xi)) for xi in x) for yj in y[:k]])


def planted(d_in=30, d_out=20, rank=12, turned=(2, 3, 4, 5)):
    """A kernel, and factors of an update that turns four output directions by a Hadamard matrix.

    Each of the four then has cosine 1/2 with four vectors of the kernel; all others stay.
    """
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((d_in, rank)))[0]
    v = np.linalg.qr(rng.standard_normal((d_out, rank)))[0]
    sigma = np.linspace(12.0, 1.0, rank)
    t = list(turned)
    a = u[:, t] * sigma[t]
    return u * sigma @ v.T, (a, (v[:, t] @ HADAMARD - v[:, t]).T), sigma


def test_planted_intruders_are_found():
    w, (a, b), sigma = planted()
    expected = np.array([1, 1, 0.5, 0.5, 0.5, 0.5, 1, 1])
    for delta in ((a, b), (2 * a, b, 0.5), a @ b):
        got = intruders(w, delta, 8, (0.49, 0.51))
        np.testing.assert_allclose(got.similarity, expected, atol=1e-9)
        np.testing.assert_array_equal(got.mask, [expected < 0.1, expected < 0.6])
        np.testing.assert_array_equal(got.count, [0, 4])
        np.testing.assert_allclose(got.sigma, sigma[:8], atol=1e-9)
    # Every smaller k from the same mask.
    for k in range(1, 9):
        assert np.cumsum(got.mask, -1)[1, k - 1] == intruders(w, (a, b), k, 0.51).count
    # The input directions did not turn.
    assert intruders(w, (a, b), 8, 0.99, side="in").count == 0


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 3.0])
def test_a_direction_outside_of_w_has_the_known_cosine(strength):
    """in < out: W's output vectors do not span, and u1 (sigma1 v1 + c q)^T turns v1 towards q."""
    rng = np.random.default_rng(1)
    u = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    v = np.linalg.qr(rng.standard_normal((20, 7)))[0]
    w = u * [2.0, 1.2, 1.0, 0.8, 0.6, 0.4] @ v[:, :6].T
    got = intruders(w, (u[:, :1], v[:, 6:].T, strength), 6, 0.6)
    cosine = 2 / np.hypot(2, strength)
    np.testing.assert_allclose(got.similarity, [cosine, 1, 1, 1, 1, 1], atol=1e-9)
    assert got.count == (cosine < 0.6) and got.sigma[0] == pytest.approx(np.hypot(2, strength))


def test_no_update_has_no_intruder():
    w = np.random.default_rng(2).standard_normal((15, 11))
    got = intruders(w, (np.ones((15, 2)), np.zeros((2, 11))), 11, 1 - 1e-9)
    assert got.count == 0 and not got.mask.any()


def test_isotropic_directions_are_all_intruders():
    """A strong random update of rank 5 in 200 dimensions: cosines near sqrt(2 ln 200 / 200)."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((200, 200))
    a, b = rng.standard_normal((200, 5)), 100 * rng.standard_normal((5, 200))
    got = intruders(w, (a, b), 5)
    assert got.count == 5
    np.testing.assert_allclose(got.similarity, np.sqrt(2 * np.log(200) / 200), atol=0.07)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)])
def test_definition(shape):
    rng = np.random.default_rng(4)
    w, a, b = rng.standard_normal(shape), *map(rng.standard_normal, ((shape[0], 2), (2, shape[1])))
    k, dW = min(shape), (1.5 * a @ b).T
    got = intruders(w, (a, b, 1.5), k)
    np.testing.assert_allclose(got.similarity, from_definition(w.T, dW, k), atol=1e-9)
    assert got.count == np.sum(from_definition(w.T, dW, k) < 0.5)
    got = intruders(w, (a, b, 1.5), k, side="in")
    np.testing.assert_allclose(got.similarity, from_definition(w.T, dW, k, "right"), atol=1e-9)
    transposed = intruders(w.T, (b.T, a.T, 1.5), k)
    np.testing.assert_allclose(got.similarity, transposed.similarity, atol=1e-9)


def test_known_svd_saves_the_work():
    w, delta, _ = planted()
    # Another matrix's vectors would show: they are what is compared with.
    known = np.linalg.svd(w, full_matrices=False)
    own = intruders(w, delta, 6)
    np.testing.assert_array_equal(intruders(w, delta, 6, w_svd=known).similarity, own.similarity)
    swapped = (*known[:2], np.linalg.svd(own.u @ own.vt, full_matrices=False)[2])
    assert not np.allclose(intruders(w, delta, 6, w_svd=swapped).similarity, own.similarity)


def test_batched_equals_one_by_one():
    rng = np.random.default_rng(5)
    w = rng.standard_normal((2, 3, 12, 8))
    a, b = rng.standard_normal((2, 3, 12, 2)), rng.standard_normal((2, 3, 2, 8))
    s = rng.uniform(0.5, 2, (2, 3))
    got = intruders(w, (a, b, s), 4, (0.5, 0.7))
    change = intervene(w, (a, b, s), 0.7, 4, 0.7)
    assert got.mask.shape == (2, 3, 2, 4) and got.count.shape == (2, 3, 2)
    assert change.a.shape == (2, 3, 12, 1) and change.b.shape == (2, 3, 1, 8)
    one = (w[1, 2], (a[1, 2], b[1, 2], s[1, 2]))
    for field, value in intruders(*one, 4, (0.5, 0.7))._asdict().items():
        np.testing.assert_allclose(np.abs(getattr(got, field)[1, 2]), np.abs(value), atol=1e-9)
    for field in ("index", "norm", "scale"):
        expected = getattr(intervene(*one, 0.7, 4, 0.7), field)
        np.testing.assert_allclose(getattr(change, field)[1, 2], expected, atol=1e-9)


def test_norm_matched_has_the_singular_values():
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((2, 14, 3)), rng.standard_normal((2, 3, 10))
    for delta, k in (((a, b, 0.5), 3), (0.5 * a @ b, 10)):
        one, other = norm_matched(7, delta)
        assert one.shape == (2, 14, k) and other.shape == (2, k, 10)
        sigma = np.linalg.svd(0.5 * a @ b, compute_uv=False)
        np.testing.assert_allclose(np.linalg.svd(one @ other, compute_uv=False), sigma, atol=1e-9)
    again = norm_matched(np.random.default_rng(7), 0.5 * a @ b)
    np.testing.assert_array_equal(one, again[0])


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_norm_matched_of_few_directions_is_that_of_a_qr_decomposition(rank):
    """Columns of at most half as many as rows come from a Cholesky decomposition: they are as
    orthonormal, and the same numbers."""
    a, b = (np.random.default_rng(1).standard_normal((3, 128, rank)) for _ in range(2))
    one, other = norm_matched(2, (a, np.swapaxes(b, -1, -2)), np.ones((3, rank)))
    rng = np.random.default_rng(2)
    for got in (one, np.swapaxes(other, -1, -2)):
        q, r = np.linalg.qr(rng.standard_normal((3, 128, rank)))
        signs = np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None]
        np.testing.assert_allclose(got, q * signs, atol=1e-13)
        eye = np.broadcast_to(np.eye(rank), (3, rank, rank))
        np.testing.assert_allclose(np.swapaxes(got, -1, -2) @ got, eye, atol=1e-13)


def test_norm_matched_is_uniform():
    """Haar: a column's mean is 0 and its second moment I / n (LAPACK's signs fail the first)."""
    a, b = np.broadcast_to(np.eye(4, 2), (4000, 4, 2)), np.broadcast_to(np.eye(2, 3), (4000, 2, 3))
    one, other = norm_matched(0, (a, b))
    for columns, n in ((np.swapaxes(one, -1, -2), 4), (other, 3)):
        # Standard errors are below 0.01; five of them.
        np.testing.assert_allclose(columns.mean(0), 0, atol=0.05)
        second = np.einsum("dki,dkj->kij", columns, columns) / 4000
        np.testing.assert_allclose(second, np.broadcast_to(np.eye(n) / n, second.shape), atol=0.03)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0, 1.5])
def test_intervention_scales_one_singular_value(lam):
    w, delta, sigma = planted()
    dW = delta[0] @ delta[1]
    for update in (delta, (2 * delta[0], delta[1], 0.5), dW):
        got = intervene(w, update, lam, 8, 0.6)
        assert got.index == 2  # the strongest of the four
        after = dW + got.a @ got.b
        expected = np.sort(np.concatenate([np.delete(sigma, 2), [lam * sigma[2]], np.zeros(8)]))
        found = np.linalg.svd(w + after, compute_uv=False)
        np.testing.assert_allclose(found, expected[::-1], atol=1e-9)
        assert got.norm == pytest.approx(np.linalg.norm(after), abs=1e-9)
        assert np.linalg.norm(got.scale * dW) == pytest.approx(got.norm, abs=1e-9)
        # W has half of sigma in this direction, so that lam = 0 turns dW there and leaves its norm.
        assert (got.scale == pytest.approx(1, abs=1e-9)) == (lam in (0, 1))


def test_intervention_sweep_is_one_search():
    w, delta, _ = planted()
    found = intruders(w, delta, 8)
    lam = np.array([0.0, 0.25, 1.0])
    sweep = intervene(w, delta, lam, epsilon=0.6, found=found)
    assert sweep.a.shape == (3, 30, 1) and sweep.b.shape == (3, 1, 20)
    for i, one in enumerate(lam):
        alone = intervene(w, delta, one, 8, 0.6)
        np.testing.assert_allclose((sweep.a @ sweep.b)[i], alone.a @ alone.b, atol=1e-9)
        assert sweep.scale[i] == pytest.approx(alone.scale, abs=1e-9)


def test_intervention_without_an_intruder_changes_nothing():
    w, delta, _ = planted()
    got = intervene(w, delta, 0.0, 8, 0.4)
    assert got.index == -1 and got.scale == pytest.approx(1, abs=1e-12)
    assert not got.a.any() and not got.b.any()
    nothing = intervene(w, np.zeros_like(w), 0.5)
    assert nothing.index == -1 and nothing.norm == 0 and nothing.scale == 1


def test_bad_input_is_named():
    w, delta, _ = planted()
    for k in (0, 21):
        with pytest.raises(ValueError, match=f"k {k}: from 1 to 20"):
            intruders(w, delta, k)
    with pytest.raises(ValueError, match=r"\(20, 30\)"):
        intruders(w.T, delta)
    with pytest.raises(ValueError, match="epsilon 50"):
        intruders(w, delta, epsilon=50)
    with pytest.raises(ValueError, match="side 'left'"):
        intruders(w, delta, side="left")


def check_definition(w, a, b, s):
    """Against the definition, (out, in), and the intervention against the dense matrices."""
    dW = (s * np.asarray(a, np.float64) @ b).T
    w_svd = np.linalg.svd(w, full_matrices=False)
    found = intruders(w, (a, b, s), w_svd=w_svd)
    expected = from_definition(w.T, dW, 10)
    np.testing.assert_allclose(found.similarity, expected, rtol=0, atol=1e-5)
    assert found.count == np.sum(expected < 0.5) > 0
    u, sigma, vt = np.linalg.svd(w.T + dW, full_matrices=False)
    top = int(np.argmax(expected < 0.5))
    change = intervene(w, (a, b, s), 0.7, found=found)
    dense = (0.7 - 1) * sigma[top] * np.outer(u[:, top], vt[top])
    assert change.index == top
    np.testing.assert_allclose((change.a @ change.b).T, dense, rtol=0, atol=1e-5)
    assert change.norm == pytest.approx(np.linalg.norm(dW + dense), abs=1e-5)
    assert change.scale == pytest.approx(np.linalg.norm(dW + dense) / np.linalg.norm(dW), abs=1e-5)


def test_definition_on_the_authors_own_adapter():
    with np.load(data(MNLI)) as stored:
        name = "roberta.encoder.layer.11.attention.self.query.lora_"
        a, b = stored[name + "A"].T, stored[name + "B"].T  # (768, 8), (8, 768)
    # Its base is not at hand: a Gaussian one, weak enough for intruders.
    w = 0.01 * np.random.default_rng(8).standard_normal((768, 768))
    check_definition(w, a, b, 2.0)


def test_definition_on_a_peft_adapter():
    """attn/v of a fused c_attn."""
    factors = peft.load(data("adapters/peft_gpt2_lora"), gpt2.hf_tensors(gpt2.Config())).factors
    one = factors["h/5/attn/v"]
    w = 0.01 * np.random.default_rng(9).standard_normal((768, 768))
    check_definition(w, one.a, one.b, float(one.s))


def test_large_matrices_have_the_intruders_of_the_definition():
    """From W's own decomposition, stacked, with factors and without."""
    rng = np.random.default_rng(5)
    w, a, b = (rng.standard_normal(s) for s in ((2, 260, 270), (2, 260, 4), (2, 4, 270)))
    s = np.array([0.5, 2.0])
    got = intruders(w, (a, b, s), 6, w_svd=np.linalg.svd(w, full_matrices=False))
    dense = intruders(w, s[:, None, None] * (a @ b), 6)
    for n in range(2):
        expected = from_definition(w[n].T, (s[n] * a[n] @ b[n]).T, 6)
        np.testing.assert_allclose(got.similarity[n], expected, atol=1e-8)
    np.testing.assert_allclose(got.similarity, dense.similarity, atol=1e-8)
    np.testing.assert_allclose(got.sigma, dense.sigma, rtol=1e-10)
    assert got.u.shape == (2, 260, 6) and got.vt.shape == (2, 6, 270)
    with_values = norm_matched(0, a @ b, np.linalg.svd(a @ b, compute_uv=False))
    for one, other in zip(with_values, norm_matched(0, a @ b), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)
