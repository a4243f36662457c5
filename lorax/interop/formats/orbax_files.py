"""Checkpoints of orbax, whose arrays are read one at a time by tensorstore, without JAX.

    _METADATA    {"tree_metadata": {text: {"key_metadata": [{"key": ...}, ...]}}, "use_ocdbt": ...}
    an array     zarr, in the database manifest.ocdbt or in a folder of its own, at its keys joined
                 by "."

A checkpoint may be an item of a step of a run: DIR/100/model_params/_METADATA.
(orbax, checkpoint/_src/metadata/tree.py.)
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax.files import read_json
from lorax.interop.formats.opened import check_names, quiet
from lorax.interop.formats.pairs import Lazy

METADATA, CHECKPOINT = "_METADATA", "_CHECKPOINT_METADATA"
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_MOST = 2**30  # numbers of a tensor: 4 GiB of float32
_OTHERS = ("opt_state", "optimizer", "optimizer_state", "step")  # first keys of what is no weight


class Checkpoint(NamedTuple):
    """path: the folder with _METADATA. arrays: the keys of every array but the optimizer's. custom:
    what the program that wrote it says, of the folder or of the step around it."""

    path: Path
    arrays: tuple[tuple[str, ...], ...]
    custom: dict[str, Any]
    metadata: dict[str, Any]

    def lazy(self, keys: tuple[str, ...]) -> Lazy:
        """An array. Raises ValueError that names it if it can't be opened or holds no floats."""
        name = f"{self.path}: {'.'.join(keys)}"
        stored = self._open(keys, name)
        kind = _KINDS.get(stored.dtype.name)
        if kind is None:
            raise ValueError(f"{name}: {stored.dtype.name} given; expected {', '.join(_KINDS)}")
        if math.prod(stored.shape) > _MOST:
            raise ValueError(f"{name}: {stored.shape} given; the most is {_MOST} numbers")

        def read(index: Sequence[range] | None = None) -> np.ndarray:
            again = self._open(keys, name)
            part = again if index is None else again[tuple(slice(i.start, i.stop) for i in index)]
            try:
                return np.array(part.read().result(), np.float32)
            except Exception as error:  # of tensorstore, of any type
                raise _unreadable(name, error) from None

        return Lazy(name, tuple(stored.shape), kind, quiet(read))

    def _open(self, keys: tuple[str, ...], name: str):
        import tensorstore

        folder = ".".join(keys)
        if self.metadata.get("use_ocdbt"):
            base = {"driver": "file", "path": f"{self.path.resolve()}/"}
            store = {"driver": "ocdbt", "base": base, "path": f"{folder}/"}
        else:
            store = {"driver": "file", "path": f"{self.path.resolve() / folder}/"}
        driver = "zarr3" if self.metadata.get("use_zarr3") else "zarr"
        try:
            return tensorstore.open({"driver": driver, "kvstore": store}, read=True).result()
        except Exception as error:  # of tensorstore, of any type
            raise _unreadable(name, error) from None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, of the last step if there are several, of the item of the model's
    parameters. Raises ValueError that names the folder if there is none, or several."""
    folder = _item(path)
    metadata = read_json(folder / METADATA)
    tree = metadata.get("tree_metadata")
    if not isinstance(tree, dict):
        raise ValueError(f"{folder / METADATA}: tree_metadata is missing")
    arrays = []
    for name, entry in tree.items():
        try:
            keys = tuple(str(part["key"]) for part in entry["key_metadata"])
        except (TypeError, KeyError):
            raise ValueError(f"{folder / METADATA}: {name}: key_metadata is damaged") from None
        if any("/" in key or key in ("", ".", "..") for key in keys):
            raise ValueError(f"{folder / METADATA}: {name}: not the name of an array")
        if keys and keys[0] not in _OTHERS:
            arrays.append(keys)
    check_names(folder, map(".".join, arrays))
    return Checkpoint(folder, tuple(arrays), _custom(folder), metadata)


def _item(path: Path) -> Path:
    """The folder with _METADATA at a path or below."""
    for _ in range(4):
        if (path / METADATA).is_file():
            return path
        below = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
        steps = [folder for folder in below if folder.name.rpartition("_")[2].isdecimal()]
        items = [folder for folder in below if (folder / METADATA).is_file()]
        named = [f for f in items if f.name in ("model_params", "params", "items", "default")]
        if steps and not items:
            path = max(steps, key=lambda folder: int(folder.name.rpartition("_")[2]))
        elif len(named or items) == 1:
            path = (named or items)[0]
        elif items:
            names = ", ".join(folder.name for folder in items)
            raise ValueError(f"{path}: {len(items)} items, {names}; give the folder of one")
        elif len(below) == 1:
            path = below[0]
        else:
            break
    raise ValueError(f"{path}: no {METADATA} of an orbax checkpoint in it")


def _custom(folder: Path) -> dict[str, Any]:
    for file in (folder / CHECKPOINT, folder.parent / CHECKPOINT):
        if file.is_file():
            custom = read_json(file).get("custom_metadata")
            if isinstance(custom, dict) and custom:
                return custom
    return {}


def _unreadable(name: str, error: Exception) -> ValueError:
    why = str(error).strip().partition("\n")[0] or type(error).__name__
    return ValueError(f"{name}: not readable ({why[:200]})")
