"""What a few batches say about each matrix before anything is trained: gradients and inputs.

`evidence` runs the frozen base; starts that read data (`lorax.methods.starts`), the choice of
targets (`rank_matrices`, `choose`) and of ranks (`spectra`) are made from it.

Second moments come from one gradient call: beside a kernel lies a zero `tap`, through which nothing
flows, and whose "gradient" is defined as x^T x of the layer's inputs. So they pass through
`nn.scan` and remat as gradients do, stacked by layer and added over batches.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorax import ops, tree
from lorax.models import Base

STATISTICS = ("gradient", "moments", "covariance")


def evidence(
    base: Base, kind, batches: Mapping, paths, statistics=("gradient",)
) -> dict[str, dict]:
    """{path: {statistic: float32 array, the layer axes first}} of the kernels at `paths`.

    kind: of the rows, a `lorax.tasks.kinds.Kind`: their loss, and which positions are real.
    batches: the leaves of a task's rows, (N, B, ...), N batches.
    statistics:
      "gradient" (in, out): of the loss by the kernel, the mean over all weighted tokens of all
          batches (PEFT's LoRA-GA takes the mean of the batches' means, the same for equal weights).
      "moments" (in + 1, in + 1): the sum of [x, 1]^T [x, 1] over the real tokens' inputs x (in,):
          x^T x, the sum of x, and in the corner their number.
      "covariance" (in, in): CorDA's, the mean over rows of the batch of x^T x, x the row's real
          inputs over the absolute value of their largest entry.
    Inputs that are not one row per token (of a classifier's pooled head, of an array) all count.
    Raises ValueError for an unknown statistic or path, and for the inputs of anything other than a
    plain linear layer.
    """
    paths, statistics = tuple(paths), tuple(statistics)
    flat = tree.flatten(base.params)
    for statistic in statistics:
        if statistic not in STATISTICS:
            raise ValueError(f"statistics: {statistic!r} is not one of {', '.join(STATISTICS)}")
    for path in paths:
        if path not in base.sites:
            raise ValueError(f"paths: {path} can't be adapted; there is {', '.join(base.sites)}")
    # Quantised weights are decoded: a gradient is by numbers, not by codes.
    probe = lambda path: ops.dense(flat[path], base.sites[path])
    probes = {path: probe(path) for path in paths if "gradient" in statistics}
    for statistic in statistics:
        probes |= {} if statistic == "gradient" else _taps(base, flat, paths, statistic)

    batches = jax.tree.map(jnp.asarray, dict(batches))
    total, weight, rows = _summed(base.module, kind, flat, probes, batches)
    read = {
        "gradient": lambda path: base.sites[path].to_matrix(total[path] / jnp.maximum(weight, 1)),
        "moments": lambda path: total[_beside(path, "moments")],
        "covariance": lambda path: total[_beside(path, "covariance")] / jnp.maximum(rows, 1),
    }
    return {path: {name: read[name](path) for name in statistics} for path in paths}


@functools.partial(jax.jit, static_argnames=("module", "kind"))  # once for all seeds and members
def _summed(module, kind, flat: dict, probes: dict, batches: dict):
    """(the probes' gradients, weights, rows with a real token), each summed over the batches."""

    def loss(probes, batch):
        with nn.intercept_methods(_listen(kind.real(batch))):
            return kind.loss(module, tree.unflatten(flat | probes), batch)[:2]

    def add(carry, batch):
        grads, weight = jax.grad(loss, has_aux=True)(probes, batch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        rows = jnp.sum(jnp.any(kind.real(batch), axis=1).astype(jnp.float32))
        return jax.tree.map(jnp.add, carry, (grads, weight, rows)), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), probes)
    return jax.lax.scan(add, (zero, jnp.float32(0), jnp.float32(0)), batches)[0]


# ------------------------------------------------------------------------------------------- inputs


@jax.custom_vjp
def _tapped(x, tap, rows):
    """x; the cotangent of `tap` (in, in) is rows^T rows, rows (..., in) whatever x brings."""
    return x


_tapped.defvjp(
    lambda x, tap, rows: (x, rows),
    lambda rows, dx: (dx, jnp.einsum("...i,...j->ij", rows, rows), jnp.zeros_like(rows)),
)


def _beside(path: str, statistic: str) -> str:
    return f"{path.rpartition('/')[0]}/{statistic}"


def _taps(base: Base, flat: dict, paths, statistic: str) -> dict:
    """{path of a tap: zeros (layers..., in, in)}, one more row and column for "moments"."""
    taps = {}
    for path in paths:
        site, top = base.sites[path], path.partition("/")[0]
        if site.kind != "linear" or (site.ins, site.outs) != ((0,), (1,)):
            raise ValueError(f"paths: {path}: the inputs of its kind, {site.kind}, can't be read")
        if top in base.traits.head:
            raise ValueError(f"paths: {path}: a language model's head is read in parts, not whole")
        axes, n_in, _ = site.matrix_shape(flat[path].shape)
        size = n_in + (statistic == "moments")
        taps[_beside(path, statistic)] = jnp.zeros((*axes, size, size), jnp.float32)
    return taps


def _listen(real):
    """The interceptor that leads each layer's inputs past its taps. real: (B, T) bool."""
    rows_of = {"moments": _ones_beside, "covariance": _over_largest}

    def listen(next_fun, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.Dense):
            return next_fun(*args, **kwargs)
        (x,) = args
        mask = real if real.shape == x.shape[:-1] else jnp.ones(x.shape[:-1], bool)
        for statistic, read in rows_of.items():
            if module.has_variable("params", statistic):
                rows = read(jax.lax.stop_gradient(x.astype(jnp.float32)), mask)
                x = _tapped(x, module.get_variable("params", statistic), rows)
        return next_fun(x, **kwargs)

    return listen


def _ones_beside(x, mask):
    """[x, 1] (..., in + 1), zero where the mask is not."""
    wide = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)
    return jnp.where(mask[..., None], wide, 0)


