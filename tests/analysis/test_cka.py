"""Linear CKA: invariances, planted overlaps, and the definition with (n, n) matrices."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import data

from lorax.analysis import linear_cka


def from_definition(x, y):
    """Equation 1 and HSIC of section 3, with Gram matrices and the centring matrix H."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    hsic = lambda k, m: np.trace(k @ h @ m @ h) / (n - 1) ** 2
    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def activations(seed, n=40, p=6):
    return np.random.default_rng(seed).standard_normal((n, p))


def test_rotation_scale_and_shift_change_nothing():
    x = activations(0)
    turn = np.linalg.qr(activations(1, 6, 6))[0]
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, -3e100 * x @ turn + 5) == pytest.approx(1, abs=1e-12)
    y = activations(2, p=9)
    assert linear_cka(x @ turn + 1, 2 * y - 7) == pytest.approx(linear_cka(x, y), abs=1e-12)
    # A scale for each feature does.
    assert linear_cka(x * [1, 1, 1, 1, 1, 9], y) != pytest.approx(linear_cka(x, y), abs=1e-3)


def test_planted_overlap():
    """Orthonormal features, c of them in common: c / sqrt(p q)."""
    start = np.concatenate([np.ones((40, 1)), activations(3, 40, 12)], axis=1)
    q = np.linalg.qr(start)[0][:, 1:]  # orthonormal, and of mean 0
    assert linear_cka(q[:, :5], q[:, 3:12]) == pytest.approx(2 / np.sqrt(5 * 9), abs=1e-12)
    assert linear_cka(q[:, :5], q[:, 5:]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("p, q", [(6, 6), (3, 10), (60, 50)])
def test_definition(p, q):
    x = activations(4, p=p) + 2
    y = np.concatenate([x[:, :2], activations(5, p=q - 2)], axis=1)
    assert linear_cka(x, y) == pytest.approx(from_definition(x, y), abs=1e-9)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-12)


def test_batched_equals_one_by_one():
    x, y = activations(6, 6 * 20).reshape(2, 3, 20, 6), activations(7, 3 * 20, 4).reshape(3, 20, 4)
    got = linear_cka(x, y)
    assert got.shape == (2, 3)
    assert got[1, 2] == pytest.approx(linear_cka(x[1, 2], y[2]), abs=1e-12)
    as_float32 = linear_cka(jnp.asarray(x, "float32"), jnp.asarray(y, "float32"))
    np.testing.assert_allclose(as_float32, got, rtol=0, atol=1e-6)


def test_activations_that_do_not_vary_share_nothing():
    assert linear_cka(np.full((30, 4), 0.1), activations(8, 30)) == 0
    assert linear_cka(np.zeros((30, 4)), np.zeros((30, 4))) == 0


def test_few_examples_say_little():
    x, y = activations(9, 10, 2000), activations(10, 10, 2000)
    assert linear_cka(x, y) > 0.95


def test_different_examples_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 2\), \(5, 2\)"):
        linear_cka(np.ones((4, 2)), np.ones((5, 2)))
    with pytest.raises(ValueError, match="activations"):
        linear_cka(np.ones(4), np.ones((4, 1)))


def test_definition_on_what_real_updates_do():
    """A trained adapter's two branches, s * x @ a @ b, on one batch of inputs."""
    with np.load(data("adapters/lora_roberta_mnli/roberta_base_lora_mnli.npz")) as stored:
        name = "roberta.encoder.layer.{}.attention.self.query.lora_{}"
        updates = [stored[name.format(i, "A")].T @ stored[name.format(i, "B")].T for i in (0, 11)]
    x = activations(11, 64, 768)
    one, other = (x @ update for update in updates)
    expected = from_definition(one, other)
    assert linear_cka(one, other) == pytest.approx(expected, abs=1e-5)
