"""The updates of a file by the layers of a base that lorax knows."""

import functools
from collections.abc import Mapping

import numpy as np

from lorax.errors import nearest
from lorax.interop.adapter import Factors, Unread, Updates, shapes_of
from lorax.interop.places import Places, as_index


def placed(updates: Updates, places: Places) -> Unread:
    """{layer of the base: its update} of updates by Hugging Face's modules. A fused module has a
    layer for each part, with the same a and its own columns.

    Raises ValueError for a module that the base does not have.
    """
    readers, shapes = {}, {}
    known = [name.removesuffix(".weight") for name in places.tensors]
    for module, shape in shapes_of(updates).items():
        parts = places.at(f"{module}.weight")
        if not parts:
            raise ValueError(f"{module}: the base has no such module{nearest(module, known)}")
        for parameter, source in parts.items():
            layer, columns = parameter.rsplit("/", 1)[0], as_index(source.part)
            readers[layer] = functools.partial(_part, updates, module, columns)
            shapes[layer] = (shape[0], np.empty(shape[1])[columns].size, *shape[2:])
    return Unread(readers, shapes)


def _part(updates: Mapping, module: str, columns) -> Factors | np.ndarray:
    update = updates[module]
    if not isinstance(update, Factors):
        return np.ascontiguousarray(update[:, columns])
    lengths = None if update.m is None else update.m[columns]
    return update._replace(b=np.ascontiguousarray(update.b[:, columns]), m=lengths)
