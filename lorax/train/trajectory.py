"""Trajectories: singular values and leading directions of every update, computed on the device.

A low-rank update is decomposed through its factors, a QR of both and an SVD of the small core
between them: dW is never formed. Updates without factors are decomposed matrix by matrix, if small.
Each recorded step is one file; `lorax.analysis.tables` reads them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg  # noqa: F401  JAX calls its LAPACK, whose threads are limited below
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from lorax import gather
from lorax.files import atomically
from lorax.models import Base

DIRECTIONS = 4  # number of leading input directions that are stored
WIDEST = 512  # longest shorter side of an update without factors that is decomposed


class Spectrum(NamedTuple):
    """Spectra of the updates of one stack of layers, float32.

    sigma: (layers..., k), descending. directions: (layers..., in, at most `DIRECTIONS`), the left
    singular vectors of dW (in, out), zeros where sigma is only rounding error. used: (layers...)
    bool, False where a member's update is all zeros, e.g. for a matrix that it does not adapt.
    """

    sigma: jax.Array
    directions: jax.Array
    used: jax.Array


def decomposer(method, sites) -> Callable:
    """f(params, constants, trainable, n) -> `spectra` of the first n members of stacked trees on
    the devices, leaves (n, ...) on the host; compiled on the first call."""

    def of_one(function):
        member = lambda i, trees: jax.tree.map(lambda x: x[i], trees)
        return jax.jit(lambda params, *t, i: function(method, sites, params, *member(i, t)))

    of_member, updates = of_one(spectra), of_one(_updates)

    def of_members(params, constants, trainable, n: int) -> dict[str, Spectrum]:
        arguments = params, constants, trainable, n
        with threadpool_limits(1, user_api="blas"):
            if gather.is_here(trainable) and gather.mesh_of(params) is None:
                results = _each_on_its_device(of_member, *arguments)
            else:
                results = _layer_by_layer(updates, *arguments)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *results)

    return of_members


def spectra(method, sites, params, constants, trainable) -> dict[str, Spectrum]:
    """{parameter path: Spectrum} of one member's updates; {} for a method that doesn't change
    weights. As in `lorax.analysis`, DoRA's update is s a b, without its column magnitudes."""
    updates = _updates(method, sites, params, constants, trainable)
    return {path: _decomposed(update) for path, update in updates.items()}


def _each_on_its_device(of_member, params, constants, trainable, n: int) -> list[dict]:
    """The first n members' spectra. of_member(params, constants, trainable, i=i): of member i.

    Members are decomposed one after another, each on its own device, not in one program over all
    devices. A CPU's devices share a pool of one thread per core; batched LAPACK calls wait there
    for their subtasks, and if every thread waits, none is left to run them. Each call uses one BLAS
    thread: several would wait for each other on a busy machine, which makes matrices of 128 x 128
    fifty times slower.
    """
    results = []
    shards = [x for x in jax.tree.leaves(trainable)[0].addressable_shards if x.replica_id == 0]
    for shard in sorted(shards, key=lambda x: x.index[0].start or 0):
        here = lambda x, on=shard.device: next(
            y.data for y in x.addressable_shards if y.device == on
        )
        stacked = jax.tree.map(here, (params, constants, trainable))
        for i in range(min(len(shard.data), n - len(results))):
            results.append(jax.device_get(of_member(*stacked, i=i)))
    return results


def _layer_by_layer(updates, params, constants, trainable, n: int) -> list[dict]:
    """The first n members' spectra, of updates to a base that several devices hold parts of: one
    layer's update at a time is gathered. updates(params, constants, trainable, i=i): of member i.
    """
    return [
        {path: _of_layers(update) for path, update in of_member.items()}
        for of_member in (updates(params, constants, trainable, i=i) for i in range(n))
    ]


