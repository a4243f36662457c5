"""Trains groups of members one after another, each in parts (`lorax.train.part`)."""

import csv
import io
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax

from lorax import rundir, tasks, tree
from lorax.calls import steps_per_call
from lorax.config import Member, group_key
from lorax.files import write_bytes
from lorax.train import fitting, layouts, part, results, stacks, trajectory
from lorax.train.batches import batch_shapes, eval_batches
from lorax.train.prepare import Group
from lorax.train.programs import Programs


class Terminal(NamedTuple):
    """Output of the loop: say(line), progress(steps done, total), finished(row of a member)."""

    say: Callable[[str], None]
    progress: Callable[[float, float], None]
    finished: Callable[[dict], None]


def write_rankings(workdir: Path, groups: list[Group]) -> None:
    """Write analysis/sensitivity.csv, the ranking of matrices, if evidence chose targets or
    ranks."""
    lines = [
        {"member": member} | row
        for group in groups
        for member, rows in group.rankings.items()
        for row in rows
    ]
    if lines:
        text = io.StringIO()
        writer = csv.DictWriter(text, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        write_bytes(rundir.table(workdir, "sensitivity"), text.getvalue().encode())


def train(
    workdir: Path,
    groups: list[Group],
    terminal: Terminal,
    offset: int = 0,
    before: float = 0,
    after: float = 0,
) -> tuple[dict[int, dict], int]:
    """Train all groups in turn, from the newest checkpoints; ({member: its final row}, bytes of
    metrics.jsonl up to their end).

    offset: bytes of metrics.jsonl written by earlier calls. before, after: steps of members that
    earlier calls have trained or later ones may train, for the progress of the whole run.

    A row has "status" ("finished" or "diverged"), "diverged_at" (step or None), "eval_loss" (nats
    per completion token, a classifier's loss, or the squared error of values; None after
    divergence), "seconds", "step_ms" (of training alone; both are a member's share) and "scores"
    ({metric: value} of a classifier or of generated texts). Unless it diverged, it has "cka" (per
    layer) with `analysis.cka`, and "base_scores" (of the base's own texts) with `eval.generate`.
    "failed" ({config key: reason}) is set if the texts or the CKA of a trained member failed. If
    training is killed at any moment and called again, metrics, adapters and trajectories are bit
    for bit the same as without the interruption.
    """
    total = before + member_steps([m for g in groups for m in g.stack.members]) + after
    done, rows, programs, key = before, {}, None, None
    # Fail before any training if the largest group does not fit.
    first = max(groups, key=_largest)
    ahead = {_program_key(first): _timed_fit(first)}
    for group in groups:
        last, key = key, _program_key(group)
        seconds = 0.0
        if key != last:  # consecutive groups that differ only in their data share a program
            programs, seconds = ahead.pop(key, None) or _timed_fit(group)
        began = time.monotonic()
        for width in tasks.widths(group.task):
            programs.narrow(width)
        seconds += time.monotonic() - began
        parts = stacks.parts(group.stack, programs.layout.size)
        terminal.say(_plan_line(group, programs, len(parts), seconds))
        if why := _without_spectra(group):
            terminal.say(f"group {group.index}: analysis.trajectory: {why}")
        progress = lambda steps, before=done: terminal.progress(before + steps, total)
        finals, offset = _train_group(workdir, group, programs, parts, offset, terminal, progress)
        rows |= finals
        done += member_steps(group.stack.members)
    return rows, offset


def _train_group(
    workdir: Path, group: Group, programs: Programs, parts: list[stacks.Stack], offset: int,
    terminal: Terminal, progress: Callable[[float], None],
) -> tuple[dict[int, dict], int]:  # fmt: skip
    """Train a group part by part; ({member: its final row}, bytes of metrics.jsonl)."""
    rows, done = {}, 0
    params = programs.place_base(group.base.params)
    eval_rows = jax.device_put(eval_batches(group.task, group.config.eval.batch_size))
    for number, stack in enumerate(parts):
        current = part.Part(
            workdir=workdir,
            name=rundir.part(group.index, number, len(parts)),
            group=group,
            stack=stack,
            programs=programs,
            params=params,
            eval_rows=eval_rows,
            constants=programs.place(stack.constants),
            hyper=programs.place(stack.hyper),
            say=terminal.say,
        )
        tell = lambda steps, before=done: progress(before + steps)
        finals, offset = _train_part(current, offset, tell, terminal.finished)
        rows |= finals
        done += member_steps(stack.members)
    return rows, offset


def _train_part(current: part.Part, offset: int, progress, finished) -> tuple[dict[int, dict], int]:
    """Like `_train_group`, for one part; its state is freed on return."""
    at = part.train(current, offset, progress)
    return results.of_part(current, at, finished), at.offset


def member_steps(members: Iterable[Member]) -> int:
    """Steps of all members together."""
    return sum(member.config.train.steps for member in members)


def _shapes(group: Group):
    """Shapes of the batches of one call to train, and of the evaluation."""
    c = group.config
    k = steps_per_call(c.eval.every, c.train.offload)
    batches = batch_shapes(c.train, group.task, k)
    return batches, tree.shapes(eval_batches(group.task, c.eval.batch_size))


def _timed_fit(group: Group) -> tuple[Programs, float]:
    """The programs of a group, and the seconds that it took to compile them."""
    began = time.monotonic()
    arguments = group.stack, group.base, group.config.train, *_shapes(group), group.task.kind
    return fitting.fit(*arguments), time.monotonic() - began


def _without_spectra(group: Group) -> str:
    """What trajectories leave out of the updates; "" for nothing or without trajectories."""
    if not group.config.analysis.trajectory:
        return ""
    stack = group.stack
    member = jax.tree.map(lambda x: x[0], (stack.constants, stack.state.trainable))
    return trajectory.left_out(stack.methods[0], group.base, *member)


def _largest(group: Group) -> float:
    """Rough estimate of the bytes that one member needs: weights, state and layer outputs."""
    c, params = group.config, jax.tree.leaves(group.base.params)
    put_out = sum(x.size / x.shape[-2] for x in params if x.ndim > 1)
    rows = c.train.batch_size // c.train.accumulate * layouts.row_tokens(c.train, group.base)
    state = tree.nbytes(group.stack.state) / len(group.stack.members)
    return tree.nbytes(group.base.params) + state + 4 * rows * put_out


def _program_key(group: Group) -> str:
    """Everything that the programs of `fitting.fit` depend on; not the content of the rows."""
    settings = json.loads(group_key(group.stack.members[0]))
    of_rows = lambda key: key.startswith("task.") or key == "seeds.data"
    settings = {key: value for key, value in settings.items() if not of_rows(key)}
    dropout = any(member.config.method.dropout > 0 for member in group.stack.members)
    shapes = tree.shapes(group.stack[2:]), *_shapes(group)
    kind = group.task.kind
    return json.dumps([settings, dropout, kind.name, kind.scored, str(shapes)], sort_keys=True)


def _plan_line(group: Group, programs: Programs, n_parts: int, seconds: float) -> str:
    layout, n = programs.layout, len(group.stack.members)
    where = f"{len(layout.devices)} {layout.devices[0].platform} device"
    where += "s" * (len(layout.devices) > 1)
    split = "" if layout.mode == "none" else f", {layout.mode} spread"
    parts = f" in {n_parts} parts" if n_parts > 1 else ""
    return (
        f"group {group.index}: {n} members{parts}, {layout.width} side by side on {where}{split}; "
        f"compiled in {seconds:.1f} s, {programs.bytes / 1e6:,.0f} MB"
    )
