"""Spectral drift: how much an update moves the singular values of the weight that it is added to.

    drift = |s(W + dW) - s(W)| / |s(W)|

s are the singular values in descending order, |.| the Euclidean norm (Zhu et al., arXiv:2511.08567,
ask it of reinforcement learning). By Mirsky's inequality it is at most |dW|_F / |W|_F. An update of
that norm in random directions stays below the bound as well, so a drift is compared with that of
`intruders.norm_matched`: dW's own singular values in Haar distributed directions.
"""

import numpy as np
from numpy.typing import ArrayLike

from lorax.spectrum import dense_update


def spectral_drift(
    w: ArrayLike, delta: ArrayLike | tuple[ArrayLike, ...], w_sigma: ArrayLike | None = None
) -> np.ndarray:
    """(...) float64: the drift of w (..., in, out) under an update; 0 for no update, NaN if w is 0.

    Args:
      delta: factors (a, b) or (a, b, s) with a (..., in, r), b (..., r, out), or dense.
      w_sigma: w's singular values (..., min(in, out)), if already computed: saves half of the work.

    Raises ValueError if the shapes do not fit.
    """
    w = np.asarray(w, np.float64)
    dense = dense_update(delta)
    if w.ndim < 2 or dense.shape[-2:] != w.shape[-2:]:
        raise ValueError(f"w {w.shape} and delta {dense.shape} need the same (..., in, out)")
    before = np.linalg.svd(w, compute_uv=False) if w_sigma is None else np.asarray(w_sigma)
    before = np.sort(np.asarray(before, np.float64), axis=-1)[..., ::-1]
    after = np.linalg.svd(w + dense, compute_uv=False)
    whole = np.linalg.norm(before, axis=-1)
    moved = np.linalg.norm(after - before, axis=-1)
    return np.where(whole > 0, moved / np.where(whole > 0, whole, 1.0), np.nan)[()]
