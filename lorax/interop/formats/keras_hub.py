"""Adapters of keras-hub: `Backbone.save_lora_weights`, NAME.lora.h5.

    lora/vars/rank                      r
    lora/<index>/vars/lora_kernel_a     the kernel's shape without its last axis, and r
    lora/<index>/vars/lora_kernel_b     (r, last axis)

A layer is named by its index among the model's layers with weights, so its name needs the model's
class and version. s is 1: Keras divides its alpha by the rank, and alpha is the rank unless it was
set, which the file does not say. keras-hub adapts queries and values, whose kernels have an axis of
heads: each head is a LoRA of its own, a[head] (in, r) with the b of all.
(keras-hub, models/backbone.py; keras, layers/core/einsum_dense.py.)
"""

from pathlib import Path

import ml_dtypes
import numpy as np

from lorax.interop.formats import pairs
from lorax.interop.formats.contract import Found, Update
from lorax.interop.formats.opened import Opened, check_names, quiet

_SIDES = ("lora_kernel_a", "lora_kernel_b")
_MOST = 2**30  # numbers of a tensor: 4 GiB of float32
UNNAMED = "layers are named by index: their names need the model's class and version"
ALPHA = "keras-hub's files have no alpha: if it was set, dW is larger or smaller"


def recognises(opened: Opened) -> bool:
    """Whether a file is HDF5; `read` refuses those that are no adapters."""
    return opened.container == "h5"


def read(opened: Opened) -> Found:
    """The updates of a file. Raises ValueError that names it if it is damaged, refers to other
    files, or is no adapter; and one line if the package h5py is missing."""
    tensors, rank = _tensors(opened.file)
    updates = []
    for index in sorted(tensors, key=lambda name: (len(name), name)):
        sides = tensors[index]
        if set(sides) != set(_SIDES):
            raise ValueError(f"{opened.file}: lora/{index}: needs {' and '.join(_SIDES)}")
        updates += _updates(index, *(sides[name] for name in _SIDES))
    return Found("keras-hub", opened.path, tuple(updates), {}, {"rank": rank}, (UNNAMED, ALPHA))


def _updates(index: str, a: pairs.Lazy, b: pairs.Lazy) -> list[Update]:
    source = "default 1: the file has none"
    if len(a.shape) == 2:
        return [pairs.update(index, pairs.as_is(a), pairs.as_is(b), 1.0, source)]
    if len(a.shape) != 3 or 0 in a.shape:
        raise ValueError(f"{a.name}: {a.shape} given; expected (in, r), or with an axis of heads")
    axis = 0 if a.shape[0] < a.shape[1] else 1
    warning = f"a {a.shape}: the smaller axis is taken as {a.shape[axis]} heads"
    if a.shape[0] == a.shape[1]:
        warning = f"a {a.shape}: which axis is that of the heads can't be told; the second is taken"
    as_b = pairs.as_is(b)
    heads = {f"{index}.{i}": pairs.as_is(a.at(axis, i)) for i in range(a.shape[axis])}
    return [pairs.update(*head, as_b, 1.0, source, warnings=[warning]) for head in heads.items()]


def _tensors(file: Path) -> tuple[dict[str, dict[str, pairs.Lazy]], int]:
    """({index: {name: tensor}}, rank) of a file."""
    try:
        import h5py
    except ModuleNotFoundError:
        raise ValueError(
            f"{file}: reading it needs h5py: pip install lorax-research[formats]"
        ) from None
    try:
        with h5py.File(file, "r") as opened:
            group = _group(opened, "lora", file)
            rank = int(_dataset(_vars(group, file), "rank", file)[()])
            tensors = {}
            check_names(file, group)
            for index in group:
                if index in ("vars", "rank"):
                    continue
                inner = _vars(_group(group, index, file), file)
                check_names(file, inner)
                tensors[index] = {name: _lazy(inner, name, file) for name in inner}
            return tensors, rank
    except ValueError as error:
        if str(error).startswith(str(file)):
            raise
        raise _damaged(file, error) from None
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> ValueError:
    why = str(error).strip().partition("\n")[0] or type(error).__name__
    return ValueError(f"{file}: not a readable .lora.h5 file ({why})")


def _vars(group, file: Path):
    """The group with a layer's tensors: Keras puts them into one called vars."""
    return _group(group, "vars", file) if "vars" in group else group


def _group(parent, name: str, file: Path):
    """Raises ValueError unless it is a group in this file."""
    import h5py

    link = parent.get(name, getlink=True)
    found = parent.get(name) if isinstance(link, h5py.HardLink) else None
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{file}: no group {name} in it: no adapter of keras-hub's")
    return found


def _dataset(group, name: str, file: Path):
    """Raises ValueError unless it is a tensor whose numbers are in this file."""
    import h5py

    link = group.get(name, getlink=True)
    found = group.get(name) if isinstance(link, h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise ValueError(f"{file}: {name} is no tensor of this file; other files are not read")
    if found.size is None or found.size > _MOST:
        raise ValueError(f"{file}: {name}: {found.shape} given; the most is {_MOST} numbers")
    return found


def _lazy(group, name: str, file: Path) -> pairs.Lazy:
    dataset = _dataset(group, name, file)
    place, label = dataset.name, f"{file}: {dataset.name}"
    bfloat = dataset.attrs.get("dtype") == "bfloat16" and dataset.dtype.itemsize == 2
    if dataset.dtype.kind != "f" and not bfloat:
        raise ValueError(f"{label}: {dataset.dtype} given; expected floats")

    def read(index=None) -> np.ndarray:
        import h5py

        try:
            with h5py.File(file, "r") as opened:
                index = [range(n) for n in shape] if index is None else index
                part = opened[place][tuple(slice(at.start, at.stop) for at in index)]
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise _damaged(file, error) from None
        return np.array(part.view(ml_dtypes.bfloat16) if bfloat else part, np.float32)

    shape = dataset.shape
    kind = "BF16" if bfloat else f"F{8 * dataset.dtype.itemsize}"
    return pairs.Lazy(label, shape, kind, quiet(read))
