"""TinyLoRA: a handful of numbers, shared by groups of matrices ("Learning to reason in 13
parameters", 2026, arXiv:2602.04118).

    y = x w + (dropout(x) a) (sum_i v_i p_i) b        w = u diag(sigma) z^T
    a = the first r columns of u diag(sqrt sigma), b = the first r rows of diag(sqrt sigma) z^T

v (n,) is trained and belongs to a group of matrices; p (n, r, r), random with variance 1 / r,
belongs to one. a, b and p are frozen. v starts at zero. The distribution of p and the square roots
on both sides are PEFT's; the paper leaves the first open and has sigma on one side.

`tying` t says how many of the L adapted matrices share a v: there are max(1, round(L (1 - t)))
groups of L / groups matrices each, rounded down, of which the last takes the rest. Matrices are in
order of their layers. Without tying, the p of a matrix span only r^2 directions, so n above r^2
adds parameters and no updates. PEFT's names: u for n, weight_tying for tying.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lorax import gather, tree
from lorax.methods import lora
from lorax.methods.arrays import joined, key_for, matrices
from lorax.methods.contract import Method, State
from lorax.methods.starts import pissa
from lorax.methods.targets import Default, adapted_matrices, layer_of

SHARED = "tinylora"  # v of all groups is at tinylora/v of the trainable tree


def tinylora(
    rank: int = 2,
    numbers: int = 64,
    tying: float = 0.0,
    projection_seed: int = 42,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> Method:
    """TinyLoRA. rank, targets, layers, dropout: see `lorax.methods.lora.lora`, which raises for
    them.

    numbers: of a group. tying: in [0, 1], 0: a group for each matrix, 1: one for all.
    projection_seed: of p, which is the same for every `seed` of a run.
    Trainable: v (groups, numbers) for all matrices, with rows of zeros if there are fewer groups.
    """
    hp = lora.checked(rank=rank, targets=targets, layers=layers, dropout=dropout)
    hp |= {"numbers": numbers, "tying": tying, "projection_seed": projection_seed}
    if numbers < 1:
        raise ValueError(f"method.numbers: {numbers} given, must be at least 1")
    if not 0 <= tying <= 1:
        raise ValueError(f"method.tying: {tying} given, must be from 0 to 1")

    def adapts(params, sites=None):
        return adapted_matrices(params, sites, hp["targets"], layers, rank)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        flat, width, constants = tree.flatten(params), pad or numbers, {}
        adapted = adapts(params, sites)
        groups, n = groups_of(adapted, tying)
        random = jax.random.key(projection_seed)
        padded = [*matrices(params, adapted, targets, random, rank)]
        for m in padded:

            def draw(key, index, m=m):
                w = gather.matrix(flat[m.path], m.site, index).astype(jnp.float32)
                a, b = pissa(key, w, rank, 1.0)
                p = jax.random.normal(key_for(key, "p"), (numbers, rank, rank)) / math.sqrt(rank)
                return {"a": a, "b": b, "p": p}

            shapes = {"a": (m.n_in, rank), "b": (rank, m.n_out), "p": (width, rank, rank)}
            group = groups.get(m.path, np.full(m.axes, -1))
            constants[m.path] = m.fill(shapes, draw) | {"group": jnp.asarray(group, jnp.int32)}
            constants[m.path] |= {"s": m.full(1), "dropout": m.full(dropout)}
        rows = n if targets is None else sum(math.prod(m.axes) for m in padded)
        return State({SHARED: {"v": jnp.zeros((rows, width))}}, tree.unflatten(constants))

    def count(params, sites=None):
        return groups_of(adapts(params, sites), tying)[1] * numbers

    return Method("tinylora", hp, init, bind, delta, count, factors, adapts=adapts, width=numbers)


def groups_of(adapted: dict, tying: float) -> tuple[dict[str, np.ndarray], int]:
    """({path: group of each layer's matrix, -1 if it is not adapted}, number of groups).

    adapted: {path: (Site, active)}. Matrices are in order of their layers, and in one layer of
    their paths in `adapted`.
    """
    places = []
    for i, (path, (_, active)) in enumerate(adapted.items()):
        for index in np.ndindex(np.shape(active)):
            if active[index]:
                places.append((index[0] if index else layer_of(path), i, path, index))
    n = max(1, round(len(places) * (1 - tying)))
    size = max(1, len(places) // n)
    groups = {path: np.full(np.shape(active), -1) for path, (_, active) in adapted.items()}
    for i, (*_, path, index) in enumerate(sorted(places)):
        groups[path][index] = min(i // size, n - 1)
    return groups, n


def _as_lora(trainable, constants, params, sites) -> dict:
    """The LoRA with the same update."""
    v, thin = trainable[SHARED]["v"], joined(constants)
    for x in thin.values():
        own = jax.nn.one_hot(x.pop("group"), len(v), dtype=v.dtype) @ v  # (layers..., numbers)
        middle = jnp.einsum("...u,...uij->...ij", own, x.pop("p").astype(v.dtype))
        x["a"], x["b"] = x["a"].astype(v.dtype) @ middle, x["b"].astype(v.dtype)
    return tree.unflatten(thin)


#: `LowRank` leaves, a (sum_i v_i p_i) b, and (a (sum_i v_i p_i), b, 1, None).
bind, delta, factors = lora.through(_as_lora)
