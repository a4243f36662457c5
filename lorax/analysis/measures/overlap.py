"""How much two updates share their directions (LoRA, arXiv 2106.09685, section 7.2 and appendix G).

phi(i, j) = ||U1[:, :i]^T U2[:, :j]||_F^2 / min(i, j), from 0 (orthogonal) to 1 (one contains the
other), where U1 and U2 are orthonormal bases in order of importance. Appendix G says left singular
vectors; for A (r, in), our a^T, only the right ones live in the input space, and those are meant.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from lorax.spectrum import existing, factor_svd


class Band(NamedTuple):
    """The chance level: mean and the 5% and 95% quantiles, each (r1, r2)."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def basis_similarity(u1: ArrayLike, u2: ArrayLike) -> np.ndarray:
    """phi for all (i, j) at once, from one product of two orthonormal bases.

    Args:
      u1: (..., n, r1), orthonormal columns in order of importance.
      u2: (..., n, r2), likewise.

    Returns (..., r1, r2): phi(i, j) at [i - 1, j - 1]. A missing direction (a column of
    zeros) is shared with none.
    """
    u1, u2 = np.asarray(u1, np.float64), np.asarray(u2, np.float64)
    if u1.shape[-2] != u2.shape[-2]:
        raise ValueError(f"bases of different spaces: {u1.shape} and {u2.shape}, need (n, r) each")
    squares = (np.swapaxes(u1, -1, -2) @ u2) ** 2
    shared = np.cumsum(np.cumsum(squares, axis=-2), axis=-1)
    i = np.arange(1, u1.shape[-1] + 1)[:, None]
    j = np.arange(1, u2.shape[-1] + 1)[None, :]
    return shared / np.minimum(i, j)


def principal_angles(u1: ArrayLike, u2: ArrayLike) -> np.ndarray:
    """The angles between the spans of two orthonormal bases, in radians.

    Björck & Golub 1973: the cosines are the singular values of u1^T u2; below 45 degrees the angle
    is computed from its sine, which is more accurate there. phi(r1, r2) is sum(cos^2) / min(r1,
    r2), so phi(i, i) is the mean of cos^2 over the angles of the first i columns.

    Args:
      u1: (..., n, r1), orthonormal columns.
      u2: (..., n, r2), likewise.

    Returns (..., min(r1, r2)), ascending, from 0 (a common direction) to pi / 2. A missing
    direction (a column of zeros) is orthogonal to all.
    """
    u1, u2 = np.asarray(u1, np.float64), np.asarray(u2, np.float64)
    if u1.shape[-2] != u2.shape[-2]:
        raise ValueError(f"bases of different spaces: {u1.shape} and {u2.shape}, need (n, r) each")
    if u1.shape[-1] < u2.shape[-1]:
        u1, u2 = u2, u1
    cross = np.swapaxes(u1, -1, -2) @ u2
    cosines = np.linalg.svd(cross, compute_uv=False)
    # The part of u2 outside u1's span; an extra row makes a column of zeros orthogonal to all.
    missing = np.linalg.norm(u2, axis=-2) < 0.5
    apart = np.concatenate([u2 - u1 @ cross, missing[..., None] * np.eye(u2.shape[-1])], axis=-2)
    sines = np.linalg.svd(apart, compute_uv=False)[..., ::-1]
    small = cosines**2 > 0.5
    return np.where(
        small, np.arcsin(np.where(small, sines, 0.0)), np.arccos(np.where(small, 0.0, cosines))
    )


def directions(a: ArrayLike) -> np.ndarray:
    """The left singular vectors of a (..., n, r), sigma descending: (..., n, min(n, r)).

    These are the right singular vectors of the paper's A = a^T. If a singular value is zero up to
    rounding, there is no direction, and the column is zero.
    """
    a = np.asarray(a, np.float64)
    u, sigma, _ = np.linalg.svd(a, full_matrices=False)
    return existing(u, sigma, a.shape[-2:])


