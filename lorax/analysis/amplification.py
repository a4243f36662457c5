"""How much an update amplifies what the base already has in its directions.

LoRA, arXiv 2106.09685, section 7.3 and table 7: with U and V the leading singular directions of
dW, ||U^T W V||_F is what W does in them, and ||dW||_F over that is the amplification factor.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lorax.analysis.spectrum import existing, update_svd


class Amplification(NamedTuple):
    """One block of table 7. All are Frobenius norms; U, V have `rank` columns each."""

    delta_norm: float  # ||dW||
    w_in_delta: float  # ||U^T W V||, U and V from dW
    w_in_w: float  # the same from W itself: sqrt(sum of its `rank` largest sigma^2)
    w_in_random: float  # the same from a Gaussian matrix: about rank ||W|| / sqrt(in out)
    factor: float  # delta_norm / w_in_delta; 0 for no update, inf where W has nothing there


def amplification(
    w: ArrayLike,
    delta: ArrayLike | tuple[ArrayLike, ...],
    rank: int,
    *,
    w_sigma: ArrayLike | None = None,
    rng: int | np.random.Generator = 0,
) -> Amplification:
    """Table 7 of the LoRA paper for one matrix.

    Args:
      w: the frozen kernel, (in, out). (All five numbers are the same for its transpose.)
      delta: the update: factors (a, b) or (a, b, s) with a (in, r), b (r, out), or dense (in, out).
      rank: how many leading directions, 1 to min(in, out); the paper takes the adapter's own r.
      w_sigma: w's singular values, where they are at hand: they are most of the work.
      rng: seed or generator of the random control.

    Raises ValueError where the shapes or the rank do not fit.
    """
    w = np.asarray(w, np.float64)
    u, sigma, vt = update_svd(delta)
    if w.ndim != 2 or (u.shape[0], vt.shape[1]) != w.shape:
        raise ValueError(
            f"w {w.shape} and delta {(u.shape[0], vt.shape[1])} need the same (in, out)"
        )
    if not 1 <= rank <= min(w.shape):
        raise ValueError(f"rank {rank}: from 1 to {min(w.shape)} for a {w.shape} matrix")
    if w_sigma is None:
        w_sigma = np.linalg.svd(w, compute_uv=False)

    delta_norm = float(np.linalg.norm(sigma))
    u = existing(u, sigma, w.shape)[:, :rank]
    v = existing(vt.T, sigma, w.shape)[:, :rank]
    rng = np.random.default_rng(rng)
    random_u = np.linalg.qr(rng.standard_normal((w.shape[0], rank)))[0]
    random_v = np.linalg.qr(rng.standard_normal((w.shape[1], rank)))[0]

    w_in_delta = float(np.linalg.norm(u.T @ w @ v))
    w_in_random = float(np.linalg.norm(random_u.T @ w @ random_v))
    w_in_w = float(np.linalg.norm(np.sort(np.asarray(w_sigma, np.float64))[::-1][:rank]))
    if delta_norm == 0:
        factor = 0.0
    else:
        factor = delta_norm / w_in_delta if w_in_delta > 0 else float("inf")
    return Amplification(delta_norm, w_in_delta, w_in_w, w_in_random, factor)
