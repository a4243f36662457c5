"""The header of a GGUF file, and its tensors as float32.

    "GGUF", version (2 or 3), number of tensors, number of fields
    fields: key, type, value; tensors: name, axes, type, place; then the data, aligned

The `gguf` package reads headers too, but takes the counts in a file at their word, so that it reads
on long after the end of a damaged one; here each is held against what is left of
the file. Quantised numbers are decoded by the package. (ggml's docs/gguf.md.)
"""

import math
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lorax.interop.formats.opened import check_names, quiet, single
from lorax.interop.formats.pairs import Lazy

_SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}  # struct's words, by type
_STRING, _ARRAY, _LONGEST = 8, 9, 1024
_VERSIONS = (2, 3)
_FLOATS = {0: ("F32", np.float32), 1: ("F16", np.float16), 30: ("BF16", ml_dtypes.bfloat16)}
_FLOATS[28] = ("F64", np.float64)


class Gguf(NamedTuple):
    """fields: {key: value}, of arrays at most the first 1,024 elements. tensors: by name; their
    axes are in numpy's order, the file's last axis first."""

    fields: dict[str, Any]
    tensors: dict[str, Lazy]


def read_header(file: Path) -> Gguf:
    """The fields and tensors of a file.

    Raises ValueError that names the file if it is damaged, of another version or byte order, or
    ends within a tensor, and for quantised tensors without the `gguf` package.
    """
    try:
        with open(file, "rb") as handle:
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return _Header(file, data).read()
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{file}: not a readable GGUF file ({error})") from None
    except ValueError as error:
        if str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file}: not a readable GGUF file ({error})") from None


class _Header:
    """Reads from the beginning of a file; `at` is the place of what comes next."""

    def __init__(self, file: Path, data: mmap.mmap):
        self.file, self.data, self.at = file, data, 4

    def read(self) -> Gguf:
        version = self.scalar("I")
        if version not in _VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", version))[0]
            why = "big-endian" if swapped in _VERSIONS else f"version {version}"
            raise ValueError(f"{self.file}: {why}; GGUF is read in versions 2 and 3, little-endian")
        n_tensors, n_fields = self.scalar("Q"), self.scalar("Q")
        self.check(n_tensors, 24, "tensors")
        self.check(n_fields, 13, "fields")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self.string()
            if key in fields:
                raise ValueError(f"{self.file}: {key} occurs twice")
            fields[key] = self.value(self.scalar("I"))
        infos = [self.tensor() for _ in range(n_tensors)]
        align = fields.get("general.alignment", 32)
        if type(align) is not int or align < 1:
            raise ValueError(f"{self.file}: general.alignment: {align} given; should be over 0")
        start = -(-self.at // align) * align
        check_names(self.file, [name for name, *_ in infos])
        tensors: dict[str, Lazy] = {}
        for name, shape, kind, place in infos:
            if name in tensors:
                raise ValueError(f"{self.file}: {name} occurs twice")
            tensors[name] = self.lazy(name, shape, kind, start + place)
        return Gguf(fields, tensors)

    def check(self, count: int, size: int, what: str) -> None:
        if count * size > len(self.data) - self.at:
            raise ValueError(f"{self.file}: {count} {what} do not fit into the file: it is damaged")

    def scalar(self, kind: str):
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        self.check(size, 1, "bytes of a text")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int, nested: bool = False) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY or nested:
            raise ValueError(f"{self.file}: a field of unknown type {kind}")
        kind, count = self.scalar("I"), self.scalar("Q")
        size = struct.calcsize(f"<{_SCALARS[kind]}") if kind in _SCALARS else 8
        self.check(count, size, "elements of a list")
        values = []
        for i in range(count if kind == _STRING else min(count, _LONGEST)):
            value = self.value(kind, nested=True)
            values += [value] * (i < _LONGEST)
        if kind != _STRING:
            self.at += size * (count - len(values))
        return values

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, axes, type, place in the data)."""
        name, axes = self.string(), self.scalar("I")
        if axes > 4:
            raise ValueError(f"{self.file}: {name}: {axes} axes given; GGUF has at most 4")
        shape = tuple(self.scalar("Q") for _ in range(axes))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def lazy(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> Lazy:
        """A tensor that begins at `start`."""
        whole = f"{self.file}: {name}"
        if kind in _FLOATS:
            word, dtype = _FLOATS[kind]
            size = math.prod(shape) * np.dtype(dtype).itemsize
        else:
            word, size = _quantised(whole, kind, shape)
        if not start + size <= len(self.data):
            raise ValueError(f"{whole}: {shape} numbers of type {word}: the file ends before them")

        def read(index: Sequence[range] | None = None) -> np.ndarray:
            raw = np.frombuffer(self.data, np.uint8, size, start)
            if kind in _FLOATS:
                values = raw.view(dtype).reshape(shape)
            else:
                values = _decoded(raw, kind, shape)
            values = values if index is None else values[np.ix_(*index)]
            return np.array(single(values))

        return Lazy(whole, shape, word, quiet(read))


def _quantised(name: str, kind: int, shape: tuple[int, ...]) -> tuple[str, int]:
    """(name, bytes) of a quantised tensor. Raises ValueError for types that can't be decoded."""
    gguf = package(name)
    try:
        known = gguf.GGMLQuantizationType(kind)
        block, bytes_of_block = gguf.GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise ValueError(f"{name}: unknown type {kind} of numbers") from None
    if not shape or shape[-1] % block:
        raise ValueError(f"{name}: {shape} given; {known.name} has blocks of {block} numbers")
    return known.name, math.prod(shape) // block * bytes_of_block


def _decoded(raw: np.ndarray, kind: int, shape: tuple[int, ...]) -> np.ndarray:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    known = GGMLQuantizationType(kind)
    block, bytes_of_block = GGML_QUANT_SIZES[known]
    rows = raw.reshape(*shape[:-1], shape[-1] // block * bytes_of_block)
    try:
        return dequantize(rows, known)
    except NotImplementedError:
        raise ValueError(f"the gguf package decodes no {known.name}") from None


def package(name: str):
    """The gguf package. Raises ValueError that names a file if it is missing."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise ValueError(f"{name}: needs gguf: pip install lorax-research[formats]") from None
    return gguf
