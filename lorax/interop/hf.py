"""Hugging Face's model directory: config.json, model.safetensors (or shards), tokenizer.json.

Weights are read in small parts into the arrays that stay, so the peak memory is the tree itself.
Only safetensors are opened: a pickled `.bin` can run code and is refused.
"""

import functools
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lorax.files import atomically, read_json, write_json

BLOCK = 1 << 24  # bytes that are read at a time


class Source(NamedTuple):
    """Where a parameter lies in Hugging Face's tensors: ours = theirs.transpose(axes)[..., part].

    name: theirs, "{}" in it for the layer where ours stacks all layers. axes: the order of their
    axes in ours, None for the same; (1, 0) for a torch `Linear`. part: slice or integer array,
    the columns of a fused tensor that are ours; None for all.
    """

    name: str
    axes: tuple[int, ...] | None = None
    part: slice | np.ndarray | None = None

    def width(self) -> int:
        """Columns that a fused tensor must have at least to hold this part."""
        return self.part.stop if isinstance(self.part, slice) else int(np.max(self.part)) + 1


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, shards in order.

    Raises FileNotFoundError where there is none, with the way out if only pickles are there.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict):
            raise ValueError(f"{index}: no 'weight_map' from tensors to files")
        names = sorted(set(where.values()))
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise FileNotFoundError(f"{directory}: shards {missing} of {index.name} are missing")
        return [directory / name for name in names]
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    if list(directory.glob("*.bin")):
        raise FileNotFoundError(
            f"{directory}: only pickled weights (*.bin), which can run code when opened. Convert: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )
    raise FileNotFoundError(f"{directory}: no model.safetensors")


def tensors(directory: Path) -> dict[str, tuple]:
    """{tensor's name: (open handle, its file)} of all safetensors files of a model directory.

    Raises FileNotFoundError as `weight_files`, ValueError that names a file that is damaged."""
    where = {}
    for file in weight_files(directory):
        try:
            handle = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
        where.update({key: (handle, file) for key in handle.keys()})  # noqa: SIM118
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
    Raises ValueError that names file, tensor and shapes where they disagree or a file is corrupt.
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
        """The tensor of one layer, to be sliced."""
        name = source.name.format(layer)
        key = next((key for key in spellings(name) if key in where), None)
        if key is None:
            raise ValueError(f"{directory}: no tensor {name!r} in its safetensors files")
        handle, file = where[key]
        piece = handle.get_slice(key)
        given, right = piece.get_shape(), stored(source, shape)
        if given != right:
            raise ValueError(
                f"{file}: {key} has shape {tuple(given)}, config.json says {tuple(right)}"
            )
        return piece

    def fits(source, shape):
        keys = [key for key in spellings(source.name) if key in where]
        return bool(keys) and where[keys[0]][0].get_slice(keys[0]).get_shape() == stored(
            source, shape
        )

    params = {}
    for path, source in sources.items():
        shape = tuple(shapes[path])
        if path in optional and not fits(source, shape):
            continue
        leaf, stacked = jnp.zeros(shape, dtype), "{}" in source.name
        for layer in range(shape[0]) if stacked else [None]:
            own = shape[1:] if stacked else shape
            piece = find(source, layer, own)
            for start, value in _blocks(piece, source, own):
                at = (start, *(0,) * (len(own) - 1))
                if stacked:
                    value, at = value[None], (layer, *at)
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


def spellings(name: str) -> list[str]:
    """Names under which a tensor may lie: a checkpoint of the bare model has no "transformer." in
    front, and BERT's oldest call a norm's weight and bias gamma and beta."""
    names = [name, name.split(".", 1)[-1]]
    old = [n.replace("LayerNorm.weight", "LayerNorm.gamma") for n in names]
    return names + [n.replace("LayerNorm.bias", "LayerNorm.beta") for n in old]


def write(directory: Path, config: dict, sources: Mapping[str, Source], params: Mapping) -> None:
    """Write {path: array} and config.json so that transformers loads them; inverse of `read`."""
    tensors: dict[str, np.ndarray] = {}
    fused: dict[str, list] = {}
    for path, source in sources.items():
        leaf = np.asarray(params[path], np.float32)
        for layer in range(leaf.shape[0]) if "{}" in source.name else [None]:
            value = leaf if layer is None else leaf[layer]
            fused.setdefault(source.name.format(layer), []).append((source, value))
    for name, parts in fused.items():
        axes = parts[0][0].axes or tuple(range(parts[0][1].ndim))
        whole = parts[0][1]
        if parts[0][0].part is not None:
            width = max(source.width() for source, _ in parts)
            whole = np.zeros((*whole.shape[:-1], width), np.float32)
            for source, value in parts:
                whole[..., source.part] = value
        tensors[name] = np.ascontiguousarray(whole.transpose(np.argsort(axes)))
    weights = lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"})
    atomically(directory / "model.safetensors", weights)
    write_json(directory / "config.json", config)
