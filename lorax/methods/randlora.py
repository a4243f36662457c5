"""RandLoRA: an update of full rank, made of scaled random bases (Albert et al. 2025,
arXiv:2502.00987, section 3, equations 3 and 4).

    Q[(i, j)] = lam[i, j] a[i] * gamma[j]        Q (r n, min), s = alpha / r
    dw = s Q^T b^T where in <= out, otherwise s b Q

min and max are the smaller and the larger size of a matrix, and n = ceil(min / r): so many products
of rank r make the full rank. a (r, min) and b (max, r n) are random and shared by all matrices,
which use their first entries. lam (r, n) and gamma (n, min) are trained: n (r + min) numbers, the
fewer the larger r is. lam starts at zero and gamma at 1 / min; a and b are uniform with variance 1.

PEFT's arrays are randlora_lambda, randlora_gamma, and for all modules randlora_A (r, 1, min) and
randlora_B (max, n, r), which is b: PEFT too counts the inner index of Q by bases last and that of b
by bases first, which is of no account to random numbers. PEFT draws in the machine's half precision
and by torch's generator; here the numbers come from JAX's, and an export includes them.

A step holds a and b once for each layer of a stack, as much again as the base's weights of the
targets: the scan over layers takes an array for each.

Members of a sweep share a program with others of their rank: how many numbers another rank trains
does not follow from the largest rank, which is all that is known of the others.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lorax import grouped, leaves, ops, tree
from lorax.methods import lora
from lorax.methods.arrays import joined, matrices, shared, updates
from lorax.methods.contract import Method, State
from lorax.methods.targets import Default, adapted_matrices, only_linear

SHARED = "randlora"  # a and b are at randlora/a and randlora/b of the constants


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Bases(leaves.Added):
    """A frozen weight plus scaled random bases: dense(leaf) = w + s left right, see the head of
    this file.

    w: a kernel or another operator leaf. lam: (r, n), gamma: (n, min), a: (r, min), b: (max, r n),
    s: () float32. dropout: on the input of the update. Each has the layer axes first.
    """

    w: object
    lam: jax.Array
    gamma: jax.Array
    a: jax.Array
    b: jax.Array
    s: jax.Array
    dropout: leaves.Dropout | None = None

    def linear(self, x):
        left, right = (t.astype(x.dtype) for t in self._factors(x.shape[-1]))
        update = (leaves.dropout(x, self.dropout) @ left) @ right
        return ops.linear(x, self.w) + self.s.astype(x.dtype) * update

    def ragged(self, x, sizes):  # the update of all experts
        axes, n_in, _ = ops.EXPERTS.matrix_shape(ops.frozen(self.w).shape)
        update = self._update(n_in, len(axes)).astype(x.dtype)
        update = grouped.product(leaves.ragged_dropout(x, self.dropout), update, sizes)
        return ops.ragged(x, self.w, sizes) + update

    def delta(self, w, site):
        axes, n_in, _ = site.matrix_shape(w.shape)
        return site.from_matrix(self._update(n_in, len(axes)).astype(w.dtype), w.shape)

    def _factors(self, n_in: int):
        """(in, r n) and (r n, out) of one layer."""
        q = self.lam[:, :, None] * self.a[:, None] * self.gamma[None]
        q = q.reshape(-1, q.shape[-1])
        return (q.T, self.b.T) if n_in == q.shape[-1] else (self.b, q)

    def _update(self, n_in: int, stack: int):
        def one(leaf):
            left, right = leaf._factors(n_in)
            return leaf.s * (left @ right)

        return ops.over_layers(one, stack)(dataclasses.replace(self, w=None, dropout=None))


def randlora(
    rank: int = 32,
    alpha: float = 640.0,
    scaling: str = "lora",
    projection_seed: int = 0,
    targets: tuple[str, ...] = Default(("q", "v")),
    layers: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> Method:
    """RandLoRA, with the hyperparameters of `lorax.methods.lora.lora` and one of its own.

    rank: r, of each product. projection_seed: of a and b, which are the same for every `seed` of a
    run. Trainable: lam (layers..., r, n), gamma (layers..., n, min).
    Raises ValueError as LoRA, and for targets that are not linear layers.
    """
    hp = dict(rank=rank, alpha=alpha, scaling=scaling, targets=targets, layers=layers)
    hp = lora.checked(**hp, dropout=dropout) | {"projection_seed": projection_seed}

    def adapts(params, sites=None):
        return only_linear(adapted_matrices(params, sites, hp["targets"], layers, rank))

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        trainable, constants = {}, {}
        adapted = adapts(params, sites)
        padded = [*matrices(params, adapted, targets, key)]
        for m in padded:
            least = min(m.n_in, m.n_out)
            n = -(-least // rank)
            start = lambda key, index, n=n, least=least: {"gamma": jnp.full((n, least), 1 / least)}
            trainable[m.path] = m.fill({"lam": (rank, n), "gamma": (n, least)}, start)
            constants[m.path] = {"s": m.full(hp["scale"]), "dropout": m.full(dropout)}
        drawn = [*matrices(params, adapted)]
        constants[SHARED] = _pair(drawn, padded, rank, projection_seed)
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        adapted = matrices(params, adapts(params, sites))
        return sum(int(m.active.sum()) * _count(min(m.n_in, m.n_out), rank) for m in adapted)

    return Method("randlora", hp, init, bind, delta, count, adapts=adapts)


def _count(least: int, rank: int) -> int:
    """Numbers that are trained for a matrix whose smaller size is `least`."""
    return -(-least // rank) * (rank + least)


def _pair(drawn, padded, rank: int, seed: int) -> dict:
    """The shared a and b, as large as the largest matrix of `padded`; zero beyond the largest of
    `drawn`."""

    def shapes(group):
        least = max(min(m.n_in, m.n_out) for m in group)
        most = max(max(m.n_in, m.n_out) for m in group)
        return {"a": (rank, least), "b": (most, -(-least // rank) * rank)}

    def uniform(key, shape):
        return jax.random.uniform(key, shape, jnp.float32, -math.sqrt(3), math.sqrt(3))

    return shared(seed, rank, uniform, shapes(drawn), shapes(padded))


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with a `Bases` leaf at every adapted path; dropout if a key is given."""
    sites = sites or ops.sites_from_shapes(params)
    flat, arrays = tree.flatten(params), joined(trainable, constants)
    pair = arrays.pop(SHARED)
    for path, x in arrays.items():
        axes, n_in, n_out = sites[path].matrix_shape(ops.frozen(flat[path]).shape)
        inner = math.prod(x["lam"].shape[-2:])
        a = pair["a"][:, : min(n_in, n_out)]
        b = pair["b"][: max(n_in, n_out), :inner]
        a, b = (jnp.broadcast_to(t, (*axes, *t.shape)) for t in (a, b))
        dropout = lora.dropout_of(path, x, key)
        flat[path] = Bases(flat[path], x["lam"], x["gamma"], a, b, x["s"], dropout)
    return tree.unflatten(flat)


def delta(trainable, constants, params, sites=None):
    """{path: s Q^T b^T or s b Q in the kernel's shape, float32}."""
    return updates(bind, trainable, constants, params, sites)
