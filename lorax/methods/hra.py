"""HRA: a weight whose inputs are reflected r times (Yuan et al. 2024, arXiv:2405.17484).

    y = x H_r ... H_1 w         H_i = I - 2 u_i u_i^T / |u_i|^2         u (in, r)

The product of reflections is I - U T^T U^T (the compact WY form; Schreiber and Van Loan 1989,
SIAM J. Sci. Stat. Comput. 10(1)), U the u_i of length 1 and T upper triangular with the inverse
I / 2 + the entries of U^T U above its diagonal. So dw = -U T^T (U^T w) is a LoRA of rank r whose
second factor follows from w, and is exported as one. w's singular values stay as they are.

At an even rank the u_i start in equal pairs, whose reflections cancel each other, as in PEFT. At an
odd rank they don't cancel: a run then starts away from the base, and its evaluation at step 0 is
the loss there. PEFT's array is hra_u. Its `apply_GS` (orthonormal u) and the paper's regulariser
are left out. A column of zeros, as padding has, is no reflection.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lorax import ops, tree
from lorax.methods import lora
from lorax.methods.arrays import joined, matrices
from lorax.methods.contract import Method, State
from lorax.methods.elimination import inverse
from lorax.methods.starts import uniform
from lorax.methods.targets import Default, adapted_matrices, only_linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Reflected(ops.Leaf):
    """A weight whose inputs are reflected: dense(leaf) = w - u t u^T w.

    w: a kernel or another operator leaf. u: (in, r), t: (r, r), each with the layer axes first.
    """

    w: object
    u: jax.Array
    t: jax.Array

    def linear(self, x):
        u, t = self.u.astype(x.dtype), self.t.astype(x.dtype)
        return ops.linear(x - ((x @ u) @ t) @ u.T, self.w)

    def dense(self, w, site):
        a, b = self.update(site.to_matrix(w))
        return w + site.from_matrix(a @ b, w.shape)

    def update(self, w):
        """(a, b) with a b = -u t u^T w, of a matrix or matrices (layers..., in, out)."""
        u, t = self.u.astype(w.dtype), self.t.astype(w.dtype)
        return u, -t @ (jnp.swapaxes(u, -1, -2) @ w)


def hra(
    rank: int = 8,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
) -> Method:
    """HRA with the given hyperparameters; see `lorax.methods.Method` for what its functions take.

    rank: r >= 1, the number of reflections; an odd one does not start as the base. targets, layers:
    see `lorax.methods.lora.lora`. Trainable: u (layers..., in, r).
    Raises ValueError for a rank below 1, and for targets that are not linear layers.
    """
    hp = lora.checked(rank=rank, targets=targets, layers=layers)

    def adapts(params, sites=None):
        return only_linear(adapted_matrices(params, sites, hp["targets"], layers))

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        trainable = {}
        for m in matrices(params, adapts(params, sites), targets, key, rank):
            draw = lambda key, index, n_in=m.n_in: {"u": _start(key, n_in, rank)}
            trainable[m.path] = m.fill({"u": (m.n_in, pad or rank)}, draw)
        return State(tree.unflatten(trainable), {})

    def count(params, sites=None):
        adapted = matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * m.n_in * rank for m in adapted)

    return Method("hra", hp, init, bind, delta, count, factors, adapts=adapts, width=rank)


def _start(key, n_in: int, rank: int):
    """u (in, r): PEFT's Kaiming start of (in, r / 2) with each column twice, or of (in, r)."""
    drawn = rank if rank % 2 else rank // 2
    return jnp.repeat(uniform(key, drawn, (n_in, drawn)), rank // drawn, axis=1)


def reflections(u):
    """(U, T^T) of the head of this file, for u (layers..., in, r)."""
    square = jnp.sum(jnp.square(u), axis=-2, keepdims=True)
    u = u * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    products = jnp.swapaxes(u, -1, -2) @ u
    eye = jnp.eye(u.shape[-1], dtype=u.dtype).reshape((1,) * (u.ndim - 2) + products.shape[-2:])
    t = 2 * inverse(eye + 2 * jnp.triu(products, 1))
    return u, jnp.swapaxes(t, -1, -2)


def _leaves(trainable, params) -> dict[str, Reflected]:
    """{path: `Reflected`} of the adapted matrices."""
    flat = tree.flatten(params)
    return {
        path: Reflected(flat[path], *reflections(x["u"])) for path, x in joined(trainable).items()
    }


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with a `Reflected` leaf at every adapted path."""
    return tree.unflatten(tree.flatten(params) | _leaves(trainable, params))


def factors(trainable, constants, params, sites=None):
    """{path: (U, -T^T U^T w, 1, None)}."""
    sites = sites or ops.sites_from_shapes(params)
    found = {}
    for path, leaf in _leaves(trainable, params).items():
        w = sites[path].to_matrix(ops.wide(leaf.w, sites[path]))
        found[path] = *leaf.update(w), jnp.ones(w.shape[:-2], jnp.float32), None
    return found


def delta(trainable, constants, params, sites=None):
    """{path: -U T^T U^T w in the kernel's shape, float32}."""
    return lora.products(factors(trainable, constants, params, sites), params, sites)
