"""Where training leads: every update's singular values and leading directions, on the device.

An update of low rank is taken apart by its factors, a QR of both and an SVD of the small core in
between: dW is never formed. An update without factors is one matrix after the other, where that is
small. What is kept of a step is one file; `lorax.analysis.tables` reads them.
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

from lorax.files import atomically
from lorax.models import Base

DIRECTIONS = 4  # leading input directions that are kept
WIDEST = 512  # shorter side up to which an update without factors is taken apart


class Spectrum(NamedTuple):
    """Of the updates of one stack of layers, float32.

    sigma: (layers..., k), descending. directions: (layers..., in, at most `DIRECTIONS`), the left
    singular vectors of dW (in, out), zeros where sigma is rounding. used: (layers...) bool, False
    where a member has nothing but zeros, such as in a matrix that it does not adapt.
    """

    sigma: jax.Array
    directions: jax.Array
    used: jax.Array


def spectra(method, sites, params, constants, trainable) -> dict[str, Spectrum]:
    """{parameter path: Spectrum} of one member's updates; {} of a method that is no change of
    weights. The lengths that DoRA gives its columns are no part of its update s a b, as in
    `lorax.analysis`."""
    if method.factors is not None:
        found = method.factors(trainable, constants, params, sites)
        return {path: _of_factors(*own[:3]) for path, own in found.items()}
    found = _matrices(method, sites, params, constants, trainable)
    return {path: _of_matrix(dw) for path, dw in found.items() if _is_small(dw)}


def of_members(one: Callable, params, constants, trainable, n: int) -> dict[str, Spectrum]:
    """`spectra` of the first n members of stacked trees, leaves (n, ...) on the host.

    one(params, constants, trainable, i): `spectra` of member i, compiled.

    Members are taken apart one after the other, each on the device where it is, and not in one
    program over all devices. A CPU's devices share a pool of as many threads as there are cores;
    batched LAPACK calls wait there for parts of theirs, and where every thread waits, none is left
    to do the parts. Each call has one BLAS thread: more wait for each other on a busy machine, and
    matrices of 128 x 128 then take fifty times as long.
    """
    found = []
    shards = [x for x in jax.tree.leaves(trainable)[0].addressable_shards if x.replica_id == 0]
    for shard in sorted(shards, key=lambda x: x.index[0].start or 0):
        here = lambda x, on=shard.device: next(
            y.data for y in x.addressable_shards if y.device == on
        )
        stacked = jax.tree.map(here, (params, constants, trainable))
        with threadpool_limits(1, user_api="blas"):
            for i in range(min(len(shard.data), n - len(found))):
                found.append(jax.device_get(one(*stacked, i)))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def left_out(method, base: Base, constants, trainable) -> str:
    """What `spectra` leaves out of an update without factors, in words; "" for nothing."""
    if method.factors is not None:
        return ""
    if method.delta is None:
        return f"{method.name} is no change of weights and has no spectrum"
    given = base.params, constants, trainable
    found = jax.eval_shape(lambda *t: _matrices(method, base.sites, *t), *given)
    wide = [path for path, dw in found.items() if not _is_small(dw)]
    return f"without {', '.join(wide)}: wider than {WIDEST} both ways" if wide else ""


def write(file: Path, found: dict[str, Spectrum], members, base: Base) -> None:
    """Write the spectra of many members, leaves (M, ...) on the host, as one file.

    Arrays: "members" (M,) int32, the numbers of `members`, and of every layer's matrix
    "h/3/attn/q/sigma" (M, k), ".../directions" (M, in, d), ".../used" (M,).
    """
    arrays = {"members": np.array([member.index for member in members], np.int32)}
    for path, spectrum in found.items():
        for name, index in base.layers_of(path).items():
            for kind, x in spectrum._asdict().items():
                arrays[f"{name}/{kind}"] = np.ascontiguousarray(x[:, *index])
    atomically(file, lambda temporary: save_file(arrays, temporary))


def _matrices(method, sites, params, constants, trainable) -> dict[str, jax.Array]:
    """{path: dW (layers..., in, out)} of an update without factors."""
    if method.delta is None:
        return {}
    found = method.delta(trainable, constants, params, sites)
    return {path: sites[path].to_matrix(dw) for path, dw in found.items() if path in sites}


def _is_small(dw) -> bool:
    return min(dw.shape[-2:]) <= WIDEST


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
    """`measures.spectrum.existing` of lorax.analysis: zeros where sigma is rounding."""
    floor = max(shape) * np.finfo(np.float32).eps * sigma[..., :1]
    return jnp.where((sigma[..., : u.shape[-1]] > floor)[..., None, :], u, 0)
