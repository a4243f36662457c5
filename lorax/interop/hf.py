"""Hugging Face's model directory: config.json, model.safetensors (or shards), tokenizer.json.

Weights are read leaf by leaf, so the peak memory is the tree itself and one leaf. Only safetensors
are opened: a pickled `.bin` can run code and is refused.
"""

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lorax.files import atomically, read_json, write_json


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


def read(
    directory: Path,
    sources: Mapping[str, Source],
    shapes: Mapping[str, tuple],
    dtype=jnp.float32,
    optional: Collection[str] = (),
) -> dict[str, jax.Array]:
    """{path: array} of the parameters in `sources`, in `dtype`, one layer at a time.

    shapes: {path: expected shape}; a leading layer axis is filled from one tensor a layer.
    optional: paths that may be missing from the files, or have another shape there (a classifier
    of other classes), and then are missing from the answer.
    Raises ValueError that names file, tensor and shapes where they disagree or a file is corrupt.
    """
    where = {}
    for file in weight_files(directory):
        try:
            handle = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
        where.update({key: (handle, file) for key in handle.keys()})  # noqa: SIM118

    widths: dict[str, int] = {}  # of fused tensors
    for source in sources.values():
        if source.part is not None:
            widths[source.name] = max(source.width(), widths.get(source.name, 0))

    def stored(source, shape) -> list[int]:
        """The shape of their tensor where ours has `shape`."""
        whole = (*shape[:-1], widths.get(source.name, shape[-1]))
        return [whole[i] for i in np.argsort(source.axes or range(len(whole)))]

    def tensor(source, layer, shape):
        key = next((key for key in _spellings(source.name.format(layer)) if key in where), None)
        if key is None:
            name = source.name.format(layer)
            raise ValueError(f"{directory}: no tensor {name!r} in its safetensors files")
        handle, file = where[key]
        piece = handle.get_slice(key)
        given, right = piece.get_shape(), stored(source, shape)
        if given != right:
            raise ValueError(
                f"{file}: {key} has shape {tuple(given)}, config.json says {tuple(right)}"
            )
        axes = source.axes or tuple(range(len(right)))
        if source.part is None:
            return piece[:].transpose(axes)
        if isinstance(source.part, slice):  # only what is ours leaves the disk
            cut = [slice(None)] * len(right)
            cut[axes[-1]] = source.part
            return piece[tuple(cut)].transpose(axes)
        return piece[:].transpose(axes)[..., source.part]

    def fits(source, shape):
        keys = [key for key in _spellings(source.name) if key in where]
        return bool(keys) and where[keys[0]][0].get_slice(keys[0]).get_shape() == stored(
            source, shape
        )

    params = {}
    for path, source in sources.items():
        shape = shapes[path]
        if path in optional and not fits(source, shape):
            continue
        if "{}" not in source.name:
            params[path] = jnp.asarray(tensor(source, None, shape), dtype)
            continue
        leaf = jnp.zeros(shape, dtype)
        for layer in range(shape[0]):
            leaf = _put(leaf, tensor(source, layer, shape[1:]), layer)
        params[path] = leaf
    return params


@functools.partial(jax.jit, donate_argnums=0)
def _put(leaf, value, layer):
    """The stacked leaf with one layer filled in, in the leaf's own memory."""
    return jax.lax.dynamic_update_index_in_dim(leaf, value.astype(leaf.dtype), layer, 0)


def _spellings(name: str) -> list[str]:
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
