"""Linear CKA: how similar two sets of activations for the same examples are.

Kornblith et al. 2019, Similarity of Neural Network Representations Revisited (arXiv 1905.00414),
section 3: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with linear kernels K = X X^T, L = Y Y^T.
"""

import numpy as np
from numpy.typing import ArrayLike


def linear_cka(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F), with centred columns; no (n, n) matrix is formed.

    Invariant to rotating the features, scaling all of them and shifting any of them.

    Args:
      x: (..., n, p), n examples and p features. Other axes (batch, position) become examples by
        reshaping: x.reshape(-1, p).
      y: (..., n, q), for the same examples in the same order.

    Returns (...), float64, from 0 (nothing in common) to 1 (the same up to rotation and scale); 0
    if x or y is the same for all examples. With fewer examples than features it is not informative:
    unrelated activations are also close to 1.

    Raises ValueError if the numbers of examples differ.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim < 2 or y.ndim < 2 or x.shape[-2] != y.shape[-2]:
        raise ValueError(
            f"activations: need (..., n, p) and (..., n, q) of the same n, got {x.shape}, {y.shape}"
        )
    x, y = _centred(x), _centred(y)
    norm = lambda x, y: np.linalg.norm(np.swapaxes(x, -1, -2) @ y, axis=(-2, -1))
    norms = norm(x, x) * norm(y, y)
    return np.where(norms > 0, norm(x, y) ** 2 / np.where(norms > 0, norms, 1.0), 0.0)


def _centred(x: np.ndarray) -> np.ndarray:
    """x minus its mean over examples, scaled to unit norm (no overflow later); zeros if none
    varies."""
    centred = x - x.mean(-2, keepdims=True)
    norm, remainder = (np.linalg.norm(v, axis=(-2, -1), keepdims=True) for v in (x, centred))
    # The mean of equal numbers is rounded: the remainder is not variation.
    varies = remainder > x.shape[-2] * np.finfo(np.float64).eps * norm
    return np.where(varies, centred / np.where(varies, remainder, 1.0), 0.0)
