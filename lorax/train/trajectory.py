"""Trajectories: singular values and leading directions of every update, computed on the device, and
where they lie among directions that do not move (`lorax.train.compared`).

A low-rank update is decomposed through its factors, a QR of both and an SVD of the small core
between them: dW is never formed. Updates without factors are decomposed matrix by matrix, if small.
Each recorded step is one file; `lorax.analysis.tables` reads them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg  # noqa: F401  JAX calls its LAPACK, whose threads are limited below
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from lorax import gather, tree
from lorax.files import atomically
from lorax.models import Base
from lorax.train.compared import Compared

DIRECTIONS = 4  # number of leading input directions that are stored
WIDEST = 1024  # longest shorter side of an update without factors that is decomposed
EMPTY: Mapping = MappingProxyType({})


class Spectrum(NamedTuple):
    """Spectra of the updates of one stack of layers, float32.

    sigma: (layers..., k), descending. directions: (layers..., in, at most `DIRECTIONS`), the left
    singular vectors of dW (in, out), zeros where sigma is only rounding error. used: (layers...)
    bool, False where a member's update is all zeros, e.g. for a matrix that it does not adapt.
    energy: (layers..., 3, 3), shares of |dW|_F^2: those in W's k leading singular directions, in
    its k last ones, and in k directions at random, on average; of both sides |U^T dW V|_F^2, of the
    input side |U^T dW|_F^2, of the output side |dW V|_F^2. NaN where there is no update.
    phi: (layers..., 2), how much of the span of a lies in that of as many leading directions of the
    first gradient, from 0 to 1, and r / in, what it is for directions at random on average.
    energy, phi: None if the run does not ask for them, or the method has no a that is trained.
    """

    sigma: jax.Array
    directions: jax.Array
    used: jax.Array
    energy: jax.Array | None = None
    phi: jax.Array | None = None


class Learned(NamedTuple):
    """One stack of layers of a member. update: its factors (a, b, s), or dW (layers..., in, out).
    span: the trained a (layers..., in, r), None for a method without."""

    update: tuple | jax.Array
    span: jax.Array | None


def decomposer(method, sites) -> Callable:
    """f(params, constants, trainable, compared) -> `spectra` of the first members of stacked trees
    on the devices, as many as `compared` has, leaves (n, ...) on the host; compiled on the first
    call. compared: {path: Compared} of each member, numpy."""

    def of_one(function):
        member = lambda i, trees: jax.tree.map(lambda x: x[i], trees)
        return jax.jit(
            lambda params, *t, i, **given: function(method, sites, params, *member(i, t), **given)
        )

    of_member, updates = of_one(spectra), of_one(_updates)

    def of_members(params, constants, trainable, compared) -> dict[str, Spectrum]:
        arguments = params, constants, trainable, compared
        with threadpool_limits(1, user_api="blas"):
            if gather.is_here(trainable) and gather.mesh_of(params) is None:
                results = _each_on_its_device(of_member, *arguments)
            else:
                results = _layer_by_layer(updates, *arguments)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *results)

    return of_members


def spectra(
    method, sites, params, constants, trainable, compared: Mapping[str, Compared] = EMPTY
) -> dict[str, Spectrum]:
    """{parameter path: Spectrum} of one member's updates; {} for a method that doesn't change
    weights. As in `lorax.analysis`, DoRA's update is s a b, without its column magnitudes."""
    updates = _updates(method, sites, params, constants, trainable)
    return {path: _one_by_one(learned, compared.get(path)) for path, learned in updates.items()}


def _one_by_one(learned: Learned, compared: Compared | None) -> Spectrum:
    """`_decomposed`, one layer after another: LAPACK's call for a batch of matrices waits in a
    CPU's thread for parts of its work, and where as many such calls run as there are threads, none
    is left to do these parts."""
    axes = _axes(learned)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(axes) :]), (learned, compared))
    found = jax.lax.map(lambda layer: _decomposed(*layer), flat)
    return jax.tree.map(lambda x: x.reshape(*axes, *x.shape[1:]), found)


