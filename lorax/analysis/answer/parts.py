"""The parts of an answer: its settings, baseline, neighbours and edges, as values for JSON."""

from typing import Any

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.analysis import runs
from lorax.analysis.answer import along_axes, next_run
from lorax.analysis.answer.candidates import Field, plain
from lorax.analysis.answer.decision import BASE, Choice, Draws, as_dict
from lorax.analysis.answer.words import in_words

SIDES = ("lower", "higher")


def candidate(field: Field, draws: Draws, choice: Choice, n: int) -> dict[str, Any]:
    """A row of "settings". behind: its loss less the best's; gain: the base's less its own."""
    row = field.candidates.loc[n]
    found = {
        "setting": field.setting(n),
        "words": in_words(field.setting(n)),
        "trainable_params": int(row["trainable_params"]),
        "verdict": "not eligible",
        **dict.fromkeys(("value", "interval", "gain", "behind")),
        "members": [],
    }
    if not row["eligible"]:
        return found
    verdict = "best" if n == choice.best else choice.shown(n)
    return found | {
        "verdict": verdict if len(field.candidates) > 1 else "only",
        **_measured(field, draws, n),
        "gain": draws.difference("candidates", BASE, n),
        "behind": draws.difference("candidates", n, choice.best),
        "members": [int(member) for member in row["members"]],
    }


def _measured(field: Field, draws: Draws, at: int) -> dict[str, Any]:
    """The metric, with its interval, of a number among the draws of candidates."""
    sign = field.metric.sign
    interval = as_dict(draws.candidates.interval(lambda loss: sign * loss[..., at], draws.level))
    return {"value": interval.pop("value"), "interval": interval | {"level": draws.level}}


def baseline(field: Field, draws: Draws) -> dict[str, Any]:
    """The base before training, and whether all members start from it."""
    same = runs.agree(field.table[field.metric.base])
    return _measured(field, draws, BASE) | {"same_for_all": same}


def full(field: Field, draws: Draws, shown: int) -> dict[str, Any] | None:
    """Full fine-tuning at its best, beside the shown setting; None if there is none beside which
    it can be shown."""
    if field.full is None:
        return None
    at, row = len(field.candidates), field.points.loc[field.full]
    share = lambda loss: (loss[..., BASE] - loss[..., shown]) / (loss[..., BASE] - loss[..., at])
    return {
        "setting": plain(row, ("method", "lr")),
        "trainable_params": int(row["trainable_params"]),
        **_measured(field, draws, at),
        "behind": draws.difference("candidates", shown, at),
        "share_of_gain": as_dict(draws.candidates.interval(share, draws.level)),
        "members": [int(member) for member in row["members"]],
    }


def neighbours(field: Field, draws: Draws, axis: str, shown: int) -> dict[str, Any]:
    """The values beside that of the shown setting, and how much their loss is above its own."""
    along = along_axes.along(field, draws, axis, shown)
    found = {"axis": axis, "value": along["value"], "at_its_best": along["at_its_best"]}
    for side in SIDES:
        if along[side]["neighbour"] is not None:
            behind = along[side]["difference"]
            found[side] = {"value": along[side]["neighbour"], "behind": behind}
    return found


def edge(field: Field, draws: Draws, choice: Choice, axis: str) -> dict[str, Any]:
    """Whether the best lies at an end of an axis' grid, and whether the loss still falls at one.

    at: "lower", "higher" or None. fall: the loss of the value beside that end less that of the end.
    limit: the axis can't go further. open: a better setting may lie beyond: the axis can go
    further, and the loss falls by what may be more than delta. also: other settings whose best
    value is at this end.
    """
    along = along_axes.along(field, draws, axis, choice.best)
    side = next((side for side in SIDES if along[side]["at_end"]), None)
    fall = along[side]["fall"] if side else None
    limit = side is not None and next_run.is_limit(field, axis, along["value"], side)
    could = _could_matter(fall, choice.delta["value"])
    others = np.flatnonzero(field.candidates["eligible"]) if side and axis in field.tuned else ()
    also = [n for n in others if n != choice.best and along_axes.is_at_end(field, axis, n, side)]
    return {
        "axis": axis,
        "value": along["value"],
        "at": side,
        "fall": fall,
        "beside": along[side]["before"] if side else None,
        "limit": limit,
        "open": bool(side) and not limit and could,
        "falls_at": [end for end in SIDES if along[end]["falls"]],
        "ends": {end: along[end]["end"] for end in SIDES},
        "also": [in_words(field.sizes_of(n), " ") for n in also],
    }


def _could_matter(fall: dict[str, Any] | None, delta: float | None) -> bool:
    """Whether a fall may be more than delta; without a delta, whether there is one."""
    if fall is None or fall["low"] is None:
        return True
    return fall["low"] > 0 if delta is None else fall["high"] > delta


def excluded(field: Field) -> list[dict[str, Any]]:
    """The settings that are not eligible, and why."""
    lost = field.points[~field.points["eligible"]]
    found = [(plain(row, field.axes), row["why"]) for _, row in lost.iterrows()]
    return [{"setting": s, "words": in_words(s), "why": why} for s, why in found]


def diverged(field: Field) -> list[str]:
    """The members that diverged, with the step."""
    lost = field.table[field.table["status"] == "diverged"]
    steps = pd.to_numeric(lost["diverged_at"])
    at = ["" if np.isnan(step) else f" at step {step:.0f}" for step in steps]
    return [f"{name}{when}" for name, when in zip(lost["name"], at, strict=True)]


def adapters(field: Field, shown: int) -> list[str]:
    """The folders of the shown setting's members, relative to the run; best on validation first."""
    losses = field.table[field.metric.validation]
    members = sorted(field.candidates["members"][shown], key=lambda member: losses[member])
    there = [m for m in members if rundir.adapter(field.run.directory, m).is_dir()]
    return [f"{rundir.ADAPTERS}/{member}" for member in there]


def scale_spread(field: Field) -> float | None:
    """By which factor the update's scale differs between ranks that don't have a rate of their own;
    None if it doesn't, or only as rsLoRA's, which keeps the size of the activations at every rank
    (arXiv:2312.03732)."""
    if set(field.table.get("scaling", pd.Series()).dropna()) == {"rslora"}:
        return None
    scales = pd.to_numeric(field.table["scale"], errors="coerce").dropna()
    if "rank" not in field.sizes or "lr" in field.tuned or not len(scales) or scales.min() <= 0:
        return None
    spread = max(
        own.max() / own.min() for _, own in scales.groupby(field.table["method"].loc[scales.index])
    )
    return float(spread) if spread > 1 + 1e-6 else None
