"""`convert add` and `convert subtract`: several adapters as one, without their base.

    sum of w_i s_i a_i b_i = [a_1, a_2...] [w_1 s_1 b_1; w_2 s_2 b_2...]

The sum's rank is at most that of all together; `shrinking` cuts it. Matrices are matched by name
and shape, as `lorax.xray` does, and have the names of the first file that has them.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from lorax import spectrum
from lorax.interop.adapter import Factors
from lorax.interop.formats import Update
from lorax.interop.formats.heads import is_unordered
from lorax.xray.together import same_matrix


def added(files: Mapping[object, Sequence[Update]], weights: Sequence[float]) -> tuple[Update, ...]:
    """The updates of a sum with these weights; its numbers are read when asked for.

    files: {path or name: its updates}. Raises ValueError for weights that don't fit, a matrix of
    two shapes or with rows in two orders, and DoRA.
    """
    if len(weights) != len(files):
        raise ValueError(f"--weights: {len(weights)} given for {len(files)} adapters")
    if not np.isfinite(weights).all():
        raise ValueError(f"--weights: {', '.join(map(str, weights))}; they must be finite")
    matrices: dict[str, list[tuple[Update, float]]] = {}
    for (name, updates), weight in zip(files.items(), weights, strict=True):
        for update in updates:
            if "DoRA" in update.kind:
                raise ValueError(
                    f"{name}: {update.layer} is DoRA, whose lengths belong to its own update on "
                    "its base: merge it into the base instead"
                )
            parts = matrices.setdefault(same_matrix(update.layer), [])
            if parts and parts[0][0].shape != update.shape:
                raise ValueError(
                    f"{name}: {update.layer} is {update.shape}, but {parts[0][0].shape} in "
                    "another file; adapters of one base are needed"
                )
            if parts and is_unordered(parts[0][0]) != is_unordered(update):
                raise ValueError(
                    f"{name}: the rows of {update.layer} are in another order than in another "
                    "file; their base's config.json beside the files puts them in one order"
                )
            parts.append((update, weight))
    return tuple(_sum(parts) for parts in matrices.values())


def _sum(parts: Sequence[tuple[Update, float]]) -> Update:
    first = parts[0][0]
    rank = min(sum(update.rank for update, _ in parts), *first.shape)
    read = functools.partial(_read, parts)
    return first._replace(kind="LoRA", rank=rank, scale=1.0, source="of a sum", read=read)


def _read(parts: Sequence[tuple[Update, float]]) -> Factors | np.ndarray:
    """The sum: factors if all have some, else dW. What is below the rounding of its parts is 0, as
    of an update less itself."""
    given = [(update.read(), weight) for update, weight in parts]
    size = max(abs(weight) * _norm(one) for one, weight in given)
    floor = max(parts[0][0].shape) * np.finfo(np.float32).eps * size
    if not all(isinstance(one, Factors) for one, _ in given):
        dense = lambda one: one.s * (one.a @ one.b) if isinstance(one, Factors) else one
        total = sum(np.float32(weight) * dense(one) for one, weight in given)
        return total if _norm(total) > floor else np.zeros_like(total)
    a = np.concatenate([one.a for one, _ in given], axis=1)
    b = np.concatenate([np.float32(weight * one.s) * one.b for one, weight in given])
    u, sigma, vt = spectrum.factor_svd(a, b)
    k = max(1, int(np.sum(sigma > floor)))
    sigma = np.where(sigma > floor, sigma, 0.0)[:k]
    return Factors((u[:, :k] * sigma).astype(np.float32), vt[:k].astype(np.float32), 1.0)


def _norm(update: Factors | np.ndarray) -> float:
    """||dW||_F."""
    if isinstance(update, Factors):
        return float(np.linalg.norm(spectrum.factor_sigma(*update[:3])))
    return float(np.linalg.norm(update))