def _axes(learned: Learned) -> tuple[int, ...]:
    """The lengths of the layer axes."""
    update = learned.update
    return update[2].shape if isinstance(update, tuple) else update.shape[:-2]


def paths(method, base: Base, constants, trainable) -> dict[str, int]:
    """{path of a parameter whose updates are decomposed: columns of its a, 0 if no a is trained},
    of one member."""
    arguments = base.params, constants, trainable
    updates = jax.eval_shape(lambda *t: _updates(method, base.sites, *t), *arguments)
    return {path: 0 if x.span is None else x.span.shape[-1] for path, x in updates.items()}


def _each_on_its_device(of_member, params, constants, trainable, compared) -> list[dict]:
    """The members' spectra. of_member(params, constants, trainable, i=i): of member i.

    Members are decomposed one after another, each on its own device. Each call uses one BLAS
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
        for i in range(min(len(shard.data), len(compared) - len(results))):
            given = compared[len(results)]
            results.append(jax.device_get(of_member(*stacked, i=i, compared=given)))
    return results


def _layer_by_layer(updates, params, constants, trainable, compared) -> list[dict]:
    """The members' spectra, of updates to a base that several devices hold parts of: one layer's
    update at a time is gathered. updates(params, constants, trainable, i=i): of member i."""
    results = []
    for i, given in enumerate(compared):
        of_member = updates(params, constants, trainable, i=i)
        results.append({path: _of_layers(x, given.get(path)) for path, x in of_member.items()})
    return results


def _of_layers(learned: Learned, compared: Compared | None) -> Spectrum:
    """`_decomposed`, on the host. learned: on several devices."""
    axes = _axes(learned)
    layers = []
    for index in np.ndindex(*axes):
        of_layer = jax.tree.map(lambda x, at=index: x[at], compared)
        layers.append(_of_layer(gather.layer(learned, index), of_layer))
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
    "h/3/attn/q/sigma" (M, k), ".../directions" (M, in, d), ".../used" (M,), and where they are
    asked for ".../energy" (M, 3, 3) and ".../phi" (M, 2).
    """
    arrays = {"members": np.array([member.index for member in members], np.int32)}
    for path, spectrum in by_path.items():
        for name, index in base.layers_of(path).items():
            for kind, x in spectrum._asdict().items():
                if x is not None:
                    arrays[f"{name}/{kind}"] = np.ascontiguousarray(x[:, *index])
    atomically(file, lambda temporary: save_file(arrays, temporary))


def _updates(method, sites, params, constants, trainable) -> dict[str, Learned]:
    """{path: what is learned of it}; without updates that have no factors and are not small."""
    if method.factors is not None:
        factors, flat = method.factors(trainable, constants, params, sites), tree.flatten(trainable)
        return {path: Learned(x[:3], flat.get(f"{path}/a")) for path, x in factors.items()}
    updates = _matrices(method, sites, params, constants, trainable)
    return {path: Learned(dw, None) for path, dw in updates.items() if _is_small(dw)}


def _matrices(method, sites, params, constants, trainable) -> dict[str, jax.Array]:
    """{path: dW (layers..., in, out)} of an update without factors."""
    if method.delta is None:
        return {}
    updates = method.delta(trainable, constants, params, sites)
    return {path: sites[path].to_matrix(dw) for path, dw in updates.items() if path in sites}


def _is_small(dw) -> bool:
    return min(dw.shape[-2:]) <= WIDEST


def _decomposed(learned: Learned, compared: Compared | None) -> Spectrum:
    """The spectrum of one layer's update."""
    update, span = learned
    spectrum = _of_factors(*update) if isinstance(update, tuple) else _of_matrix(update)
    if compared is None:
        return spectrum
    return spectrum._replace(
        energy=None if compared.u is None else _energy(update, spectrum.sigma, compared),
        phi=None if span is None or compared.gradient is None else _phi(span, compared.gradient),
    )


