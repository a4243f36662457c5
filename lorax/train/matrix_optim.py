"""Optimisers that see a parameter as a matrix: Adafactor and Muon.

Layers are stacked in one array, and members of a sweep are padded to the largest rank. Here each
layer's matrix is trained as if it were a parameter by itself, and the rows and columns that take
part in no update, as those of padding, don't count in the factors that depend on a matrix's size.
So a member of rank 4 in a stack padded to rank 64 trains as it does alone.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from lorax import ops, tree


def adafactor(sites: Mapping[str, ops.Site]) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5), external rate.

    The second moment of a matrix (n, m) is kept as n + m numbers, that of anything else in full;
    beta2 = 1 - t^-0.8, updates are clipped to a root mean square of 1. Without first moment and
    without scaling by the parameter's own size (section 8), which would hold back a factor that
    starts at zero; transformers' Trainer leaves both out too.

    sites: {path: Site} of the base's kernels.
    """
    # Every matrix is factored, as in the paper, not only those of 128 rows and columns: whether one
    # is must not depend on the rank to which it is padded.
    of_matrix = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), _clip_rms())
    of_rest = optax.chain(optax.scale_by_factored_rms(factored=False), _clip_rms())
    return _leafwise(sites, of_matrix, of_rest, of_embedding=of_matrix)


def muon(sites: Mapping[str, ops.Site], rest: optax.GradientTransformation, momentum: float):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, orthogonalised.

    The update of a matrix is its Nesterov momentum with all singular values brought near 1 by five
    Newton-Schulz steps, times sqrt(max(1, out / in)). As its authors recommend, embeddings that are
    trained in full are left to `rest`, and so is what is no matrix; other than there, a head that
    is trained in full is a matrix like the others.

    sites: {path: Site} of the base's kernels. rest: another optimiser's scaling.
    """
    of_matrix = optax.chain(optax.contrib.scale_by_muon(beta=momentum), _scale_by_shape())
    return _leafwise(sites, of_matrix, rest, of_embedding=rest)


def _clip_rms(most: float = 1.0) -> optax.GradientTransformation:
    """Divides an update by the root mean square of its nonzero entries, if that is above `most`."""

    def clip(update, params):
        count = jnp.maximum(jnp.sum(update != 0), 1).astype(update.dtype)
        rms = jnp.sqrt(jnp.sum(jnp.square(update)) / count)
        return update / jnp.maximum(1, rms / most)

    return optax.stateless(clip)


def _scale_by_shape() -> optax.GradientTransformation:
    """Multiplies an update (in, out) by sqrt(max(1, out / in)), without rows and columns of 0."""

    def scale(update, params):
        n_in, n_out = (jnp.sum(jnp.any(update != 0, axis=axis)) for axis in (1, 0))
        ratio = n_out / jnp.maximum(n_in, 1)
        return update * jnp.sqrt(jnp.maximum(1, ratio)).astype(update.dtype)

    return optax.stateless(scale)


def _leafwise(
    sites: Mapping[str, ops.Site],
    of_matrix: optax.GradientTransformation,
    of_rest: optax.GradientTransformation,
    of_embedding: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Transforms each layer's matrix by `of_matrix` and every other leaf by `of_rest`.

    Matrices are the kernels that are trained in full and the factors (layers..., n, m) that a
    method has for a kernel. of_embedding: for embeddings that are trained in full.
    """

    def chosen(path: str, leaf) -> optax.GradientTransformation:
        kernel, _, name = path.rpartition("/")
        site = sites.get(kernel)
        if site is not None and name == "w":
            to, back = site.to_matrix, lambda m: site.from_matrix(m, leaf.shape)
            inner = of_embedding if site.kind == "embed" else of_matrix
            return _within(_per_layer(inner, site.stack), to, back)
        if site is not None and leaf.ndim >= site.stack + 2:
            return _per_layer(of_matrix, leaf.ndim - 2)
        return of_rest

    def init(params):
        flat = tree.flatten(params)
        return tree.unflatten({path: chosen(path, x).init(x) for path, x in flat.items()})

    def update(grads, state, params):
        grads, states, params = map(tree.flatten, (grads, state, params))
        pairs = {
            path: chosen(path, g).update(g, states[path], params[path]) for path, g in grads.items()
        }
        updates, new = ({path: pair[i] for path, pair in pairs.items()} for i in (0, 1))
        return tree.unflatten(updates), tree.unflatten(new)

    return optax.GradientTransformation(init, update)


def _per_layer(inner: optax.GradientTransformation, axes: int) -> optax.GradientTransformation:
    """`inner` for each index of the first `axes` axes of an array."""
    init, update = inner
    for _ in range(axes):
        init, update = jax.vmap(init), jax.vmap(update)
    return optax.GradientTransformation(init, update)


def _within(
    inner: optax.GradientTransformation, to: Callable, back: Callable
) -> optax.GradientTransformation:
    """`inner` on to(array); its updates are turned back."""

    def update(gradient, state, param):
        change, state = inner.update(to(gradient), state, to(param))
        return back(change), state

    return optax.GradientTransformation(lambda param: inner.init(to(param)), update)
