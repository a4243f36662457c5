"""Singular values of an update dW = s * a @ b, and the ranks computed from them.

Everything is computed from the factors a (in, r) and b (r, out), without forming dW. (For updates
without factors, as in full fine-tuning, there is `randomised_svd`.) Arrays may be from numpy or
jax; the arithmetic is numpy's, in float64. Leading axes are batch axes.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

LARGE = 256  # rows and columns; from here on, Lanczos is cheaper than a decomposition
FEW = 96  # the same of a few eigenvectors, computed alone, and of all
SQUARED = 1e-3  # times sigma_1: smaller values are inaccurate if computed from their squares
BLOCK = 1024  # rows of which a copy stays in a core's cache
ROUNDED = 1e-6  # times sigma_1: an error below it is below the rounding of float32 factors


def factor_svd(
    a: ArrayLike, b: ArrayLike, s: ArrayLike = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SVD of s * a @ b: a QR of both factors, then an SVD of the small core in between.

    Args:
      a: (..., in, r).
      b: (..., r, out).
      s: scale, a number or (...,).

    Returns u (..., in, k), sigma (..., k) descending, vt (..., k, out), float64, with
    k = min(r, in, out): u @ diag(sigma) @ vt = s * a @ b. Directions whose sigma is 0 are an
    arbitrary orthonormal completion.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"factors: need a (..., in, r) and b (..., r, out), got {a.shape}, {b.shape}"
        )
    qa, ra = np.linalg.qr(a)
    qb, rb = np.linalg.qr(np.swapaxes(b, -1, -2))
    core = ra @ np.swapaxes(rb, -1, -2) * np.asarray(s, np.float64)[..., None, None]
    u, sigma, vt = np.linalg.svd(core, full_matrices=False)
    return qa @ u, sigma, vt @ np.swapaxes(qb, -1, -2)


def factor_sigma(a: ArrayLike, b: ArrayLike, s: float = 1.0) -> np.ndarray:
    """The singular values of s * a @ b without its directions, many times as fast as `factor_svd`.

    From the Gram matrices of both factors: with a^T a = l l^T, those of l^T b b^T l are their
    squares. Squaring makes values below 1e-8 of s |a| |b| inaccurate; where that is more than
    `ROUNDED` of sigma_1, and where a^T a is singular, it uses `factor_svd`.

    Args:
      a: (in, r). b: (r, out).

    Returns (k,) float64 descending, k = min(r, in, out); NaN if a number in them is not finite.
    """
    of_a, of_b = _gram(np.asarray(a)), _gram(np.asarray(b).T)
    k = min(*np.shape(a), np.shape(b)[1])
    if not (np.isfinite(of_a).all() and np.isfinite(of_b).all()):
        return np.full(k, np.nan)
    try:
        low = np.linalg.cholesky(of_a)
    except np.linalg.LinAlgError:
        return factor_svd(a, b, s)[1]
    squares = np.linalg.eigvalsh(low.T @ of_b @ low)[::-1]
    sigma = abs(float(s)) * np.sqrt(np.maximum(squares, 0.0))
    norms = (np.linalg.norm(gram) ** 0.5 for gram in (of_a, of_b))  # at least |a| and |b|
    lost = np.sqrt(np.finfo(np.float64).eps) * abs(float(s)) * math.prod(norms)
    if lost > ROUNDED * sigma[0]:
        return factor_svd(a, b, s)[1]
    return sigma[:k]


def dense_sigma(matrix: ArrayLike) -> np.ndarray:
    """The singular values of a matrix without its directions, two to five times as fast as an SVD.

    From the Gram matrix of its shorter side: values below 1e-8 of sigma_1 are inaccurate.

    Args:
      matrix: (in, out), dense.

    Returns (k,) float64 descending, k = min(in, out); NaN if a number in it is not finite.
    """
    matrix = np.asarray(matrix)
    n_in, n_out = matrix.shape
    gram = _gram(matrix if n_in >= n_out else matrix.T)
    if not np.isfinite(gram).all():
        return np.full(len(gram), np.nan)
    squares = np.linalg.eigvalsh(gram)[::-1]
    return np.sqrt(np.maximum(squares, 0.0))


@np.errstate(invalid="ignore", over="ignore")
def _gram(x: np.ndarray) -> np.ndarray:
    """x^T x, float64, of x (n, k), in blocks of rows: fresh memory for all of x in float64 would
    take longer than the products."""
    gram = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), BLOCK):
        rows = np.asarray(x[start : start + BLOCK], np.float64)
        gram += rows.T @ rows
    return gram


def update_svd(
    delta: ArrayLike | tuple[ArrayLike, ...],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD of an update: `factor_svd` of a tuple (a, b) or (a, b, s), numpy's of an array."""
    if isinstance(delta, tuple):
        return factor_svd(*delta[:3])
    return np.linalg.svd(np.asarray(delta, np.float64), full_matrices=False)


