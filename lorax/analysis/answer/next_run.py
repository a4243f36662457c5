"""The run that a sweep asks for next, as a command: a grid that goes on where the best lies at its
edge, or is finer around the best, or more seeds.
"""

import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorax.analysis import compare, runs
from lorax.analysis.answer.candidates import Field
from lorax.analysis.tables import shape_of
from lorax.config import axes, axis_of, key_of, swept

MOST_SEEDS = 20  # that a command asks for
COARSE = 2.0  # a grid is finer than this factor, or
COARSE_RATES = 1.5  # for learning rates, or gets values in between
BEYOND = 2  # values added beyond an edge,
FURTHEST = 4.0  # each at most this factor further, or
FURTHEST_ELSE = 3.0  # for axes that don't decide the size


def proposal(field: Field, found: Mapping[str, Any]) -> dict[str, Any]:
    """{"why": in words, "changes": {axis: values}, "command"}: what to run next. command is None
    where nothing is left to refine, or the run was not started by a command.

    found: the answer so far: its edges, undecided, best...
    """
    changes, why = _grid(field, found)
    seeds, more = _seeds(field, found)
    if len(seeds) > len(field.seeds):
        why = [*why, more]
    if not why:
        return {"why": "", "changes": {}, "command": None}
    axis = (*_seed_axes(field), "seed")[0]
    if len(seeds) > len(field.seeds) or axis not in swept(_sweep(field)):
        changes |= {axis: tuple(seeds)}
    command = rerun(str(field.run.config.get("command") or ""), changes, _sweep(field))
    return {"why": ", ".join(why), "changes": changes, "command": command}


def _sweep(field: Field) -> Mapping[str, Any]:
    return field.run.config.get("config", {}).get("sweep") or {}


# ------------------------------------------------------------------------------------------- seeds


def _seed_axes(field: Field) -> list[str]:
    return [axis for axis in runs.SEEDS if axis in swept(_sweep(field))]


def _seeds(field: Field, found: Mapping[str, Any]) -> tuple[list[int], str]:
    """(the seeds to run with, why more than now): three at least, and as many as decide. The run's
    own if it sweeps several kinds of seeds."""
    now = len(field.seeds)
    if len(_seed_axes(field)) > 1:
        return field.seeds, ""
    wanted, why = max(now, compare.SEEDS), "with three seeds, the fewest that decide anything"
    if (
        now >= compare.SEEDS
        and found["undecided"]
        and not any(edge["open"] for edge in found["edges"])
    ):
        needed = max([now + 2, *(row["seeds"] or 0 for row in found["undecided"])])
        wanted = max(now, min(needed, MOST_SEEDS))
        why = f"with {wanted} seeds" + f", though it may take {needed}" * (needed > wanted)
    kept = [int(seed) for seed in field.seeds if isinstance(seed, (int, np.integer))]
    new = (seed for seed in itertools.count() if seed not in kept)
    return [*kept, *itertools.islice(new, wanted - len(kept))], why


# -------------------------------------------------------------------------------------------- grid


def _grid(field: Field, found: Mapping[str, Any]) -> tuple[dict[str, tuple], list[str]]:
    """({axis: values} that differ from the run's sweep, why in words: none if the grid is fine)."""
    opened = {e["axis"]: e for e in found["edges"] if e["open"]}
    refined, changes, why = {}, {}, []
    blocks = _blocks(swept(_sweep(field)), _sweep(field).get("zip") or ())
    for block, steps in blocks.items():
        axis = next((axis for axis in block if axis in opened), None)
        if axis is not None:
            refined[block], text = _beyond(field, block, steps, axis, opened[axis]["at"])
        elif not opened and not found["undecided"]:
            refined[block], text = _between(field, block, steps, found["setting"])
        else:
            refined[block], text = [], ""
        why += [text] * bool(text)
    if not why and not found["undecided"] and "lr" not in field.axes:
        rates, text = _rates(field, found)
        return ({"lr": rates}, [text]) if rates else ({}, [])
    if not why and not found["undecided"]:
        return {}, []
    for block, steps in blocks.items():
        new, kept = refined[block], _kept(field, block, steps, found, opened)
        if set(block) & set(field.sizes) & set(opened):  # they stay to be compared with
            new = [*kept, *(step for step in new if step not in kept)]
        new = new or kept
        if new != steps:
            changes |= dict(zip(block, zip(*new, strict=True), strict=True))
    return changes, why