def update_directions(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Directions of dW = a @ b: input (..., in, k) and output (..., out, k), k = min(r, in, out).

    They don't depend on the scale. Directions whose singular value is zero are columns of zeros.
    """
    u, sigma, vt = factor_svd(a, b)
    shape = (u.shape[-2], vt.shape[-1])
    return existing(u, sigma, shape), existing(np.swapaxes(vt, -1, -2), sigma, shape)


def subspace_similarity(a1: ArrayLike, a2: ArrayLike) -> np.ndarray:
    """The paper's phi between two adapters' A: a1 (..., in, r1), a2 (..., in, r2) -> (..., r1, r2).

    Section 7.2, equation 4, with a = A^T and the singular vectors of the factors themselves.
    """
    return basis_similarity(directions(a1), directions(a2))


def output_similarity(b1: ArrayLike, b2: ArrayLike) -> np.ndarray:
    """phi between two adapters' B: b1 (..., r1, out), b2 (..., r2, out) -> (..., r1, r2).

    The paper's B is b^T (out, r); its left singular vectors span the output directions.
    """
    b1, b2 = np.asarray(b1, np.float64), np.asarray(b2, np.float64)
    return subspace_similarity(np.swapaxes(b1, -1, -2), np.swapaxes(b2, -1, -2))


def update_similarity(
    factors1: tuple[ArrayLike, ...], factors2: tuple[ArrayLike, ...], side: str = "in"
) -> np.ndarray:
    """phi between the directions of two updates dW = a @ b, rather than of one factor alone.

    A's directions include those of its random start; dW's include only those that b uses.

    Args:
      factors1, factors2: (a, b) or (a, b, s), with a (..., in, r) and b (..., r, out).
      side: "in" for the input directions, "out" for the output directions.
    """
    if side not in ("in", "out"):
        raise ValueError(f"side {side!r}: 'in' or 'out'")
    which = 0 if side == "in" else 1
    first, second = update_directions(*factors1[:2]), update_directions(*factors2[:2])
    return basis_similarity(first[which], second[which])


def expected_similarity(i: ArrayLike, j: ArrayLike, n: int) -> np.ndarray:
    """The mean of phi(i, j) over uniformly random subspaces of R^n: i j / n / min(i, j)."""
    return np.maximum(i, j) / n


def chance_similarity(n: int, r1: int, r2: int) -> Band:
    """phi between two uniformly random subspaces of R^n (the spans of Gaussian matrices, the
    paper's control), in closed form.

    phi min(i, j) is the trace of a matrix with the multivariate beta distribution (Muirhead 1982,
    Aspects of Multivariate Statistical Theory, theorem 3.3.1). For i = 1 or j = 1 that is a number
    with the distribution Beta(m / 2, (n - m) / 2), m = max(i, j), which gives exact quantiles:
    phi(1, 1) for n = 128 has mean 0.0078 and 95% quantile 0.0299. Otherwise the quantiles are those
    of a beta distribution on the possible values with the exact mean m / n and the exact variance,
    2 i j (n - i) (n - j) / (n^2 (n - 1) (n + 2)) / min(i, j)^2. (The variance follows from
    invariance to rotations: for a projection P of rank j, the mean of P_11^2 is
    j (j + 2) / (n (n + 2)), and the mean of the whole sum of squares of P is j.)

    Returns (r1, r2) each. Phi of more than n directions is that of all n.
    """
    i, j = (np.minimum(np.arange(1, r + 1.0), n) for r in (r1, r2))
    i, j = np.broadcast_arrays(i[:, None], j[None])
    few, many = np.minimum(i, j), np.maximum(i, j)
    mean = many / n
    lowest = np.maximum(i + j - n, 0.0) / few  # directions that have no room to differ
    variance = 2 * i * j * (n - i) * (n - j) / (n**2 * max(n - 1, 1) * (n + 2) * few**2)
    varies = variance > 0
    centre = np.where(varies, (mean - lowest) / np.where(varies, 1 - lowest, 1.0), 0.5)
    spread = np.where(varies, variance / np.where(varies, 1 - lowest, 1.0) ** 2, 0.1)
    total = centre * (1 - centre) / spread - 1
    quantile = lambda q: np.where(
        varies,
        lowest + (1 - lowest) * special.betaincinv(centre * total, (1 - centre) * total, q),
        mean,
    )
    return Band(mean, quantile(0.05), quantile(0.95))