def dense_update(delta: ArrayLike | tuple[ArrayLike, ...]) -> np.ndarray:
    """An update (..., in, out) float64: of a tuple (a, b) or (a, b, s), or as it is."""
    if not isinstance(delta, tuple):
        return np.asarray(delta, np.float64)
    a, b, s = (np.asarray(x, np.float64) for x in (*delta, 1.0)[:3])
    return s[..., None, None] * (a @ b)


class RandomisedSVD(NamedTuple):
    """The leading k singular values and vectors of A (in, out), with their errors."""

    u: np.ndarray  # (in, k)
    sigma: np.ndarray  # (k,), descending; lower bounds of A's singular values
    vt: np.ndarray  # (k, out)
    upper: np.ndarray  # (k,): upper bounds of A's singular values
    residual: float  # ||A - u @ diag(sigma) @ vt||_F


def randomised_svd(
    matrix: ArrayLike,
    k: int,
    *,
    oversamples: int = 10,
    iterations: int = 4,
    rng: int | np.random.Generator = 0,
) -> RandomisedSVD:
    """The k leading singular values of a dense update, by projection onto a random range.

    Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1, are scikit-learn's
    `randomized_svd`. The errors are exact, unlike the paper's probabilistic bounds (its equation
    4.3 is about eight times ||R||_F): if Q is the range found, with k + oversamples directions,
    then Q Q^T A and R = A - Q Q^T A are orthogonal, so ||R||_F^2 is ||A||_F^2 minus the sum of all
    sigma^2. From A^T A = (Q^T A)^T (Q^T A) + R^T R, A's singular values are between sigma and
    upper = sqrt(sigma^2 + ||R||_F^2). All this is up to rounding, which is 1e-8 of ||A||_F for R.

    Args:
      matrix: (in, out), dense.
      k: 1 to min(in, out). Near min(in, out), numpy's SVD is faster.
      oversamples: extra directions of the range, dropped at the end.
      iterations: power iterations. More of them help if the singular values fall slowly.
      rng: a numpy generator or a seed.

    Raises ValueError if the shape or a number does not fit.
    """
    from sklearn.utils.extmath import randomized_svd  # takes a second to import

    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"matrix {matrix.shape}: need (in, out)")
    if not 1 <= k <= min(matrix.shape):
        raise ValueError(f"k {k}: from 1 to {min(matrix.shape)} for a {matrix.shape} matrix")
    if oversamples < 0 or iterations < 0:
        raise ValueError(f"oversamples {oversamples} and iterations {iterations}: 0 or more")
    seed = int(np.random.default_rng(rng).integers(2**31))
    # All directions are components, none is one of scikit-learn's oversamples: R needs all sigma.
    wide = min(k + oversamples, *matrix.shape)
    u, sigma, vt = randomized_svd(
        matrix, wide, n_oversamples=0, n_iter=iterations, random_state=seed
    )
    energy = np.sum(matrix**2)
    missed = max(energy - np.sum(sigma**2), 0.0)
    residual = np.sqrt(max(energy - np.sum(sigma[:k] ** 2), 0.0))
    upper = np.sqrt(sigma[:k] ** 2 + missed)
    return RandomisedSVD(u[:, :k], sigma[:k], vt[:k], upper, float(residual))


