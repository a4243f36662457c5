"""Splits the members of a round into parts that change nothing of what is computed.

The one machine trains `width` members side by side on each of its devices, and a worker does the
same, so that a part has whole multiples of what the devices of a worker take at a time. Where an
axis is tuned by halving, a part has whole points: the values of a point compete with each other
only.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import jax

from lorax.halving import Race
from lorax.launching.machines import Machine
from lorax.train import layouts, loop
from lorax.train.prepare import Group


def split(
    groups: Sequence[Group], race: Race | None, machine: Machine, workers: int
) -> list[tuple[int, ...]]:
    """The members of each part, at most one part for each worker; the longest part first.

    A group is divided only if its share of the work is more than a worker's.
    """
    work = {m.index: _work(m) for group in groups for m in group.members}
    if race:
        found = _chunks([_of_point(point) for point in race.points], workers)
    else:
        total, found = sum(work.values()), []
        for group in groups:
            members = [member.index for member in group.members]
            at_once = _at_once(group, machine)
            units = [members[i : i + at_once] for i in range(0, len(members), at_once)]
            share = sum(work[i] for i in members) / total
            found += _chunks(units, max(1, round(workers * share)))
    return _packed(found, workers, work)


def size(group: Group, race: Race | None, machine: Machine) -> int:
    """Members of a group in one program of the one machine; 0 for all of a leg."""
    if race and machine.platform != "cpu":
        return 0
    legs = loop.legs(group, group.stack, race) if race else ()
    return _layout(group, machine, legs).size * (machine.devices // machine.each)


def _work(member) -> float:
    """Tokens or rows that a member reads, up to a factor that is the same for all."""
    t = member.config.train
    return t.steps * t.batch_size * t.seq_len


def _of_point(point) -> list[int]:
    return [i for candidate in point for i in (*candidate.racing, *candidate.waiting)]


def _chunks(units: list[list[int]], count: int) -> list[tuple[int, ...]]:
    """The units in at most `count` parts of nearly as many units each."""
    count = min(count, len(units))
    ends = [len(units) * i // count for i in range(count + 1)]
    pairs = zip(ends, ends[1:], strict=False)
    return [tuple(sorted(sum(units[a:b], []))) for a, b in pairs]


def _packed(chunks: list[tuple[int, ...]], workers: int, work: dict[int, float]) -> list[tuple]:
    """The chunks in as many parts as there are workers, which take about the same time: the longest
    chunk first, each to the part that has the least to do."""
    cost = lambda part: sum(work[i] for i in part)
    found = [()] * min(workers, len(chunks))
    for chunk in sorted(chunks, key=cost, reverse=True):
        least = min(range(len(found)), key=lambda i: cost(found[i]))
        found[least] = tuple(sorted(found[least] + chunk))
    return sorted(found, key=cost, reverse=True)


def _at_once(group: Group, machine: Machine) -> int:
    """Members that a worker computes at a time, side by side and on all its devices."""
    chosen = _layout(group, machine)
    return chosen.width * chosen.shape.member


def _layout(group: Group, machine: Machine, legs=()) -> layouts.Layout:
    """The layout of a worker's share of the one machine, as far as shapes say; a worker has less
    side by side if its memory is too small, as the one machine would."""
    share = math.ceil(len(group.members) * machine.each / machine.devices)
    here = jax.devices()[: machine.each]
    others = [SimpleNamespace(platform=machine.platform)] * machine.each
    devices = here if machine.platform == "cpu" else others
    return layouts.layout(share, group.config.train, group.base, devices, legs)
