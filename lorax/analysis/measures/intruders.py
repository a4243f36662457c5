"""Intruder dimensions: leading directions of W + dW that W does not have.

Shuttleworth et al., LoRA vs Full Fine-tuning (arXiv 2410.21228): y_j, one of the k leading left
singular vectors of W + dW, is an intruder if max_i |cos(y_j, x_i)| < epsilon over all left singular
vectors x_i of W. Their W is (out, in), so their left vectors are directions of the output. Our
kernels are the transpose, (in, out), so these are our right singular vectors, the rows of vt.

What the paper's definition leaves open, and what we do:
- It has no absolute value, although the sign of a singular vector is arbitrary. The authors' code
  takes the absolute value, and so do we.
- "All" vectors of a rectangular W are the min(in, out) vectors of its thin SVD, as in the authors'
  code. If in < out, they do not span the output space. A vector orthogonal to their span has
  cosine 0 with each of them and is an intruder. A random direction is always one too: its largest
  |cosine| is about sqrt(2 ln(out) / out).
- If singular values of W are equal or zero, their vectors are an arbitrary basis, so the cosines
  are arbitrary too. The directions of zero singular values count as W's, as in the authors' code.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lorax import spectrum
from lorax.spectrum import dense_update, leading_svd, update_svd


class Intruders(NamedTuple):
    """The k leading singular vectors of W + dW. Leading axes (...) are those of W and dW.

    A smaller k needs no further work: np.cumsum(mask, -1)[..., j - 1] is the count for k = j.
    """

    similarity: np.ndarray  # (..., k): the largest |cosine| with a vector of W, 0 to 1
    mask: np.ndarray  # (..., k) bool, or (..., e, k) for e epsilons: similarity < epsilon
    # (...) int, or (..., e): how many of the k; the paper sums them over matrices
    count: np.ndarray
    u: np.ndarray  # (..., in, k); W + dW = u @ diag(sigma) @ vt + the rest of its SVD
    sigma: np.ndarray  # (..., k), descending
    vt: np.ndarray  # (..., k, out)


class Intervention(NamedTuple):
    """The change of the update that scales the top intruder: dW becomes dW + a @ b."""

    index: np.ndarray  # (...) int: which of the k leading vectors it is; -1 if there is no intruder
    a: np.ndarray  # (..., in, 1); zeros if there is no intruder
    b: np.ndarray  # (..., 1, out)
    norm: np.ndarray  # (...): ||dW + a @ b||_F
    scale: np.ndarray  # (...): the control is scale * dW, an update with the same norm


def intruders(
    w: ArrayLike,
    delta: ArrayLike | tuple[ArrayLike, ...],
    k: int = 10,
    epsilon: float | ArrayLike = 0.5,
    *,
    side: str = "out",
    w_svd: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
) -> Intruders:
    """The intruders among the k leading singular vectors of w + delta (definition above).

    Args:
      w: the frozen kernel, (..., in, out).
      delta: the update: factors (a, b) or (a, b, s) with a (..., in, r), b (..., r, out) and s a
        number or (...,); or dense, (..., in, out).
      k: how many leading vectors, 1 to min(in, out); the paper takes 10.
      epsilon: a threshold above 0 and at most 1, or (e,) of them, applied to the same cosines.
      side: "out" for the output directions, the paper's; "in" for the input directions.
      w_svd: w's thin SVD (u, sigma, vt), if already computed: saves half of the work.

    Raises ValueError if shapes, k, epsilon or side do not fit.
    """
    w, shape = np.asarray(w, np.float64), _shape(delta)
    if w.ndim < 2 or shape[-2:] != w.shape[-2:]:
        raise ValueError(f"w {w.shape} and delta {shape} need the same (..., in, out)")
    if not 1 <= k <= min(w.shape[-2:]):
        raise ValueError(f"k {k}: from 1 to {min(w.shape[-2:])} for a {w.shape[-2:]} matrix")
    epsilon = np.asarray(epsilon, np.float64)
    if epsilon.ndim > 1 or not np.all((epsilon > 0) & (epsilon <= 1)):
        raise ValueError(f"epsilon {epsilon}: a cosine above 0 and at most 1, or (e,) of them")
    if side not in ("in", "out"):
        raise ValueError(f"side {side!r}: 'in' or 'out'")
    w_u, w_sigma, w_vt = np.linalg.svd(w, full_matrices=False) if w_svd is None else w_svd

    u, sigma, vt = _leading(w, delta, k, (w_u, w_sigma, w_vt))
    if side == "out":
        cosines = vt @ np.swapaxes(np.asarray(w_vt, np.float64), -1, -2)
    else:
        cosines = np.swapaxes(u, -1, -2) @ np.asarray(w_u, np.float64)
    similarity = np.abs(cosines).max(-1)  # (..., k)
    mask = (similarity[..., None, :] if epsilon.ndim else similarity) < epsilon[..., None]
    return Intruders(similarity, mask, mask.sum(-1), u, sigma, vt)


def norm_matched(
    rng: int | np.random.Generator,
    delta: ArrayLike | tuple[ArrayLike, ...],
    sigma: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Control: an update with delta's singular values (so with its norm) in random directions.

    The directions of both sides are Haar distributed, i.e. uniform.

    Args:
      rng: a numpy generator or a seed.
      delta: factors (a, b) or (a, b, s), or dense, as in `intruders`.
      sigma: delta's singular values (..., k), if already computed: saves most of the work for a
        dense delta.

    Returns factors a (..., in, k), b (..., k, out) with k the number of delta's singular values.
    """
    rng = np.random.default_rng(rng)
    sigma = update_svd(delta)[1] if sigma is None else np.asarray(sigma, np.float64)
    *lead, rows, columns = _shape(delta)
    k = sigma.shape[-1]
    u, v = _haar(rng, (*lead, rows, k)), _haar(rng, (*lead, columns, k))
    return u * sigma[..., None, :], np.swapaxes(v, -1, -2)


