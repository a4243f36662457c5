"""Adapters merged into plain parameters, and taken out again."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import gather, ops, sharding, tree
from lorax.adapters import altered, tied
from lorax.adapters.stacking import by_parameter, with_weights
from lorax.interop.adapter import Adapter, Factors
from lorax.interop.tensors import check_finite
from lorax.models import Base


class Merged(NamedTuple):
    """params: the base's parameters with the adapter merged; changed ones are plain arrays.
    replaced: {path: leaf} of the base's leaves that differ in params. error: {layer: largest
    |merged - exact| over largest |exact|}, the rounding error; of a base that is still in its files
    (`models.unread`) added as its layers are read."""

    params: dict
    replaced: dict
    error: dict[str, float]


def merge(base: Base, adapter: Adapter, dtypes: Mapping[str, np.dtype] | None = None) -> Merged:
    """The adapter merged: w + s a b, for DoRA with its columns rescaled to length m.

    The sum is computed in float64 and rounded once, to the dtype of the base's weight or to that in
    `dtypes` for its path. A quantised weight is decoded first. Where a mesh of devices divides the
    weights, one layer at a time is gathered, and the sum is divided like them.
    Raises ValueError as `bind` does, for an adapter that gives a tied head another weight than the
    embedding, and for a layer whose weights become NaN or too large for their dtype.
    """
    rest, head = tied.split(base, adapter)
    if head is not None:
        raise ValueError(
            f"{head.path}: the model's head is its embedding, and the adapter updates the two "
            "differently: they can't be one weight"
        )
    flat, error = with_weights(base, rest.weights), {}
    for path, layers in by_parameter(base, rest.factors).items():
        dtype = (dtypes or {}).get(path, ops.frozen(flat[path]).dtype)
        site, of = base.sites[path], functools.partial(_merged, flat[path], base.sites[path], dtype)
        matrices = {layer[1]: functools.partial(of, *layer, error) for layer in layers}
        if altered.is_unread(flat[path]):
            flat[path] = altered.with_matrices(flat[path], site, dtype, matrices)
        else:
            flat[path] = _replaced(base, path, flat[path], matrices, dtype)
    params = tree.unflatten(flat)
    return Merged(params, replaced(base, params), error)


def _merged(leaf, site: ops.Site, dtype, layer: str, index: tuple, factors: Factors, error: dict):
    """The merged matrix of one layer in `dtype`. error: where its rounding error is added."""
    exact = _sum(np.asarray(gather.matrix(leaf, site, index)), factors)
    after = _rounded(exact, dtype)
    check_finite(layer, exact, after)
    off = np.abs(after.astype(np.float64) - exact).max(initial=0)
    error[layer] = float(off / (np.abs(exact).max(initial=0) or 1))
    return after


def _replaced(base: Base, path: str, leaf, matrices: Mapping[tuple, Callable], dtype):
    """The plain kernel in `dtype`, with other matrices in some of its layers: {index: function that
    returns it}."""
    mesh, site = gather.mesh_of(leaf), base.sites[path]
    stack = lambda leaf: site.to_matrix(ops.dense(leaf, site))
    if mesh is None:
        whole = np.array(stack(leaf)).astype(dtype)
        for index, matrix in matrices.items():
            whole[index] = matrix()
        return site.from_matrix(jnp.asarray(whole), leaf.shape)
    whole = gather.divided(lambda leaf: stack(leaf).astype(dtype), mesh, leaf)
    put = lambda whole, matrix, index: whole.at[index].set(matrix)
    put = jax.jit(put, donate_argnums=0, out_shardings=whole.sharding)
    for index, matrix in matrices.items():
        whole = put(whole, matrix(), index)
    shape = tree.unflatten({path: jax.ShapeDtypeStruct(leaf.shape, dtype)})
    at = tree.flatten(sharding.shardings(shape, base.sites, mesh))[path]
    return jax.jit(lambda whole: site.from_matrix(whole, leaf.shape), out_shardings=at)(whole)


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
