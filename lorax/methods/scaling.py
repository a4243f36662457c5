"""(IA)3: activations scaled by learned vectors (Liu et al. 2022, arXiv:2205.05638, section 3.3).

    y = l * (x w + bias)        l (out,), on keys and values
    y = (l * x) w + bias        l (in,), on the feed-forward's inner activation, the input of "down"

l starts at one, so that an adapted model equals its base. Both are changes of weights: l scales
the columns of w and the bias, or the rows of w. As in PEFT, weight decay pulls l towards zero, not
one; PEFT's `feedforward_modules` is `feedforward` here. The paper trains with Adafactor without
weight decay.
"""

import jax.numpy as jnp
import numpy as np

from lorax import leaves, ops, tree
from lorax.methods.arrays import joined, matrices
from lorax.methods.contract import Method, State
from lorax.methods.targets import Default, adapted_matrices, matching, resolve, words_of


def ia3(
    targets: tuple[str, ...] = Default(("k", "v", "down")),
    feedforward: tuple[str, ...] = Default(("down",)),
    layers: tuple[int, ...] | None = None,
) -> Method:
    """(IA)3 with the given hyperparameters; see `lorax.methods.Method` for what its functions take.

    targets: see `lorax.methods.resolve`. feedforward: words for the targets whose input is scaled;
    the other targets' output is. It has no effect on matrices that are not targets. layers: indices
    of the layers to adapt, None for all.
    `init` and `count` raise ValueError for a word that the base does not have and for an embedding
    or a convolution whose input would be scaled.
    """
    words = words_of(targets)
    feedforward = words_of(feedforward)

    def adapts(params, sites=None):
        return adapted_matrices(params, sites, words, layers)

    def vectors(params, sites, targets=None, key=None):
        """(matrix, name of its vector, length of that) of each matrix."""
        sites = sites or ops.sites_from_shapes(params)
        if feedforward and not isinstance(feedforward, Default):
            resolve(feedforward, sites, "method.feedforward")
        inner = {path for word in feedforward for path in matching(word, sites)}
        for m in matrices(params, adapts(params, sites), targets, key):
            if m.path in inner and m.site.kind not in ("linear", "experts"):
                raise ValueError(f"method.feedforward: {m.path} is not a linear layer's kernel")
            yield (m, "l_in", m.n_in) if m.path in inner else (m, "l", m.n_out)

    def init(key, params, sites=None, targets=None, pad=None, evidence=None):
        trainable, constants = {}, {}
        for m, name, n in vectors(params, sites, targets, key):
            # Padding is zero and not one, because weight decay leaves zero unchanged.
            draw = lambda key, index, name=name, n=n: {name: jnp.ones(n)}
            trainable[m.path] = m.fill({name: (n,)}, draw)
            constants[m.path] = {"on": jnp.asarray(m.active, jnp.float32)}
        return State(tree.unflatten(trainable), tree.unflatten(constants))

    def count(params, sites=None):
        return sum(int(m.active.sum()) * n for m, _, n in vectors(params, sites))

    hp = dict(targets=words, feedforward=feedforward, layers=layers)
    return Method("ia3", hp, init, bind, delta, count, adapts=adapts)


def _vector(x):
    """(l, whether it scales the input) of a matrix's arrays; l is one where it is not adapted."""
    inner = "l_in" in x
    return jnp.where(x["on"][..., None] > 0, x["l_in" if inner else "l"], 1), inner


def _bias(path: str, flat: dict) -> str | None:
    """The path of a kernel's bias, None if there is none."""
    bias = tree.sibling(path, "bias")
    return bias if bias in flat else None


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with a `Scaled` or `ScaledInput` leaf at every adapted path, and scaled biases."""
    flat = tree.flatten(params)
    for path, x in joined(trainable, constants).items():
        vector, inner = _vector(x)
        flat[path] = (leaves.ScaledInput if inner else leaves.Scaled)(flat[path], vector)
        if not inner and (bias := _bias(path, flat)):
            flat[bias] = _scaled(flat[bias], vector).astype(flat[bias].dtype)
    return tree.unflatten(flat)


def _scaled(bias, vector):
    """A bias of any shape times a vector of the same size, in the wider of their dtypes."""
    wide = np.promote_types(bias.dtype, vector.dtype)
    return bias.astype(wide) * vector.astype(wide).reshape(bias.shape)


def delta(trainable, constants, params, sites=None):
    """{path: (l - 1) times the weight}, for kernels and scaled biases."""
    sites = sites or ops.sites_from_shapes(params)
    flat, updates = tree.flatten(params), {}
    for path, x in joined(trainable, constants).items():
        vector, inner = _vector(x)
        change = vector.astype(jnp.float32) - 1
        w = sites[path].to_matrix(ops.dense(flat[path], sites[path]).astype(jnp.float32))
        update = w * (change[..., None] if inner else change[..., None, :])
        updates[path] = sites[path].from_matrix(update, flat[path].shape)
        if not inner and (bias := _bias(path, flat)):
            updates[bias] = _scaled(flat[bias], change).astype(jnp.float32)
    return updates
