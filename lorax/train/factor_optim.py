"""Optimisers that see LoRA's factors a (in, r) and b (r, out) as the product s a b.

A change of the factors to a q and q^-1 b leaves the product, and so the model, as it is; what Adam
makes of it depends on q. Here each factor's gradient is measured by the other factor. Layers are
stacked, and members of a sweep are padded to the largest rank; rows of b and columns of a that are
padding stay exactly zero, and the others move as without them.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import tree


class MuonState(NamedTuple):
    """count: () int32, steps so far. momenta: of the factors, in their places. rest: the state of
    the optimiser that moves all else."""

    count: jax.Array
    momenta: dict
    rest: object


def riemannian(damping: float) -> optax.GradientTransformation:
    """Preconditioned gradients (Zhang and Pilanci 2024, arXiv:2402.02347, equation 4):

        g_a (b b^T + d I)^-1          (a^T a + d I)^-1 g_b

    Both read the factors before the step, as in PEFT; computed in float32. d is `damping`, above 0.
    s is not divided out. Embeddings' factors are preconditioned like those of other matrices, which
    PEFT leaves out; all else passes unchanged. Followed by Adam, it is the paper's ScaledAdamW.
    """

    def precondition(grads, params):
        grads, factors = tree.flatten(grads), tree.flatten(params)
        for path in pairs(grads):
            a, b = (factors[f"{path}/{name}"].astype(jnp.float32) for name in "ab")
            of_a = _solved(b @ _t(b), _t(grads[f"{path}/a"]), damping)
            of_b = _solved(_t(a) @ a, grads[f"{path}/b"], damping)
            grads |= {f"{path}/a": _t(of_a), f"{path}/b": of_b}
        return tree.unflatten(grads)

    return optax.stateless(precondition)


def lora_muon(
    rest: optax.GradientTransformation,
    rate: Callable,
    weight_decay,
    momentum: float,
    scales: Mapping[str, jax.Array],
) -> optax.GradientTransformation:
    """LoRA-Muon (Cesista et al. 2026, arXiv:2606.12921): the product s a b moves as by Muon.

    With the momenta m_a, m_b, msign(u diag(sigma) v^T) = u v^T and the rate lr, a step is

        da = -lr / (2 |s|) msign(m_a (b b^T)^-1/2) (b b^T)^-1/2
        db = -lr / (2 |s|) (a^T a)^-1/2 msign((a^T a)^-1/2 m_b)
        a <- c a + da / c,  b <- c b + db / c,  c = sqrt(1 - lr weight_decay)

    so s da b and s a db have spectral norm lr / 2 each, whatever the rank, s, and the sizes of a
    and b, and the decay is that of the product, 1 - lr weight_decay. From the paper: these formulas
    with m <- momentum m + (1 - momentum) g. Decided here: s is divided out, as the paper's product
    has none; msign and the roots are iterated until they are exact but for rounding, by products of
    matrices alone (on a CPU, SVDs of a stack in a compiled step can wait for each other for ever);
    directions in which the partner is zero get no step (a pseudo-inverse), so from b = 0 the first
    step moves b alone; there is no factor of the matrix's shape.

    rest: what moves all else, with its rate and decay. rate: step -> lr, which may be traced.
    scales: {path: s (layers...)}.
    """

    def init(params):
        flat = tree.flatten(params)
        factors, others = _apart(flat)
        zeros = {path: jnp.zeros_like(x) for path, x in factors.items()}
        return MuonState(jnp.int32(0), tree.unflatten(zeros), rest.init(tree.unflatten(others)))

    def update(grads, state, params):
        (moving, others), (factors, still) = map(_apart, map(tree.flatten, (grads, params)))
        updates, of_rest = rest.update(tree.unflatten(others), state.rest, tree.unflatten(still))
        average = lambda m, g: momentum * m + (1 - momentum) * g
        momenta = jax.tree.map(average, tree.flatten(state.momenta), moving)
        lr = rate(state.count)
        keep = jnp.sqrt(1 - lr * weight_decay)
        updates = tree.flatten(updates)
        for path in pairs(moving):
            names = f"{path}/a", f"{path}/b"
            steps = _spectral(
                *(factors[name] for name in names), *(momenta[name] for name in names)
            )
            size = lr / (2 * keep * jnp.abs(scales[path])[..., None, None])
            for name, step in zip(names, steps, strict=True):
                change = (keep - 1) * factors[name] - size * step
                updates[name] = change.astype(factors[name].dtype)
        new = MuonState(state.count + 1, tree.unflatten(momenta), of_rest)
        return tree.unflatten(updates), new

    return optax.GradientTransformation(init, update)


def scales(constants: dict) -> dict[str, jax.Array]:
    """{path: s (layers...)} of a method's constants."""
    flat = tree.flatten(constants)
    return {path.removesuffix("/s"): x for path, x in flat.items() if path.endswith("/s")}


