"""Successive halving: a sweep in which every point finds its own best value of one axis.

With `sweep.tune` the values of that axis (the learning rates, say) race at every point of the other
axes. All begin with the schedule of the full run. At each rung, a share of train.steps, the values
of a point are compared by their validation loss, averaged over the seeds; the best go on where they
are, the others stop (Jamieson and Talwalkar 2016, arXiv:1502.07943, section 3). Values of different
points never compete. Nothing here imports JAX.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from lorax import config
from lorax.calls import steps_per_call
from lorax.config import Member

#: Sections and keys that decide what is measured: with other values, losses can't be compared.
MEASURED = ("base", "task.", "eval.")


class Candidate(NamedTuple):
    """A value of the tuned axis at one point. racing: its members, one for each seed that races;
    waiting: those of the other seeds, which train only if the value wins."""

    value: object
    racing: tuple[int, ...]
    waiting: tuple[int, ...]


class Race(NamedTuple):
    """Which members compete, and when. A leg is what is trained between two rungs.

    axis: the tuned one. rungs: shares of train.steps, ascending. keep: the share of a point's
    candidates that goes on after each. points: the candidates of each point. stops: {member: the
    steps at which its legs end}, the last of them train.steps; () as long as the rows that
    `train.epochs` passes over aren't counted.
    """

    axis: str
    rungs: tuple[float, ...]
    keep: float
    points: tuple[tuple[Candidate, ...], ...]
    stops: dict[int, tuple[int, ...]]

    @property
    def starters(self) -> set[int]:
        """The members that train from the beginning."""
        return {i for point in self.points for candidate in point for i in candidate.racing}

    def ends(self, member: int, leg: int) -> tuple[int, int]:
        """The steps at which a leg of a member begins and ends. The leg after the last one is that
        of the seeds that waited, from the first step to the last."""
        stops = (0, *self.stops[member])
        return stops[leg : leg + 2] if leg < len(self.rungs) + 1 else (0, stops[-1])


def without(members: Iterable[Member]) -> Race:
    """A race in which all members train to the end."""
    points = tuple((Candidate(None, (member.index,), ()),) for member in members)
    return Race("", (), 1.0, points, {m.index: (m.config.train.steps,) for m in members})


def race(settings: ConfigDict, members: list[Member]) -> Race | None:
    """The race that a config asks for, None if it tunes nothing.

    Raises ValueError for an axis that can't be tuned and a key of config.halving out of range.
    """
    _check(settings.halving)
    if settings.sweep.tune is None:
        return None
    axis = config.axis_of(settings.sweep.tune)
    _check_axis(settings, axis)
    halving, points = settings.halving, {}
    for member in members:
        others = {a: v for a, v in member.point.items() if a != axis and not is_seed(a)}
        values = points.setdefault(json.dumps(others), {})
        values.setdefault(json.dumps(member.point.get(axis)), []).append(member)
    if max(map(len, points.values())) < 2:
        raise ValueError(
            f"sweep.tune: {settings.sweep.tune!r} given, but it has one value at every point of "
            f"the other axes; give it several, and don't tie it (sweep.zip) to an axis that differs"
        )
    seeds = halving.seeds or len(members)
    made = tuple(tuple(_candidate(axis, m, seeds) for m in v.values()) for v in points.values())
    stops = {member.index: _stops(member, halving.rungs) for member in members}
    for point in made:
        if len({stops[i] for candidate in point for i in candidate.racing}) > 1:
            raise ValueError(
                f"sweep.tune: {settings.sweep.tune!r} given, but its values would be compared at "
                f"different steps; calls of the program differ in length"
            )
    return Race(axis, tuple(halving.rungs), halving.keep, made, stops)


def _candidate(axis: str, members: list[Member], seeds: int) -> Candidate:
    """members: one for each seed; the first `seeds` race."""
    of = [member.index for member in members]
    return Candidate(members[0].point.get(axis), tuple(of[:seeds]), tuple(of[seeds:]))


def is_seed(axis: str) -> bool:
    """Whether an axis is a seed: losses are averaged over it."""
    key = config.key_of(axis)
    return key in ("seed", "task.seed") or key.startswith("seeds.")


def _stops(member: Member, rungs: Iterable[float]) -> tuple[int, ...]:
    """The steps at which a member's legs end: whole calls of the program; () if its steps are still
    unknown. Raises ValueError for a rung that leaves nothing to train after it."""
    c = member.config
    k, steps = steps_per_call(c.eval.every, c.train.offload), c.train.steps
    if not steps:
        return ()
    stops = [max(1, round(share * steps / k)) * k for share in rungs]
    if stops[-1] >= steps:
        raise ValueError(
            f"halving.rungs: {rungs[-1]:g} given, but of train.steps = {steps} that is no step "
            f"before the last: training goes on by {k} steps at a time (a divisor of eval.every)"
        )
    return (*stops, steps)


def _check(halving) -> None:
    """Raises ValueError for a key of config.halving that is out of range."""

    def need(field, fits, right):
        if not fits:
            raise ValueError(f"halving.{field}: {halving[field]!r} given, {right}")

    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
    rungs, seeds = halving.rungs, halving.seeds
    shares = len(rungs) > 0 and all(number(v) and 0 < v < 1 for v in rungs)
    ascending = shares and all(a < b for a, b in zip(rungs, rungs[1:], strict=False))
    need("rungs", ascending, "must be shares of train.steps in (0, 1), ascending: (0.125, 0.25)")
    need("keep", 0 < halving.keep < 1, "must be in (0, 1): the share of values that goes on")
    fits = seeds is None or 1 <= seeds < 2**31
    need("seeds", fits, "must be at least 1 and less than 2**31, or None for all")


def _check_axis(settings: ConfigDict, axis: str) -> None:
    """Raises ValueError for an axis that can't be tuned."""
    if settings.search.threshold:
        why = "but a search (search.threshold) tries every value; leave one of them out"
    elif axis not in (axes := config.swept(settings.sweep)):
        why = f"must be an axis of this sweep; it has {', '.join(axes) or 'none'}"
    elif is_seed(axis):
        why = "but a seed is no choice: losses are averaged over it"
    elif axis in ("steps", "train.epochs"):
        why = "but values are compared at the same step"
    elif config.key_of(axis).startswith(MEASURED) and axis != "n_train":
        why = "but it changes what the loss is measured on"
    else:
        return
    raise ValueError(f"sweep.tune: {settings.sweep.tune!r} given, {why}")


