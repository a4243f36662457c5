"""Checkpoints with linear layers quantised by bitsandbytes, as transformers saves them.

In addition to `NAME.weight`, uint8 codes (n / 2, 1), they have

    NAME.weight.absmax                              the scales, float32, or codes of nested scales
    NAME.weight.nested_absmax, .nested_quant_map    their scales and the table of their values
    NAME.weight.quant_map                           the table of the 16 values
    NAME.weight.quant_state.bitsandbytes__nf4       JSON: blocksize, dtype, shape (out, in), offset

Codes and scales are read without decoding, so the weights are the same bit for bit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax.files import parse_json
from lorax.interop import hf
from lorax.interop.tensors import Stored, check_weight
from lorax.quant import nf4

_STATE = ".quant_state.bitsandbytes__"


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """Codes, uint8, or scales, float32, of one layer in a file; nothing of them is read yet.

    tensor: in `shape` but for its first axis. first: the first row that is ours.
    """

    tensor: Stored
    shape: tuple[int, ...]
    first: int = 0

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.tensor.kind == "U8" else np.float32)

    def read(self, at: Sequence[range]) -> np.ndarray:
        """The numbers at some positions along each axis. Raises ValueError that names file and
        tensor for a corrupt file and for scales that are not finite."""
        rows, *rest = at
        value = self.tensor.read([_shifted(rows, self.first), *rest])
        if self.tensor.kind != "U8":
            check_weight(value, self.tensor.key, self.tensor.file)
        return value.astype(self.dtype)

    def part(self, rows: range) -> "Codes":
        """Some of the rows of a whole tensor."""
        return Codes(self.tensor, (len(rows), *self.shape[1:]), rows.start)

    def reshape(self, rows: int, _: int) -> "Codes":
        """(n,) as (rows, n / rows)."""
        (size,) = self.shape
        width = size // rows
        tensor = self.tensor._replace(shape=(self.tensor.shape[0] // width, width))
        return Codes(tensor, (rows, width), self.first // width)


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """Scales of one layer in 8 bits, decoded as they are read, as `nf4.Nested` does it."""

    codes: Codes
    outer: Codes
    offset: np.float32
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def read(self, at: Sequence[range]) -> np.ndarray:
        """As `Codes.read`."""
        rows, *rest = at
        positions = np.ravel_multi_index(
            np.ix_(_shifted(rows, self.codes.first), *rest), self.codes.tensor.shape
        )
        blocks = positions // nf4.NESTED_BLOCK
        first, last = blocks.min(), blocks.max()
        outer = self.outer.read([range(first, last + 1)])[blocks - first]
        return nf4.DYNAMIC.values[self.codes.read(at)] * outer + self.offset

    def reshape(self, *shape: int) -> "Decoded":
        """As `Codes.reshape`."""
        return dataclasses.replace(self, codes=self.codes.reshape(*shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Number:
    """A number that is in memory already."""

    value: np.float32
    dtype = np.dtype(np.float32)
    shape = ()

    def read(self, at: Sequence[range]) -> np.ndarray:
        """It itself. at: ()."""
        return self.value


def _shifted(positions: range, by: int) -> range:
    return range(positions.start + by, positions.stop + by)


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """An array (layers..., ...) of one array for each layer; read as `hf.Parameter`."""

    each: Sequence[Codes | Decoded | Number]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.axes, *self.each[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.each[0].dtype

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A block of the array. index: a slice for each axis."""
        at = [range(n)[part] for n, part in zip(self.shape, index, strict=True)]
        block, stacked = np.empty(tuple(map(len, at)), self.dtype), len(self.axes)
        layers = np.arange(len(self.each)).reshape(self.axes)[tuple(index[:stacked])]
        for place, layer in np.ndenumerate(layers):
            block[place] = self.each[layer].read(at[stacked:])
        return block


def parameters(
    directory: Path, sources: Mapping[str, hf.Source], shapes: Mapping[str, tuple]
) -> dict[str, nf4.Quantised]:
    """{path: leaf} of the parameters that the directory holds in 4 bits, with `Layers` in place
    of arrays; {} if there are none.

    sources, shapes: as for `hf.parameters`. Raises ValueError that names the file and the tensor
    for an unreadable state, an unknown table of values, a shape that contradicts config.json, a
    kernel with only some layers quantised, and a part of a fused kernel that is not whole blocks.
    """
    where = hf.tensors(directory)
    if not any(_STATE in key for key in where):
        return {}
    kernels = {}
    for path, source in sources.items():
        source = hf.stored_place(source, where)
        stacked = source.axes_stacked
        layers = [*np.ndindex(*shapes[path][:stacked])]
        names = [_stored(source.name.format(*index), where) for index in layers]
        if not any(names):
            continue
        if not all(names):
            raise ValueError(f"{directory}: {path}: some of its layers are quantised, others not")
        axes, shape = tuple(shapes[path][:stacked]), tuple(shapes[path][stacked:])
        leaves = [_leaf(name, where, source, shape) for name in names]
        if len({jax.tree.structure(leaf) for leaf in leaves}) > 1:
            raise ValueError(f"{directory}: {path}: its layers are quantised in different ways")
        kernels[path] = jax.tree.map(lambda *each, axes=axes: Layers(each, axes), *leaves)
    return kernels


