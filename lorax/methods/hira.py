"""HiRA: an update of high rank from thin factors (Huang et al., ICLR 2025,
openreview.net/forum?id=TwJrTz9cRS).

    y = x w + dropout(x) (w * (a b))        elementwise; a (in, r), b (r, out)

The rank of w * (a b) is up to r times that of w, so it is not exported as a LoRA; where w is zero,
it stays zero. There is no alpha: a step of the update is |w| times that of a b, and the best
learning rate is far above LoRA's. a starts as in LoRA, b at zero; of an embedding, a starts at zero
and b is drawn. PEFT's hira_A and hira_B are a and b transposed.

dW is computed whole, one layer at a time, in both passes (`lorax.leaves.Updated`).
"""

import dataclasses

import jax
import jax.numpy as jnp

from lorax import leaves, ops, tree
from lorax.methods import lora
from lorax.methods.arrays import joined, matrices, updates
from lorax.methods.contract import Method, State
from lorax.methods.starts import drawn
from lorax.methods.targets import Default, adapted_matrices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Elementwise(leaves.Updated):
    """A frozen weight plus itself times a low-rank matrix, entry by entry:
    dense(leaf) = w + w * (a b).

    w: a kernel or another operator leaf. a: (in, r), b: (r, out), layer axes first.
    """

    w: object
    a: jax.Array
    b: jax.Array
    dropout: leaves.Dropout | None = None

    def update(self, w):
        return w * (self.a.astype(w.dtype) @ self.b.astype(w.dtype))

    def embed(self, ids, dtype=None):
        rows = ops.embed(ids, self.w, dtype)
        a, b = self.a.astype(rows.dtype), self.b.astype(rows.dtype)
        return rows + rows * (jnp.take(a, ids, axis=0) @ b)


def hira(
    rank: int = 32,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> Method:
    """HiRA, with hyperparameters of `lorax.methods.lora.lora`; raises as that does.

    Trainable: a (layers..., in, r), b (layers..., r, out).
    """
    hp = lora.checked(rank=rank, targets=targets, layers=layers, dropout=dropout)

    def adapts(params, sites=None):
        return adapted_matrices(params, sites, hp["targets"], layers, rank)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        width, trainable, constants = pad or rank, {}, {}
        for m in matrices(params, adapts(params, sites), targets, key, rank):

            def draw(key, index, m=m):  # what it leaves out stays zero
                return drawn("kaiming", m.site.kind, key, m.n_in, m.n_out, rank)

            trainable[m.path] = m.fill({"a": (m.n_in, width), "b": (width, m.n_out)}, draw)
            constants[m.path] = {"dropout": m.full(dropout)}
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        adapted = matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * rank * (m.n_in + m.n_out) for m in adapted)

    return Method("hira", hp, init, bind, delta, count, adapts=adapts, width=rank)


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with an `Elementwise` leaf at every adapted path; dropout if a key is given."""
    flat = tree.flatten(params)
    for path, x in joined(trainable, constants).items():
        flat[path] = Elementwise(flat[path], x["a"], x["b"], lora.dropout_of(path, x, key))
    return tree.unflatten(flat)


def delta(trainable, constants, params, sites=None):
    """{path: w * (a b) in the kernel's shape, float32}."""
    return updates(bind, trainable, constants, params, sites)
