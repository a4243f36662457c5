"""Sums of updates: what one update does to another if both are added to one weight.

    cosine(i, j) = <dW_i, dW_j> / (|dW_i| |dW_j|),   <X, Y> the sum of all products of entries

Of the sum S of several updates, each update has:

    kept = <dW_i, S> / |dW_i|^2
        1 if the others are orthogonal to it; below 1 they cancel a part of it, above they add to it
    disturbed = |U_i^T (S - dW_i)| / |dW_i|,   U_i the input directions of dW_i
        what the others add for the inputs that dW_i reads, relative to what it adds itself

For updates in random directions the cosine has mean 0 and standard deviation 1 / sqrt(in out), kept
has mean 1, and disturbed is about |S - dW_i| sqrt(r_i / in) / |dW_i|. All of it comes from SVDs of
the factors; dW is not formed unless it is dense itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lorax import spectrum

EXACT, LEADING = 512, 64  # a dense update with more rows and columns has its leading directions


class Directions(NamedTuple):
    """An update as u diag(sigma) vt: u (in, k), sigma (k,), vt (k, out), float64; whole: dW (in,
    out) of a dense update, of which u and vt may have the leading k directions only, or None."""

    u: np.ndarray
    sigma: np.ndarray
    vt: np.ndarray
    whole: np.ndarray | None

    @property
    def dense(self) -> np.ndarray:
        """dW (in, out)."""
        return (self.u * self.sigma) @ self.vt if self.whole is None else self.whole


class Sum(NamedTuple):
    """n updates of one matrix and their sum. inner: (n, n), <dW_i, dW_j>. norm: of the sum. kept,
    disturbed, by_chance: (n,), as above; NaN for an update that is 0."""

    inner: np.ndarray
    norm: float
    kept: np.ndarray
    disturbed: np.ndarray
    by_chance: np.ndarray


def directions(delta: ArrayLike | tuple[ArrayLike, ...]) -> Directions:
    """The directions of an update: of factors (a, b) or (a, b, s), or of dW (in, out)."""
    if isinstance(delta, tuple):
        u, sigma, vt = spectrum.factor_svd(*delta[:3])
        return _existing(u, sigma, vt, None)
    whole = np.asarray(delta, np.float64)
    if min(whole.shape) <= EXACT:
        u, sigma, vt = spectrum.leading_svd(whole, min(LEADING, *whole.shape))
    else:
        u, sigma, vt = spectrum.randomised_svd(whole, LEADING, iterations=8)[:3]
    return _existing(u, sigma, vt, whole)


def _existing(u, sigma, vt, whole) -> Directions:
    """Without the directions whose sigma is only rounding."""
    floor = max(len(u), vt.shape[1]) * np.finfo(np.float32).eps * sigma.max(initial=0.0)
    some = sigma > floor
    return Directions(u[:, some], sigma[some], vt[some], whole)


def inner(first: Directions, second: Directions) -> float:
    """<dW_1, dW_2>."""
    if first.whole is None and second.whole is None:
        shared = (first.u.T @ second.u) * (first.vt @ second.vt.T)
        return float(first.sigma @ shared @ second.sigma)
    return float(np.sum(first.dense * second.dense))


def summed(updates: Sequence[Directions]) -> Sum:
    """What becomes of updates of one matrix in their sum."""
    n = len(updates)
    products = np.zeros((n, n))
    for i, first in enumerate(updates):
        for j in range(i, n):
            products[i, j] = products[j, i] = inner(first, updates[j])
    squares = np.diag(products)
    moves = squares > 0
    safe = np.where(moves, squares, 1.0)
    total = max(float(products.sum()), 0.0)
    kept = np.where(moves, products.sum(1) / safe, np.nan)
    others = np.maximum(total - 2 * products.sum(1) + squares, 0.0)  # |S - dW_i|^2
    share = np.array([len(x.sigma) / max(len(x.u), 1) for x in updates])
    disturbed = np.array([_added(i, updates) for i in range(n)])
    disturbed = np.where(moves, disturbed / np.sqrt(safe), np.nan)
    by_chance = np.where(moves, np.sqrt(others * share / safe), np.nan)
    return Sum(products, total**0.5, kept, disturbed, by_chance)


def _added(i: int, updates: Sequence[Directions]) -> float:
    """|U_i^T (S - dW_i)|."""
    u, added = updates[i].u, 0.0
    for j, other in enumerate(updates):
        if j != i and other.whole is None:
            added = added + ((u.T @ other.u) * other.sigma) @ other.vt
        elif j != i:
            added = added + u.T @ other.whole
    return float(np.linalg.norm(added))
