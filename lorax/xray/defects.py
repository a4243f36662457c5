"""What is wrong in a file: numbers that are none, updates that are 0, the same one twice."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lorax.interop.adapter import Factors
from lorax.interop.formats.contract import Update
from lorax.xray.measured import Measured

SHOWN = 3  # layers that a line names


class Defects(NamedTuple):
    """Layers of one file.

    bad: {layer: how many numbers are NaN or infinite}.
    dead: {layer: why dW = 0}.
    duplicates: groups of layers with the same dW.
    shared: groups of layers with the same A, whose dW differ: one matrix that was split.
    unused: {layer: (rank, numerical rank)} if the numerical rank is lower, of those that change.
    """

    bad: dict[str, int]
    dead: dict[str, str]
    duplicates: list[list[str]]
    shared: list[list[str]]
    unused: dict[str, tuple[int, int]]


def defects(measured: Sequence[Measured], ranks: dict[str, int]) -> Defects:
    """The defects of a file's updates. ranks: {layer: numerical rank}."""
    bad = {m.update.layer: m.bad for m in measured if m.bad}
    dead = {m.update.layer: m.idle for m in measured if m.idle}
    moving = [m for m in measured if not m.bad and not m.idle]
    duplicates = _equal(moving, 0, lambda update: _arrays(update.read()))
    twice = {layer for group in duplicates for layer in group}
    others = [m for m in moving if m.update.layer not in twice and m.factored]
    shared = _equal(others, 1, lambda update: (update.read().a,))
    unused = {
        m.update.layer: (m.update.rank, ranks[m.update.layer])
        for m in moving
        if m.factored and ranks[m.update.layer] < min(m.update.rank, *m.update.shape)
    }
    return Defects(bad, dead, duplicates, shared, unused)


def _arrays(given: Factors | np.ndarray) -> tuple[np.ndarray, ...]:
    return (given.a, given.b, np.float64(given.s)) if isinstance(given, Factors) else (given,)


def _equal(
    measured: Iterable[Measured], mark: int, read: Callable[[Update], tuple[np.ndarray, ...]]
) -> list[list[str]]:
    """Groups of two or more layers with equal arrays. mark: which of `Measured.marks` is theirs."""
    candidates: dict[bytes, list[Update]] = {}
    for one in measured:
        candidates.setdefault(one.marks[mark], []).append(one.update)
    groups = []
    for updates in candidates.values():
        while len(updates) > 1:
            first, *others = updates
            arrays = read(first)
            same = [other for other in others if _same(arrays, read(other))]
            if same:
                groups.append([update.layer for update in (first, *same)])
            updates = [other for other in others if other not in same]
    return groups


def _same(first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def lines(found: Defects, matrices: int) -> list[str]:
    """The defects in words, a line each. matrices: how many the file has."""
    said = []
    if found.bad:
        numbers = sum(found.bad.values())
        said.append(
            f"not finite: {numbers:,} NaN or infinite numbers in {len(found.bad)} of {matrices} "
            f"matrices, which have no ranks and count in no sum: {named(found.bad)}"
        )
    for why in dict.fromkeys(found.dead.values()):
        layers = [layer for layer, reason in found.dead.items() if reason == why]
        said.append(f"dead: dW = 0 in {len(layers)} of {matrices} matrices, {why}: {named(layers)}")
    for group in found.duplicates:
        said.append(f"duplicates: {len(group)} matrices have the same dW: {named(group)}")
    if found.shared:
        example = named(found.shared[0])
        said.append(
            f"shared A: {len(found.shared)} groups of matrices have one A, as parts of a fused "
            f"matrix have; their input directions count once per part: {example}"
        )
    if found.unused:
        layer, (rank, used) = max(found.unused.items(), key=lambda item: item[1][0] - item[1][1])
        said.append(
            f"unused rank: {len(found.unused)} of {matrices} matrices have a numerical rank below "
            f"their r, the most {layer}: {used} of {rank}"
        )
    return said


def named(layers: Iterable[str]) -> str:
    """The first layers by name, and how many more there are."""
    layers = list(layers)
    more = len(layers) - SHOWN
    return ", ".join(layers[:SHOWN]) + (f" and {more} more" if more > 0 else "")
