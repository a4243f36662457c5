"""The largest eigenvalue of symmetric matrices that are known by their products with vectors.

Lanczos' method: H restricted to the span of v, Hv, H^2 v... is tridiagonal, and its largest
eigenvalue theta is at most that of H. The norm of the residual, |H y - theta y|, bounds the
distance to an eigenvalue of H. All earlier vectors are kept and each new one is made orthogonal to
them twice, as rounding would otherwise bring back eigenvalues that are found already (Parlett, The
Symmetric Eigenvalue Problem, 1998, chapter 13).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh_tridiagonal


class Largest(NamedTuple):
    """value: (M,) float64, the largest eigenvalues. residual: (M,), |H y - value y| of unit vectors
    y: an eigenvalue lies so near. products: how many vectors each matrix was multiplied with."""

    value: np.ndarray
    residual: np.ndarray
    products: int


def largest_eigenvalues(
    product: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    tolerance: float = 1e-3,
    most: int = 100,
) -> Largest:
    """The largest eigenvalues of M symmetric matrices H (P, P), side by side.

    Args:
      product: (M, P) -> (M, P), the product of every H with its vector. With float32 products the
        residual can't fall below about 1e-6 of the largest |eigenvalue|.
      start: (M, P), where to begin, e.g. random; none may be 0. Coordinates that are 0 in it stay
        so if `product` keeps them 0.
      tolerance: stops once every residual is below this share of its |value|.
      most: stops after so many products in any case.

    Raises ValueError for a start of zeros and a product that is not finite.
    """
    start = np.asarray(start, np.float64)
    length = np.linalg.norm(start, axis=1, keepdims=True)
    if start.ndim != 2 or not np.all(length > 0):
        raise ValueError(f"start {start.shape}: need (M, P), none of the M all zeros")
    basis, alphas, betas = [start / length], [], []
    while True:
        w = np.asarray(product(basis[-1]), np.float64)
        if not np.isfinite(w).all():
            raise ValueError("product: returned numbers that are not finite")
        alphas.append(np.sum(w * basis[-1], axis=1))
        for _ in range(2):
            for q in basis:
                w = w - np.sum(w * q, axis=1, keepdims=True) * q
        beta = np.linalg.norm(w, axis=1)
        value, last = _ritz(np.stack(alphas, 1), np.stack(betas, 1) if betas else None)
        residual = beta * np.abs(last)
        # Once the span is all that H moves the start in, w is only rounding error.
        exhausted = beta <= 1e-6 * np.max(np.abs(alphas), axis=0)
        residual = np.where(exhausted, 0.0, residual)
        if np.all(residual <= tolerance * np.abs(value)) or len(alphas) == most:
            return Largest(value, residual, len(alphas))
        betas.append(np.where(exhausted, 0.0, beta))
        basis.append(
            np.where(exhausted, 0.0, 1.0)[:, None] * w / np.where(beta > 0, beta, 1)[:, None]
        )


def _ritz(alphas: np.ndarray, betas: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(the largest eigenvalue of each tridiagonal matrix, the last entry of its unit vector)."""
    if betas is None:
        return alphas[:, 0], np.ones(len(alphas))
    top = alphas.shape[1] - 1
    found = [
        eigh_tridiagonal(d, e, select="i", select_range=(top, top))
        for d, e in zip(alphas, betas, strict=True)
    ]
    return np.array([w[0] for w, _ in found]), np.array([v[-1, 0] for _, v in found])
