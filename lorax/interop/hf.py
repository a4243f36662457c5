"""Hugging Face's model directory: config.json, model.safetensors (or shards), tokenizer.json.

Weights are read leaf by leaf, so the peak memory is the tree itself and one leaf. Only safetensors
are opened: a pickled `.bin` can run code and is refused.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lorax.files import atomically, read_json, write_json

# {our path: (their name with "{}" for the layer, columns of a fused tensor, transposed)}
Names = dict[str, tuple[str, slice | None, bool]]


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


def read(directory: Path, names: Names, shapes: dict[str, tuple], dtype=jnp.float32) -> dict:
    """{path: array} of the parameters in `names`, in `dtype`.

    shapes: {path: expected shape}; a leading layer axis is filled from one tensor a layer.
    Raises ValueError that names file, tensor and shapes where they disagree or a file is corrupt.
    """
    handles, where = [], {}
    for file in weight_files(directory):
        try:
            handle = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
        handles.append(handle)
        where.update({key: (handle, file) for key in handle.keys()})  # noqa: SIM118

    widths: dict[str, int] = {}  # of fused tensors
    for name, columns, _ in names.values():
        if columns is not None:
            widths[name] = max(columns.stop, widths.get(name, 0))

    def tensor(name, layer, columns, transpose, shape):
        full = name if layer is None else name.format(layer)
        # A checkpoint of the bare model has no "transformer." in front.
        key = full if full in where else full.split(".", 1)[1]
        if key not in where:
            raise ValueError(f"{directory}: no tensor {full!r} in its safetensors files")
        handle, file = where[key]
        piece = handle.get_slice(key)
        right = shape[::-1] if transpose else (*shape[:-1], widths.get(name, shape[-1]))
        if tuple(piece.get_shape()) != right:
            given = tuple(piece.get_shape())
            raise ValueError(f"{file}: {key} has shape {given}, config.json says {right}")
        value = piece[..., columns] if columns is not None else piece[:]
        return value.T if transpose else value

    params = {}
    for path, (name, columns, transpose) in names.items():
        shape = shapes[path]
        if "{}" in name:
            leaf = np.empty(shape, np.float32)
            for layer in range(shape[0]):
                leaf[layer] = tensor(name, layer, columns, transpose, shape[1:])
        else:
            leaf = tensor(name, None, columns, transpose, shape)
        params[path] = jnp.asarray(leaf, dtype)
    return params


def write(directory: Path, config: dict, names: Names, params: dict) -> None:
    """Write {path: array} and config.json so that transformers loads them; inverse of `read`."""
    tensors: dict[str, dict[int, np.ndarray]] = {}
    for path, (name, columns, transpose) in names.items():
        leaf = np.asarray(params[path], np.float32)
        for layer in range(leaf.shape[0]) if "{}" in name else [None]:
            value = leaf if layer is None else leaf[layer]
            start = columns.start if columns is not None else 0
            parts = tensors.setdefault(name if layer is None else name.format(layer), {})
            parts[start] = value.T if transpose else value
    joined = {
        name: np.ascontiguousarray(np.concatenate([parts[i] for i in sorted(parts)], axis=-1))
        for name, parts in tensors.items()
    }
    weights = lambda temporary: save_file(joined, temporary, metadata={"format": "pt"})
    atomically(directory / "model.safetensors", weights)
    write_json(directory / "config.json", config)
