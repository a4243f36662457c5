"""Weights from outside, .safetensors and .npz, checked as they are read.

Nothing is unpickled. Types other than floats of at least 16 bits, NaN and infinity raise an error
that names file and tensor.
"""

import collections
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes  # gives numpy the bfloat16 that safetensors returns
import numpy as np
from safetensors import SafetensorError, safe_open

from lorax import hosts
from lorax.files import atomically, parse_json, pointer_hint

#: Types of weights, as safetensors call them.
FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
#: And of codes of weights.
CODES = {"U8": np.uint8}
#: All types that lorax writes, in the order of safetensors.
TYPES = {"BOOL": np.bool_, **CODES, "I8": np.int8, "I16": np.int16, "U16": np.uint16}
TYPES |= {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "I32": np.int32, "U32": np.uint32}
TYPES |= {"F32": np.float32, "F64": np.float64, "I64": np.int64, "U64": np.uint64}


def write(file: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
    """Write arrays as a safetensors file, byte for byte as `safetensors.numpy.save_file` does, with
    only one of them in this process's memory at a time.

    arrays: {name: NumPy or JAX array}; the parts of one that several devices or processes hold are
    gathered when it is written, layer by layer, so all processes must call it together
    (`lorax.hosts`).
    """
    kinds = {np.dtype(kind): name for name, kind in TYPES.items()}
    order = [*kinds]
    names = sorted(arrays, key=lambda name: (-order.index(np.dtype(arrays[name].dtype)), name))
    header, end = {}, 0
    for name in names:
        x = arrays[name]
        start, end = end, end + math.prod(x.shape) * np.dtype(x.dtype).itemsize
        kind = {"dtype": kinds[np.dtype(x.dtype)], "shape": [*x.shape]}
        header[name] = kind | {"data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write_to(temporary):
        with open(temporary, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for piece in _pieces(arrays[name]):
                    out.write(np.ascontiguousarray(piece).tobytes())

    if hosts.first():
        atomically(file, write_to)
    else:  # which has only to give its parts
        for name in names:
            collections.deque(_pieces(arrays[name]), maxlen=0)


def _pieces(x) -> Iterator[np.ndarray]:
    """An array whole; layer by layer if several devices hold parts of a stack of matrices."""
    if x.ndim < 3 or getattr(x, "is_fully_replicated", True):
        yield hosts.whole(x)
        return
    for i in range(len(x)):
        yield hosts.whole(x[i])


def opened(file: str | os.PathLike):
    """A safetensors file, opened to read single tensors.

    Raises FileNotFoundError, or ValueError that names a damaged file.
    """
    try:
        return safe_open(file, framework="numpy")
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: not a readable safetensors file ({error}){pointer_hint(file)}"
        ) from None


class Stored(NamedTuple):
    """A tensor in a safetensors file. kind: its type as safetensors call it; start: where its
    numbers begin in the file, size: how many they are, both in bytes."""

    file: str | os.PathLike
    key: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int

    def checked(self) -> "Stored":
        """The same tensor. Raises ValueError if it holds no floats of at least 16 bits."""
        if self.kind not in FLOATS:
            raise _no_weight(self.file, self.key, self.kind)
        return self

    @property
    def dtype(self) -> np.dtype:
        """Raises ValueError for a type that holds neither floats of at least 16 bits nor codes."""
        if self.kind not in FLOATS | CODES:
            raise _no_weight(self.file, self.key, self.kind)
        return np.dtype((FLOATS | CODES)[self.kind])

    def as_bytes(self) -> "Stored":
        """Its bytes, (size,) uint8, whatever its type is."""
        return self._replace(kind="U8", shape=(self.size,))

    def flat(self) -> "Stored":
        """Its numbers in order, (n,)."""
        return self._replace(shape=(math.prod(self.shape),))

    def read(self, index: Sequence[Sequence[int]] | None = None) -> np.ndarray:
        """The numbers at `index`, as they are stored; only they are read.

        index: for each axis, the positions along it, a range or an array; None for all numbers.
        Whole rows are read at once; of a part of each row, these rows are mapped until it is
        copied, which takes less time than a read for each.
        Raises ValueError if the file ends before.
        """
        index = [range(n) for n in self.shape] if index is None else index
        apart = lambda at: isinstance(at, np.ndarray) or at.step != 1
        parted = [apart(at) for at in index[:1]]
        pairs = zip(index[1:], self.shape[1:], strict=True)
        parted += [apart(at) or len(at) < n for at, n in pairs]
        return self._mapped(index) if any(parted) else self._whole_rows(*index[:1])

    def _row(self) -> int:
        """Bytes of one row, an element of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _whole_rows(self, rows: range = range(1)) -> np.ndarray:
        """(rows, ...), or () of a tensor without axes."""
        out = np.empty((len(rows), *self.shape[1:]) if self.shape else (), self.dtype)
        part = memoryview(out.reshape(-1).view(np.uint8))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start + rows.start * self._row())
            while part and (read := file.readinto(part)):
                part = part[read:]
        if part:
            raise self._ends()
        return out

    def _mapped(self, index: Sequence[Sequence[int]]) -> np.ndarray:
        """As `read`."""
        first, last = int(np.min(index[0])), int(np.max(index[0]))
        start = self.start + first * self._row()
        beyond = start % mmap.ALLOCATIONGRANULARITY  # where a mapping can begin
        size = beyond + (last + 1 - first) * self._row()
        with open(self.file, "rb") as file:
            try:
                held = mmap.mmap(
                    file.fileno(), size, access=mmap.ACCESS_READ, offset=start - beyond
                )
            except ValueError:
                raise self._ends() from None
        rows = np.frombuffer(held, self.dtype, offset=beyond)
        part = rows.reshape(last + 1 - first, *self.shape[1:])
        for axis, at in enumerate(index):
            at = slice(at.start, at.stop, at.step) if isinstance(at, range) else at
            if axis == 0:  # the rows between are mapped as well
                at = slice(None, None, at.step) if isinstance(at, slice) else at - first
            part = part[(*(slice(None),) * axis, at)]
        return np.array(part, order="C")

    def _ends(self) -> ValueError:
        return ValueError(f"{self.file}: it ends within {self.key}")


def stored(file: str | os.PathLike) -> dict[str, Stored]:
    """{tensor's name: its place} of a safetensors file that `opened` has opened without an error,
    which checks what the places are read from."""
    with open(file, "rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = parse_json(handle.read(size).decode(), file)
    tensors = {}
    for key, entry in header.items():
        if key != "__metadata__":
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors[key] = Stored(file, key, entry["dtype"], shape, 8 + size + start, end - start)
    return tensors


def weight(stored, key: str, file: str | os.PathLike):
    """The slice of a float tensor in an open file; no data is read yet.

    Raises ValueError that names file, tensor and type for anything else.
    """
    piece = stored.get_slice(key)
    if piece.get_dtype() not in FLOATS:
        raise _no_weight(file, key, piece.get_dtype())
    return piece


def floats(stored, key: str, file: str | os.PathLike) -> np.ndarray:
    """A tensor of finite floats in an open file, as float32. Raises as `weight`."""
    weight(stored, key, file)
    return _float32(stored.get_tensor(key), key, file)


def array(stored, key: str, file: str | os.PathLike) -> np.ndarray:
    """A tensor in an open file as it is stored. Raises ValueError for types that numpy lacks."""
    try:
        return stored.get_tensor(key)
    except (SafetensorError, AttributeError, TypeError):
        raise _no_weight(file, key, stored.get_slice(key).get_dtype()) from None


def read_arrays(file: str | os.PathLike) -> dict[str, np.ndarray]:
    """{name: array as it is stored} of a safetensors file. Raises as `opened` and `array`."""
    with opened(file) as stored:
        return {key: array(stored, key, file) for key in stored.keys()}


def read_safetensors(
    file: str | os.PathLike, integers: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: float32 array}, the file's metadata). integers: a regex for names of tensors that may
    hold integers, which stay as they are stored.

    Raises FileNotFoundError; ValueError that names the file, and the tensor if it is not a weight.
    """

    def read(stored, key):
        if integers and re.fullmatch(integers, key):
            whole = array(stored, key, file)
            if whole.dtype.kind in "iu":
                return whole
        return floats(stored, key, file)

    with opened(file) as stored:
        return {key: read(stored, key) for key in stored.keys()}, stored.metadata() or {}


def read_npz(file: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """{name: array as it is stored}, all or those of `names`.

    Raises FileNotFoundError; ValueError that names the file if it is not an archive of arrays, is
    damaged, lacks a name, or declares an array larger than the memory.
    """
    try:
        with open(file, "rb") as handle:
            loaded = np.load(handle, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise ValueError("a single array")
            with loaded:
                arrays = {key: loaded[key] for key in (loaded.files if names is None else names)}
            for key, value in arrays.items():
                if not isinstance(value, np.ndarray):
                    raise ValueError(f"{key} is no array")
            return arrays
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except Exception as error:  # a dozen kinds, of zipfile, zlib, tokenize... all mean the file
        why = str(error) or type(error).__name__
        raise ValueError(f"{file}: not a readable .npz file ({why}){pointer_hint(file)}") from None


def read_npz_weights(file: str | os.PathLike) -> dict[str, np.ndarray]:
    """{name: float32 array} of an .npz file. Raises as `read_npz`, and if a type is not float."""
    arrays = {}
    for key, value in read_npz(file).items():
        if value.dtype.kind != "f":
            raise _no_weight(file, key, value.dtype)
        arrays[key] = _float32(value, key, file)
    return arrays


def check_weight(value: np.ndarray, key: str, file: str | os.PathLike, dtype=np.float32) -> None:
    """`check_finite` for a tensor of a file, before it is rounded to `dtype`."""
    with np.errstate(over="ignore"):
        narrow = ml_dtypes.finfo(value.dtype).maxexp > ml_dtypes.finfo(np.dtype(dtype)).maxexp
        rounded = value.astype(dtype) if narrow else value
    check_finite(f"{file}: {key}", value, rounded)


def check_finite(name: str, exact: np.ndarray, rounded: np.ndarray) -> None:
    """Raises ValueError, which begins with `name`, if a number in a tensor is NaN or infinite, or
    too large for the dtype that it was rounded to."""
    if _finite(rounded):
        return
    if not _finite(exact):
        raise ValueError(f"{name}: NaN or infinity in it; weights must be finite")
    largest, dtype = float(np.abs(exact).max()), rounded.dtype
    hint = "take bfloat16 or float32" if dtype == np.float16 else "weights must be finite"
    most = float(ml_dtypes.finfo(dtype).max)
    raise ValueError(
        f"{name}: {largest:.4g} in it is too large for {dtype}, which ends at {most:.5g}; {hint}"
    )


def _finite(value: np.ndarray) -> bool:
    if value.dtype.itemsize > 2:
        return bool(np.isfinite(value).all())
    infinity = np.array(np.inf, value.dtype).view(np.uint16)  # numpy's own test is slow on these
    return not ((value.view(np.uint16) & infinity) == infinity).any()


def _float32(value: np.ndarray, key: str, file: str | os.PathLike) -> np.ndarray:
    check_weight(value, key, file)
    return np.asarray(value, np.float32)


def _no_weight(file, key, given) -> ValueError:
    return ValueError(
        f"{file}: {key}: {given} given where weights belong; expected float32, float16 or bfloat16"
    )
