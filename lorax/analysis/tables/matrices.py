"""The adapted matrices of members: their names, and stacks of matrices with the same shape."""

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from lorax.interop.peft import Factors

TOGETHER = 2**22  # numbers in a stack of matrices: 32 MB in float64

Updates = Mapping[str, Factors | np.ndarray]  # of one member, by path
SVDs = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # u, sigma, vt by path, thin


def layer_and_target(path: str) -> tuple[int, str]:
    """Layer and target of a path: "h/3/attn/q" -> (3, "q"), and of another library's module
    "encoder.layer.3.attention.query" -> (3, "query"); -1 for a matrix outside all layers. Each
    expert is a target: "h/3/experts/5/up" -> (3, "experts.5.up")."""
    parts = re.split(r"[/.]", path)
    layer = next((int(part) for part in parts if part.isdecimal()), -1)
    of_expert = len(parts) > 2 and parts[-3] == "experts" and parts[-2].isdecimal()
    return layer, ".".join(parts[-3:]) if of_expert else parts[-1]


def identity(member: Hashable, path: str) -> dict:
    """The columns that identify the matrix of a row."""
    layer, target = layer_and_target(path)
    return {"member": member, "path": path, "layer": layer, "target": target}


def stacks(shapes: Mapping[Hashable, tuple[int, ...]]) -> Iterator[list]:
    """Lists of keys with equal shapes, each at most a stack of `TOGETHER` numbers.

    shapes: what must be equal within a stack; the two largest numbers of a shape are the size of a
    matrix.
    """
    by_shape: dict[tuple[int, ...], list] = {}
    for key, shape in shapes.items():
        by_shape.setdefault(tuple(shape), []).append(key)
    for shape, keys in by_shape.items():
        count = max(1, TOGETHER // max(1, math.prod(sorted(shape)[-2:])))
        yield from (keys[n : n + count] for n in range(0, len(keys), count))


def shape_of(update: Factors | np.ndarray) -> tuple[int, ...]:
    """(in, out, r) of factors, (in, out) of a dense update."""
    if isinstance(update, Factors):
        return (update.a.shape[0], update.b.shape[1], update.a.shape[1])
    return update.shape


def stacked(updates: Sequence):
    """Updates of one shape, stacked for the array functions: (a, b, s), or (..., in, out)."""
    if isinstance(updates[0], Factors):
        return tuple(np.stack([update[n] for update in updates]) for n in range(3))
    return np.stack(updates)


def by_matrix(
    updates: Mapping[Hashable, Updates], kernels: Mapping[str, np.ndarray] | None = None
) -> dict[tuple[Hashable, str], Factors | np.ndarray]:
    """{(member, path): update}. Raises KeyError or ValueError if the kernels do not fit them."""
    flat = {
        (member, path): update
        for member, by_path in updates.items()
        for path, update in by_path.items()
    }
    for (_, path), update in flat.items() if kernels is not None else ():
        if reason := misfit(path, update, kernels):
            raise (ValueError if path in kernels else KeyError)(reason)
    return flat


def misfit(path: str, update: Factors | np.ndarray, kernels: Mapping[str, np.ndarray]) -> str:
    """Why an update doesn't fit its kernel; "" if it fits."""
    if path not in kernels:
        return f"{path}: adapted, but not among the base's kernels"
    shape, known = shape_of(update)[:2], kernel_shape(kernels, path)
    if shape != known:
        return f"{path}: an update of {shape}, but a kernel of {known}"
    return ""


def kernel_shape(kernels: Mapping[str, np.ndarray], path: str) -> tuple[int, int]:
    """(in, out) of a kernel. `lorax.models.Kernels` says it without reading the weight."""
    shapes = getattr(kernels, "shapes", None)
    return kernels[path].shape if shapes is None else shapes[path]


def with_base(every: dict, kernels: Mapping, svds: SVDs, keys: list) -> tuple:
    """Stacks of updates of one shape, their kernels and the kernels' SVDs."""
    w = np.stack([np.asarray(kernels[path], np.float64) for _, path in keys])
    w_svd = tuple(np.stack([svds[path][n] for _, path in keys]) for n in range(3))
    return stacked([every[key] for key in keys]), w, w_svd
