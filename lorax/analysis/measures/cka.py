"""Linear CKA: how alike two sets of activations of the same examples are.

Kornblith et al. 2019, Similarity of Neural Network Representations Revisited (arXiv 1905.00414),
section 3: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with linear kernels K = X X^T, L = Y Y^T.
"""

import numpy as np
from numpy.typing import ArrayLike


def linear_cka(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F), columns centred: no (n, n) matrix is formed.

    Turning the features, scaling all of them and shifting any of them change nothing.

    Args:
      x: (..., n, p), n examples and p features. Other axes (batch, position) become examples by
        reshaping: x.reshape(-1, p).
      y: (..., n, q), of the same examples in the same order.

    Returns (...), float64, from 0 (nothing in common) to 1 (the same up to rotation and scale); 0
    where x or y is the same for all examples. With fewer examples than features it says little:
    unrelated activations also come near 1.

    Raises ValueError where the examples do not match.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim < 2 or y.ndim < 2 or x.shape[-2] != y.shape[-2]:
        raise ValueError(
            f"activations: need (..., n, p) and (..., n, q) of the same n, got {x.shape}, {y.shape}"
        )
    x, y = _centred(x), _centred(y)
    norm = lambda x, y: np.linalg.norm(np.swapaxes(x, -1, -2) @ y, axis=(-2, -1))
    own = norm(x, x) * norm(y, y)
    return np.where(own > 0, norm(x, y) ** 2 / np.where(own > 0, own, 1.0), 0.0)


def _centred(x: np.ndarray) -> np.ndarray:
    """x - its mean over examples, of unit norm (no overflow later); zeros where none varies."""
    centred = x - x.mean(-2, keepdims=True)
    whole, rest = (np.linalg.norm(v, axis=(-2, -1), keepdims=True) for v in (x, centred))
    # The mean of equal numbers is rounded: what it leaves is no variation.
    varies = rest > x.shape[-2] * np.finfo(np.float64).eps * whole
    return np.where(varies, centred / np.where(varies, rest, 1.0), 0.0)
