"""The Walsh-Hadamard transform."""

import jax
import jax.numpy as jnp
import numpy as np

BITS = 4  # of the index that one product works on: a 16 x 16 matrix


def hadamard(x: jax.Array) -> jax.Array:
    """H x over the last axis, H[i, j] = (-1)^popcount(i & j), not normalised: H H = n I.

    x: (..., n), n a power of two. H is symmetric, so the gradient is H times the cotangent. This
    takes n log n operations: H is a Kronecker product of small ones, and each product with one of
    these moves the index bits that it has processed to the front, so that the next bits are last.
    Raises ValueError for another n.
    """
    *lead, n = x.shape
    bits = n.bit_length() - 1
    if n != 1 << bits:
        raise ValueError(f"a transform of {n} values: the number must be a power of two")
    parts = -(-bits // BITS)
    for i in range(parts):
        size = 1 << (bits // parts + (i < bits % parts))
        rows = x.reshape(*lead, n // size, size)
        x = jnp.einsum("ij,...rj->...ir", matrix(size, x.dtype), rows).reshape(x.shape)
    return x


def matrix(n: int, dtype=np.float32) -> np.ndarray:
    """H itself, (n, n), n a power of two."""
    index = np.arange(n, dtype=np.uint32)
    return (1 - 2 * (np.bitwise_count(index[:, None] & index) % 2).astype(np.int8)).astype(dtype)


def at_least(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
