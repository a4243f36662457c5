"""Adapters to and from training: an initial state from an adapter, an adapter from a state."""

import functools

import jax.numpy as jnp
import numpy as np

from lorax import gather, hosts, methods, ops, tree
from lorax.adapters.stacking import stacks
from lorax.interop.adapter import Adapter, Factors
from lorax.models import Base


def state(base: Base, adapter: Adapter) -> methods.State:
    """The state of `lorax.methods.lora` that equals the adapter, without dropout.

    Weights trained in full are left out. Raises ValueError for DoRA, and as `bind`.
    """
    trainable, constants = {}, {}
    for path, stack in stacks(base, adapter.factors).items():
        if stack.has_m.any():
            raise ValueError(f"{path}: has DoRA magnitudes, which LoRA does not train")
        trainable[path] = {"a": jnp.asarray(stack.a), "b": jnp.asarray(stack.b)}
        constants[path] = {"s": jnp.asarray(stack.s), "dropout": jnp.zeros(stack.s.shape)}
    return methods.State(tree.unflatten(trainable), tree.unflatten(constants))


def factored(base: Base, method: methods.Method, state: methods.State) -> Adapter:
    """The low-rank factors of a trained method and its weights trained in full, by layer.

    Padding is removed, and layers that are not adapted (both factors zero) are left out.
    """
    factors, weights = {}, {}
    for path, arrays in method.factors(*state, base.params, base.sites).items():
        a, b, s, m = (None if x is None else np.asarray(x, np.float32) for x in arrays)
        for layer, index in base.layers_of(path).items():
            used = a[index].any(axis=0) | b[index].any(axis=1)
            if used.any():
                scale = method.hp.get("scale", s[index])  # s is this number in float32
                lengths = None if m is None else m[index]
                factors[layer] = Factors(a[index][:, used], b[index][used], float(scale), lengths)
    if any(factor.m is not None for factor in factors.values()):
        factors |= _lengths_beside(base, factors)
    for path, arrays in methods.joined(state.trainable).items():
        if "w" in arrays:
            weights |= base.parts_of(path, np.asarray(hosts.whole(arrays["w"]), np.float32))
    return Adapter(factors, weights, {})


def _lengths_beside(base: Base, factors: dict[str, Factors]) -> dict[str, Factors]:
    """Rank-0 factors with the base's column lengths for unadapted layers that share a fused tensor
    with adapted ones (GPT-2's k with q and v): DoRA stores the lengths of whole modules."""
    flat, tensors, lengths = tree.flatten(base.params), {}, {}
    squares = functools.cache(
        lambda path: gather.by_layer(ops.column_squares, flat[path], base.sites[path])
    )
    for layer, (path, index) in base.layers.items():  # {tensor of one layer: its parts}
        if path in base.sources:
            tensors.setdefault((base.sources[path].name, index), []).append(layer)
    for parts in tensors.values():
        adapted = [layer for layer in parts if layer in factors]
        for layer in parts if adapted else ():
            if layer in factors:
                continue
            path, index = base.layers[layer]
            site = base.sites[path]
            _, n_in, n_out = site.matrix_shape(flat[path].shape)
            a, b = np.zeros((n_in, 0), np.float32), np.zeros((0, n_out), np.float32)
            m = np.asarray(jnp.sqrt(squares(path))[index])
            lengths[layer] = Factors(a, b, factors[adapted[0]].s, m)
    return lengths
