"""VeRA: one random pair of factors shared by all matrices and scaled by trained vectors (Kopiczko
et al. 2023, arXiv:2310.11454, section 3.1).

    y = x w + ((dropout(x) a) * d) b * v       a (in, r), b (r, out) frozen; d (r,), v (out,)

a and b are drawn once, as large as the largest input and output of all targets, and each matrix
uses their first rows and columns. As in PEFT they are U(-sqrt(6 / n), sqrt(6 / n)) with n the
number of rows, d starts at `d_initial` and v, the paper's b, at zero; there is no alpha / r.
PEFT's arrays: d vera_lambda_d, v vera_lambda_b, a vera_A and b vera_B transposed.

Departures: each rank has its own pair, so that no two ranks share a subspace; the numbers come from
JAX's generator and not from PEFT's, so an export includes them. d is applied to b, not to a, which
is equivalent: in (x a) (d b v), a needs no gradient.
"""

import math

import jax
import jax.numpy as jnp

from lorax import ops, tree
from lorax.methods import lora
from lorax.methods.arrays import Matrix, joined, matrices, shared
from lorax.methods.contract import Method, State
from lorax.methods.targets import Default, adapted_matrices

SHARED = "vera"  # a and b are at vera/a and vera/b of the constants, shared by all targets


def vera(
    rank: int = 256,
    d_initial: float = 0.1,
    projection_seed: int = 0,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> Method:
    """VeRA. targets, layers, dropout: see `lorax.methods.lora.lora`, which raises for them.

    rank: of the shared pair, which may exceed min(in, out). d_initial: initial value of d.
    projection_seed: of a and b, which are the same for every `seed` of a run.
    Trainable: d (layers..., r), v (layers..., out).
    """
    hp = lora.checked(rank=rank, targets=targets, layers=layers, dropout=dropout)
    hp |= {"d_initial": d_initial, "projection_seed": projection_seed}

    def adapts(params, sites=None):
        return adapted_matrices(params, sites, hp["targets"], layers)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        width, trainable, constants = pad or rank, {}, {}
        adapted = adapts(params, sites)
        padded = [*matrices(params, adapted, targets, key)]
        for m in padded:
            start = lambda key, index: {"d": jnp.full(rank, d_initial)}
            trainable[m.path] = m.fill({"d": (width,), "v": (m.n_out,)}, start)
            constants[m.path] = {"s": m.full(1), "dropout": m.full(dropout)}
        drawn = [*matrices(params, adapted)]
        constants[SHARED] = _pair(drawn, padded, rank, width, projection_seed)
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        adapted = matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * (rank + m.n_out) for m in adapted)

    return Method("vera", hp, init, bind, delta, count, factors, adapts=adapts, width=rank)


def _pair(drawn: list[Matrix], padded: list[Matrix], rank: int, width: int, seed: int) -> dict:
    """The shared a and b, as large as the largest matrix of `padded`; zero beyond the largest of
    `drawn` and beyond the rank."""

    def shapes(group, r):
        return {"a": (max(m.n_in for m in group), r), "b": (r, max(m.n_out for m in group))}

    def uniform(key, shape):
        return jax.random.uniform(key, shape, jnp.float32, -1, 1) * math.sqrt(6 / shape[0])

    return shared(seed, rank, uniform, shapes(drawn, rank), shapes(padded, width))


def _as_lora(trainable, constants, params, sites) -> dict:
    """The LoRA with the same update."""
    sites = sites or ops.sites_from_shapes(params)
    flat, thin = tree.flatten(params), joined(trainable, constants)
    pair = thin.pop(SHARED)
    for path, x in thin.items():
        d, v = x.pop("d"), x.pop("v")
        axes, n_in, n_out = sites[path].matrix_shape(ops.frozen(flat[path]).shape)
        x["a"] = jnp.broadcast_to(pair["a"][:n_in], (*axes, n_in, d.shape[-1]))
        b = jnp.broadcast_to(pair["b"][:, :n_out].astype(d.dtype), (*d.shape, n_out))
        x["b"] = d[..., :, None] * b * v[..., None, :]
    return tree.unflatten(thin)


#: `LowRank` leaves, a d b v, and (a, d b v, 1, None).
bind, delta, factors = lora.through(_as_lora)
