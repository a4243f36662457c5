"""Stacks the factors of single layers as the base stacks its parameters.

Factors are padded with zeros to the largest rank of the stack, which does not change the result;
layers without factors have zeros.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lorax import gather, hosts, ops, tree
from lorax.adapters import altered
from lorax.errors import nearest
from lorax.interop.adapter import Factors
from lorax.models import Base


class Stack(NamedTuple):
    """The factors of a base's parameter, float32: a (layers..., in, r), b (layers..., r, out),
    s (layers...), m (layers..., out), which is valid where has_m (layers...) bool."""

    a: np.ndarray
    b: np.ndarray
    s: np.ndarray
    m: np.ndarray
    has_m: np.ndarray


def stacks(base: Base, factors: Mapping[str, Factors]) -> dict[str, Stack]:
    """{parameter path: its layers' factors}; layers without any have zeros."""
    flat, stacked = tree.flatten(base.params), {}
    for path, layers in by_parameter(base, factors).items():
        axes, n_in, n_out = base.sites[path].matrix_shape(flat[path].shape)
        rank = max(factor.a.shape[1] for _, _, factor in layers)
        zeros = lambda *shape, axes=axes, dtype=np.float32: np.zeros((*axes, *shape), dtype)
        stack = Stack(
            zeros(n_in, rank), zeros(rank, n_out), zeros(), zeros(n_out), zeros(dtype=bool)
        )
        for _, index, (a, b, s, m) in layers:
            r = a.shape[1]
            stack.a[index][:, :r], stack.b[index][:r], stack.s[index] = a, b, s
            if m is not None:
                stack.m[index], stack.has_m[index] = m, True
        stacked[path] = stack
    return stacked


def by_parameter(base: Base, factors: Mapping[str, Factors]) -> dict[str, list]:
    """{parameter path: [(layer, its index in the stack, factors)]}.

    Raises ValueError for a layer that the base does not have, and factors that do not fit it.
    """
    flat = tree.flatten(base.params)
    layers: dict[str, list] = {}
    for layer, factor in factors.items():
        if layer not in base.layers:
            raise ValueError(f"{layer}: {_unknown(base, 'layer', layer, base.layers)}")
        path, index = base.layers[layer]
        _, n_in, n_out = base.sites[path].matrix_shape(flat[path].shape)
        a, b, m = (np.shape(x) for x in (factor.a, factor.b, factor.m))
        if a != (n_in, a[-1]) or b != (a[-1], n_out) or m not in ((), (n_out,)):
            lengths = "" if factor.m is None else f", m {m}"
            raise ValueError(
                f"{layer}: a {a}, b {b}{lengths} do not fit the base's {n_in} x {n_out} matrix"
            )
        layers.setdefault(path, []).append((layer, index, factor))
    return layers


def with_weights(base: Base, weights: Mapping[str, np.ndarray]) -> dict:
    """{path: leaf} of the base with `weights` {parameter with its layer: value} in place of the
    base's, in the base's dtype. Raises ValueError as `check_weights`."""
    check_weights(base, weights)
    flat = tree.flatten(base.params)
    layers: dict[str, dict] = {}
    for name, value in weights.items():
        path, index = base.parts[name]
        layers.setdefault(path, {})[index] = value
    for path, values in layers.items():
        flat[path] = _with_layers(flat[path], base.sites.get(path), values)
    return flat


def _with_layers(leaf, site, values: dict[tuple, np.ndarray]):
    """A leaf with other numbers in some of its layers, or in all of it (index ())."""
    dtype, cast = ops.frozen(leaf).dtype, lambda value: jnp.asarray(value).astype(dtype)
    if () in values:
        whole = cast(values[()])
        return whole if gather.mesh_of(leaf) is None else hosts.place(whole, leaf.sharding)
    if altered.is_unread(leaf):
        later = {index: functools.partial(cast, value) for index, value in values.items()}
        return altered.Altered(leaf, site, dtype, later)
    leaf = ops.dense(leaf, site)
    for index, value in values.items():
        leaf = leaf.at[index].set(cast(value))
    return leaf


def check_weights(base: Base, weights: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for a parameter that the base lacks or that has another shape."""
    flat = tree.flatten(base.params)
    for name, value in weights.items():
        if name not in base.parts:
            raise ValueError(f"{name}: {_unknown(base, 'parameter', name, base.parts)}")
        path, index = base.parts[name]
        shape = flat[path].shape[len(index) :]
        if np.shape(value) != shape:
            raise ValueError(f"{name}: {np.shape(value)} given, the base's has {shape}")


def _unknown(base: Base, kind: str, name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that the base does not have."""
    return f"{base.name} has no such {kind}{nearest(name, known)}"