def _over_largest(x, mask):
    """Each row's real inputs over |their largest entry|, as CorDA's code has it: the first axis is
    the rows', (B, ..., in)."""
    mask, axes = mask[..., None], tuple(range(1, x.ndim))
    largest = jnp.abs(jnp.max(jnp.where(mask, x, -jnp.inf), axis=axes, keepdims=True))
    return jnp.where(mask & (largest > 0), x / jnp.where(largest > 0, largest, 1), 0)


# ------------------------------------------------------------------------------------------ ranking


class Matrix(NamedTuple):
    """One matrix in a ranking.

    path, index: of the kernel and its layer. energy: ||g||_F^2 of the loss's gradient. share: of
    it, in the largest `rank` singular values. parameters: rank (in + out), what an adapter trains.
    """

    path: str
    index: tuple[int, ...]
    energy: float
    share: float
    parameters: int

    @property
    def score(self) -> float:
        """What of the gradient an adapter can reach, for each parameter that it trains."""
        return self.energy * self.share / self.parameters


def rank_matrices(evidence: Mapping[str, Mapping], rank: int) -> list[Matrix]:
    """All matrices of evidence with "gradient", the highest score first (`Matrix.score`).

    The score is the sum of the r largest squared singular values over r (in + out): to first
    order, the square of what a unit step along the best rank-r update takes off the loss, for each
    parameter.
    """
    found = []
    for (path, index), g in _gradients(evidence):
        squares = np.linalg.svd(g, compute_uv=False).astype(np.float64) ** 2
        energy = float(squares.sum())
        share = float(squares[:rank].sum()) / energy if energy else 0.0
        found.append(Matrix(path, index, energy, share, rank * sum(g.shape)))
    return sorted(found, key=lambda matrix: -matrix.score)


def choose(ranking: list[Matrix], rank: int, n: int | None = None, budget: int | None = None):
    """{(path, layer index): rank, or 0 where left out}: the n best that fit in a budget.

    In order of the ranking; a matrix whose parameters no longer fit is passed over. budget:
    trainable parameters in all. `starts.by_path` brings the result into the form of
    `lora(ranks=...)`. Raises ValueError where nothing is chosen.
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
    """{(path, layer index): squared singular values of the gradient over in + out}, for
    `starts.redistribute`: each further rank goes where it reaches most per parameter."""
    return {
        matrix: np.linalg.svd(g, compute_uv=False).astype(np.float64) ** 2 / sum(g.shape)
        for matrix, g in _gradients(evidence)
    }


def _gradients(evidence):
    for path, kinds in evidence.items():
        gradients = np.asarray(kinds["gradient"])
        for index in np.ndindex(*gradients.shape[:-2]):
            yield (path, index), gradients[index]
