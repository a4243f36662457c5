"""Bottleneck adapters: small feed-forward networks between frozen layers.

    h = x w + bias,  y = h + f(h down + down_bias) up + up_bias      down (d, m), up (m, d)

- Houlsby (Houlsby et al. 2019, arXiv:1902.00751, section 2.1): after the attention's and the
  feed-forward's output projection, before the residual sum; GELU; the norms are trained as well.
- Pfeiffer (Pfeiffer et al. 2020, arXiv:2005.00247): after the feed-forward's alone; ReLU; m = d/16,
  which is the default of 48 for BERT's 768 features; no norms.

Departures. The authors' code (adapter-bert) draws both matrices from a normal distribution of
standard deviation 0.001, cut off at two of them; here `up` starts at zero, so that an adapted model
is its base at step 0. Pfeiffer's adapter in AdapterHub reads the sum with the residual stream after
its norm; here, as Houlsby's, what the feed-forward gives. Nothing of this is a change of weights:
it can't be merged, and costs two products more in generation too.
"""

import jax
import jax.numpy as jnp

from lorax import leaves, methods, tree
from lorax.errors import nearest
from lorax.methods.full import beside
from lorax.methods.targets import Default, words_of
from lorax.models.layers import ACTIVATIONS

WIDTH = 1e-3  # standard deviation of `down` at the start, before the cut


def houlsby(
    rank: int = 64,
    activation: str = "gelu",
    targets: tuple[str, ...] = Default(("o", "down")),
    layers: tuple[int, ...] | None = None,
    full: tuple[str, ...] = (),
) -> "methods.Method":
    """Houlsby's adapters, and every norm trained; see `lorax.methods.Method`.

    rank: m >= 1, the adapter's inner size. activation: f, a name of `layers.ACTIVATIONS`. targets:
    the linear layers that an adapter follows, see `lorax.methods.resolve`. layers: indices of the
    layers that have adapters, None for all. full: words for what is trained beside the norms, which
    are trained in all layers.
    Raises ValueError for a value out of range and a target that is no linear layer.
    """
    words = (full,) if isinstance(full, str) else tuple(full)
    words = tuple(dict.fromkeys(("norms", *words)))
    return beside(_bottleneck("houlsby", rank, activation, targets, layers), words, "float32")


def pfeiffer(
    rank: int = 48,
    activation: str = "relu",
    targets: tuple[str, ...] = Default(("down",)),
    layers: tuple[int, ...] | None = None,
) -> "methods.Method":
    """Pfeiffer's adapters; hyperparameters and errors as of `houlsby`."""
    return _bottleneck("pfeiffer", rank, activation, targets, layers)


def _bottleneck(name, rank, activation, words, layers) -> "methods.Method":
    words = words_of(words)
    if rank < 1:
        raise ValueError(f"method.rank: {rank} given, must be at least 1")
    if activation not in ACTIVATIONS:
        hint = nearest(activation, ACTIVATIONS)
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"method.activation: {activation!r} is not one of {known}{hint}")

    def chosen(params, sites=None):
        own = methods.adapted_matrices(params, sites, words, layers)
        for path, (site, _) in own.items():
            if site.kind != "linear":
                raise ValueError(f"method.targets: {path} is no linear layer's kernel")
        return own

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        own = chosen(params, sites)
        flat, trainable, constants = tree.flatten(params), {}, {}
        for path, site in (targets or {path: site for path, (site, _) in own.items()}).items():
            axes, _, d = site.matrix_shape(flat[path].shape)
            active, m = own[path][1] if path in own else None, pad or rank

            def draw(key, index, d=d):
                return {"down": WIDTH * jax.random.truncated_normal(key, -2, 2, (d, rank))}

            # Units that only pad have zeros on both sides, and so zero gradients: every f(0) is 0.
            shapes = {"down": (d, m), "down_bias": (m,), "up": (m, d), "up_bias": (d,)}
            own_key = jax.random.fold_in(methods.key_for(key, path), rank)
            trainable[path] = methods.fill(own_key, axes, active, shapes, draw)
            on = jnp.zeros(axes) if active is None else jnp.asarray(active)
            constants[path] = {"on": on.astype(jnp.float32)}
        return methods.State(tree.unflatten(trainable), tree.unflatten(constants))

    def bind(trainable, constants, params, key=None, sites=None):
        flat = tree.flatten(params)
        for path, own in methods.joined(trainable, constants).items():
            # The one gradient that would not be zero where this member has no adapter.
            up_bias = own["up_bias"] * own["on"][..., None].astype(own["up_bias"].dtype)
            within = own["down"], own["down_bias"], own["up"], up_bias
            flat[path] = leaves.Bottleneck(flat[path], *within, ACTIVATIONS[activation])
        return tree.unflatten(flat)

    def count(params, sites=None):
        flat, total = tree.flatten(params), 0
        for path, (site, active) in chosen(params, sites).items():
            d = site.matrix_shape(flat[path].shape)[2]
            total += int(active.sum()) * (2 * d * rank + rank + d)
        return total

    hp = dict(rank=rank, activation=activation, targets=words, layers=layers)
    return methods.Method(name, hp, init, bind, None, count, adapts=chosen, width=rank)