def _kept(field: Field, block, steps: list[tuple], found, opened) -> list[tuple]:
    """The steps that the answer is between. All of them where it may be another: with too few
    seeds; at an open edge of a tuned axis, beyond which each size may be better; and along the
    tuned axes themselves, of which a size beyond an edge may have another best value."""
    axis = next((axis for axis in block if axis in field.axes), None)
    moves = set(opened) & set(field.tuned) if axis in field.sizes else opened
    raced = axis_of(_sweep(field).get("tune") or "") in block  # halving needs several values
    if axis is None or raced or moves or len(field.seeds) < compare.SEEDS:
        return steps
    rows = [found["best"], *filter(None, [found["chosen"]]), *found["undecided"]]
    used = {_word(row["setting"].get(axis)) for row in rows}
    return [step for step in steps if _word(step[block.index(axis)]) in used] or steps


def _rates(field: Field, found: Mapping[str, Any]) -> tuple[tuple, str]:
    """Learning rates around the only one of a run; smaller ones if nothing beats the base."""
    rates = field.table["lr"].unique() if "lr" in field.table else []
    if len(rates) != 1 or not rates[0] > 0:
        return (), ""
    worse = found["verdict"] == "nothing beats the base"
    factors = (0.03, 0.1, 0.3) if worse else (0.3, 1.0, 3.0)
    values = tuple(float(f"{rates[0] * factor:.2g}") for factor in factors)
    return values, "smaller learning rates" if worse else "other learning rates: one was tried"


def _blocks(
    values: Mapping[str, tuple], ties: Sequence[Sequence[str]]
) -> dict[tuple[str, ...], list[tuple]]:
    """{axes that advance together: their steps, with a value of each}, without those of seeds."""
    tied = [tuple(map(axis_of, tie)) for tie in ties]
    single = [(axis,) for axis in values if not any(axis in tie for tie in tied)]
    blocks = [block for block in [*tied, *single] if not set(block) & set(runs.SEEDS)]
    return {block: list(zip(*(values[axis] for axis in block), strict=True)) for block in blocks}


def _word(value: Any) -> str:
    listed = isinstance(value, (list, tuple))
    return runs.in_words(" ".join(map(str, value)) if listed else value)


def _beyond(field: Field, block, steps, axis: str, side: str) -> tuple[list[tuple], str]:
    """The step at the edge, and up to two beyond it; [] if there is none."""
    at, limits = block.index(axis), [_limits(field, name) for name in block]
    most = [FURTHEST if name in field.sizes else FURTHEST_ELSE for name in block]
    order = sorted(steps, key=lambda step: step[at], reverse=side == "lower")
    new = order[-1:]
    while len(new) <= BEYOND and not _is_beyond(limits[at], new[-1][at], side):
        before = zip(*order[:-1], *new, strict=True)  # the values of each axis
        new.append(tuple(map(_next, before, most, limits)))
        if new[-1][at] == new[-2][at]:
            return [], ""
    if len(new) == 1:
        return [], ""
    return sorted(new, key=lambda step: step[at]), f"{axis} beyond {_word(order[-1][at])}"


def _next(values: Sequence, most: float, limits: tuple[float, float]) -> Any:
    """The value that goes on with a grid: by the factor of its last step, at most `most`, or, where
    a value is 0, by their difference; within the limits. For words the last one."""
    if not all(map(_is_number, values[-2:])):
        return values[-1]
    before, last = values[-2:] if len(values) > 1 else (values[-1] / 2, values[-1])
    if last * before > 0:
        new = last * min(max(last / before, 1 / most), most)
    else:
        new = 2 * last - before
    new = min(max(new, limits[0]), limits[1])
    return round(new) if isinstance(last, int) else float(f"{new:.2g}")


def _between(field: Field, block, steps, setting: Mapping[str, Any]) -> tuple[list[tuple], str]:
    """The steps around a setting with new ones in between, where the grid is coarse; else [].

    Of an axis that decides the size, only a smaller value can be a better answer.
    """
    axis = block[0]
    values = sorted(step[0] for step in steps if _is_number(step[0]))
    here = setting.get(axis)
    if len(block) > 1 or axis not in field.axes or here not in values or min(values) <= 0:
        return [], ""
    at = values.index(here)
    sides = [at - 1] if axis in field.sizes else [at - 1, at + 1]
    near = [values[i] for i in sides if 0 <= i < len(values)]
    coarse = COARSE_RATES if axis == "lr" else COARSE
    new = [middle for value in near if (middle := _middle(value, here, coarse)) is not None]
    if not new:
        return [], ""
    kept = [*near, here, *new] if axis in field.sizes else [here, *new]
    return [(value,) for value in sorted(kept)], f"{axis} finer around {_word(here)}"