def pairs(flat: Mapping) -> list[str]:
    """The paths of which `flat`, {path/name: array}, has both factors, path/a and path/b."""
    paths = [path.removesuffix("/a") for path in flat if path.endswith("/a")]
    return [path for path in paths if f"{path}/b" in flat]


def _apart(flat: Mapping) -> tuple[dict, dict]:
    """(the factors, all else) of {path/name: array}."""
    names = {f"{path}/{name}" for path in pairs(flat) for name in "ab"}
    return {n: flat[n] for n in flat if n in names}, {n: flat[n] for n in flat if n not in names}


def _spectral(a, b, m_a, m_b):
    """(step of a, step of b), float32, before their size: (step of a) b and a (step of b) are the
    matrices of spectral norm 1 that gain most along the momenta. Leading axes are of layers."""
    a, b, m_a, m_b = (x.astype(jnp.float32) for x in (a, b, m_a, m_b))
    used = (jnp.any(a != 0, axis=-2) | jnp.any(b != 0, axis=-1)).astype(jnp.float32)
    of_b, of_a = _inverse_root(_t(b)), _inverse_root(a)
    step_a = _sign(m_a @ of_b) @ of_b
    step_b = of_a @ _t(_sign(_t(of_a @ m_b)))
    return step_a * used[..., None, :], step_b * used[..., :, None]


def _inverse_root(x):
    """(x^T x)^-1/2 (..., r, r) of x (..., n, r), zero where x is.

    The root is x^T sign(x), whose condition is that of x and not its square. Its pseudo-inverse is
    the limit of z (2 - root z) from a multiple of the root (Ben-Israel and Cohen 1966).
    """
    root = _t(x) @ _sign(x)
    root = (root + _t(root)) / 2
    identity = jnp.broadcast_to(jnp.eye(root.shape[-1]), root.shape)
    first = root / jnp.square(_length(root))
    return jax.lax.fori_loop(0, 32, lambda _, z: z @ (2 * identity - root @ z), first)


def _sign(x):
    """u v^T of x = u diag(sigma) v^T (..., n, r), by Newton-Schulz steps of order five, which take
    all singular values above 1e-5 of the largest to 1 and leave zeros as they are."""

    def step(_, x):
        gram = _t(x) @ x
        return 1.875 * x - x @ (1.25 * gram - 0.375 * (gram @ gram))

    return jax.lax.fori_loop(0, 20, step, x / _length(x))


def _length(x):
    """Frobenius norms (..., 1, 1), 1 for zeros."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    return jnp.where(norm > 0, norm, 1)


def _solved(gram, right, damping: float):
    """(gram + damping I)^-1 right, in the dtype of `right`.

    The inverse is by the sweep operator (Goodnight 1979), which takes no pivots other than the
    diagonal's, and no routine of LAPACK: see `lora_muon`.
    """
    size = gram.shape[-1]

    def sweep(i, x):
        column = jax.lax.dynamic_index_in_dim(x, i, axis=-1)  # (..., r, 1)
        pivot = jax.lax.dynamic_index_in_dim(column, i, axis=-2)  # (..., 1, 1)
        here = jnp.broadcast_to((jnp.arange(size) == i)[:, None], column.shape)
        u = jnp.where(here, -1, column)
        return jnp.where(here | _t(here), 0, x) - u * _t(u) / pivot

    damped = gram + jnp.broadcast_to(damping * jnp.eye(size), gram.shape)
    inverse = -jax.lax.fori_loop(0, size, sweep, damped)
    return (inverse @ right.astype(gram.dtype)).astype(right.dtype)


def _t(x):
    return jnp.swapaxes(x, -2, -1)
