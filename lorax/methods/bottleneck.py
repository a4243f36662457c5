"""Bottleneck adapters: small feed-forward networks between frozen layers.

    h = x w + bias,  y = h + f(h down + down_bias) up + up_bias      down (d, m), up (m, d)

- Houlsby (Houlsby et al. 2019, arXiv:1902.00751, section 2.1): after the output projections of
  attention and feed-forward layer, before the residual sum; GELU; the norms are trained as well.
- Pfeiffer (Pfeiffer et al. 2020, arXiv:2005.00247): only after the feed-forward layer; ReLU;
  m = d/16, which is the default of 48 for BERT's 768 features; no norms.

Departures. The authors' code (adapter-bert) draws both matrices from a normal distribution with
standard deviation 0.001, truncated at two standard deviations; here `up` starts at zero, so that an
adapted model equals its base at step 0. Pfeiffer's adapter in AdapterHub reads the normalised sum
with the residual stream; here it reads the feed-forward output, as Houlsby's does. Neither is a
change of weights: it can't be merged, and generation costs two more products.
"""

import jax
import jax.numpy as jnp

from lorax import leaves, tree
from lorax.errors import nearest
from lorax.methods.arrays import joined, matrices
from lorax.methods.contract import Method, State
from lorax.methods.full import beside
from lorax.methods.targets import Default, adapted_matrices, words_of
from lorax.models.layers import ACTIVATIONS

WIDTH = 1e-3  # initial standard deviation of `down`, before truncation


def houlsby(
    rank: int = 64,
    activation: str = "gelu",
    targets: tuple[str, ...] = Default(("o", "down")),
    layers: tuple[int, ...] | None = None,
    full: tuple[str, ...] = (),
) -> Method:
    """Houlsby's adapters, and every norm trained; see `lorax.methods.Method`.

    rank: m >= 1, the adapter's inner size. activation: f, a name of `layers.ACTIVATIONS`. targets:
    the linear layers that an adapter follows, see `lorax.methods.resolve`. layers: indices of the
    layers that have adapters, None for all. full: words for parameters to train in addition to the
    norms, which are trained in all layers.
    Raises ValueError for a value out of range and a target that is not a linear layer.
    """
    words = tuple(dict.fromkeys(("norms", *words_of(full))))
    return beside(_bottleneck("houlsby", rank, activation, targets, layers), words, "float32")


def pfeiffer(
    rank: int = 48,
    activation: str = "relu",
    targets: tuple[str, ...] = Default(("down",)),
    layers: tuple[int, ...] | None = None,
) -> Method:
    """Pfeiffer's adapters; hyperparameters and errors as of `houlsby`."""
    return _bottleneck("pfeiffer", rank, activation, targets, layers)


def _bottleneck(name, rank, activation, words, layers) -> Method:
    words = words_of(words)
    if rank < 1:
        raise ValueError(f"method.rank: {rank} given, must be at least 1")
    if activation not in ACTIVATIONS:
        hint = nearest(activation, ACTIVATIONS)
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"method.activation: {activation!r} is not one of {known}{hint}")

    def adapts(params, sites=None):
        adapted = adapted_matrices(params, sites, words, layers)
        for path, (site, _) in adapted.items():
            if site.kind != "linear":
                raise ValueError(f"method.targets: {path} is not a linear layer's kernel")
        return adapted

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        width, trainable, constants = pad or rank, {}, {}
        for m in matrices(params, adapts(params, sites), targets, key, rank):
            d = m.n_out

            def draw(key, index, d=d):
                return {"down": WIDTH * jax.random.truncated_normal(key, -2, 2, (d, rank))}

            # Padding units are zero on both sides, and f(0) = 0, so their gradients are zero too.
            shapes = {"down": (d, width), "down_bias": (width,), "up": (width, d), "up_bias": (d,)}
            trainable[m.path] = m.fill(shapes, draw)
            constants[m.path] = {"on": jnp.asarray(m.active, jnp.float32)}
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def bind(trainable, constants, params, key=None, sites=None):
        flat = tree.flatten(params)
        for path, x in joined(trainable, constants).items():
            # Without this, its gradient would not be zero where this member has no adapter.
            up_bias = x["up_bias"] * x["on"][..., None].astype(x["up_bias"].dtype)
            adapter = x["down"], x["down_bias"], x["up"], up_bias
            flat[path] = leaves.Bottleneck(flat[path], *adapter, ACTIVATIONS[activation])
        return tree.unflatten(flat)

    def count(params, sites=None):
        each = lambda d: 2 * d * rank + rank + d
        return sum(
            int(m.active.sum()) * each(m.n_out) for m in matrices(params, adapts(params, sites))
        )

    hp = dict(rank=rank, activation=activation, targets=words, layers=layers)
    return Method(name, hp, init, bind, None, count, adapts=adapts, width=rank)
