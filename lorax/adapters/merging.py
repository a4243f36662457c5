"""Adapters merged into plain parameters, and taken out again."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lorax import ops, tree
from lorax.adapters import tied
from lorax.adapters.stacking import by_parameter, with_weights
from lorax.interop.adapter import Adapter, Factors
from lorax.interop.tensors import check_finite
from lorax.models import Base


class Merged(NamedTuple):
    """params: the base's parameters with the adapter merged; changed ones are plain arrays.
    replaced: {path: leaf} of the base's leaves that differ in params. error: {layer: largest
    |merged - exact| over largest |exact|}, the rounding error."""

    params: dict
    replaced: dict
    error: dict[str, float]


def merge(base: Base, adapter: Adapter, dtypes: Mapping[str, np.dtype] | None = None) -> Merged:
    """The adapter merged: w + s a b, for DoRA with its columns rescaled to length m.

    The sum is computed in float64 and rounded once, to the dtype of the base's weight or to that in
    `dtypes` for its path. A quantised weight is decoded first. Raises ValueError as `bind` does,
    for an adapter that gives a tied head another weight than the embedding, and for a layer whose
    weights become NaN or too large for their dtype.
    """
    rest, head = tied.split(base, adapter)
    if head is not None:
        raise ValueError(
            f"{head.path}: the model's head is its embedding, and the adapter updates the two "
            "differently: they can't be one weight"
        )
    flat, error = with_weights(base, rest.weights), {}
    for path, layers in by_parameter(base, rest.factors).items():
        site = base.sites[path]
        leaf = ops.dense(flat[path], site)
        before = np.asarray(site.to_matrix(leaf))
        after = before.astype((dtypes or {}).get(path, leaf.dtype))
        for layer, index, factors in layers:
            exact = _sum(before[index], factors)
            after[index] = _rounded(exact, after.dtype)
            check_finite(layer, exact, after[index])
            off = np.abs(after[index].astype(np.float64) - exact).max(initial=0)
            error[layer] = float(off / (np.abs(exact).max(initial=0) or 1))
        flat[path] = site.from_matrix(jnp.asarray(after), leaf.shape)
    params = tree.unflatten(flat)
    return Merged(params, replaced(base, params), error)


def replaced(base: Base, params: dict) -> dict:
    """{path: leaf} of the base's leaves that differ in `params`."""
    flat = tree.flatten(params)
    return {p: leaf for p, leaf in tree.flatten(base.params).items() if flat[p] is not leaf}


def _sum(matrix: np.ndarray, factors: Factors) -> np.ndarray:
    """w + s a b in float64, with its columns rescaled to lengths m if the factors have them."""
    a, b, s, m = factors
    exact = matrix.astype(np.float64)
    exact += s * (np.asarray(a, np.float64) @ np.asarray(b, np.float64))
    if m is not None:
        norms = np.linalg.norm(exact, axis=0)
        exact *= np.where(norms > 0, m / np.where(norms > 0, norms, 1), 1)
    return exact


def _rounded(exact: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64 rounded once. A cast to bfloat16 goes through float32 and would round twice, so the
    last bit of float32 is set if anything was cut off, which prevents false ties."""
    with np.errstate(over="ignore"):  # the caller checks for infinities
        if dtype != jnp.bfloat16:
            return exact.astype(dtype)
        near = exact.astype(np.float32)
        below = np.where(abs(near) > abs(exact), np.nextafter(near, np.float32(0)), near)
        odd = below.view(np.uint32) | (below != exact)
        return odd.view(np.float32).astype(dtype)


def unmerge(merged: Merged) -> dict:
    """The base's parameters again, bit for bit: the replaced leaves are put back."""
    return tree.unflatten(tree.flatten(merged.params) | merged.replaced)
