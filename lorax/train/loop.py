"""Train groups of members: a chunk after the other, with checkpoints, metrics and exports."""

import csv
import functools
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from lorax import adapters, methods, rundir, tasks, tree
from lorax.config import Member, group_key
from lorax.errors import reason
from lorax.files import write_bytes
from lorax.tasks import scores
from lorax.train import activations, checkpoint, fitting, layouts, stacks, trajectory
from lorax.train.batches import batch_shapes, eval_batches, steps_per_call, train_batches
from lorax.train.prepare import Group
from lorax.train.programs import Programs
from lorax.train.texts import write_texts


class Terminal(NamedTuple):
    """How the loop speaks: say(line), progress(steps done, in all), finished(row of a member)."""

    say: Callable[[str], None]
    progress: Callable[[float, float], None]
    finished: Callable[[dict], None]


def write_rankings(workdir: Path, groups: list[Group]) -> None:
    """analysis/sensitivity.csv: what evidence said of every matrix, where it chose any."""
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

    offset: bytes of metrics.jsonl that groups of earlier calls have filled. before, after: steps of
    members that other calls have trained or may train, to tell the progress of the whole.

    A row has "status" ("finished" or "diverged"), "diverged_at" (step or None), "eval_loss" (nats a
    completion token, or a classifier's, or the squared error of values; None after divergence),
    "seconds", "step_ms" (of training alone, both a member's share), "scores" ({metric: value} of
    a classifier, or of the texts that were asked for) and, where `analysis.cka` asks for it and it
    has not diverged, "cka" (of each layer); "failed" ({key of the config: why}) where the texts or
    the CKA of a trained member failed. Killed at any moment and called again, the metrics,
    adapters and trajectories come out bit for bit as without the interruption.
    """
    total = before + member_steps([m for g in groups for m in g.stack.members]) + after
    done, rows, key, programs = before, {}, None, None
    # What has no room is found before anything is trained.
    first = max(groups, key=_largest)
    began = time.monotonic()
    fitted = {_program_key(first): (_fit(first), time.monotonic() - began)}
    for group in groups:
        c = group.config
        k = steps_per_call(c.eval.every, c.train.offload)
        eval_rows = eval_batches(group.task, c.eval.batch_size)
        began, ahead = time.monotonic(), 0.0
        last, key = key, _program_key(group)
        if key != last:  # groups that differ in their data alone run in turn, and share one
            programs, ahead = fitted.pop(key, None) or (_fit(group), 0.0)
        for width in tasks.widths(group.task):
            programs.narrow(width)
        chunks = stacks.chunks(group.stack, programs.layout.size)
        terminal.say(_plan_line(group, programs, chunks, ahead + time.monotonic() - began))
        if c.analysis.trajectory:
            one = jax.tree.map(lambda x: x[0], (group.stack.constants, group.stack.state.trainable))
            why = trajectory.left_out(group.stack.methods[0], group.base, *one)
            if why:
                terminal.say(f"group {group.index}: analysis.trajectory: {why}")
        params = programs.place_base(group.base.params)
        eval_rows = jax.device_put(eval_rows)
        for number, chunk in enumerate(chunks):
            part = rundir.part(group.index, number, len(chunks))
            offset, finals = _train_chunk(
                workdir, part, chunk, group, programs, params, eval_rows, k, offset,
                lambda steps, before=done: terminal.progress(before + steps, total), terminal,
            )  # fmt: skip
            rows |= finals
            done += len(chunk.members) * c.train.steps
    return rows, offset


def member_steps(members: list[Member]) -> int:
    """Steps of all members together."""
    return sum(member.config.train.steps for member in members)


def _train_chunk(
    workdir, part, chunk, group, programs, params, eval_rows, k, offset, progress, terminal
):
    """One call of the compiled programs after another; (offset in metrics.jsonl, {member: row})."""
    c = chunk.config
    where, m = rundir.checkpoints(workdir, part), len(chunk.members)
    constants, hyper = programs.place(chunk.constants), programs.place(chunk.hyper)
    state = programs.place_state(chunk.state)

    def evaluate():
        """Loss (m,) and {metric: (m,)} of every member as it is now."""
        losses, outputs = programs.evaluate(params, constants, state.trainable, eval_rows)
        return np.asarray(losses)[:m], scores.of_members(group.task, outputs, m)

    def look():
        """The spectra of all updates as they are now: trajectory/<chunk>/<step>.safetensors."""
        found = programs.spectra(params, constants, state.trainable, m)
        if found:
            file = rundir.spectra(workdir, part, step)
            trajectory.write(file, found, chunk.members, group.base)

    # -------------------------------------------------------------------------- resume, or step 0
    found = checkpoint.restore(where, tree.shapes(state), terminal.say)
    # Fewer lines than the checkpoint has seen: an earlier group had to go back.
    if found and found[2]["offset"] > rundir.metrics_size(workdir):
        shutil.rmtree(where)
        found = None
    if found:
        step, saved, meta = found
        state = jax.device_put(saved, jax.tree.map(lambda x: x.sharding, state))
        offset, seconds, in_steps = meta["offset"], meta["seconds"], meta["in_steps"]
        losses = np.array(meta["eval_loss"], np.float32)
        scored = {name: np.array(values, np.float32) for name, values in meta["scores"].items()}
        if step < c.train.steps:  # else what comes after may be later groups'
            rundir.cut_metrics(workdir, offset)
        if step:
            terminal.say(f"group {group.index}: continues at step {step} of {c.train.steps}")
    else:
        step, seconds, in_steps = 0, 0.0, 0.0
        losses, scored = evaluate()
        if c.analysis.trajectory:
            look()
        rundir.cut_metrics(workdir, offset)
        offset = rundir.append_metrics(workdir, _lines(chunk, 0, "eval", loss=losses, **scored))
        checkpoint.save(where, 0, state, _meta(offset, seconds, in_steps, losses, scored))

    # -------------------------------------------------------------------------------------- train
    diverged = np.asarray(state.diverged_at)[:m]
    while step < c.train.steps:
        began = time.monotonic()
        batches = programs.place_batches(train_batches(chunk, group.task, step, k))
        state, logs = programs.train(params, constants, hyper, state, batches)
        real = min(k, c.train.steps - step)  # steps past the last one change nothing
        logs = {name: np.asarray(x)[:m, :real] for name, x in logs.items()}
        in_steps += time.monotonic() - began
        step += real
        lines = _lines(
            chunk, step, "train", loss=logs["loss"].mean(1), grad_norm=logs["grad_norm"][:, -1]
        )
        at_checkpoint = step % c.eval.every == 0 or step == c.train.steps
        if at_checkpoint:
            losses, scored = evaluate()
            lines += _lines(chunk, step, "eval", loss=losses, **scored)
            if c.analysis.trajectory:
                look()
        now = np.asarray(state.diverged_at)[:m]
        for i in np.flatnonzero((now >= 0) & (diverged < 0)):
            terminal.say(
                f"member {chunk.members[i].name} diverged at step {now[i]}; it stays there"
            )
        diverged = now
        seconds += time.monotonic() - began
        offset = rundir.append_metrics(workdir, lines)
        if at_checkpoint:
            checkpoint.save(where, step, state, _meta(offset, seconds, in_steps, losses, scored))
        progress(step * m)

    # ------------------------------------------- export all of them before anything else can fail
    rows, said = {}, set()
    trainable = jax.tree.map(lambda x: np.asarray(x)[:m], state.trainable)
    take = lambda i: jax.tree.map(lambda x: x[i], (trainable, chunk.constants))
    for i, (member, method) in enumerate(zip(chunk.members, chunk.methods, strict=True)):
        learned = adapters.from_training(group.base, method, methods.State(*take(i)))
        why = adapters.save(rundir.adapter(workdir, member.index), learned, member.config.base)
        if why and why not in said:
            terminal.say(f"member {member.name}: kept in lorax's own format alone: {why}")
            said.add(why)
        at = int(diverged[i])
        rows[member.index] = {
            "status": "finished" if at < 0 else "diverged",
            "diverged_at": None if at < 0 else at,
            "eval_loss": _number(losses[i]) if at < 0 else None,
            "seconds": round(seconds / m, 3),
            "step_ms": round(1e3 * in_steps / (m * c.train.steps), 3),
            "scores": {name: _number(values[i]) for name, values in scored.items() if at < 0},
        }

    # ------------------------------------ what is measured of them may fail, and the rest goes on
    learnt = [i for i in range(m) if diverged[i] < 0]

    def measured(what, members, work):
        """work(), or None where it fails, which is said and stands in the members' rows."""
        try:
            return work()
        except Exception as error:
            terminal.say(f"{what} of member {members[0].name}: {rundir.keep_error(workdir, error)}")
            for member in members:
                rows[member.index].setdefault("failed", {})[what] = reason(error)

    if c.analysis.cka and learnt:
        look_alike = lambda: activations.similarity(
            group.base, chunk.methods[0], trainable, chunk.constants, group.task,
            c.analysis.cka, c.eval.batch_size,
        )  # fmt: skip
        alike = measured("analysis.cka", [chunk.members[i] for i in learnt], look_alike)
        for i in learnt if alike is not None else ():
            rows[chunk.members[i].index]["cka"] = [_number(value) for value in alike[i]]
    for i, (member, method) in enumerate(zip(chunk.members, chunk.methods, strict=True)):
        if c.eval.generate and i in learnt:
            bound = method.bind(*take(i), group.base.params, sites=group.base.sites)
            given = workdir, member, group.base, group.task, bound, terminal.say
            write = functools.partial(write_texts, *given)
            rows[member.index]["scores"] |= measured("eval.generate", [member], write) or {}
        else:  # those of an evaluation that is no longer asked for
            rundir.texts(workdir, member.index).unlink(missing_ok=True)
        terminal.finished({"member": member.index, "name": member.name} | rows[member.index])
    return offset, rows


def _shapes(group: Group):
    """Shapes of the batches of one call to train, and of the evaluation's."""
    c = group.config
    k = steps_per_call(c.eval.every, c.train.offload)
    batches = batch_shapes(c.train, group.task, k)
    return batches, tree.shapes(eval_batches(group.task, c.eval.batch_size))


def _fit(group: Group) -> Programs:
    train = group.config.train
    return fitting.fit(group.stack, group.base, train, *_shapes(group), None, group.task.kind)


def _largest(group: Group) -> float:
    """About how many bytes one member needs: what is there, and what its layers put out."""
    c, params = group.config, jax.tree.leaves(group.base.params)
    put_out = sum(x.size / x.shape[-2] for x in params if x.ndim > 1)
    rows = c.train.batch_size // c.train.accumulate * layouts.row_tokens(c.train, group.base)
    state = tree.nbytes(group.stack.state) / len(group.stack.members)
    return tree.nbytes(group.base.params) + state + 4 * rows * put_out


def _program_key(group: Group) -> str:
    """All that `fitting.fit` compiles for; what the task's rows hold is no part of it."""
    settings = json.loads(group_key(group.stack.members[0]))
    settings = {key: value for key, value in settings.items() if not key.startswith("task.")}
    dropout = any(member.config.method.dropout > 0 for member in group.stack.members)
    shapes = tree.shapes(group.stack[2:]), *_shapes(group)
    kind = group.task.kind
    return json.dumps([settings, dropout, kind.name, kind.scored, str(shapes)], sort_keys=True)


def _plan_line(group, programs, chunks, seconds):
    layout, n = programs.layout, len(group.stack.members)
    where = f"{len(layout.devices)} {layout.devices[0].platform} device"
    where += "s" * (len(layout.devices) > 1)
    split = "" if layout.mode == "none" else f", {layout.mode} spread"
    parts = f" in {len(chunks)} parts" if len(chunks) > 1 else ""
    return (
        f"group {group.index}: {n} members{parts}, {layout.width} side by side on {where}{split}; "
        f"compiled in {seconds:.1f} s, {programs.bytes / 1e6:,.0f} MB"
    )


def _lines(chunk, step, split, **values) -> list[dict]:
    return [
        {"member": member.index, "step": step, "split": split}
        | {name: _number(v[i]) for name, v in values.items()}
        for i, member in enumerate(chunk.members)
    ]


def _number(x) -> float | None:
    """A float32 as the shortest decimal that means it, or None where it is not finite."""
    return float(str(np.float32(x))) if np.isfinite(x) else None


def _meta(offset, seconds, in_steps, losses, scores) -> dict:
    scores = {name: [_number(x) for x in values] for name, values in scores.items()}
    losses = [_number(x) for x in losses]
    times = {"seconds": seconds, "in_steps": in_steps}
    return {"offset": offset, **times, "eval_loss": losses, "scores": scores}
