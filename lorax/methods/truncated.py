"""An update of any method as low-rank factors, to evaluate a member with fewer of its directions.

    dW = u diag(sigma) v^T      a = u sqrt(sigma), b = sqrt(sigma) v^T; the first k are kept

DoRA keeps its trained column lengths, and what is trained in full beside low-rank factors (a
classifier, biases, norms) stays as it is trained.
"""

from lorax import leaves, ops, tree
from lorax.methods import full
from lorax.methods.arrays import joined
from lorax.methods.contract import Method


def of(method: Method) -> Method:
    """The method with `bind` for trees of factors in place of its own."""
    return method._replace(bind=bind)


def bind(trainable, constants, params, key=None, sites=None):
    """`params` with a `LowRank` leaf for the factors a and b at every path, inside `Scaled` where
    there are lengths m; layers whose "on" is 0 have none. w: a parameter as it is trained."""
    sites = sites or ops.sites_from_shapes(params)
    factors, whole = full.apart(trainable)
    flat = tree.flatten(full.bind(whole, {}, params))
    for path, x in joined(factors, constants).items():
        flat[path] = leaves.LowRank(flat[path], x["a"], x["b"], x["s"])
        if "m" in x:
            flat[path] = leaves.dora(flat[path], x["m"], sites[path], on=x["on"])
    return tree.unflatten(flat)
