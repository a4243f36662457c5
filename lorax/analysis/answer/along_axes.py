"""The loss along each axis of a sweep: its neighbours, the ends of its grid, its main effect.

Everything is a difference of measured settings; nothing is read between the points of a grid.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorax.analysis import runs
from lorax.analysis.answer.candidates import Field, scalar
from lorax.analysis.answer.decision import Draws, as_dict


class Step(NamedTuple):
    """A value along an axis. at: its number in the draws; NaN losses if it was not measured."""

    value: Any
    at: int


def numeric(field: Field, axis: str) -> bool:
    """Whether an axis has at least two values among the candidates, all of them numbers."""
    column = field.points.loc[field.points["candidate"] >= 0, axis]
    values = [value for value in column.unique() if not runs.is_missing(value)]
    numbers = [isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in values]
    return len(values) > 1 and all(numbers)


def line(field: Field, axis: str, candidate: int) -> tuple[str, list[Step], int]:
    """("candidates" or "points", the steps of the line along an axis through a candidate, which of
    them is the candidate). Along a size, the tuned axes are at their best for every value; all
    other axes are equal."""
    candidates, points = field.candidates, field.points
    if axis in field.sizes:
        among, rows, own = "candidates", candidates, candidates.loc[candidate]
        others = [name for name in field.sizes if name != axis]
    else:
        among, rows = "points", points[points["candidate"] == candidate]
        own = points.loc[candidates["point"][candidate]]
        others = [name for name in field.axes if name != axis]
    rows = rows[runs.alike(rows, own, others) & rows[axis].notna()]
    rows = rows.assign(_at=pd.to_numeric(rows[axis])).sort_values("_at")
    steps = [Step(scalar(value), int(at)) for at, value in rows[axis].items()]
    return among, steps, [step.value for step in steps].index(scalar(own[axis]))


def is_at_end(field: Field, axis: str, candidate: int, side: str) -> bool:
    """Whether a candidate is at an end of an axis' line. side: "lower" or "higher"."""
    _, steps, here = line(field, axis, candidate)
    return here == (0 if side == "lower" else len(steps) - 1)


def along(field: Field, draws: Draws, axis: str, candidate: int) -> dict[str, Any]:
    """The neighbours of a candidate along an axis, and the ends of the grid.

    loss of a neighbour minus that of the candidate: positive where the neighbour is worse. An end
    "falls" if its loss is below that of the value before it, by an interval that excludes 0.
    """
    among, steps, here = line(field, axis, candidate)
    sides = {}
    for side, step in (("lower", -1), ("higher", 1)):
        end, before = (0, 1) if step < 0 else (len(steps) - 1, len(steps) - 2)
        fall = None
        if len(steps) > 1:
            fall = draws.difference(among, steps[before].at, steps[end].at)
        near = here + step
        difference = None
        if 0 <= near < len(steps):
            difference = draws.difference(among, steps[near].at, steps[here].at)
        sides[side] = {
            "end": steps[end].value,
            "before": steps[before].value if len(steps) > 1 else None,
            "at_end": here == end,
            "fall": fall,
            "falls": fall is not None and fall["low"] is not None and fall["low"] > 0,
            "neighbour": steps[near].value if 0 <= near < len(steps) else None,
            "difference": difference,
        }
    kept = [name for name in field.tuned if among == "candidates"]
    return {"axis": axis, "value": steps[here].value, "at_its_best": kept, **sides}


def main_effect(field: Field, draws: Draws, axis: str) -> dict[str, Any] | None:
    """The mean loss at each value of an axis, over settings of the other axes that were measured at
    all its values (balanced); None if there is none.

    range: the largest mean less the smallest, with its interval. settings: over how many settings
    of the other axes each mean is taken; left_out: how many lack a value.
    """
    points = field.points[field.points["candidate"] >= 0]
    others = [name for name in field.axes if name != axis]
    values = list(dict.fromkeys(map(scalar, points[axis])))
    groups: dict[tuple, dict] = {}
    for number, row in points.iterrows():
        group = groups.setdefault(tuple(scalar(row[name]) for name in others), {})
        if row["eligible"]:
            group[scalar(row[axis])] = number
    whole = [group for group in groups.values() if len(group) == len(values)]
    if not whole or len(values) < 2:
        return None
    at = np.array([[group[value] for value in values] for group in whole])
    means = draws.points.losses[at].mean(0)
    worst, best = int(means.argmax()), int(means.argmin())
    of = lambda loss: (loss[..., at[:, worst]] - loss[..., at[:, best]]).mean(-1)
    return {
        "axis": axis,
        "values": values,
        "means": (field.metric.sign * means).tolist(),
        "range": as_dict(draws.points.interval(of, draws.level)),
        "best": values[best],
        "averaged_over": others,
        "settings": len(whole),
        "left_out": len(groups) - len(whole),
    }