def _middle(a: float, b: float, coarse: float) -> float | int | None:
    """The value halfway, by factors, between two; None if they are close."""
    if max(a, b) / min(a, b) <= coarse * 1.001:
        return None
    middle = math.sqrt(a * b)
    return round(middle) if isinstance(a, int) and isinstance(b, int) else float(f"{middle:.2g}")


# ------------------------------------------------------------------------------------------ limits

POSITIVE = ("rank", "steps", "batch_size")  # at least 1
SHARES = ("dropout", "train.label_smoothing", "train.warmup_ratio")  # below 1


def is_limit(field: Field, axis: str, value: Any, side: str) -> bool:
    """Whether an axis can't go beyond a value. side: "lower" or "higher"."""
    return _is_beyond(_limits(field, axis), value, side)


def _is_beyond(limits: tuple[float, float], value: Any, side: str) -> bool:
    """Whether a value is at its limit on a side, or beyond."""
    return value <= limits[0] if side == "lower" else value >= limits[1]


def _limits(field: Field, axis: str) -> tuple[float, float]:
    """The smallest and the largest possible value of an axis, as far as is known."""
    if axis == "rank":
        return 1, _largest_rank(field)
    if axis in POSITIVE:
        return 1, math.inf
    return 0, 0.9 if axis in SHARES else math.inf


def _largest_rank(field: Field) -> float:
    """min(in, out) of the smallest matrix that a member's update changes."""
    for members in field.candidates["members"]:
        for member in members:
            try:
                updates = field.run.update(member)
            except (OSError, ValueError):  # it saved nothing, or needs its base to be read
                continue
            widths = (min(shape_of(update)[:2]) for update in updates.values())
            return min(widths, default=math.inf)
    return math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ----------------------------------------------------------------------------------------- command


def rerun(command: str, changes: Mapping[str, tuple], sweep: Mapping[str, Any]) -> str | None:
    """The command that runs a study again with other values on some axes, in another directory;
    None if `command` is not a call of lorax.run or lorax.launch.

    sweep: the section of the config; an axis that `sweep.axes` names is changed there.
    """
    words = shlex.split(command)
    if words[:2] != ["python", "-m"] or words[2] not in ("lorax.run", "lorax.launch"):
        return None
    flags = _flags(words[3:])
    others = dict(sweep.get("axes") or {})
    for axis, values in changes.items():
        if axis in axes():
            flags[f"config.sweep.{axis}"] = _text(values)
        else:
            others |= {key_of(axis): list(values)}
            inner = ", ".join(f"{key!r}: {_text(value)}" for key, value in others.items())
            flags["config.sweep.axes"] = f"{{{inner}}}"
    if "workdir" in flags:
        flags["workdir"] += "-next"
    return " ".join([*words[:3], *(_flag(name, value) for name, value in flags.items())])


def _flags(words: Sequence[str]) -> dict[str, str | None]:
    """{name: value} of flags as "--name=value", "--name value" or "--name"."""
    found, name = {}, None
    for word in words:
        if word.startswith("-"):
            name, has_value, value = word.lstrip("-").partition("=")
            found[name] = value if has_value else None
            name = None if has_value else name
        elif name is not None:
            found[name], name = word, None
    return found


def _flag(name: str, value: str | None) -> str:
    """A flag for the shell, in double quotes where it needs some and has nothing that they mean."""
    if value is None:
        return f"--{name}"
    if shlex.quote(value) == value:
        return f"--{name}={value}"
    if not set(value) & set('"$`\\!\n'):
        return f'--{name}="{value}"'
    return f"--{name}={shlex.quote(value)}"


def _text(values: Sequence) -> str:
    """A tuple as the command line reads it."""
    return repr(_plain(tuple(values)))


def _plain(value: Any) -> Any:
    """A value as Python has it: tuples, and numbers that are not numpy's."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value
