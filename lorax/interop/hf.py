"""Hugging Face's model directory: config.json, model.safetensors (or shards), tokenizer.json.

Weights are read in small blocks into the final arrays, so peak memory is the tree itself.
Only safetensors are opened: a pickled `.bin` can run code and is refused.
"""

import functools
import math
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lorax.files import atomically, read_json, write_json
from lorax.interop.tensors import check_finite, check_weight, opened, weight

BLOCK = 1 << 24  # bytes that are read at a time
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: Files besides config.json and the weights: tokenizer, image processor, chat templates, generation
#: settings and licence.
SIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("additional_chat_templates/*.jinja", "vocab.json", "vocab.txt", "merges.txt", "*.model"),
    *("preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*"),
)

#: Dtypes that are kept when weights are written again, by safetensors' names.
_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


class Source(NamedTuple):
    """A parameter's place in Hugging Face's tensors: ours = theirs.transpose(axes)[..., part].

    name: of their tensor, with "{}" for the layer if ours stacks all layers. axes: the order of
    their axes in ours, None for the same; (1, 0) for a torch `Linear`. part: slice or integer
    array, our columns of a fused tensor; None for all. tied: another tensor with the same weight,
    read if the files have only that one. layer: the parameter's name in one layer, with "{}" for
    the number, if the number does not follow the first word of its path.
    """

    name: str
    axes: tuple[int, ...] | None = None
    part: slice | np.ndarray | None = None
    tied: str | None = None
    layer: str | None = None

    def width(self) -> int:
        """The fewest columns that a fused tensor with this part can have."""
        return self.part.stop if isinstance(self.part, slice) else int(np.max(self.part)) + 1


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: the single file, which transformers prefers too,
    or the shards of an index in order.

    Raises FileNotFoundError if there is none (with advice if there are only pickles), and
    ValueError for an index with anything other than names of files in the folder.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).exists():
        names = sorted(set(_weight_map(directory).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise FileNotFoundError(
                f"{directory}: shards {missing[:3]}{others} of {INDEX} are missing"
            )
        return [directory / name for name in names]
    if list(directory.glob("*.bin")):
        raise FileNotFoundError(
            f"{directory}: only pickled weights (*.bin), which can run code when opened. Convert: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )
    raise FileNotFoundError(f"{directory}: no {SINGLE}")


def _weight_map(directory: Path) -> dict[str, str]:
    """{tensor: name of its file} of an index. The file may be a symbolic link, as in the Hub's
    cache, but a name can't lead out of the folder otherwise."""
    index = directory / INDEX
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: no 'weight_map' from tensors to files")
    for key, name in where.items():
        plain = isinstance(name, str) and name not in ("", "..") and Path(name).name == name
        if not plain or "\0" in name or len(name.encode()) > 255:
            raise ValueError(
                f"{index}: weight_map: {key[:80]}: {reprlib.repr(name)} given; it must be the name "
                "of a file in this folder"
            )
    return where


def tensors(directory: Path) -> dict[str, tuple]:
    """{tensor's name: (open handle, its file)} of all safetensors files of a model directory.

    Raises as `weight_files`; ValueError that names a damaged file, or a tensor that is in two files
    or in another file than the index says."""
    where = {}
    files = weight_files(directory)
    for file in files:
        handle = opened(file)
        for key in handle.keys():
            if key in where:
                raise ValueError(f"{directory}: {key} is in {where[key][1].name} and {file.name}")
            where[key] = handle, file
    listed = {} if files == [directory / SINGLE] else _weight_map(directory)
    for key, name in listed.items():
        if key in where and where[key][1].name != name:
            raise ValueError(
                f"{directory}: {key} is in {where[key][1].name}, and {INDEX} says in {name}"
            )
    return where


def read(
    directory: Path,
    sources: Mapping[str, Source],
    shapes: Mapping[str, tuple],
    dtype=jnp.float32,
    optional: Collection[str] = (),
) -> dict[str, jax.Array]:
    """{path: array} of the parameters in `sources`, in `dtype`, read in blocks.

    shapes: {path: expected shape}; a leading layer axis is filled from one tensor per layer.
    optional: paths that may be missing from the files, or have another shape there (a classifier
    with other classes); they are then missing from the result.
    Raises ValueError that names file and tensor if shapes disagree, a file is corrupt, a number is
    NaN, infinite or too large for `dtype`, or two tied tensors differ.
    """
    where = tensors(directory)
    widths: dict[str, int] = {}  # of fused tensors
    for source in sources.values():
        if source.part is not None:
            widths[source.name] = max(source.width(), widths.get(source.name, 0))

    def stored(source, shape) -> list[int]:
        """The shape of their tensor if ours has `shape`."""
        whole = (*shape[:-1], widths.get(source.name, shape[-1]))
        return [whole[i] for i in np.argsort(source.axes or range(len(whole)))]

    def find(source, layer, shape):
        """(the tensor of one layer, to be sliced, its name, its file)."""
        key = _key(source, layer, where)
        if key is None:
            name = source.name.format(layer)
            raise ValueError(f"{directory}: no tensor {name!r} in its safetensors files")
        handle, file = where[key]
        piece = weight(handle, key, file)
        given, right = piece.get_shape(), stored(source, shape)
        if given != right:
            raise ValueError(
                f"{file}: {key} has shape {tuple(given)}, config.json says {tuple(right)}"
            )
        return piece, key, file

    def fits(source, shape):
        key = _key(source, None, where)
        return key and where[key][0].get_slice(key).get_shape() == stored(source, shape)

    params = {}
    for path, source in sources.items():
        shape = tuple(shapes[path])
        if path in optional and not fits(source, shape):
            continue
        leaf, stacked = jnp.zeros(shape, dtype), "{}" in source.name
        for layer in range(shape[0]) if stacked else [None]:
            layer_shape = shape[1:] if stacked else shape
            piece, key, file = find(source, layer, layer_shape)
            if source.tied in where and source.tied != key:
                _check_equal(piece, key, source.tied, *where[source.tied])
            for start, value in _blocks(piece, source, layer_shape):
                start_index = (start, *(0,) * (len(layer_shape) - 1))
                if stacked:
                    value, start_index = value[None], (layer, *start_index)
                check_weight(value, key, file, dtype)
                leaf = _put(
                    leaf, value, start_index
                ).block_until_ready()  # or blocks in flight pile up
        params[path] = leaf
    return params


def _blocks(piece, source: Source, shape):
    """(first row, rows) of our array, as many rows at a time as `BLOCK` bytes hold. Only our part
    is read from the disk, unless its columns are scattered."""
    axes = source.axes or tuple(range(len(shape)))
    many = max(1, BLOCK // (4 * math.prod(shape[1:]))) if len(shape) > 1 else max(shape, default=1)
    for start in range(0, shape[0] if shape else 1, many):
        cut = [slice(None)] * len(shape)
        if len(shape) > 1:
            cut[axes[0]] = slice(start, min(start + many, shape[0]))
        if isinstance(source.part, slice):
            cut[axes[-1]] = source.part
        value = (piece[tuple(cut)] if shape else piece[:]).transpose(axes)
        yield start, value[..., source.part] if isinstance(source.part, np.ndarray) else value


@functools.partial(jax.jit, donate_argnums=0)
def _put(leaf, value, at):
    """The leaf with a block filled in, in place."""
    return jax.lax.dynamic_update_slice(leaf, value.astype(leaf.dtype), at)


def _check_equal(piece, key: str, other: str, handle, file: Path) -> None:
    """Raises ValueError if the files of a tied model have two different weights."""
    twin, shape = weight(handle, other, file), piece.get_shape()
    rows = max(1, BLOCK // max(1, 4 * math.prod(shape[1:])))
    cuts = [slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows)]
    same = twin.get_shape() == shape and all(np.array_equal(piece[x], twin[x]) for x in cuts)
    if not same:
        raise ValueError(
            f"{file}: {other} differs from {key}, to which config.json ties it; "
            "tie_word_embeddings must be false there"
        )


def _key(source: Source, layer: int | None, where: Collection[str]) -> str | None:
    """The name of one layer's tensor in the files, None if it is missing."""
    names = (*spellings(source.name.format(layer)), source.tied)
    return next((key for key in names if key in where), None)


def spellings(name: str) -> list[str]:
    """Possible names of a tensor: a checkpoint of the bare model lacks the prefix "transformer.",
    and the oldest BERT files call a norm's weight and bias gamma and beta."""
    names = [name, name.split(".", 1)[-1]]
    old = [n.replace("LayerNorm.weight", "LayerNorm.gamma") for n in names]
    return names + [n.replace("LayerNorm.bias", "LayerNorm.beta") for n in old]


def dtypes(
    directory: Path, sources: Mapping[str, Source], shapes: Mapping[str, tuple]
) -> dict[str, np.dtype]:
    """{path: dtype} of the parameters that a model directory stores as floating point numbers, the
    widest if layers differ. sources, shapes: as for `read`."""
    where, result = tensors(directory), {}
    for path, source in sources.items():
        layers = range(shapes[path][0]) if "{}" in source.name else [None]
        keys = [key for layer in layers if (key := _key(source, layer, where)) is not None]
        kinds = {where[key][0].get_slice(key).get_dtype() for key in keys}
        if kinds and kinds <= _DTYPES.keys():
            result[path] = np.dtype(functools.reduce(jnp.promote_types, map(_DTYPES.get, kinds)))
    return result


def write(
    directory: Path,
    config: dict,
    sources: Mapping[str, Source],
    params: Mapping,
    dtypes: Mapping | None = None,
) -> None:
    """Write {path: array} and config.json so that transformers loads them; inverse of `read`.

    dtypes: {path: dtype} to round to; None for float32. Raises ValueError that names the tensor,
    before anything is written, for NaN, infinity and numbers too large for the dtype.
    """
    parts: dict[str, list] = {}  # of each tensor
    for path, source in sources.items():
        leaf = np.asarray(params[path])
        with np.errstate(over="ignore"):  # `check_finite` says it with the tensor's name
            rounded = leaf.astype(np.float32 if dtypes is None else dtypes[path])
        for layer in range(len(leaf)) if "{}" in source.name else [None]:
            name = source.name.format(layer)
            index = ... if layer is None else layer
            check_finite(name, leaf[index], rounded[index])
            parts.setdefault(name, []).append((source, rounded[index]))
    tensors: dict[str, np.ndarray] = {}
    for name, pieces in parts.items():
        source, whole = pieces[0]
        axes = source.axes or range(whole.ndim)
        if source.part is not None:
            width = max(source.width() for source, _ in pieces)
            whole = np.zeros((*whole.shape[:-1], width), whole.dtype)
            for source, value in pieces:
                whole[..., source.part] = value
        tensors[name] = np.ascontiguousarray(whole.transpose(np.argsort(axes)))
    weights = lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"})
    atomically(directory / SINGLE, weights)
    write_json(directory / "config.json", config)