def _stored(name: str, where) -> str | None:
    """The name of a quantised tensor in the files, None if it is not quantised."""
    for key in hf.spellings(name):
        if any(f"{key}{_STATE}{kind}" in where for kind in ("nf4", "fp4")):
            return key
    return None


class _State(NamedTuple):
    """The description of a quantised tensor. shape: (out, in). offset, outer_block: of nested
    scales; None without."""

    block: int
    dtype: np.dtype
    shape: tuple
    offset: np.float32 | None = None
    outer_block: int | None = None


def _state(packed: Stored) -> _State:
    """Raises KeyError, TypeError or ValueError if it is none."""
    state = parse_json(packed.read().tobytes().decode(), "JSON")
    about = state["blocksize"], jnp.dtype(state["dtype"]), tuple(state["shape"])
    if "nested_offset" not in state:
        return _State(*about)
    return _State(*about, np.float32(state["nested_offset"]), state["nested_blocksize"])


def _leaf(name: str, where, source: hf.Source, shape: tuple) -> nf4.Quantised:
    """One layer's kernel (in, out), or its part of a fused kernel, with a reader for each array."""
    kind = next(kind for kind in ("nf4", "fp4") if f"{name}{_STATE}{kind}" in where)
    file = where[name].file

    def get(suffix: str) -> Stored:
        if name + suffix not in where:
            raise ValueError(f"{file}: no tensor {name}{suffix} beside its codes")
        return where[name + suffix]

    try:
        state = _state(get(f"{_STATE}{kind}"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {name}: no state of bitsandbytes ({error!r})") from None
    codes, given, block, (n_in, n_out) = get("").as_bytes(), state.shape, state.block, shape
    whole = len(given) == 2 and all(type(n) is int for n in given)
    width = given[0] if whole and source.part is not None else n_out
    if not whole or given != (width, n_in) or codes.size != -(-width * n_in // 2):
        raise ValueError(f"{file}: {name}: (out, in) = {given}, config.json says {(n_out, n_in)}")
    if not np.array_equal(get(".quant_map").read(), nf4.CODES[kind].values):
        raise ValueError(f"{file}: {name}: its {kind} values are not the ones that are known")
    if type(block) is not int or block not in nf4.BLOCKS:
        raise ValueError(f"{file}: {name}: blocks of {block}; there are {nf4.BLOCKS}")
    if state.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise ValueError(
            f"{file}: {name}: decoded to {state.dtype}; expected float32, float16, bfloat16"
        )
    first, last = (0, width) if source.part is None else _rows(source.part, f"{file}: {name}")
    if first * n_in % block or (last * n_in % block and last != width):
        raise ValueError(f"{file}: {name}: outputs {first} to {last} are no whole blocks")
    part = lambda each: range(first * n_in // each, -(-last * n_in // each))
    scales = _scales(get, state, -(-width * n_in // block))
    if source.part is not None and state.offset is not None:  # 256 of them may span several parts
        scales = Decoded(scales.codes.part(part(block)), scales.absmax, state.offset)
    elif source.part is not None:
        scales = scales.part(part(block))
    codes = Codes(codes, codes.shape).part(part(2))
    return nf4.from_flat(codes, scales, shape, kind, block, state.dtype)


def _scales(get, state: _State, blocks: int) -> Codes | nf4.Nested:
    """Readers of the scales of a whole tensor. get(suffix) -> one of its tensors."""
    absmax = get(".absmax")
    place = f"{absmax.file}: {absmax.key}"
    absmax = absmax.flat()
    if absmax.shape != (blocks,):
        raise ValueError(f"{place}: {absmax.shape[0]} scales; expected {blocks}")
    if state.offset is None:
        return Codes(absmax.checked(), absmax.shape)
    outer, table = get(".nested_absmax").checked().flat(), get(".nested_quant_map").read()
    if state.outer_block != nf4.NESTED_BLOCK or not np.array_equal(table, nf4.DYNAMIC.values):
        raise ValueError(f"{place}: scales nested in another way than is known")
    if absmax.kind != "U8" or outer.shape != (-(-blocks // nf4.NESTED_BLOCK),):
        given = f"{absmax.kind} with {outer.shape[0]} scales of their own"
        raise ValueError(f"{place}: {given}; expected U8 with one for each {nf4.NESTED_BLOCK}")
    if not np.isfinite(state.offset):
        raise ValueError(f"{place}: nested_offset {state.offset}; it must be finite")
    readers = Codes(absmax, absmax.shape), Codes(outer, outer.shape)
    return nf4.Nested(*readers, Number(state.offset))


def _rows(part, where: str) -> tuple[int, int]:
    if not isinstance(part, slice):
        raise ValueError(f"{where}: its parts are interleaved: only a model in full can be read")
    return part.start or 0, part.stop
