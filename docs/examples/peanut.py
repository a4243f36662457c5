"""PEANuT (Zhong et al. 2024, arXiv:2410.01870): an update that a small network makes of the weight.

    y = x (w + dW)    dW = gain relu(w a) b    a (out, r), b (r, out), zero at the start

This is PEANuT without hidden layers. A method in a file of its own, with an operator leaf and a
hyperparameter, `gain`, that lorax knows nothing of. One compiled program trains all 8 members:

    python -m lorax.run --config=docs/examples/peanut.py
    python -m lorax.run --config=docs/examples/peanut.py --config.sweep.gain="(4.0, 16.0)"
    python -m lorax.plan --config=docs/examples/peanut.py
    python -m lorax.convert merge gpt2-nano runs/peanut/adapters/0 merged \\
        --method docs/examples/peanut.py
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lorax import methods, ops, tree
from lorax.config import default


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class WeightAware(ops.Leaf):
    """A weight with an update that reads it: dense(leaf) = w + s relu(w a) b.

    w: the kernel or another leaf. a: (out, r), b: (r, out), s: () float32, layer axes in front.
    """

    w: object
    a: jax.Array
    b: jax.Array
    s: jax.Array

    def linear(self, x):
        w, a, b, s = (t.astype(x.dtype) for t in (ops.matrix(self.w), self.a, self.b, self.s))
        return x @ (w + s * (jax.nn.relu(w @ a) @ b))

    def dense(self, w, site):
        return w + site.from_matrix(update(site.to_matrix(w), self.a, self.b, self.s), w.shape)


def update(w, a, b, s):
    """dW of matrices w (layers..., in, out), in the dtype of w."""
    a, b, s = (t.astype(w.dtype) for t in (a, b, s))
    return s[..., None, None] * jnp.matmul(jax.nn.relu(jnp.matmul(w, a)), b)


@methods.register(
    "peanut",
    varies=("rank", "gain", "targets", "layers"),  # padding, or in the trees
    help={"gain": "of the update: dW = gain relu(w a) b"},
)
def peanut(
    rank: int = 8,
    gain: float = 1.0,
    targets: tuple[str, ...] = ("q", "v"),
    layers: tuple[int, ...] | None = None,
) -> methods.Method:
    """PEANuT of linear layers. Raises ValueError for a rank below 1 or above min(in, out)."""
    if rank < 1:
        raise ValueError(f"method.rank: {rank} given, must be at least 1")

    def adapts(params, sites=None):
        return methods.adapted_matrices(params, sites, targets, layers, rank)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        width, trainable, constants = pad or rank, {}, {}
        for m in methods.matrices(params, adapts(params, sites), targets, key, rank):

            def draw(key, index, n_out=m.n_out):  # of one layer; b stays zero
                bound = 1 / math.sqrt(n_out)
                return {"a": jax.random.uniform(key, (n_out, rank), jnp.float32, -bound, bound)}

            trainable[m.path] = m.fill({"a": (m.n_out, width), "b": (width, m.n_out)}, draw)
            constants[m.path] = {"s": m.full(gain)}
        return methods.State(tree.unflatten(trainable), tree.unflatten(constants))

    def bind(trainable, constants, params, key=None, sites=None):
        flat = tree.flatten(params)
        for path, x in methods.joined(trainable, constants).items():
            flat[path] = WeightAware(flat[path], x["a"], x["b"], x["s"])
        return tree.unflatten(flat)

    def delta(trainable, constants, params, sites=None):
        sites = sites or ops.sites_from_shapes(params)
        flat, updates = tree.flatten(params), {}
        for path, x in methods.joined(trainable, constants).items():
            w = ops.dense(flat[path], sites[path]).astype(jnp.float32)
            dw = update(sites[path].to_matrix(w), x["a"], x["b"], x["s"])
            updates[path] = sites[path].from_matrix(dw, w.shape)
        return updates

    def count(params, sites=None):
        found = methods.matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * 2 * rank * m.n_out for m in found)

    hp = dict(rank=rank, gain=gain, targets=targets, layers=layers)
    return methods.Method("peanut", hp, init, bind, delta, count, adapts=adapts, width=rank)


def get_config(arg=None):
    config = default()
    config.method.name = "peanut"
    config.train.batch_size = 8
    config.train.steps = 150
    config.train.lr = 5e-2  # a step is scaled by |w|
    config.eval.examples = 128
    config.sweep.rank = (2, 8)
    config.sweep.gain = (1.0, 4.0)
    config.sweep.seed = (0, 1)
    return config
