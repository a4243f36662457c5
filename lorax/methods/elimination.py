"""The inverse of small matrices without LAPACK.

Steps run on all of a CPU's devices at once, where LAPACK's batched calls can wait for each other
for ever.
"""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def inverse(a: jax.Array) -> jax.Array:
    """The inverses of matrices (..., n, n) by Gauss-Jordan elimination without pivots.

    It is stable where x^T a x > 0 for every x, as for I - Q with Q skew-symmetric: no pivot is then
    below that of the symmetric part. So it is for triangular matrices with a diagonal of ones.
    """
    n = a.shape[-1]

    def eliminate(k, a):
        row, column = (jax.lax.dynamic_index_in_dim(a, k, axis, False) for axis in (-2, -1))
        pivot = jax.lax.dynamic_index_in_dim(row, k, -1)
        one = (jnp.arange(n) == k).astype(a.dtype)
        one = one.reshape((1,) * (row.ndim - 1) + one.shape)
        return a - (column - one)[..., :, None] * ((row + one) / pivot)[..., None, :]

    return jax.lax.fori_loop(0, n, eliminate, a)


@inverse.defjvp
def _inverse_jvp(primals, tangents):
    x = inverse(*primals)
    return x, -x @ tangents[0] @ x
