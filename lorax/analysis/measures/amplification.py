"""How much an update amplifies the part of the base weights in its directions.

LoRA, arXiv 2106.09685, section 7.3 and table 7: with U and V the leading singular directions of
dW, ||U^T W V||_F is the norm of W in them, and ||dW||_F divided by it is the amplification factor.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lorax.spectrum import existing, update_svd


class Amplification(NamedTuple):
    """One block of table 7. All but `factor` are Frobenius norms; all have shape (...). U and V
    have `rank` columns each."""

    delta_norm: np.ndarray  # ||dW||
    w_in_delta: np.ndarray  # ||U^T W V||, U and V from dW
    w_in_w: np.ndarray  # the same with U, V from W: sqrt(sum of its `rank` largest sigma^2)
    w_in_random: np.ndarray  # with U, V from a Gaussian matrix: about rank ||W|| / sqrt(in out)
    factor: np.ndarray  # delta_norm / w_in_delta; NaN for no update, inf if w_in_delta is 0


def amplification(
    w: ArrayLike,
    delta: ArrayLike | tuple[ArrayLike, ...],
    rank: int,
    *,
    w_sigma: ArrayLike | None = None,
    delta_svd: Sequence[ArrayLike] | None = None,
    rng: int | np.random.Generator = 0,
) -> Amplification:
    """Table 7 of the LoRA paper. Leading axes (...) are those of w and delta.

    Args:
      w: the frozen kernel, (..., in, out). (All five numbers are the same for its transpose.)
      delta: the update: factors (a, b) or (a, b, s) with a (..., in, r), b (..., r, out), or dense,
        (..., in, out).
      rank: how many leading directions, 1 to min(in, out); the paper takes the adapter's own r.
      w_sigma: w's singular values (..., min(in, out)), if already computed: saves most of the work.
      delta_svd: delta's thin SVD (u, sigma, vt), if already computed: saves most of the rest.
      rng: seed or generator of the random control; all matrices of a stack share its directions.

    Raises ValueError if the shapes or the rank do not fit.
    """
    w = np.asarray(w, np.float64)
    u, sigma, vt = update_svd(delta) if delta_svd is None else map(np.asarray, delta_svd)
    shape = (u.shape[-2], vt.shape[-1])
    if w.ndim < 2 or shape != w.shape[-2:]:
        raise ValueError(f"w {w.shape} and delta {shape} need the same (..., in, out)")
    if not 1 <= rank <= min(shape):
        raise ValueError(f"rank {rank}: from 1 to {min(shape)} for a {shape} matrix")
    if w_sigma is None:
        w_sigma = np.linalg.svd(w, compute_uv=False)

    u = existing(u, sigma, shape)[..., :rank]
    v = existing(np.swapaxes(vt, -1, -2), sigma, shape)[..., :rank]
    rng = np.random.default_rng(rng)
    random_u = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
    random_v = np.linalg.qr(rng.standard_normal((shape[1], rank)))[0]

    inside = lambda u, v: np.linalg.norm(np.swapaxes(u, -1, -2) @ w @ v, axis=(-2, -1))
    w_in_delta, w_in_random = inside(u, v), inside(random_u, random_v)
    w_in_w = np.linalg.norm(
        np.sort(np.asarray(w_sigma, np.float64))[..., ::-1][..., :rank], axis=-1
    )
    delta_norm = np.linalg.norm(sigma, axis=-1)
    some = w_in_delta > 0
    factor = np.where(some, delta_norm / np.where(some, w_in_delta, 1.0), np.inf)
    factor = np.where(delta_norm > 0, factor, np.nan)[()]
    return Amplification(delta_norm, w_in_delta, w_in_w, w_in_random, factor)
