"""OFT: a weight turned by a block-diagonal rotation of its inputs (Qiu et al. 2023,
arXiv:2306.07280; Liu et al. 2025, arXiv:2506.19847, which applies it to the input).

    y = (x R) w         R = (I + Q) (I - Q)^-1 (Cayley), Q skew-symmetric, in blocks of b x b

The trained numbers are those above Q's diagonal, in/b times b (b - 1) / 2; Q starts at zero and R
at I. R is orthogonal, so w's singular values, the lengths of its columns and the angles between
them stay as they are, and dw = (R - I) w is not of low rank. It is computed with R - I, as
2 Q (I - Q)^-1, which is not rounded next to ones.

`neumann` = t > 0 has a series in place of the inverse, as version 2 of the paper, and is not quite
orthogonal: R = I + 2 Q + 2 Q^2 + ... + Q^d, d = max(t - 1, 3), and I + 2 Q for t = 2. That is what
PEFT computes with `num_cayley_neumann_terms` = t, of which 3 and 4 are therefore the same.

PEFT's array is oft_R.weight, one row for each block. Without the series PEFT has the transposed
rotation, (I - Q) (I + Q)^-1; its Q is then minus ours. Departures from PEFT: exact by default,
where PEFT has t = 5; a block size that does not divide a target's inputs is refused, which PEFT
replaces by another one. COFT's bound on Q and shared blocks are left out.

Members of a sweep with several block sizes share a program where one divides the other (by a power
of two): Q then has the largest blocks, and is zero outside the member's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lorax import leaves, ops, tree
from lorax.methods.arrays import joined, matrices, updates
from lorax.methods.contract import Method, State
from lorax.methods.elimination import inverse
from lorax.methods.targets import Default, adapted_matrices, only_linear, words_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Turned(leaves.Added):
    """A weight whose inputs are turned: dense(leaf) = w + T w, T block-diagonal (in, in).

    w: a kernel or another operator leaf. t: (n, p, p), the blocks of T, with the layer axes first;
    n p may exceed `in`, and the rows and columns beyond it take no part.
    """

    w: object
    t: jax.Array

    def linear(self, x):
        turned = _in_blocks(x[..., None], self.t)
        turned = jnp.einsum("...nio,nij->...njo", turned, self.t.astype(x.dtype))
        return ops.linear(x + _out_of_blocks(turned, x.shape[-1])[..., 0], self.w)

    def delta(self, w, site):
        rows = site.to_matrix(w)
        blocks = _in_blocks(rows, self.t)
        turned = jnp.einsum("...nij,...njo->...nio", self.t.astype(w.dtype), blocks)
        return site.from_matrix(_out_of_blocks(turned, rows.shape[-2]), w.shape)


def _in_blocks(x, t):
    """(..., in, m) -> (..., n, p, m), rows of zeros at the end."""
    n, p = t.shape[-3:-1]
    *axes, rows, m = x.shape
    x = jnp.pad(x, (*((0, 0),) * len(axes), (0, n * p - rows), (0, 0)))
    return x.reshape(*axes, n, p, m)


def _out_of_blocks(x, rows: int):
    """Inverse of `_in_blocks`."""
    *axes, n, p, m = x.shape
    return x.reshape(*axes, n * p, m)[..., :rows, :]


def oft(
    block_size: int = 32,
    neumann: int = 0,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
) -> Method:
    """OFT with the given hyperparameters; see `lorax.methods.Method` for what its functions take.

    block_size: b, which must divide the inputs of every target. neumann: 0 for the exact rotation,
    or the number of terms of the series, 2 to 64. targets, layers: see
    `lorax.methods.lora.lora`. Trainable: q (layers..., in/b, b (b - 1) / 2).
    Raises ValueError for a value out of range, and targets that are not as said.
    """
    hp = dict(block_size=block_size, neumann=neumann, targets=words_of(targets), layers=layers)
    if block_size < 2:
        raise ValueError(f"method.block_size: {block_size} given, must be at least 2")
    if neumann != 0 and not 2 <= neumann <= 64:
        raise ValueError(f"method.neumann: {neumann} given, must be 0 (exact) or from 2 to 64")

    def adapts(params, sites=None):
        adapted = only_linear(adapted_matrices(params, sites, hp["targets"], layers))
        for m in matrices(params, adapted):
            if m.n_in % block_size:
                raise ValueError(
                    f"method.block_size: {block_size} given, but {m.path} has {m.n_in} inputs, "
                    "which must be a multiple of it"
                )
        return adapted

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        size, trainable, constants = pad or block_size, {}, {}
        for m in matrices(params, adapts(params, sites), targets):
            shape = (-(-m.n_in // size), size * (size - 1) // 2)
            trainable[m.path] = {"q": jnp.zeros((*m.axes, *shape))}
            # Blocks of one row have no rotation: they are those of layers that are not adapted.
            sizes = np.where(m.active, block_size, 1)
            constants[m.path] = {"size": jnp.asarray(sizes, jnp.float32)}
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        adapted = matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * m.n_in * (block_size - 1) // 2 for m in adapted)

    def bind(trainable, constants, params, key=None, sites=None):
        flat = tree.flatten(params)
        for path, x in joined(trainable, constants).items():
            flat[path] = Turned(flat[path], turn(skew(x["q"], x["size"]), neumann))
        return tree.unflatten(flat)

    def delta(trainable, constants, params, sites=None):
        return updates(bind, trainable, constants, params, sites)

    return Method("oft", hp, init, bind, delta, count, adapts=adapts, width=block_size)


def skew(q, size):
    """Skew-symmetric blocks (layers..., n, p, p) with q (layers..., n, p (p - 1) / 2) above the
    diagonal; zero outside of the diagonal blocks of `size` (layers...) rows."""
    p = int(np.sqrt(2 * q.shape[-1])) + 1
    rows, columns = np.triu_indices(p, 1)  # in PEFT's order
    size = size.astype(jnp.int32)[..., None]
    at = lambda x: jnp.asarray(x, jnp.int32).reshape((1,) * (size.ndim - 1) + x.shape)
    inside = at(rows) // size == at(columns) // size
    q = jnp.where(inside[..., None, :], q, 0)
    index = np.zeros((p, p), np.int32)
    index[rows, columns] = index[columns, rows] = np.arange(len(rows))
    sign = np.sign(np.arange(p)[None] - np.arange(p)[:, None])
    sign = jnp.asarray(sign, q.dtype).reshape((1,) * (q.ndim - 1) + sign.shape)
    return jnp.take(q, index, axis=-1) * sign


def turn(q, neumann: int = 0):
    """R - I of skew-symmetric matrices (..., p, p), exact or with the terms of a series."""
    if neumann == 0:
        eye = jnp.eye(q.shape[-1], dtype=q.dtype).reshape((1,) * (q.ndim - 2) + q.shape[-2:])
        return 2 * q @ inverse(eye - q)
    if neumann == 2:
        return 2 * q
    total, power = 2 * q, q
    for _ in range(max(neumann - 1, 3) - 2):
        power = power @ q
        total += 2 * power
    return total + power @ q
