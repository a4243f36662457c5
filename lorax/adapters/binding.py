"""An adapter bound to its base: the factors as operator leaves of the base's parameters."""

import functools

import jax
import jax.numpy as jnp

from lorax import leaves, tree
from lorax.adapters import tied
from lorax.adapters.stacking import by_parameter, check_weights, stacks, with_weights
from lorax.interop.adapter import Adapter
from lorax.models import Base


def bind(base: Base, adapter: Adapter) -> dict:
    """The base's parameters with the adapter in them, for `lorax.apply`.

    Adapted matrices become `leaves.LowRank`, for DoRA inside `leaves.Scaled`. Parameters that were
    trained in full are replaced, in the base's dtype.

    Raises ValueError that names path and shapes for a layer that the base does not have or factors
    that do not fit it.
    """
    rest, head = tied.split(base, adapter)
    flat = with_weights(base, rest.weights)
    for path, stack in stacks(base, rest.factors).items():
        flat[path] = leaves.LowRank(flat[path], *map(jnp.asarray, (stack.a, stack.b, stack.s)))
        if stack.has_m.any():
            g = _gain(flat[path], jnp.asarray(stack.m), jnp.asarray(stack.has_m), base.sites[path])
            flat[path] = leaves.Scaled(flat[path], g)
    if head is not None:
        flat[head.path] = leaves.Untied(flat[head.path], tied.read_out(base, head))
    return tree.unflatten(flat)


def check(base: Base, adapter: Adapter) -> None:
    """Raises ValueError, as `bind` does, for an adapter that does not fit. base may be a skeleton:
    no weights are read."""
    rest, head = tied.split(base, adapter)
    by_parameter(base, rest.factors)
    check_weights(base, rest.weights)
    if head is not None and head.factors is not None:
        by_parameter(base, {head.path.removesuffix("/embedding"): head.factors})


@functools.partial(jax.jit, static_argnums=3)
def _gain(leaf, m, has_m, site):
    """DoRA's scales of a stack's columns, 1 in a layer without lengths."""
    return leaves.dora(leaf, m, site, on=has_m).g
