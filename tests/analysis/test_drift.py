"""Spectral drift: its bound, two cases that are known, and the control in a report's table."""

import numpy as np
import pytest

from lorax.analysis import spectral_drift, tables
from lorax.analysis.also import drift
from lorax.interop.peft import Factors


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_scaling_a_weight_drifts_by_the_scale_and_turning_it_does_not():
    w = draw(3, 12, 8)
    np.testing.assert_allclose(spectral_drift(w, 0.25 * w), 0.25, rtol=1e-12)
    turned = np.linalg.qr(draw(12, 12, seed=1))[0] @ w - w
    np.testing.assert_allclose(spectral_drift(w, turned), 0, atol=1e-12)
    assert spectral_drift(np.zeros((2, 2)), np.eye(2)) != spectral_drift(w[0], 0 * w[0]) == 0


def test_drift_is_that_of_the_definition_for_factors_and_at_most_the_relative_norm():
    w, a, b = draw(5, 12, 8), draw(5, 12, 2, seed=1), draw(5, 2, 8, seed=2)
    s = np.linspace(0.1, 1, 5)
    dw = s[:, None, None] * (a @ b)
    sigma = lambda x: np.linalg.svd(x, compute_uv=False)
    norm = lambda x: np.linalg.norm(x, axis=-1)
    expected = norm(sigma(w + dw) - sigma(w)) / norm(sigma(w))
    for delta in (dw, (a, b, s)):
        np.testing.assert_allclose(spectral_drift(w, delta), expected, rtol=1e-12)
    np.testing.assert_allclose(spectral_drift(w, dw, sigma(w)[:, ::-1]), expected, rtol=1e-12)
    assert (expected <= norm(sigma(dw)) / norm(sigma(w))).all()
    with pytest.raises(ValueError, match=r"^w \(5, 12, 8\) and delta \(12, 7\) need the same"):
        spectral_drift(w, draw(12, 7))


def test_the_statistic_has_a_control_that_only_turns_the_update():
    """An update along W's first direction drifts by all of its size, random ones by less."""
    w = draw(24, 16).astype(np.float32)
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    along = Factors(u[:, :1] * sigma[0], vt[:1], 0.5)
    random = Factors(draw(24, 1, seed=3).astype(np.float32), draw(1, 16, seed=4), 0.5)
    updates = {0: {"h/0/attn/q": along, "h/1/attn/q": random}}
    kernels = dict.fromkeys(updates[0], w)
    table = tables.statistics(updates, [drift], kernels)["drift"].table
    first, second = table.to_dict("records")
    assert first["drift"] == pytest.approx(first["relative size"], rel=1e-5)
    assert first["drift"] > 1.5 * first["in random directions"] > 0
    assert second["drift"] < second["relative size"]
    ratio = second["drift"] / second["in random directions"]
    assert 0.5 < ratio < 2  # it is one of them
    missing = tables.statistics(updates, [drift])["drift"].missing
    assert all("needs the base's weights" in why for why in missing.values())
