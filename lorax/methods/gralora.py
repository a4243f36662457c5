"""GraLoRA: a LoRA of its own for each of k x k blocks of a matrix (Jung et al. 2025,
arXiv:2505.20355).

    dw[n, m] = s a[n, m] b[n, m]      a (k, k, in/k, r/k), b (k, k, r/k, out/k), s = alpha / r

Block (n, m) maps the n-th of k parts of the input to the m-th of k parts of the output. There are
r (in + out) trained numbers, as in LoRA of rank r, and dw has a rank of up to k r. As a LoRA of
rank k r, which most of is zero, it is exported and analysed; it is computed without the zeros.

a starts at U(-1/sqrt(in/k), 1/sqrt(in/k)) and b at zero, as in PEFT, whose arrays are ours with the
blocks side by side: gralora_A (k, in/k, r) and gralora_B (k, r, out/k). Here a and b are one matrix
for each block, so that the arrays of a smaller rank fit into the first columns of a larger one's,
and so that Muon sees the matrices that take part in a product. Dropout is on the input, as in LoRA.
PEFT's `hybrid_r`, a LoRA beside it, is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lorax import grouped, leaves, ops, tree
from lorax.methods import lora
from lorax.methods.arrays import joined, matrices, updates
from lorax.methods.contract import Method, State
from lorax.methods.starts import uniform
from lorax.methods.targets import Default, adapted_matrices, only_linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Blocks(leaves.Added):
    """A frozen weight plus a low-rank update for each of its k x k blocks:
    dense(leaf)[n, m] = w[n, m] + s a[n, m] b[n, m].

    w: a kernel or another operator leaf. a: (k, k, in/k, c), b: (k, k, c, out/k), s: () float32.
    dropout: on the input of a. Each has the layer axes first.
    """

    w: object
    a: jax.Array
    b: jax.Array
    s: jax.Array
    dropout: leaves.Dropout | None = None

    def linear(self, x):
        a, b, s = (t.astype(x.dtype) for t in (self.a, self.b, self.s))
        parts = leaves.dropout(x, self.dropout).reshape(*x.shape[:-1], len(a), -1)
        z = jnp.einsum("...ni,nmic->...nmc", parts, a)
        y = jnp.einsum("...nmc,nmco->...mo", z, b)
        return ops.linear(x, self.w) + s * y.reshape(*y.shape[:-2], -1)

    def ragged(self, x, sizes):  # the update of all experts
        update = self._update(np.promote_types(x.dtype, np.float32)).astype(x.dtype)
        update = grouped.product(leaves.ragged_dropout(x, self.dropout), update, sizes)
        return ops.ragged(x, self.w, sizes) + update

    def delta(self, w, site):
        return site.from_matrix(self._update(w.dtype), w.shape)

    def _update(self, dtype):
        a, b, s = (t.astype(dtype) for t in (self.a, self.b, self.s))
        return s[..., None, None] * joined_blocks(a @ b)


def joined_blocks(blocks):
    """(..., k, k, i, o) -> (..., k i, k o): a matrix from its blocks."""
    *axes, k, _, i, o = blocks.shape
    return jnp.swapaxes(blocks, -3, -2).reshape(*axes, k * i, k * o)


def gralora(
    rank: int = 8,
    alpha: float = 8.0,
    scaling: str = "lora",
    blocks: int = 2,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> Method:
    """GraLoRA, with the hyperparameters of `lorax.methods.lora.lora` and one of its own.

    rank: a multiple of `blocks`. blocks: k, which must divide the inputs and outputs of every
    target. Trainable: a (layers..., k, k, in/k, r/k), b (layers..., k, k, r/k, out/k).
    Raises ValueError as LoRA, and for a rank, blocks or targets that are not as said.
    """
    hp = dict(rank=rank, alpha=alpha, scaling=scaling, targets=targets, layers=layers)
    hp = lora.checked(**hp, dropout=dropout) | {"blocks": blocks}
    if blocks < 1:
        raise ValueError(f"method.blocks: {blocks} given, must be at least 1")
    if rank % blocks:
        raise ValueError(f"method.rank: {rank} given, must be a multiple of blocks, {blocks}")

    def adapts(params, sites=None):
        adapted = only_linear(adapted_matrices(params, sites, hp["targets"], layers, rank))
        for m in matrices(params, adapted):
            if m.n_in % blocks or m.n_out % blocks:
                raise ValueError(
                    f"method.blocks: {blocks} given, but {m.path} is {m.n_in} x {m.n_out}; both "
                    "must be multiples of it"
                )
        return adapted

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        trainable, constants = {}, {}
        width = -(-(pad or rank) // blocks)
        for m in matrices(params, adapts(params, sites), targets, key, rank):
            n_in, n_out = m.n_in // blocks, m.n_out // blocks

            def draw(key, index, n_in=n_in):
                return {"a": uniform(key, n_in, (blocks, blocks, n_in, rank // blocks))}

            shapes = {"a": (n_in, width), "b": (width, n_out)}
            shapes = {name: (blocks, blocks, *shape) for name, shape in shapes.items()}
            trainable[m.path] = m.fill(shapes, draw)
            constants[m.path] = {"s": m.full(hp["scale"]), "dropout": m.full(dropout)}
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        adapted = matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * rank * (m.n_in + m.n_out) for m in adapted)

    return Method("gralora", hp, init, bind, delta, count, factors, adapts=adapts, width=rank)


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with a `Blocks` leaf at every adapted path; dropout if a key is given."""
    flat = tree.flatten(params)
    for path, x in joined(trainable, constants).items():
        dropout = lora.dropout_of(path, x, key)
        flat[path] = Blocks(flat[path], x["a"], x["b"], x["s"], dropout)
    return tree.unflatten(flat)


def delta(trainable, constants, params, sites=None):
    """{path: the matrix of all s a[n, m] b[n, m] in the kernel's shape}."""
    return updates(bind, trainable, constants, params, sites)


def factors(trainable, constants, params, sites=None):
    """{path: (a, b, s, None)} of the LoRA of rank k r: its inner index (n, m, c) has a[n, m] in the
    rows of part n alone and b[n, m] in the columns of part m alone."""
    found = {}
    for path, x in joined(trainable, constants).items():
        *axes, k, _, n_in, c = x["a"].shape
        eye = jnp.eye(k, dtype=x["a"].dtype)
        a = jnp.einsum("...nmic,np->...pinmc", x["a"], eye)
        b = jnp.einsum("...nmco,mp->...nmcpo", x["b"], eye)
        inner = k * k * c
        found[path] = a.reshape(*axes, k * n_in, inner), b.reshape(*axes, inner, -1), x["s"], None
    return found
