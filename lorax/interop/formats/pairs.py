"""The update of a matrix from two tensors of a file, A and B, whatever their orientation and axes.

A tensor is a `Lazy`: its shape is known, its numbers are read when they are asked for, a slice of a
stack alone. A `Side` is what a tensor is to dW = s a b: a is (in, r), b is (r, out).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lorax.interop.adapter import Factors
from lorax.interop.formats.contract import Update
from lorax.interop.formats.opened import check_floats, numbers
from lorax.interop.tensors import Stored


class Lazy(NamedTuple):
    """A tensor of floats in a file. name: with its file, for errors. kind: its type, as safetensors
    call it. read(index): float32, all of it, or with one range for each axis that part."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[Sequence[range] | None], np.ndarray]

    def at(self, axis: int, i: int) -> "Lazy":
        """Element i of an axis, without that axis."""

        def read(index=None):
            index = [range(n) for n in shape] if index is None else list(index)
            return self.read([*index[:axis], range(i, i + 1), *index[axis:]]).squeeze(axis)

        shape = self.shape[:axis] + self.shape[axis + 1 :]
        return Lazy(self.name, shape, self.kind, read)


def lazy(tensor: Stored) -> Lazy:
    """A tensor of a safetensors file. Raises ValueError that names it if it holds no floats."""
    check_floats(tensor)
    name = f"{tensor.file}: {tensor.key}"
    return Lazy(name, tensor.shape, tensor.kind, lambda index=None: numbers(tensor, index))


class Side(NamedTuple):
    """a (in, r) or b (r, out) of an update. read: float32."""

    tensor: Lazy
    shape: tuple[int, int]
    read: Callable[[], np.ndarray]


def as_is(tensor: Lazy) -> Side:
    """A matrix that is stored in this orientation."""
    return Side(tensor, _matrix(tensor), lambda: tensor.read(None))


def transposed(tensor: Lazy) -> Side:
    """A matrix that is stored the other way round, as torch's Linear stores its weights."""
    rows, columns = _matrix(tensor)
    return Side(tensor, (columns, rows), lambda: tensor.read(None).T)


def flat_a(tensor: Lazy) -> Side:
    """a from (..., r): the other axes, in their order, are the rows."""
    shape = _flat(tensor, tensor.shape[:-1]), tensor.shape[-1]
    return Side(tensor, shape, lambda: tensor.read(None).reshape(shape))


def flat_b(tensor: Lazy) -> Side:
    """b from (r, ...): the other axes, in their order, are the columns."""
    shape = tensor.shape[0], _flat(tensor, tensor.shape[1:])
    return Side(tensor, shape, lambda: tensor.read(None).reshape(shape))


def columns(side: Side, order: np.ndarray) -> Side:
    """b with its columns in another order."""
    return side._replace(read=lambda: np.ascontiguousarray(side.read()[:, order]))


def update(
    layer: str,
    a: Side,
    b: Side,
    scale: float,
    source: str,
    m: Side | None = None,
    warnings: Iterable[str] = (),
) -> Update:
    """The update of one matrix. m: DoRA's lengths, (1, out).

    Raises ValueError that names both tensors if their ranks differ.
    """
    if a.shape[1] != b.shape[0] or (m is not None and m.shape[1] != b.shape[1]):
        given = [side.tensor for side in (a, b, m) if side is not None]
        shapes = ", ".join(f"{x.name.rpartition(': ')[2]} {x.shape}" for x in given)
        file = a.tensor.name.rpartition(": ")[0]
        raise ValueError(f"{file}: {layer}: {shapes} given; they don't fit together")

    def read() -> Factors:
        return Factors(a.read(), b.read(), scale, None if m is None else m.read()[0])

    kinds = dict.fromkeys(side.tensor.kind for side in (a, b))
    shape, kind = (a.shape[0], b.shape[1]), "LoRA" if m is None else "DoRA"
    dtype = "/".join(kinds)
    return Update(layer, kind, shape, a.shape[1], scale, source, dtype, read, tuple(warnings))


def stack(
    layer: str,
    a: Lazy,
    b: Lazy,
    scale: float,
    source: str,
    as_a: Callable[[Lazy], Side],
    as_b: Callable[[Lazy], Side],
    warnings: Iterable[str] = (),
    axis: int = 0,
) -> list[Update]:
    """An update for each matrix of a stack, an axis of a and b; one of them may have a single
    element, which all matrices share. as_a, as_b: the orientation of an element.

    Raises ValueError that names the layer if the stacks differ in length.
    """
    lengths = a.shape[axis], b.shape[axis]
    n = max(lengths)
    if 0 in lengths or not set(lengths) <= {1, n}:
        file = a.name.rpartition(": ")[0]
        raise ValueError(f"{file}: {layer}: stacks of {lengths[0]} and {lengths[1]} matrices given")
    said = [*warnings]
    if len(set(lengths)) == 2:
        said.append(f"{'A' if lengths[0] == 1 else 'B'} is one for all {n} matrices of {layer}")
    one = lambda tensor, i: tensor.at(axis, i if tensor.shape[axis] > 1 else 0)
    return [
        update(numbered(layer, i), as_a(one(a, i)), as_b(one(b, i)), scale, source, warnings=said)
        for i in range(n)
    ]


def numbered(layer: str, i: int) -> str:
    """The name of matrix i of a stack; an expert's number follows "experts", as in transformers."""
    if ".experts." in layer:
        return layer.replace(".experts.", f".experts.{i}.")
    return f"{layer}.{i}"


def row(tensor: Lazy) -> Side:
    """(1, n) from a vector (n,)."""
    if len(tensor.shape) != 1:
        raise ValueError(f"{tensor.name}: {tensor.shape} given; expected a vector")
    return Side(tensor, (1, *tensor.shape), lambda: tensor.read(None)[None])


def _matrix(tensor: Lazy) -> tuple[int, int]:
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise ValueError(f"{tensor.name}: {tensor.shape} given; expected a matrix")
    return tensor.shape


def _flat(tensor: Lazy, axes: tuple[int, ...]) -> int:
    if not axes or 0 in tensor.shape:
        raise ValueError(f"{tensor.name}: {tensor.shape} given; expected at least two axes")
    return int(np.prod(axes))
