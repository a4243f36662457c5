"""Statistics of each matrix from a few batches before training: gradients and inputs.

`evidence` runs the frozen base. It is used by initialisations that read data
(`lorax.methods.starts`), and to choose targets (`rank_matrices`, `choose`) and ranks (`spectra`).

Second moments come from one gradient call: next to a kernel is a zero `tap`, which does not change
the output and whose "gradient" is defined as x^T x of the layer's inputs. So they pass through
`nn.scan` and remat like gradients, stacked by layer and summed over batches.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorax import divided, gather, ops, tree
from lorax.models import Base

STATISTICS = ("gradient", "moments", "covariance")


def evidence(
    base: Base, kind, batches: Mapping, paths, statistics=("gradient",)
) -> dict[str, dict]:
    """{path: {statistic: float32 array, the layer axes first}} of the kernels at `paths`.

    Of a base that a mesh divides they are divided too; `gather.layer` gives one layer of each.

    kind: of the rows, a `lorax.tasks.kinds.Kind`: their loss, and which positions are real.
    batches: the leaves of a task's rows, (N, B, ...), N batches.
    statistics:
      "gradient" (in, out): of the loss with respect to the kernel, averaged over all weighted
          tokens of all batches (PEFT's LoRA-GA averages the batches' means, the same for equal
          weights).
      "moments" (in + 1, in + 1): the sum of [x, 1]^T [x, 1] over the inputs x (in,) of real tokens:
          x^T x, the sum of x, and in the corner their number.
      "covariance" (in, in): CorDA's, the mean over the batch's rows of x^T x, where x are the row's
          real inputs divided by the absolute value of their largest entry.
    Inputs that are not one row per token (of a classifier's pooled head, of an array) all count.
    Raises ValueError for an unknown statistic or path, and if inputs are asked of anything other
    than a plain linear layer.
    """
    paths, statistics = tuple(paths), tuple(statistics)
    flat = tree.flatten(base.params)
    for statistic in statistics:
        if statistic not in STATISTICS:
            raise ValueError(f"statistics: {statistic!r} is not one of {', '.join(STATISTICS)}")
    for path in paths:
        if path not in base.sites:
            raise ValueError(f"paths: {path} can't be adapted; there is {', '.join(base.sites)}")
    # Quantised weights are decoded: gradients need numbers, not codes.
    mesh = gather.mesh_of(base.params)
    decoded = lambda leaf, site: gather.divided(lambda leaf: ops.dense(leaf, site), mesh, leaf)
    probe = lambda path: (
        decoded(flat[path], base.sites[path]) if ops.is_operator(flat[path]) else flat[path]
    )
    probes = {path: probe(path) for path in paths if "gradient" in statistics}
    for statistic in statistics:
        probes |= {} if statistic == "gradient" else _taps(base, flat, paths, statistic, mesh)

    batches = gather.side_by_side(jax.tree.map(jnp.asarray, dict(batches)), mesh, axis=1)
    with divided.on(mesh):
        total, weight, rows = _summed(base.module, kind, mesh, flat, probes, batches)
    read = {
        "gradient": lambda path: base.sites[path].to_matrix(total[path] / jnp.maximum(weight, 1)),
        "moments": lambda path: _filled(base, flat, path, total[tree.sibling(path, "moments")]),
        "covariance": lambda path: total[tree.sibling(path, "covariance")] / jnp.maximum(rows, 1),
    }
    return {path: {name: read[name](path) for name in statistics} for path in paths}


@functools.partial(jax.jit, static_argnames=("module", "kind", "mesh"))  # once for all members
def _summed(module, kind, mesh, flat: dict, probes: dict, batches: dict):
    """(the probes' gradients, weights, rows with a real token), each summed over the batches. mesh:
    that the gradients are divided over, None for one device."""
    divide = lambda x: (
        x if mesh is None else jax.lax.with_sharding_constraint(x, gather.division(x.shape, mesh))
    )

    def loss(probes, batch):
        with nn.intercept_methods(_listen(kind.real(batch))):
            return kind.loss(module, tree.unflatten(flat | probes), batch)[:2]

    def add(carry, batch):
        grads, weight = jax.grad(loss, has_aux=True)(probes, batch)
        grads = jax.tree.map(lambda g: divide(g.astype(jnp.float32)), grads)
        rows = jnp.sum(jnp.any(kind.real(batch), axis=1).astype(jnp.float32))
        return jax.tree.map(jnp.add, carry, (grads, weight, rows)), None

    zero = jax.tree.map(lambda x: divide(jnp.zeros(x.shape, jnp.float32)), probes)
    return jax.lax.scan(add, (zero, jnp.float32(0), jnp.float32(0)), batches)[0]


# ------------------------------------------------------------------------------------------- inputs


@jax.custom_vjp
def _tapped(x, tap, rows):
    """x itself; the cotangent of `tap` (in, in) is rows^T rows, with rows (..., in)."""
    return x


_tapped.defvjp(
    lambda x, tap, rows: (x, rows),
    lambda rows, dx: (dx, jnp.einsum("...i,...j->ij", rows, rows), jnp.zeros_like(rows)),
)


def _taps(base: Base, flat: dict, paths, statistic: str, mesh) -> dict:
    """{path of a tap: zeros (layers..., in, in)}, with one more row and column for "moments", and
    then as many as a mesh needs to divide it."""
    taps = {}
    for path in paths:
        site, top = base.sites[path], path.partition("/")[0]
        if site.kind != "linear" or (site.ins, site.outs) != ((0,), (1,)):
            raise ValueError(f"paths: {path}: the inputs of its kind, {site.kind}, can't be read")
        if top in base.traits.head:
            raise ValueError(f"paths: {path}: a language model's head is read in parts, not whole")
        axes, n_in, _ = site.matrix_shape(flat[path].shape)
        size = n_in + (statistic == "moments")
        if statistic == "moments" and mesh is not None:
            size += -size % math.lcm(mesh.shape["fsdp"], mesh.shape["tensor"])
        taps[tree.sibling(path, statistic)] = jnp.zeros((*axes, size, size), jnp.float32)
    return taps


@dataclasses.dataclass(frozen=True, eq=False)
class Corner:
    """The first `size` rows and columns of matrices (layers..., n, n) that a mesh divides, of which
    one layer at a time is read (`gather.layer`)."""

    matrices: jax.Array
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.matrices.shape[:-2], self.size, self.size)

    def read(self, index: tuple[slice, ...]) -> jax.Array:
        """One layer. index: a slice for each axis, of length 1 for those of layers."""
        layer = gather.layer(self.matrices, tuple(part.start for part in index[:-2]))
        return layer[: self.size, : self.size]


def _filled(base: Base, flat: dict, path: str, moments):
    """Moments without the rows and columns that only the mesh needs."""
    _, n_in, _ = base.sites[path].matrix_shape(flat[path].shape)
    return moments if moments.shape[-1] == n_in + 1 else Corner(moments, n_in + 1)


def _listen(real):
    """The interceptor that records each layer's inputs with its taps. real: (B, T) bool."""
    rows_of = {"moments": _ones_beside, "covariance": _over_largest}

    def listen(next_fun, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.Dense):
            return next_fun(*args, **kwargs)
        (x,) = args
        mask = real if real.shape == x.shape[:-1] else jnp.ones(x.shape[:-1], bool)
        for statistic, read in rows_of.items():
            if module.has_variable("params", statistic):
                tap = module.get_variable("params", statistic)
                rows = read(jax.lax.stop_gradient(x.astype(jnp.float32)), mask)
                more = tap.shape[-1] - rows.shape[-1]
                rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, more)]) if more else rows
                x = _tapped(x, tap, rows)
        return next_fun(x, **kwargs)

    return listen


