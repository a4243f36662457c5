"""A module of PEFT's, its arrays, and the matrices of ours that it consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class Place(NamedTuple):
    """A linear module of PEFT's. inputs, outputs: its sizes. columns: {layer: its outputs in the
    module}, slice or integers. fused: whether the module holds several layers. conv1d: whether it
    is GPT-2's `Conv1D`, whose weight is (in, out)."""

    name: str
    inputs: int
    outputs: int
    columns: dict[str, slice | np.ndarray]
    fused: bool
    conv1d: bool


class Kind(NamedTuple):
    """names: regex for a method's tensors in a module. bias: PEFT's word for biases trained with
    their modules ("lora_only"), None if it stores none."""

    names: str
    write: Callable
    read: Callable
    bias: str | None = None


def fit(where: str, tensors: Mapping[str, np.ndarray], **shapes: tuple) -> dict[str, int]:
    """{word: size} of the sizes that are words in `shapes`.

    Raises ValueError, which begins with `where`, for a tensor that is missing, has another shape or
    is unknown.
    """
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        got = tensors.get(name)
        right = got is not None and got.ndim == len(shape)
        for want, n in zip(shape, got.shape if right else (), strict=False):
            right &= n == (sizes.setdefault(want, n) if isinstance(want, str) else want)
        if not right:
            given = "there is none" if got is None else f"it is {got.shape}"
            want = ", ".join(str(sizes.get(n, n)) for n in shape)
            raise ValueError(f"{where}: {name} should be ({want}), {given}")
    unknown = sorted(set(tensors) - set(shapes))
    if unknown:
        raise ValueError(f"{where}: {', '.join(unknown)} can't be read")
    return sizes


# ------------------------------------------------------------------------------------ fused modules


def input_of(place: Place, parts: Mapping[str, Arrays], name: str, verb: str) -> np.ndarray:
    """The array `name` of the layers that a module consists of, where it changes their common
    input. verb: what PEFT does to the input, for errors. Raises ValueError if the layers have
    different ones, or if some have none."""
    first = next(iter(parts.values()))[name]
    if any(not np.array_equal(arrays.get(name), first) for arrays in parts.values()):
        raise ValueError(f"{', '.join(parts)}: PEFT {verb} the input of {place.name} once")
    if len(parts) < len(place.columns):
        raise ValueError(f"{', '.join(parts)}: PEFT {verb} the input of all {place.name}")
    return first


def only_layer(place: Place, method: str, where: str | None = None) -> str:
    """The layer that a module is. Raises ValueError, which begins with `where` (default: the
    module), for a module of several layers, of which PEFT has one update for all together."""
    if place.fused:
        layers = ", ".join(place.columns)
        raise ValueError(f"{where or place.name}: PEFT has one {method} of {layers} together")
    (layer,) = place.columns
    return layer


def not_conv1d(place: Place, method: str, where: str | None = None, instead: str = "") -> None:
    """Raises ValueError, which begins with `where` (default: the module), for GPT-2's `Conv1D`, of
    which PEFT does not have the method. instead: what to do, for the end of the message."""
    if place.conv1d:
        raise ValueError(f"{where or place.name}: PEFT has no {method} of GPT-2's Conv1D{instead}")


def largest(modules: Sequence[tuple[Place, Any]]) -> tuple[int, int]:
    """(the largest inputs, the largest outputs) of all modules, which may be those of two."""
    places = [place for place, _ in modules]
    return max(place.inputs for place in places), max(place.outputs for place in places)


def joined(place: Place, parts: Mapping[str, Arrays], inner: tuple, outer: tuple) -> Arrays:
    """A module's arrays from those of its parts: `inner`, (..., r) each, are concatenated to
    (R, ...); `outer`, (r, out), become (outputs, R). Parts with equal inner arrays share them.
    Ranks that are zero in all of `outer` (padding) are left out."""
    spans, rank, cut = {}, 0, {}
    for layer, arrays in parts.items():
        used = np.any([arrays[name].any(axis=1) for name in outer], axis=0)
        used[:1] |= not used.any()  # PEFT has no rank 0
        cut[layer] = {name: arrays[name][..., used].T for name in inner}
        cut[layer] |= {name: arrays[name][used].T for name in outer}
        same = lambda other, layer=layer: all(
            np.array_equal(cut[other][name], cut[layer][name]) for name in inner
        )
        twin = next((other for other in spans if same(other)), None)
        spans[layer] = spans[twin] if twin else slice(rank, rank + int(used.sum()))
        rank = max(rank, spans[layer].stop)
    first = next(iter(cut.values()))
    whole = {name: np.zeros((rank, *first[name].shape[1:]), np.float32) for name in inner}
    whole |= {name: np.zeros((place.outputs, rank), np.float32) for name in outer}
    for layer, arrays in cut.items():
        for name in inner:
            whole[name][spans[layer]] = arrays[name]
        for name in outer:
            whole[name][place.columns[layer], spans[layer]] = arrays[name]
    return whole


def apart(place: Place, arrays: Arrays, inner: tuple, outer: tuple) -> dict[str, Arrays]:
    """Inverse of `joined`: {layer: arrays}, without ranks that are zero in all of `outer`."""
    by_layer = {}
    for layer, columns in place.columns.items():
        cut = {name: arrays[name].T[:, columns] for name in outer}
        used = np.any([x.any(axis=1) for x in cut.values()], axis=0)
        if used.any():
            by_layer[layer] = {name: arrays[name].T[..., used] for name in inner}
            by_layer[layer] |= {name: x[used] for name, x in cut.items()}
    return by_layer


def widest(layers: Mapping[str, Arrays], name: str, where) -> int:
    """The largest rank of the layers' arrays `name`, (..., r)."""
    if not layers:
        raise ValueError(f"{where}: there is no update, all is zero")
    return max(arrays[name].shape[-1] for arrays in layers.values())
