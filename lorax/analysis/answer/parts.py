"""The parts of an answer: its settings, baseline, neighbours and edges, as values for JSON."""

from typing import Any

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.analysis import runs
from lorax.analysis.answer import along_axes, next_run
from lorax.analysis.answer.candidates import Field, plain
from lorax.analysis.answer.decision import Choice, Draws, as_dict
from lorax.analysis.answer.words import in_words

SIDES = ("lower", "higher")


def candidate(field: Field, draws: Draws, choice: Choice, n: int) -> dict[str, Any]:
    """A row of "settings". behind: its loss less the best's; gain: the base's less its own."""
    row, count, sign = field.candidates.loc[n], len(field.candidates), field.metric.sign
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
    boot, base = draws.candidates, len(draws.candidates.losses) - 1
    value = as_dict(boot.interval(lambda loss: sign * loss[..., n], draws.level))
    verdict = "best" if n == choice.best else choice.shown(n)
    return found | {
        "verdict": verdict if count > 1 else "only",
        "value": value["value"],
        "interval": _interval(value, draws.level),
        "gain": draws.difference("candidates", base, n),
        "behind": draws.difference("candidates", n, choice.best),
        "members": [int(member) for member in row["members"]],
    }


def _interval(found: dict[str, Any], level: float) -> dict[str, Any]:
    """The interval of a value, and what it knows of chance."""
    return {name: found[name] for name in ("low", "high", "over")} | {"level": level}


def baseline(field: Field, draws: Draws) -> dict[str, Any]:
    """The base before training, and whether all members start from it."""
    sign, boot = field.metric.sign, draws.candidates
    base = as_dict(boot.interval(lambda loss: sign * loss[..., -1], draws.level))
    found = {"value": base["value"], "interval": _interval(base, draws.level)}
    return found | {"same_for_all": runs.agree(field.table[field.metric.base])}


def full(field: Field, draws: Draws, shown: int) -> dict[str, Any] | None:
    """Full fine-tuning at its best, beside the shown setting; None if there is none beside which
    it can be shown."""
    if field.full is None:
        return None
    at, boot, base = len(field.candidates), draws.candidates, len(draws.candidates.losses) - 1
    sign, row = field.metric.sign, field.points.loc[field.full]
    value = as_dict(boot.interval(lambda loss: sign * loss[..., at], draws.level))
    share = lambda loss: (loss[..., base] - loss[..., shown]) / (loss[..., base] - loss[..., at])
    return {
        "setting": plain(row, ("method", "lr")),
        "trainable_params": int(row["trainable_params"]),
        "value": value["value"],
        "interval": _interval(value, draws.level),
        "behind": draws.difference("candidates", shown, at),
        "share_of_gain": as_dict(boot.interval(share, draws.level)),
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
    also = []
    if side and axis in field.tuned:
        for n in map(int, np.flatnonzero(field.candidates["eligible"])):
            other = along_axes.along(field, draws, axis, n)
            also += [in_words(field.sizes_of(n), " ")] * (
                n != choice.best and other[side]["at_end"]
            )
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
        "also": also,
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
