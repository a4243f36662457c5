"""Statistics of updates that no report computes unasked, for `config.analysis.also`:

from lorax.analysis.also import drift

config.analysis.also = (drift,)
"""

import numpy as np

from lorax.analysis.measures import intruders
from lorax.analysis.measures.drift import spectral_drift

DRAWS = 3  # random updates that an update is compared with


def drift(update) -> dict[str, float]:
    """How far the update moves W's singular values, relative to their norm, and the mean of updates
    with the same singular values in random directions. Both are at most ‖ΔW‖ / ‖W‖."""
    w_sigma = np.linalg.svd(update.w, compute_uv=False)
    rng, sigma = np.random.default_rng(0), update.singular_values
    random = [intruders.norm_matched(rng, update.dw, sigma) for _ in range(DRAWS)]
    of = lambda delta: float(spectral_drift(update.w, delta, w_sigma))
    size = np.linalg.norm(sigma) / np.linalg.norm(w_sigma)
    return {
        "drift": of(update.dw),
        "in random directions": float(np.mean([of(delta) for delta in random])),
        "relative size": float(size),
    }