# ---------------------------------------------------------------------------------------- choosing


def kept(candidates: int, keep: float) -> int:
    """How many of a point's candidates go on after a rung: their share, rounded, at least one."""
    return max(1, math.floor(candidates * keep + 0.5))


def survivors(race: Race, leg: int, running: set[int], losses: Mapping[int, float]) -> set[int]:
    """The members of the next leg: those that go on after a rung; after the last step, those of the
    seeds that waited, at the best value of each point.

    running: those that trained in this leg. losses: {member: its validation loss there}, not finite
    for one that has diverged; its candidate is out. Of a point whose candidates are all out, none
    goes on.
    """
    left = set()
    for point in race.points if leg <= len(race.rungs) else ():
        ranked = _ranked(point, running, losses)
        if leg < len(race.rungs):
            count = kept(sum(set(c.racing) <= running for c in point), race.keep)
            left |= {i for candidate in ranked[:count] for i in candidate.racing}
        else:
            left |= {i for candidate in ranked[:1] for i in candidate.waiting}
    return left


def values(race: Race, running: set[int]) -> dict:
    """{value of the tuned axis: the number of points that still train it}, in the axis' order."""
    counts = {}
    for point in race.points:
        for candidate in point:
            of = set(candidate.racing) <= running
            counts[candidate.value] = counts.get(candidate.value, 0) + of
    return {value: n for value, n in counts.items() if n}


def _ranked(point, running: set[int], losses: Mapping[int, float]) -> list[Candidate]:
    """The candidates of a point that are running, none of whose seeds has diverged; best first."""
    mean = lambda candidate: math.fsum(losses[i] for i in candidate.racing) / len(candidate.racing)
    able = [candidate for candidate in point if set(candidate.racing) <= running]
    return sorted((c for c in able if math.isfinite(mean(c))), key=mean)


# ---------------------------------------------------------------------------------------- planning


def planned(race: Race) -> list[list[int]]:
    """The members of each leg if nothing diverges, for an estimate: which value wins is unknown, so
    the first of each point's values stand for those that go on."""
    counts, made = [len(point) for point in race.points], []
    for _ in range(len(race.rungs) + 1):
        pairs = list(zip(race.points, counts, strict=True))
        made.append([i for point, n in pairs for c in point[:n] for i in c.racing])
        counts = [kept(n, race.keep) for n in counts]
    waiting = [i for point in race.points for i in point[0].waiting]
    return [*made, waiting] if waiting else made


def member_steps(race: Race, members: Iterable[int], leg: int) -> int:
    """Steps of some members together in a leg."""
    return sum(end - begin for begin, end in (race.ends(i, leg) for i in members))


def all_steps(race: Race, among: Iterable[int] | None = None) -> int:
    """Steps of all members together, or of those `among` them, if nothing diverges."""
    chosen = set(race.stops if among is None else among)
    legs = enumerate(planned(race))
    return sum(member_steps(race, chosen.intersection(members), leg) for leg, members in legs)


def budget(race: Race) -> str:
    """A line: what is tuned, how, and what it costs of the full grid, once the steps are known."""
    counts = sorted({len(point) for point in race.points})
    values = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    shares = ", ".join(f"{share:.3g}%" for share in (100 * share for share in race.rungs))
    how = f"tunes {race.axis} over {values} values by halving at {shares}"
    if not all(race.stops.values()):
        return f"{how} of the steps"
    ours, full = all_steps(race), sum(stops[-1] for stops in race.stops.values())
    share = f"{100 * ours / full:.0f}% of the full grid's steps ({ours:,} of {full:,})"
    return f"{how}: about {share}"
