"""DeLoRA (Bini et al. 2025, arXiv:2503.18225, equations 8 and 9): LoRA whose directions have a
length of their own.

    dW = |w| / r (lam sum_i a_i b_i / (|a_i| |b_i|) - the same at the start)
    a (in, r), b (r, out), both random; lam, trained, starts at alpha; |w| is the Frobenius norm

A method without a leaf of its own: `leaves.LowRank` computes it. One compiled program trains all
six members:

    python -m lorax.run --config=docs/examples/delora.py
"""

import jax
import jax.numpy as jnp

from lorax import leaves, methods, ops, tree
from lorax.config import default
from lorax.methods import lora


def unit(x, axis):
    """x with vectors of length 1 along an axis; padding, which is zero, stays zero."""
    square = jnp.sum(x * x, axis, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


@methods.register("delora", varies=("rank", "alpha", "targets", "layers"))
def delora(rank=8, alpha=1.0, targets=("q", "v"), layers=None):
    """DeLoRA of linear layers. Raises ValueError for a rank above min(in, out)."""

    def adapts(params, sites=None):
        return methods.adapted_matrices(params, sites, targets, layers, rank)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        flat, width, trainable, constants = tree.flatten(params), pad or rank, {}, {}
        for m in methods.matrices(params, adapts(params, sites), targets, key, rank):

            def draw(key, index, m=m):  # of one layer
                one, other = jax.random.split(key)
                a = jax.random.normal(one, (m.n_in, rank))
                return {"a": a, "b": jax.random.normal(other, (rank, m.n_out))}

            x = m.fill({"a": (m.n_in, width), "b": (width, m.n_out)}, draw)
            w = m.site.to_matrix(ops.dense(flat[m.path], m.site)).astype(jnp.float32)
            lam = jnp.where(m.active, jnp.float32(alpha), 0)
            trainable[m.path] = x | {"lam": lam}
            a0, b0 = lam[..., None, None] * unit(x["a"], -2), unit(x["b"], -1)
            s = jnp.sqrt(jnp.sum(w * w, (-2, -1))) / rank
            constants[m.path] = {"a0": a0, "b0": b0, "s": s}
        return methods.State(tree.unflatten(trainable), tree.unflatten(constants))

    def factors(trainable, constants, params, sites=None):
        found = {}
        for path, x in methods.joined(trainable, constants).items():
            a = x["lam"][..., None, None] * unit(x["a"], -2)
            a = jnp.concatenate([a, x["a0"].astype(a.dtype)], -1)
            b = jnp.concatenate([unit(x["b"], -1), -x["b0"].astype(a.dtype)], -2)
            found[path] = a, b, x["s"], None
        return found

    def bind(trainable, constants, params, key=None, sites=None):
        flat = tree.flatten(params)
        for path, (a, b, s, _) in factors(trainable, constants, params).items():
            flat[path] = leaves.LowRank(flat[path], a, b, s)
        return tree.unflatten(flat)

    def delta(trainable, constants, params, sites=None):
        return lora.products(factors(trainable, constants, params), params, sites)

    def count(params, sites=None):
        found = methods.matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * (rank * (m.n_in + m.n_out) + 1) for m in found)

    hp = dict(rank=rank, alpha=alpha, targets=targets, layers=layers)
    functions = init, bind, delta, count, factors
    return methods.Method("delora", hp, *functions, adapts=adapts, width=rank)


def get_config(arg=None):
    config = default()
    config.method.name = "delora"
    config.method.alpha = 1.0
    config.train.batch_size = 8
    config.train.lr = 1e-1
    config.train.steps = 100
    config.eval.examples = 128
    config.sweep.rank = (2, 8, 16)
    config.sweep.seed = (0, 1)
    return config