def _of_layers(update) -> Spectrum:
    """`_decomposed`, on the host. update: on several devices."""
    axes = update[2].shape if isinstance(update, tuple) else update.shape[:-2]
    layers = [_of_layer(gather.layer(update, index)) for index in np.ndindex(*axes)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *layers)
    return jax.tree.map(lambda x: x.reshape((*axes, *x.shape[1:])), stacked)


def left_out(method, base: Base, constants, trainable) -> str:
    """A message about what `spectra` leaves out of an update without factors; "" for nothing."""
    if method.factors is not None:
        return ""
    if method.delta is None:
        return f"{method.name} does not change weights and has no spectrum"
    arguments = base.params, constants, trainable
    updates = jax.eval_shape(lambda *t: _matrices(method, base.sites, *t), *arguments)
    wide = [path for path, dw in updates.items() if not _is_small(dw)]
    return f"without {', '.join(wide)}: wider than {WIDEST} both ways" if wide else ""


def write(file: Path, by_path: dict[str, Spectrum], members, base: Base) -> None:
    """Write the spectra of many members, leaves (M, ...) on the host, as one file.

    Arrays: "members" (M,) int32, the numbers of `members`, and for every layer's matrix
    "h/3/attn/q/sigma" (M, k), ".../directions" (M, in, d), ".../used" (M,).
    """
    arrays = {"members": np.array([member.index for member in members], np.int32)}
    for path, spectrum in by_path.items():
        for name, index in base.layers_of(path).items():
            for kind, x in spectrum._asdict().items():
                arrays[f"{name}/{kind}"] = np.ascontiguousarray(x[:, *index])
    atomically(file, lambda temporary: save_file(arrays, temporary))


def _updates(method, sites, params, constants, trainable) -> dict:
    """{path: its update's factors (a, b, s), or an update without factors that is small}."""
    if method.factors is not None:
        factors = method.factors(trainable, constants, params, sites)
        return {path: of_path[:3] for path, of_path in factors.items()}
    updates = _matrices(method, sites, params, constants, trainable)
    return {path: dw for path, dw in updates.items() if _is_small(dw)}


def _matrices(method, sites, params, constants, trainable) -> dict[str, jax.Array]:
    """{path: dW (layers..., in, out)} of an update without factors."""
    if method.delta is None:
        return {}
    updates = method.delta(trainable, constants, params, sites)
    return {path: sites[path].to_matrix(dw) for path, dw in updates.items() if path in sites}


def _is_small(dw) -> bool:
    return min(dw.shape[-2:]) <= WIDEST


def _decomposed(update) -> Spectrum:
    return _of_factors(*update) if isinstance(update, tuple) else _of_matrix(update)


_of_layer = jax.jit(_decomposed)


def _of_factors(a, b, s) -> Spectrum:
    a, b, s = (x.astype(jnp.float32) for x in (a, b, s))
    product = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
    qa, ra = jnp.linalg.qr(a)
    _, rb = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, sigma, _ = jnp.linalg.svd(
        s[..., None, None] * product(ra, jnp.swapaxes(rb, -1, -2)), full_matrices=False
    )
    used = jnp.any(a != 0, axis=(-2, -1)) | jnp.any(b != 0, axis=(-2, -1))
    shape = a.shape[-2], b.shape[-1]
    return Spectrum(sigma, _existing(product(qa, u[..., :DIRECTIONS]), sigma, shape), used)


def _of_matrix(dw) -> Spectrum:
    dw = dw.astype(jnp.float32)
    u, sigma, _ = jnp.linalg.svd(dw, full_matrices=False)
    directions = _existing(u[..., :DIRECTIONS], sigma, dw.shape[-2:])
    return Spectrum(sigma, directions, jnp.any(dw != 0, axis=(-2, -1)))


def _existing(u, sigma, shape):
    """`measures.spectrum.existing` of lorax.analysis: zeros where sigma is only rounding error."""
    floor = max(shape) * np.finfo(np.float32).eps * sigma[..., :1]
    return jnp.where((sigma[..., : u.shape[-1]] > floor)[..., None, :], u, 0)
