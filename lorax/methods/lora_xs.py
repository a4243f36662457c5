"""LoRA-XS: an r x r matrix between the weight's own singular vectors (Bałazy et al. 2024,
arXiv:2405.17604, section 3).

    y = x w + s (dropout(x) a) m b        w = u diag(sigma) v^T, s = alpha / r
    a = the first r columns of u diag(sigma), b = the first r rows of v^T, both frozen; m (r, r)

It trains r^2 numbers a matrix. m starts at zero; the paper draws it from N(0, 1e-5^2), which `std`
gives. dW lies in the first r singular subspaces of w by construction: whatever compares its
directions with those of w says nothing about training.
"""

import jax
import jax.numpy as jnp

from lorax import gather, tree
from lorax.methods import lora
from lorax.methods.arrays import joined, matrices
from lorax.methods.contract import Method, State
from lorax.methods.targets import Default, adapted_matrices


def lora_xs(
    rank: int = 8,
    alpha: float = 8.0,
    scaling: str = "lora",
    std: float = 0.0,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> Method:
    """LoRA-XS, with the hyperparameters of `lorax.methods.lora.lora`, and std, the standard
    deviation of m's initial entries. Raises ValueError as LoRA, and for a negative std.

    Trainable: m (layers..., r, r).
    """
    hp = dict(rank=rank, alpha=alpha, scaling=scaling, targets=targets, layers=layers)
    hp = lora.checked(**hp, dropout=dropout) | {"std": std}
    if std < 0:
        raise ValueError(f"method.std: {std} given, must be at least 0")

    def adapts(params, sites=None):
        return adapted_matrices(params, sites, hp["targets"], layers, rank)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        flat, r, trainable, constants = tree.flatten(params), pad or rank, {}, {}
        for m in matrices(params, adapts(params, sites), targets, key, rank):

            def draw(key, index, m=m):
                w = gather.matrix(flat[m.path], m.site, index).astype(jnp.float32)
                u, sigma, vt = jnp.linalg.svd(w, full_matrices=False)
                middle = std * jax.random.normal(key, (rank, rank))
                return {"a": u[:, :rank] * sigma[None, :rank], "b": vt[:rank], "m": middle}

            arrays = m.fill({"a": (m.n_in, r), "b": (r, m.n_out), "m": (r, r)}, draw)
            trainable[m.path] = {"m": arrays.pop("m")}
            constants[m.path] = arrays | {"s": m.full(hp["scale"]), "dropout": m.full(dropout)}
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        adapted = matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * rank**2 for m in adapted)

    return Method("lora-xs", hp, init, bind, delta, count, factors, adapts=adapts, width=rank)


def _as_lora(trainable, constants, params, sites) -> dict:
    """The LoRA with the same update."""
    thin = joined(trainable, constants)
    for x in thin.values():
        m = x.pop("m")
        x["a"], x["b"] = x["a"].astype(m.dtype) @ m, x["b"].astype(m.dtype)
    return tree.unflatten(thin)


#: `LowRank` leaves, s a m b, and (a m, b, s, None).
bind, delta, factors = lora.through(_as_lora)
