"""SHiRA: a few entries of each weight, trained (Bhardwaj et al. 2024, arXiv:2406.13175, section 3).

    y = x (w + dW)        dW is zero but for r (in + out) entries

as many as a LoRA of rank r trains, but an update of high rank: the control for whether a claim is
about the rank or about the number of parameters. The entries start at zero.

mask: "random", or "magnitude", the largest |w| (the paper's WM). The paper and PEFT draw a random
mask from all subsets of this size; here the entries of w, in rows, are cut into r (in + out) runs
of equal length, and each run has one entry, drawn at random. It needs no sort of all entries, and
gives each row of w its share. The paper's masks by structure, gradient and SNIP are not here.
PEFT's `shira_weight` and `shira_indices` are the values and the places in w^T.

dW is computed whole, one layer at a time, in both passes (`lorax.leaves.Updated`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lorax import gather, leaves, tree
from lorax.errors import nearest
from lorax.methods import lora
from lorax.methods.arrays import joined, matrices, updates
from lorax.methods.contract import Method, State
from lorax.methods.targets import Default, adapted_matrices

MASKS = ("random", "magnitude")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Sparse(leaves.Updated):
    """A frozen weight plus values at some of its entries.

    w: a kernel or another operator leaf. values: (n,). places: (n,) int32, of the values among the
    entries in rows, counted from 1; 0 for padding. Layer axes first.
    """

    w: object
    values: jax.Array
    places: jax.Array
    dropout: None = None

    def update(self, w):
        values = self.values.astype(w.dtype)
        place = jnp.where(self.places > 0, self.places - 1, w.size)  # beyond the end: dropped
        return jnp.zeros(w.size, w.dtype).at[place].add(values, mode="drop").reshape(w.shape)


def shira(
    rank: int = 32,
    mask: str = "random",
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
) -> Method:
    """SHiRA. targets, layers: see `lorax.methods.lora.lora`, which raises for them.

    rank: r, so that r (in + out) entries are trained, not more than there are. mask: of `MASKS`.
    Trainable: values (layers..., r (in + out)).
    """
    hp = lora.checked(rank=rank, targets=targets, layers=layers) | {"mask": mask}
    if mask not in MASKS:
        known = f"not one of {', '.join(MASKS)}{nearest(mask, MASKS)}"
        raise ValueError(f"method.mask: {mask!r} is {known}")

    def adapts(params, sites=None):
        adapted = adapted_matrices(params, sites, hp["targets"], layers)
        for m in matrices(params, adapted):
            if rank * (m.n_in + m.n_out) > m.n_in * m.n_out:
                raise ValueError(
                    f"method.rank: {rank} given, but {m.path} is {m.n_in} x {m.n_out}: at most "
                    f"{m.n_in * m.n_out // (m.n_in + m.n_out)}"
                )
        return adapted

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        flat, trainable, constants = tree.flatten(params), {}, {}
        for m in matrices(params, adapts(params, sites), targets, key, rank):
            n, width = rank * (m.n_in + m.n_out), (pad or rank) * (m.n_in + m.n_out)

            def draw(key, index, m=m, n=n):
                if mask == "random":
                    return {"places": 1 + _spread(key, m.n_in * m.n_out, n)}
                w = gather.matrix(flat[m.path], m.site, index).astype(jnp.float32)
                return {"places": 1 + jnp.sort(jax.lax.top_k(jnp.abs(w).ravel(), n)[1])}

            places = m.fill({"places": (width,)}, draw, jnp.int32)
            trainable[m.path] = {"values": jnp.zeros((*m.axes, width))}
            constants[m.path] = places
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        adapted = matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * rank * (m.n_in + m.n_out) for m in adapted)

    return Method("shira", hp, init, bind, delta, count, adapts=adapts, width=rank)


def _spread(key, size: int, n: int):
    """(n,) int32, increasing: one number of each of n runs that 0 to size - 1 are cut into."""
    edges = np.arange(n + 1) * size // n
    return jax.random.randint(key, (n,), edges[:-1].astype(np.int32), edges[1:].astype(np.int32))


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with a `Sparse` leaf at every adapted path."""
    flat = tree.flatten(params)
    for path, x in joined(trainable, constants).items():
        flat[path] = Sparse(flat[path], x["values"], x["places"])
    return tree.unflatten(flat)


def delta(trainable, constants, params, sites=None):
    """{path: the values at their places, in the kernel's shape, float32}."""
    return updates(bind, trainable, constants, params, sites)
