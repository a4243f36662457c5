"""Hugging Face's model directory: config.json, model.safetensors (or shards), tokenizer.json.

Weights are read in small parts into the arrays that stay, so the peak memory is the tree itself.
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

#: What lies beside config.json and the weights, and says how texts and pictures become a model's
#: input, what it is asked like, how it generates, and what one may do with it.
SIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("additional_chat_templates/*.jinja", "vocab.json", "vocab.txt", "merges.txt", "*.model"),
    *("preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*"),
)

#: Dtypes that weights are written in again where they were read, by safetensors' names.
_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


class Source(NamedTuple):
    """Where a parameter lies in Hugging Face's tensors: ours = theirs.transpose(axes)[..., part].

    name: theirs, "{}" in it for the layer where ours stacks all layers. axes: the order of their
    axes in ours, None for the same; (1, 0) for a torch `Linear`. part: slice or integer array,
    the columns of a fused tensor that are ours; None for all. tied: another tensor that is the same
    weight, read where the files have that one alone. layer: the parameter's name in one layer, "{}"
    in it for the number, where that isn't behind the first word of its path.
    """

    name: str
    axes: tuple[int, ...] | None = None
    part: slice | np.ndarray | None = None
    tied: str | None = None
    layer: str | None = None

    def width(self) -> int:
        """Columns that a fused tensor must have at least to hold this part."""
        return self.part.stop if isinstance(self.part, slice) else int(np.max(self.part)) + 1


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: the single one, as transformers has it, or the
    shards of an index in order.

    Raises FileNotFoundError where there is none, with the way out if only pickles are there, and
    ValueError for an index that says anything but names of files in the folder.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).exists():
        names = sorted(set(_weight_map(directory).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise FileNotFoundError(
                f"{directory}: shards {missing[:3]}{more} of {INDEX} are missing"
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
    """{tensor: name of its file} of an index. A name may be that of a symbolic link, as in the
    Hub's cache, but leads out of the folder in no other way."""
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

    Raises as `weight_files`; ValueError that names a file that is damaged, and a tensor that lies
    in two files or in another than the index says."""
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
    """{path: array} of the parameters in `sources`, in `dtype`, a part of a layer at a time.

    shapes: {path: expected shape}; a leading layer axis is filled from one tensor a layer.
    optional: paths that may be missing from the files, or have another shape there (a classifier
    of other classes), and then are missing from the answer.
    Raises ValueError that names file and tensor where shapes disagree, a file is corrupt, a number
    is NaN, infinite or too large for `dtype`, or two tied tensors differ.
    """
    where = tensors(directory)
    widths: dict[str, int] = {}  # of fused tensors
    for source in sources.values():
        if source.part is not None:
            widths[source.name] = max(source.width(), widths.get(source.name, 0))

    def stored(source, shape) -> list[int]:
        """The shape of their tensor where ours has `shape`."""
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
            own = shape[1:] if stacked else shape
            piece, key, file = find(source, layer, own)
            if source.tied in where and source.tied != key:
                _check_equal(piece, key, source.tied, *where[source.tied])
            for start, value in _blocks(piece, source, own):
                at = (start, *(0,) * (len(own) - 1))
                if stacked:
                    value, at = value[None], (layer, *at)
                check_weight(value, key, file, dtype)
                leaf = _put(leaf, value, at).block_until_ready()  # or blocks in flight pile up
        params[path] = leaf
    return params


def _blocks(piece, source: Source, shape):
    """(first row, rows) of our array, as many rows at a time as `BLOCK` bytes hold. Only what is
    ours leaves the disk, but for parts that are scattered."""
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
    """The leaf with a block filled in, in the leaf's own memory."""
    return jax.lax.dynamic_update_slice(leaf, value.astype(leaf.dtype), at)


def _check_equal(piece, key: str, other: str, handle, file: Path) -> None:
    """Raises ValueError where the file of a tied model has two weights that are not the same."""
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
    """The name under which one layer's tensor lies, None where it does not."""
    names = (*spellings(source.name.format(layer)), source.tied)
    return next((key for key in names if key in where), None)


def spellings(name: str) -> list[str]:
    """Names under which a tensor may lie: a checkpoint of the bare model has no "transformer." in
    front, and BERT's oldest call a norm's weight and bias gamma and beta."""
    names = [name, name.split(".", 1)[-1]]
    old = [n.replace("LayerNorm.weight", "LayerNorm.gamma") for n in names]
    return names + [n.replace("LayerNorm.bias", "LayerNorm.beta") for n in old]


def dtypes(
    directory: Path, sources: Mapping[str, Source], shapes: Mapping[str, tuple]
) -> dict[str, np.dtype]:
    """{path: dtype} of the parameters that a model directory holds as floating point numbers, the
    widest where layers differ. sources, shapes: as for `read`."""
    where, found = tensors(directory), {}
    for path, source in sources.items():
        layers = range(shapes[path][0]) if "{}" in source.name else [None]
        keys = [key for layer in layers if (key := _key(source, layer, where)) is not None]
        kinds = {where[key][0].get_slice(key).get_dtype() for key in keys}
        if kinds and kinds <= _DTYPES.keys():
            found[path] = np.dtype(functools.reduce(jnp.promote_types, map(_DTYPES.get, kinds)))
    return found


def write(
    directory: Path,
    config: dict,
    sources: Mapping[str, Source],
    params: Mapping,
    dtypes: Mapping | None = None,
) -> None:
    """Write {path: array} and config.json so that transformers loads them; inverse of `read`.

    dtypes: {path: dtype} to round to, float32 for all without it. Raises ValueError that names the
    tensor, before anything is written, for numbers that are none, or are too large for the dtype.
    """
    parts: dict[str, list] = {}  # of each tensor
    for path, source in sources.items():
        leaf = np.asarray(params[path])
        with np.errstate(over="ignore"):  # `check_finite` says it with the tensor's name
            rounded = leaf.astype(np.float32 if dtypes is None else dtypes[path])
        for layer in range(len(leaf)) if "{}" in source.name else [None]:
            name = source.name.format(layer)
            at = ... if layer is None else layer
            check_finite(name, leaf[at], rounded[at])
            parts.setdefault(name, []).append((source, rounded[at]))
    tensors: dict[str, np.ndarray] = {}
    for name, found in parts.items():
        source, whole = found[0]
        axes = source.axes or range(whole.ndim)
        if source.part is not None:
            width = max(source.width() for source, _ in found)
            whole = np.zeros((*whole.shape[:-1], width), whole.dtype)
            for source, value in found:
                whole[..., source.part] = value
        tensors[name] = np.ascontiguousarray(whole.transpose(np.argsort(axes)))
    weights = lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"})
    atomically(directory / SINGLE, weights)
    write_json(directory / "config.json", config)