def leading_svd(matrix: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k leading singular values and vectors of dense matrices, exact up to rounding.

    Uses the leading eigenvectors of the smaller Gram matrix, two to ten times as fast as an SVD.
    Squaring makes values much smaller than sigma_1 inaccurate, so if sigma_k is below 1e-3 of it,
    it uses an SVD.

    Args:
      matrix: (..., in, out), dense.
      k: 1 to min(in, out).

    Returns u (..., in, k), sigma (..., k) descending, vt (..., k, out), float64.
    """
    matrix = np.asarray(matrix, np.float64)
    if not 1 <= k <= min(matrix.shape[-2:]):
        raise ValueError(f"k {k}: from 1 to {min(matrix.shape[-2:])} for {matrix.shape[-2:]}")
    turned = matrix.shape[-2] < matrix.shape[-1]
    tall = np.swapaxes(matrix, -1, -2) if turned else matrix
    v = _leading_eigenvectors(np.swapaxes(tall, -1, -2) @ tall, k)
    u = tall @ v
    sigma = np.linalg.norm(u, axis=-2)
    if np.any(sigma[..., -1] <= SQUARED * sigma[..., 0]):
        u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
        return u[..., :k], sigma[..., :k], vt[..., :k, :]
    u = u / sigma[..., None, :]
    return (v, sigma, np.swapaxes(u, -1, -2)) if turned else (u, sigma, np.swapaxes(v, -1, -2))


def _leading_eigenvectors(gram: np.ndarray, k: int) -> np.ndarray:
    """(..., n, n) -> (..., n, k), by descending eigenvalue; computes no others of a large
    matrix."""
    n = gram.shape[-1]
    if n < FEW or 8 * k > n:
        return np.linalg.eigh(gram)[1][..., ::-1][..., :k]
    from scipy.linalg import eigh

    flat = [eigh(g, subset_by_index=(n - k, n - 1))[1] for g in gram.reshape(-1, n, n)]
    return np.stack(flat).reshape(*gram.shape[:-1], k)[..., ::-1]


def updated_svd(
    w_svd: tuple[np.ndarray, np.ndarray, np.ndarray],
    factors: tuple[ArrayLike, ...],
    k: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k leading singular values and vectors of W + s a b, from W's SVD, exact up to rounding.

    In the basis of W's singular vectors, W + s a b is a diagonal matrix plus one of rank r. A
    product with it takes (in + out) r steps, so Lanczos needs a hundredth of the time of an SVD. It
    squares as `leading_svd` does; where that is too inaccurate, `leading_svd` is used instead.

    Args:
      w_svd: the thin SVD of one W: u (in, n), sigma (n,), vt (n, out).
      factors: (a, b) or (a, b, s), a (in, r), b (r, out).
      k: 1 to n - 1.

    Returns u (in, k), sigma (k,) descending, vt (k, out), float64.
    """
    from scipy.sparse.linalg import LinearOperator, svds

    u, sigma, vt = (np.asarray(x, np.float64) for x in w_svd)
    a, b, s = factors if len(factors) == 3 else (*factors, 1.0)
    a, b, n = float(s) * np.asarray(a, np.float64), np.asarray(b, np.float64), len(sigma)
    left, left_coordinates = _along(u, a)
    right, right_coordinates = _along(vt.T, b.T)

    def times(x, out, into):
        y = out @ (into.T @ x)
        y[:n] += sigma * x[:n]
        return y

    core = LinearOperator(
        (len(left_coordinates), len(right_coordinates)),
        matvec=lambda x: times(np.ravel(x), left_coordinates, right_coordinates),
        rmatvec=lambda x: times(np.ravel(x), right_coordinates, left_coordinates),
        dtype=np.float64,
    )
    start = np.random.default_rng(0).standard_normal(min(core.shape))
    x, values, yt = svds(core, k, v0=start)
    order = np.argsort(-values)
    x, values, y = x[:, order], values[order], yt[order].T
    if values[-1] <= SQUARED * values[0]:
        return leading_svd((u * sigma) @ vt + a @ b, k)
    return u @ x[:n] + left @ x[n:], values, y[:n].T @ vt + y[n:].T @ right.T


def _along(u: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal columns that extend u (n, k) so that its span contains a (n, r), and a in terms
    of u and them."""
    inside = u.T @ a
    if u.shape[0] == u.shape[1]:
        return np.zeros((len(u), 0)), inside
    outside, coordinates = np.linalg.qr(a - u @ inside)
    return outside, np.concatenate([inside, coordinates])


def existing(u: np.ndarray, sigma: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """u (..., n, k), with zeros for the columns whose sigma (..., k) is only rounding; u itself if
    there are none."""
    # The factors were stored in float32, so its rounding matters.
    floor = max(shape) * np.finfo(np.float32).eps * sigma.max(-1, keepdims=True, initial=0.0)
    some = sigma > floor
    return u if some.all() else u * some[..., None, :]


def effective_rank(sigma: ArrayLike) -> np.ndarray:
    """exp of the entropy of p = sigma / sum(sigma) (Roy & Vetterli 2007): (..., k) -> (...).

    k equal values give k, a single one gives 1, none gives 0.
    """
    sigma = np.asarray(sigma, np.float64)
    total = sigma.sum(-1)
    p = sigma / np.where(total > 0, total, 1.0)[..., None]
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)
    return np.where(total > 0, np.exp(entropy), 0.0)


def stable_rank(sigma: ArrayLike) -> np.ndarray:
    """||dW||_F^2 / ||dW||_2^2 = sum(sigma^2) / max(sigma)^2: (..., k) -> (...); 0 for no update."""
    sigma = np.asarray(sigma, np.float64)
    largest = sigma.max(-1, initial=0.0)
    relative = sigma / np.where(largest > 0, largest, 1.0)[..., None]
    return np.sum(relative**2, axis=-1)


def energy_rank(sigma: ArrayLike, tau: float = 0.9) -> np.ndarray:
    """The fewest singular values that hold a share tau of sum(sigma^2): (..., k) -> (...) int.

    (arXiv 2405.09673, section 4.6, with "variance" read as sigma^2.) 0 for no update.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau {tau}: a share of the energy, above 0 and at most 1")
    energy = np.sort(np.asarray(sigma, np.float64), axis=-1)[..., ::-1] ** 2
    held = np.cumsum(energy, axis=-1)
    # A rounding error in the sum must not add one more value.
    enough = held >= tau * energy.sum(-1, keepdims=True) * (1 - 1e-12)
    rank = np.argmax(enough, axis=-1) + 1 if energy.shape[-1] else np.zeros(energy.shape[:-1])
    return np.where(energy.sum(-1) > 0, rank, 0).astype(int)


def numerical_rank(
    sigma: ArrayLike, shape: tuple[int, int], dtype: DTypeLike = np.float32
) -> np.ndarray:
    """#{sigma > max(shape) * eps * sigma_1}: (..., k) -> (...) int; 0 for no update.

    Args:
      shape: (in, out) of the update.
      dtype: of the stored factors, whose eps is used.
    """
    sigma = np.asarray(sigma, np.float64)
    threshold = max(shape) * np.finfo(dtype).eps * sigma.max(-1, keepdims=True, initial=0.0)
    return np.sum(sigma > threshold, axis=-1)
