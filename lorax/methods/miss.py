"""MiSS: groups of inputs that share one update (Kang and Yin 2024, arXiv:2409.15371, first called
Bone).

    y = x w + sum_g dropout(x)_g d        x_g: the g-th r inputs, d (r, out), zero at the start

so dW[i, o] = d[i mod r, o]: a LoRA with b = d whose a is frozen, the identity repeated. It trains
r out numbers, and there is no alpha. If r does not divide the inputs, the last group is smaller.
PEFT's `miss_block` is d.

With `mini_rank` m (PEFT's "mini"), outputs share as well: dW[i, o] = d[i mod r, o mod m], d (r, m).
PEFT's "bat", dW = d w + d block by block, is not here: it has no rank r, and no padding.
"""

import jax
import jax.numpy as jnp

from lorax import ops, tree
from lorax.methods import lora
from lorax.methods.arrays import joined, matrices
from lorax.methods.contract import Method, State
from lorax.methods.targets import Default, adapted_matrices


def miss(
    rank: int = 64,
    mini_rank: int | None = None,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> Method:
    """MiSS. targets, layers, dropout: see `lorax.methods.lora.lora`, which raises for them.

    rank: inputs of a group, at most the inputs of every target. mini_rank: outputs that do not
    share, a divisor of the outputs of every target; None: no outputs share.
    Trainable: d (layers..., r, out), or (layers..., r, mini_rank).
    """
    hp = lora.checked(rank=rank, targets=targets, layers=layers, dropout=dropout)
    hp["mini_rank"] = mini_rank
    if mini_rank is not None and mini_rank < 1:
        raise ValueError(f"method.mini_rank: {mini_rank} given, must be at least 1")

    def adapts(params, sites=None):
        adapted = adapted_matrices(params, sites, hp["targets"], layers)
        for m in matrices(params, adapted):
            if rank > m.n_in:
                raise ValueError(
                    f"method.rank: {rank} given, but {m.path} has {m.n_in} inputs: at most that"
                )
            if mini_rank is not None and m.n_out % mini_rank:
                raise ValueError(
                    f"method.mini_rank: {mini_rank} given, but {m.path} has {m.n_out} outputs: "
                    "must be a divisor"
                )
        return adapted

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        trainable, constants = {}, {}
        for m in matrices(params, adapts(params, sites), targets):
            trainable[m.path] = {"d": jnp.zeros((*m.axes, pad or rank, mini_rank or m.n_out))}
            constants[m.path] = {"r": jnp.asarray(rank * m.active, jnp.int32), "s": m.full(1)}
            constants[m.path]["dropout"] = m.full(dropout)
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        adapted = matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * rank * (mini_rank or m.n_out) for m in adapted)

    return Method("miss", hp, init, bind, delta, count, factors, adapts=adapts, width=rank)


def _as_lora(trainable, constants, params, sites) -> dict:
    """The LoRA with the same update."""
    sites = sites or ops.sites_from_shapes(params)
    flat, thin = tree.flatten(params), joined(trainable, constants)
    for path, x in thin.items():
        d, r = x.pop("d"), x.pop("r")
        _, n_in, n_out = sites[path].matrix_shape(ops.frozen(flat[path]).shape)
        # Where nothing is adapted, r is 0 and so is all of a: d stays zero.
        place = jax.lax.broadcasted_iota(jnp.int32, (*r.shape, n_in), r.ndim)
        place = jnp.where(r[..., None] > 0, place % jnp.maximum(r[..., None], 1), -1)
        x["a"] = jax.nn.one_hot(place, d.shape[-2], dtype=d.dtype)
        x["b"] = jnp.tile(d, n_out // d.shape[-1])
    return tree.unflatten(thin)


#: `LowRank` leaves, d repeated, and (the identity repeated, d, 1, None).
bind, delta, factors = lora.through(_as_lora)
