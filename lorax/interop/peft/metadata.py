"""Metadata in PEFT's tensors file that lets lorax split the modules of its adapters again.

PEFT adapts modules, lorax matrices. These entries say how to undo the joining by `lora.save`:
{"factors": {layer: {"module", "rows", "columns", "scale"}}, "weights": {parameter: {"tensor",
"axes", "columns"}}, "tied": path of a tied embedding or ""}. They are checked like anything in a
file.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax.files import parse_json
from lorax.interop.adapter import Factors
from lorax.interop.peft.config import CONFIG, NUMBER
from lorax.interop.peft.whole import ours
from lorax.interop.places import Places, as_index, columns_as_json, fused_width


def take_apart(updates, whole, text: str, places: Places, file: pathlib.Path):
    """(factors, weights, path of the tied embedding or "") from the metadata that `save` wrote. It
    must cover everything in the file and agree with the base."""
    where = f"{file}: its metadata 'lorax' does not fit"
    try:
        entries = parse_json(text, "line")
        factors = own_factors(entries["factors"], updates, places)
        weights = _own_weights(entries["weights"], whole, places)
        if (
            not isinstance(entries["tied"], str)
            or places.tied
            and entries["tied"] not in ("", places.tied)
        ):
            raise ValueError(f"tied is {str(entries['tied'])[:60]}")
        return factors, weights, entries["tied"]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def own_factors(
    entries: Mapping, updates: Mapping[str, Factors], places: Places
) -> dict[str, Factors]:
    """{layer: its factors} from the modules' by the metadata's entries. Raises ValueError for
    entries that don't fit, LookupError, TypeError or AttributeError for ones that are no entries.
    """
    scales: dict[str, list[float]] = {}
    for entry in entries.values():
        scales.setdefault(entry["module"], []).append(_number(entry["scale"]))
    factors: dict[str, Factors] = {}
    # The entries of b that are used, and in the last row the columns that are.
    taken = {name: np.zeros((len(x.b) + 1, x.b.shape[1]), bool) for name, x in updates.items()}
    for path, entry in entries.items():
        module, s = entry["module"], _number(entry["scale"])
        a, b, scale, m = updates[module]
        common = max(scales[module], key=abs)
        if not math.isclose(common, scale, rel_tol=1e-9):
            raise ValueError(f"scale {common} of {path}, but {CONFIG} says {scale}")
        last = "kernel" if places.of(f"{path}/kernel") else "embedding"
        _agree(f"{path}/{last}", f"{module}.weight", entry["columns"], b.shape[1], places)
        columns, rows = index_of(entry["columns"], b.shape[1]), index_of(entry["rows"], len(b))
        taken[module][rows, columns] = taken[module][-1, columns] = True
        part = np.ascontiguousarray(b[rows, columns])
        own_b, own_m = rescale(part, common, s), None if m is None else m[columns]
        lost = np.isfinite(part).all() and not np.isfinite(own_b).all()
        if lost or part.any() and not own_b.any():
            raise ValueError(f"scale {s} of {path} beside {common}")
        factors[path] = Factors(np.ascontiguousarray(a[:, rows]), own_b, s, own_m)
    for module, (a, b, _, m) in updates.items():
        *part, columns = taken[module]
        part, used = np.array(part), a.any(axis=0) | b.any(axis=1)  # experts may be padded
        part_of_each = part.any(axis=1)[used]
        if b[~part].any() or not part_of_each.all() or m is not None and not columns.all():
            raise ValueError(f"it leaves out a part of {module}")
    return factors


def _own_weights(entries: dict, whole: Mapping[str, np.ndarray], places: Places):
    """{path: value} of the parameters trained in full, from the metadata's entries."""
    weights, taken = {}, {name: np.zeros(tensor.shape, bool) for name, tensor in whole.items()}
    for path, entry in entries.items():
        name, axes = entry["tensor"], entry["axes"]
        tensor, source = whole[name], places.of(path)
        if axes is not None and sorted(axes) != [*range(tensor.ndim)]:
            raise ValueError(f"axes {axes} of {path}")
        width = tensor.shape[-1 if axes is None else axes[-1]]
        _agree(path, name, entry["columns"], width, places)
        if source is not None and (source.axes and [*source.axes]) != axes:
            raise ValueError(f"axes {axes} of {path}, in the base they are {source.axes}")
        columns = index_of(entry["columns"], width)
        taken[name].transpose(axes or range(tensor.ndim))[..., columns] = True
        weights[path] = ours(tensor, axes, columns)
    for name, part in taken.items():
        if not part.all():
            raise ValueError(f"it leaves out a part of {name}")
    return weights


def _number(x: Any) -> float:
    """A scale in the metadata. Raises ValueError if it is not a float32 number."""
    if not NUMBER.fits(x):
        raise ValueError(f"scale {x!r}; it should be {NUMBER.words}")
    return float(x)


def index_of(part: Any, size: int) -> slice | np.ndarray:
    """`as_index` of a part of an axis in the metadata. Raises ValueError if it is not one."""
    if isinstance(part, str) and re.fullmatch(r"\d{1,9}:\d{1,9}(:[1-9])?", part):
        index = as_index(part)
        if index.start <= index.stop <= size:
            return index
    elif part is None:
        return slice(None)
    elif isinstance(part, list) and all(type(i) is int and 0 <= i < size for i in part):
        if part and len(set(part)) == len(part):
            return as_index(part)
    raise ValueError(f"{str(part)[:60]} is no part of {size}")


def _agree(path: str, name: str, columns: Any, width: int, places: Places) -> None:
    """Raises ValueError if a base is known in which the parameter `path` is not in these columns of
    the tensor `name`. A different width of the base is found later, by the check of shapes."""
    if not places.sources:
        return
    source = places.of(path)
    if source is None:
        raise ValueError(f"{path}: the base has no such parameter")
    have = columns_as_json(source.part)
    same = fused_width(places.at(source.name)) not in (0, width) or have == columns
    if source.name != name or not same:
        said = f"{name}, columns {columns}"
        raise ValueError(f"{path} is {source.name}, columns {have} in the base, not {said}")


def rescale(block: np.ndarray, s: float, common: float) -> np.ndarray:
    """float32 block * s / common; the block itself if the two are equal, 0 if one is 0."""
    if s == common:
        return np.asarray(block, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # of a scale that does not fit the file's
        return (np.asarray(block, np.float64) * (s / common if common else 0)).astype(np.float32)