_of_layer = jax.jit(_decomposed)


def _energy(update, sigma, compared: Compared):
    """`Spectrum.energy`."""
    u, v = compared.u, compared.v  # (layers..., 2, in, k), (layers..., 2, out, k)
    if isinstance(update, tuple):
        a, b, s = (x.astype(jnp.float32) for x in update)
        a, b = (s[..., None, None] * a)[..., None, :, :], b[..., None, :, :]
        left, right = _product(_turned(u), a), _product(b, v)
        parts = _product(left, right), _product(left, b), _product(a, right)
    else:
        dw = update.astype(jnp.float32)[..., None, :, :]
        left = _product(_turned(u), dw)
        parts = _product(left, v), left, _product(dw, v)
    inside = jnp.stack([jnp.sum(jnp.square(x), axis=(-2, -1)) for x in parts], axis=-1)
    whole = jnp.sum(jnp.square(sigma), axis=-1)[..., None, None]
    share = jnp.where(whole > 0, inside / jnp.where(whole > 0, whole, 1), jnp.nan)
    ins, outs = u.shape[-1] / u.shape[-2], v.shape[-1] / v.shape[-2]
    chance = jnp.broadcast_to(jnp.float32([ins * outs, ins, outs]), (*share.shape[:-2], 1, 3))
    return jnp.concatenate([share, chance], axis=-2)


def _phi(a, directions):
    """`Spectrum.phi`; a: (layers..., in, r), of which a member may use fewer columns."""
    u, sigma, _ = jnp.linalg.svd(a.astype(jnp.float32), full_matrices=False)
    u = _existing(u, sigma, a.shape[-2:])
    rank = jnp.sum(jnp.any(u != 0, axis=-2), axis=-1)  # (layers...)
    many = directions.shape[-1]
    order = jnp.broadcast_to(jnp.arange(many), (*rank.shape, many))
    as_many = (order < rank[..., None]).astype(jnp.float32)[..., None, :]
    inside = jnp.sum(jnp.square(_product(_turned(u), directions * as_many)), axis=(-2, -1))
    few = jnp.minimum(rank, many).astype(jnp.float32)
    known = jnp.where(few > 0, inside / jnp.maximum(few, 1), jnp.nan)
    return jnp.stack([known, rank.astype(jnp.float32) / a.shape[-2]], axis=-1)


def _product(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _turned(x):
    return jnp.swapaxes(x, -1, -2)


def _of_factors(a, b, s) -> Spectrum:
    a, b, s = (x.astype(jnp.float32) for x in (a, b, s))
    qa, ra = jnp.linalg.qr(a)
    _, rb = jnp.linalg.qr(_turned(b))
    core = s[..., None, None] * _product(ra, _turned(rb))
    u, sigma, _ = jnp.linalg.svd(core, full_matrices=False)
    used = jnp.any(a != 0, axis=(-2, -1)) | jnp.any(b != 0, axis=(-2, -1))
    shape = a.shape[-2], b.shape[-1]
    return Spectrum(sigma, _existing(_product(qa, u[..., :DIRECTIONS]), sigma, shape), used)


def _of_matrix(dw) -> Spectrum:
    dw = dw.astype(jnp.float32)
    u, sigma, _ = jnp.linalg.svd(dw, full_matrices=False)
    directions = _existing(u[..., :DIRECTIONS], sigma, dw.shape[-2:])
    return Spectrum(sigma, directions, jnp.any(dw != 0, axis=(-2, -1)))


def _existing(u, sigma, shape):
    """`lorax.spectrum.existing`: zeros where sigma is only rounding error."""
    floor = max(shape) * np.finfo(np.float32).eps * sigma[..., :1]
    return jnp.where((sigma[..., : u.shape[-1]] > floor)[..., None, :], u, 0)