def _ones_beside(x, mask):
    """[x, 1] (..., in + 1), zero where the mask is False."""
    wide = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)
    return jnp.where(mask[..., None], wide, 0)


def _over_largest(x, mask):
    """Each row's real inputs over |their largest entry|, as in CorDA's code; x: (B, ..., in)."""
    mask, axes = mask[..., None], tuple(range(1, x.ndim))
    largest = jnp.abs(jnp.max(jnp.where(mask, x, -jnp.inf), axis=axes, keepdims=True))
    return jnp.where(mask & (largest > 0), x / jnp.where(largest > 0, largest, 1), 0)


# ------------------------------------------------------------------------------------------ ranking


class Matrix(NamedTuple):
    """One matrix in a ranking.

    path, index: of the kernel and its layer. energy: ||g||_F^2 of the loss's gradient. share: of
    the energy, in the `rank` largest singular values. parameters: rank (in + out), what an adapter
    trains.
    """

    path: str
    index: tuple[int, ...]
    energy: float
    share: float
    parameters: int

    @property
    def score(self) -> float:
        """The gradient energy that an adapter can reach, per trained parameter."""
        return self.energy * self.share / self.parameters


def rank_matrices(evidence: Mapping[str, Mapping], rank: int) -> list[Matrix]:
    """All matrices of evidence with "gradient", the highest score first (`Matrix.score`).

    The score is the sum of the r largest squared singular values divided by r (in + out): to first
    order, the square of the loss decrease from a unit step along the best rank-r update, per
    parameter.
    """
    ranked = []
    for (path, index), g in _gradients(evidence):
        squares = np.linalg.svd(g, compute_uv=False).astype(np.float64) ** 2
        energy = float(squares.sum())
        share = float(squares[:rank].sum()) / energy if energy else 0.0
        ranked.append(Matrix(path, index, energy, share, rank * sum(g.shape)))
    return sorted(ranked, key=lambda matrix: -matrix.score)


def choose(ranking: list[Matrix], rank: int, n: int | None = None, budget: int | None = None):
    """{(path, layer index): rank, or 0 if left out}: the n best that fit in a budget.

    Goes in order of the ranking and skips matrices that no longer fit. budget: trainable parameters
    in total. `starts.by_path` converts the result for `lora(ranks=...)`. Raises ValueError if
    nothing is chosen.
    """
    chosen, left = dict.fromkeys([(m.path, m.index) for m in ranking], 0), budget
    for m in ranking:
        if n is not None and sum(r > 0 for r in chosen.values()) >= n:
            break
        if left is None or m.parameters <= left:
            chosen[m.path, m.index] = rank
            left = None if left is None else left - m.parameters
    if not any(chosen.values()):
        raise ValueError(f"n, budget: {n}, {budget} given: no matrix fits")
    return chosen


def spectra(evidence: Mapping[str, Mapping]) -> dict:
    """{(path, layer index): squared singular values of the gradient divided by in + out}, for
    `starts.redistribute`, which then puts each further rank where it gains most per parameter."""
    return {
        matrix: np.linalg.svd(g, compute_uv=False).astype(np.float64) ** 2 / sum(g.shape)
        for matrix, g in _gradients(evidence)
    }


def _gradients(evidence):
    for path, kinds in evidence.items():
        gradients = kinds["gradient"]
        for index in np.ndindex(*gradients.shape[:-2]):
            yield (path, index), np.asarray(gather.layer(gradients, index))
