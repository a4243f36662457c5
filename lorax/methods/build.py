"""A method by its name, and its update merged into a model."""

from collections.abc import Mapping
from typing import Any

import jax

from lorax import catalogue, gather, ops, sharding, tree
from lorax.errors import nearest
from lorax.methods import full
from lorax.methods.contract import Method, State


def method(name: str, **hp) -> Method:
    """The method of that name, e.g. `method("lora", rank=8, alpha=8, targets=("q", "v"))`.

    Every method also takes `full`, words for additional parameters to train in full
    (`resolve_full`), such as a classifier's head, and `dtype`, of all trained parameters.
    Raises ValueError for an unknown name, an unknown hyperparameter or a value out of range.
    """
    known = hyperparameters(name)
    for field in hp:
        if field not in known:
            raise ValueError(
                f"method.{field}: {name} has no such hyperparameter, only {', '.join(known)}"
                f"{nearest(field, known)}"
            )
    dtype = hp.pop("dtype", "float32")
    # Methods that take `full` themselves train a parameter only once, even if two words name it.
    row = catalogue.row(name)
    words = () if "full" in row.hyperparameters else hp.pop("full", ())
    return full.beside(row.function(**hp)._replace(name=name), words, dtype)


def hyperparameters(name: str) -> tuple[str, ...]:
    """The names of the hyperparameters of a method. Raises ValueError for an unknown name."""
    return tuple(dict.fromkeys((*catalogue.row(name).hyperparameters, "full", "dtype")))


def given(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of {name: value} that are hyperparameters of a method, without None, which stands for
    the method's own default. Raises ValueError for an unknown name of a method."""
    known = hyperparameters(name)
    return {key: value for key, value in values.items() if key in known and value is not None}


def merge(method: Method, state: State, params: dict, sites=None) -> dict:
    """Plain parameters with the update added in float32, rounded once to their own dtype.

    Raises ValueError for a method that does not change weights (prefixes, bottleneck adapters).
    """
    if method.delta is None:
        raise ValueError(f"{method.name}: is no change of weights and can't be merged")
    sites = sites or ops.sites_from_shapes(params)
    flat = tree.flatten(method.bind(*state, params, sites=sites))
    mesh = gather.mesh_of(params)
    if mesh is not None:
        return tree.unflatten(_divided(flat, sites, mesh))
    return tree.unflatten({path: ops.dense(leaf, sites.get(path)) for path, leaf in flat.items()})


def _divided(flat: dict, sites, mesh) -> dict:
    """{path: plain parameter} of leaves that a mesh divides, divided by the same rule; no device
    has more of one."""
    shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    shapes = {path: shape(ops.frozen(leaf)) for path, leaf in flat.items()}
    at = tree.flatten(sharding.shardings(tree.unflatten(shapes), sites, mesh))
    for path, leaf in flat.items():
        if ops.is_operator(leaf):
            dense = jax.jit(ops.dense, static_argnums=1, out_shardings=at[path])
            flat[path] = dense(leaf, sites.get(path))
    return flat
