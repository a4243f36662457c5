"""LoRA-XS (arXiv:2405.17604): an r x r matrix between the frozen singular vectors of each weight.

    dW = s a R b    a = U_r Sigma_r (in, r), b = V_r^T (r, out), both frozen; R (r, r), zero at the
    start    s = alpha / r

A method without a leaf of its own: `leaves.LowRank` computes it. One compiled program trains all
six members, in half a minute on two cores:

    python -m lorax.run --config=docs/examples/lora_xs.py
"""

import jax.numpy as jnp
import numpy as np

from lorax import leaves, methods, ops, tree
from lorax.config import default
from lorax.methods import lora


@methods.register("lora-xs", varies=("rank", "alpha", "targets", "layers"))
def lora_xs(rank=8, alpha=8.0, targets=("q", "v"), layers=None):
    """LoRA-XS of linear layers. Raises ValueError for a rank above min(in, out)."""

    def adapts(params, sites=None):
        return methods.adapted_matrices(params, sites, targets, layers, rank)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        flat, trainable, constants = tree.flatten(params), {}, {}
        for m in methods.matrices(params, adapts(params, sites), targets):
            w = m.site.to_matrix(ops.dense(flat[m.path], m.site)).astype(jnp.float32)
            u, sigma, vt = jnp.linalg.svd(w, full_matrices=False)
            n = min(pad or rank, sigma.shape[-1])  # zeros beyond the rank, and where not adapted
            on = m.active[..., None] & (np.arange(n) < rank)
            a = jnp.where(on[..., None, :], (u * sigma[..., None, :])[..., :n], 0)
            b = jnp.where(on[..., None], vt[..., :n, :], 0)
            constants[m.path] = {"a": a, "b": b, "s": m.full(alpha / rank)}
            trainable[m.path] = {"r": jnp.zeros((*m.axes, n, n))}
        return methods.State(tree.unflatten(trainable), tree.unflatten(constants))

    def factors(trainable, constants, params, sites=None):
        both = methods.joined(trainable, constants).items()
        return {path: (x["a"] @ x["r"], x["b"], x["s"], None) for path, x in both}

    def bind(trainable, constants, params, key=None, sites=None):
        flat = tree.flatten(params)
        for path, (a, b, s, _) in factors(trainable, constants, params).items():
            flat[path] = leaves.LowRank(flat[path], a, b, s)
        return tree.unflatten(flat)

    def delta(trainable, constants, params, sites=None):
        return lora.products(factors(trainable, constants, params), params, sites)

    def count(params, sites=None):
        return sum(int(active.sum()) * rank**2 for _, active in adapts(params, sites).values())

    hp = dict(rank=rank, alpha=alpha, targets=targets, layers=layers)
    functions = init, bind, delta, count, factors
    return methods.Method("lora-xs", hp, *functions, adapts=adapts, width=rank)


def get_config(arg=None):
    config = default()
    config.method.name = "lora-xs"
    config.train.batch_size = 8
    config.train.lr = 1e-2
    config.train.steps = 100
    config.eval.examples = 128
    config.sweep.rank = (2, 8, 16)
    config.sweep.seed = (0, 1)
    return config
