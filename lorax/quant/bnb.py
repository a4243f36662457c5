"""Checkpoints with linear layers quantised by bitsandbytes, as transformers saves them.

In addition to `NAME.weight`, uint8 codes (n / 2, 1), they have

    NAME.weight.absmax                              the scales, float32, or codes of nested scales
    NAME.weight.nested_absmax, .nested_quant_map    their scales and the table of their values
    NAME.weight.quant_map                           the table of the 16 values
    NAME.weight.quant_state.bitsandbytes__nf4       JSON: blocksize, dtype, shape (out, in), offset

Codes and scales are read without decoding, so the weights are the same bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lorax.files import parse_json
from lorax.interop import hf
from lorax.interop.tensors import array, floats
from lorax.quant import nf4

_STATE = ".quant_state.bitsandbytes__"


def read(
    directory: Path, sources: Mapping[str, hf.Source], shapes: Mapping[str, tuple]
) -> dict[str, nf4.Quantised]:
    """{path: leaf} of the parameters that the directory holds in 4 bits; {} if there are none.

    sources, shapes: as for `hf.read`. Raises ValueError that names the file and the tensor for an
    unreadable state, an unknown table of values, a shape that contradicts config.json, a kernel
    with only some layers quantised, and a part of a fused kernel that is not whole blocks.
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
        stack = lambda *x, axes=axes: jnp.stack(x).reshape(*axes, *x[0].shape)
        kernels[path] = jax.tree.map(stack, *leaves) if stacked else leaves[0]
    return kernels


def _stored(name: str, where) -> str | None:
    """The name of a quantised tensor in the files, None if it is not quantised."""
    for key in hf.spellings(name):
        if any(f"{key}{_STATE}{kind}" in where for kind in ("nf4", "fp4")):
            return key
    return None


def _leaf(name: str, where, source: hf.Source, shape: tuple) -> nf4.Quantised:
    """One layer's kernel (in, out), or its part of a fused kernel."""
    kind = next(kind for kind in ("nf4", "fp4") if f"{name}{_STATE}{kind}" in where)
    file = where[name][1]

    def get(suffix: str, read=array) -> np.ndarray:
        if name + suffix not in where:
            raise ValueError(f"{file}: no tensor {name}{suffix} beside its codes")
        handle, shard = where[name + suffix]
        return read(handle, name + suffix, shard)

    packed = get(f"{_STATE}{kind}").tobytes()
    try:
        state = parse_json(packed.decode(), "JSON")
        block, dtype, given = state["blocksize"], jnp.dtype(state["dtype"]), tuple(state["shape"])
        nested = "nested_offset" in state
        if nested:
            offset, outer_block = np.float32(state["nested_offset"]), state["nested_blocksize"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {name}: no state of bitsandbytes ({error!r})") from None
    codes, table = get("").view(np.uint8).reshape(-1), get(".quant_map")
    absmax = get(".absmax", array if nested else floats).reshape(-1)
    n_in, n_out = shape
    whole = len(given) == 2 and all(type(n) is int for n in given)
    width = given[0] if whole and source.part is not None else n_out
    if not whole or given != (width, n_in) or codes.size != -(-width * n_in // 2):
        raise ValueError(f"{file}: {name}: (out, in) = {given}, config.json says {(n_out, n_in)}")
    if not np.array_equal(table, nf4.CODES[kind].values):
        raise ValueError(f"{file}: {name}: its {kind} values are not the ones that are known")
    if type(block) is not int or block not in nf4.BLOCKS:
        raise ValueError(f"{file}: {name}: blocks of {block}; there are {nf4.BLOCKS}")
    if dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise ValueError(f"{file}: {name}: decoded to {dtype}; expected float32, float16, bfloat16")
    blocks = -(-width * n_in // block)
    if absmax.size != blocks:
        raise ValueError(f"{file}: {name}.absmax: {absmax.size} scales; expected {blocks}")
    if nested:
        outer, map_ = get(".nested_absmax", floats).reshape(-1), get(".nested_quant_map")
        if outer_block != nf4.NESTED_BLOCK or not np.array_equal(map_, nf4.DYNAMIC.values):
            raise ValueError(f"{file}: {name}: scales nested in another way than is known")
        if absmax.dtype != np.uint8 or outer.size != -(-blocks // outer_block):
            given = f"{absmax.dtype} with {outer.size} scales of their own"
            raise ValueError(
                f"{file}: {name}.absmax: {given}; expected uint8 with one for each 256"
            )
        if not np.isfinite(offset):
            raise ValueError(f"{file}: {name}: nested_offset {offset}; it must be finite")
        scales = nf4.Nested(*map(jnp.asarray, (absmax, outer, offset)))
    else:
        scales = jnp.asarray(absmax)
    if source.part is not None:
        first, last = _rows(source.part, f"{file}: {name}")
        if first * n_in % block or (last * n_in % block and last != width):
            raise ValueError(f"{file}: {name}: outputs {first} to {last} are no whole blocks")
        codes = codes[first * n_in // 2 : -(-last * n_in // 2)]
        scales = scales.decoded() if nested else scales  # blocks of 256 may span several parts
        scales = scales[first * n_in // block : -(-last * n_in // block)]
    return nf4.from_flat(jnp.asarray(codes), scales, shape, kind, block, dtype)


def _rows(part, where: str) -> tuple[int, int]:
    if not isinstance(part, slice):
        raise ValueError(f"{where}: its parts are interleaved: only a model in full can be read")
    return part.start or 0, part.stop