def intervene(
    w: ArrayLike,
    delta: ArrayLike | tuple[ArrayLike, ...],
    lam: float | ArrayLike,
    k: int = 10,
    epsilon: float = 0.5,
    *,
    side: str = "out",
    w_svd: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    found: Intruders | None = None,
) -> Intervention:
    """Scale the top intruder by lam: W + dW + (lam - 1) sigma u v^T, as a change of the update.

    u, sigma, v are singular vectors and value of W + dW, so the change also affects the part of W
    in this direction. The top intruder has the largest sigma. The other singular values of W + dW
    stay the same.

    `scale` gives the control that any claim about lam needs: the whole update, scaled to the norm
    that it has after the change.

    Args:
      w, delta, k, epsilon, side, w_svd: as in `intruders`; one epsilon.
      lam: a number, or an array that broadcasts with the leading axes: (l,) for a sweep over one
        matrix, (l, 1) for one over a stack. 0 removes the intruder, 1 changes nothing.
      found: the `intruders` of the same w, delta and side, if already computed: saves all of the
        work.
    """
    if found is None:
        found = intruders(w, delta, k, epsilon, side=side, w_svd=w_svd)
    mask = found.similarity < epsilon
    any_, first = mask.any(-1), mask.argmax(-1)
    sigma = np.take_along_axis(found.sigma, first[..., None], -1)[..., 0]
    u = np.take_along_axis(found.u, first[..., None, None], -1)  # (..., in, 1)
    vt = np.take_along_axis(found.vt, first[..., None, None], -2)  # (..., 1, out)

    change = np.where(any_, (np.asarray(lam, np.float64) - 1) * sigma, 0.0)
    if isinstance(delta, tuple):
        a, b, s = _factors(delta)
        along = s * ((np.swapaxes(u, -1, -2) @ a) @ (b @ np.swapaxes(vt, -1, -2)))[..., 0, 0]
        before = np.linalg.norm(update_svd(delta)[1], axis=-1)
    else:
        dense = np.asarray(delta, np.float64)
        along = (np.swapaxes(u, -1, -2) @ dense @ np.swapaxes(vt, -1, -2))[..., 0, 0]
        before = np.linalg.norm(dense, axis=(-2, -1))
    # ||dW + c u v^T||^2; rounding may make it negative.
    after = np.sqrt(np.maximum(before**2 + 2 * change * along + change**2, 0.0))
    scale = np.where(before > 0, after / np.where(before > 0, before, 1.0), 1.0)
    index = np.where(any_, first, -1)
    b = np.broadcast_to(vt * any_[..., None, None], change.shape + vt.shape[-2:])
    return Intervention(index, change[..., None, None] * u, b, after, scale)


def _factors(delta):
    a, b, s = delta if len(delta) == 3 else (*delta, 1.0)
    return np.asarray(a, np.float64), np.asarray(b, np.float64), np.asarray(s, np.float64)


def _leading(w, delta, k, w_svd):
    """The k leading singular vectors and values of W + dW. For a large W and a low-rank update they
    are computed from W's SVD, one matrix at a time."""
    n = min(w.shape[-2:])
    if not isinstance(delta, tuple) or n < spectrum.LARGE or 8 * max(k, _width(delta)) > n:
        return leading_svd(w + dense_update(delta), k)
    lead = np.broadcast_shapes(w.shape[:-2], _shape(delta)[:-2])
    a, b, s = _factors(delta)
    stacks = *w_svd, a, b, s
    axes = (2, 1, 2, 2, 2, 0)  # number of axes for a single matrix
    stacks = [
        np.broadcast_to(x, (*lead, *x.shape[x.ndim - ndim :])).reshape(
            -1, *x.shape[x.ndim - ndim :]
        )
        for x, ndim in zip(map(np.asarray, stacks), axes, strict=True)
    ]
    svds = [spectrum.updated_svd(parts[:3], parts[3:], k) for parts in zip(*stacks, strict=True)]
    return tuple(np.stack(x).reshape(*lead, *x[0].shape) for x in zip(*svds, strict=True))


def _width(delta: tuple) -> int:
    return np.shape(delta[0])[-1]


def _shape(delta) -> tuple[int, ...]:
    """(..., in, out) of an update."""
    if not isinstance(delta, tuple):
        return np.shape(delta)
    a, b = np.shape(delta[0]), np.shape(delta[1])
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])


def _haar(rng, shape) -> np.ndarray:
    """Orthonormal columns (..., n, k), k <= n, of uniformly random directions: the q of x = q r
    with Gaussian x. LAPACK's signs depend on the draw; with a positive diagonal of r, q is uniform.
    """
    x = rng.standard_normal(shape)
    if 2 * shape[-1] <= shape[-2]:  # x is well conditioned: x^T x = r^T r is as accurate, and fast
        low = np.linalg.cholesky(np.swapaxes(x, -1, -2) @ x)
        return x @ np.swapaxes(np.linalg.inv(low), -1, -2)
    q, r = np.linalg.qr(x)
    return q * np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]
