"""From members to a run directory: train every group, checkpoint, log, export the adapters."""

import itertools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from lorax import tasks, tree
from lorax.config import Member, group_key
from lorax.interop import peft
from lorax.models import Base, load
from lorax.models.load import layer_names
from lorax.train import checkpoint, sweep


class Terminal(NamedTuple):
    """How the loop speaks: say(line), progress(steps done, in all), finished(row of a member)."""

    say: Callable[[str], None]
    progress: Callable[[float, float], None]
    finished: Callable[[dict], None]


class Group(NamedTuple):
    """Members that share a compiled program, with what they are trained on."""

    index: int
    base: Base
    task: tasks.Task
    stack: sweep.Stack


def prepare(members: list[Member], say: Callable[[str], None]) -> list[Group]:
    """Load bases and tasks, check every member against its base, and start all members.

    Raises ValueError or FileNotFoundError for what a user can mend, before anything is trained.
    """
    bases: dict[str, Base] = {}
    task_cache: dict[str, tasks.Task] = {}
    groups = []
    ordered = sorted(members, key=group_key)
    parts = [list(part) for _, part in itertools.groupby(ordered, key=group_key)]
    parts.sort(key=lambda part: part[0].index)
    for index, part in enumerate(parts):
        c = part[0].config
        key = json.dumps([c.base, c.dtype, c.train.remat])
        if key not in bases:
            bases[key] = base = load(c.base, dtype=c.dtype, remat=c.train.remat)
            say(
                f"base {c.base}: {base.family}, {tree.count(base.params):,} parameters, "
                f"{tree.nbytes(base.params) / 1e6:.1f} MB"
            )
        base = bases[key]
        built = sweep.build_methods(part, base)
        asked = [member.config.task.n_train for member in part]
        settings = c.task.to_dict() | {"n_train": None if None in asked else max(asked)}
        key = json.dumps([settings, c.base, c.train.seq_len, c.eval.examples], sort_keys=True)
        if key not in task_cache:
            if base.tokenizer is None:
                raise ValueError(
                    f"base: {c.base} has no tokenizer.json, which task {c.task.name} needs"
                )
            most = getattr(base.config, "n_positions", math.inf)
            if c.train.seq_len > most:
                raise ValueError(
                    f"train.seq_len: {c.train.seq_len} given, {c.base} has {most} positions"
                )
            task_cache[key] = tasks.build(
                settings, base.tokenizer, c.train.seq_len, c.eval.examples
            )
            say(f"task {task_cache[key].note}")
        groups.append(Group(index, base, task_cache[key], sweep.stack(part, built, base)))
    return groups


def describe(group: Group) -> list[dict]:
    """The lines of members.jsonl for a group's members."""
    rows = []
    for member, method in zip(group.stack.members, group.stack.methods, strict=True):
        c, hp = member.config, method.hp
        rows.append(
            {
                "member": member.index,
                "group": group.index,
                "name": member.name,
                "method": method.name,
            }
            | hp
            | {"base": c.base, "lr": c.train.lr, "weight_decay": c.train.weight_decay}
            | {"steps": c.train.steps, "seed": c.seed, "n_train": c.task.n_train}
            | {"trainable_params": method.count(group.base.params, group.base.sites)}
        )
    return rows


def train(workdir: Path, groups: list[Group], terminal: Terminal) -> dict[int, dict]:
    """Train all groups in turn, from the newest checkpoints; {member: its final row}.

    A row has "status" ("finished" or "diverged"), "diverged_at" (step or None), "eval_loss" (nats a
    completion token, None after divergence) and "seconds". Killed at any moment and called again,
    the metrics and adapters come out bit for bit as without the interruption.
    """
    total = sum(len(g.stack.members) * g.stack.members[0].config.train.steps for g in groups)
    done, offset, rows = 0.0, 0, {}
    for group in groups:
        c = group.stack.members[0].config
        k = sweep.steps_per_call(c.eval.every)
        eval_batches = sweep.eval_batches(group.task, c.eval.batch_size)
        first = sweep.train_batches(group.stack, group.task, 0, k)
        batches = tree.shapes({name: x[0] for name, x in first.items()})
        began = time.monotonic()
        programs = sweep.fit(group.stack, group.base, c.train, batches, tree.shapes(eval_batches))
        chunks = sweep.chunks(group.stack, programs.layout.size)
        terminal.say(_plan_line(group, programs, chunks, time.monotonic() - began))
        params = programs.place_base(group.base.params)
        eval_batches = jax.device_put(eval_batches)
        for number, chunk in enumerate(chunks):
            # Another division (less memory free than last time) must not read these.
            parts = f"of{len(chunks)}" if len(chunks) > 1 else ""
            where = workdir / "checkpoints" / f"{group.index}-{number}{parts}"
            offset, finals = _train_chunk(
                workdir, where, chunk, group, programs, params, eval_batches, k, offset,
                lambda steps, before=done: terminal.progress(before + steps, total), terminal,
            )  # fmt: skip
            rows |= finals
            done += len(chunk.members) * c.train.steps
    return rows


def _train_chunk(
    workdir, where, chunk, group, programs, params, eval_batches, k, offset, progress, terminal
):
    """One call of the compiled programs after another; (offset in metrics.jsonl, {member: row})."""
    c = chunk.members[0].config
    metrics, m = workdir / "metrics.jsonl", len(chunk.members)
    place = lambda t: programs.place(t)
    constants, hyper, state = place(chunk.constants), place(chunk.hyper), place(chunk.state)
    evaluate = lambda: np.asarray(
        programs.evaluate(params, constants, state.trainable, eval_batches)
    )[:m]

    # -------------------------------------------------------------------------- resume, or step 0
    found = checkpoint.restore(where, tree.shapes(state), terminal.say)
    if found:
        step, saved, meta = found
        state = jax.device_put(saved, jax.tree.map(lambda x: x.sharding, state))
        offset, seconds, losses = meta["offset"], meta["seconds"], np.asarray(meta["eval_loss"])
        losses = losses.astype(np.float32)
        _cut(metrics, offset)
        if step:
            terminal.say(f"group {group.index}: continues at step {step} of {c.train.steps}")
    else:
        step, seconds, losses = 0, 0.0, evaluate()
        _cut(metrics, offset)
        offset = _append(metrics, _lines(chunk, 0, "eval", loss=losses))
        checkpoint.save(where, 0, state, _meta(offset, seconds, losses))

    # -------------------------------------------------------------------------------------- train
    diverged = np.asarray(state.diverged_at)[:m]
    while step < c.train.steps:
        began = time.monotonic()
        batches = programs.place_batches(sweep.train_batches(chunk, group.task, step, k))
        state, logs = programs.train(params, constants, hyper, state, batches)
        real = min(k, c.train.steps - step)  # steps past the last one change nothing
        logs = {name: np.asarray(x)[:m, :real] for name, x in logs.items()}
        step += real
        lines = _lines(
            chunk, step, "train", loss=logs["loss"].mean(1), grad_norm=logs["grad_norm"][:, -1]
        )
        at_checkpoint = step % c.eval.every == 0 or step == c.train.steps
        if at_checkpoint:
            losses = evaluate()
            lines += _lines(chunk, step, "eval", loss=losses)
        now = np.asarray(state.diverged_at)[:m]
        for i in np.flatnonzero((now >= 0) & (diverged < 0)):
            terminal.say(
                f"member {chunk.members[i].name} diverged at step {now[i]}; it stays there"
            )
        diverged = now
        seconds += time.monotonic() - began
        offset = _append(metrics, lines)
        if at_checkpoint:
            checkpoint.save(where, step, state, _meta(offset, seconds, losses))
        progress(step * m)

    # ------------------------------------------------------------------------------------- export
    rows = {}
    trainable = jax.tree.map(lambda x: np.asarray(x)[:m], state.trainable)
    for i, (member, method) in enumerate(zip(chunk.members, chunk.methods, strict=True)):
        own = jax.tree.map(lambda x, i=i: x[i], trainable)
        factors = adapter_factors(own, method.hp, group.base)
        peft.save(
            workdir / "adapters" / str(member.index),
            factors,
            member.config.base,
            group.base.family,
            method.hp["dropout"],
        )
        at = int(diverged[i])
        rows[member.index] = {
            "status": "finished" if at < 0 else "diverged",
            "diverged_at": None if at < 0 else at,
            "eval_loss": _number(losses[i]) if at < 0 else None,
            "seconds": round(seconds / m, 3),
        }
        terminal.finished({"member": member.index, "name": member.name} | rows[member.index])
    return offset, rows


def adapter_factors(trainable: dict, hp: dict, base: Base) -> dict[str, peft.Factors]:
    """{layer name: Factors (in, r), (r, out), s} of one member, padding cut off.

    A layer that the member does not adapt (both factors zero) is left out.
    """
    flat, rank, found = tree.flatten(trainable), hp["rank"], {}
    shapes = {path: leaf.shape for path, leaf in tree.flatten(base.params).items()}
    for path in {p.rsplit("/", 1)[0]: None for p in flat}:
        a, b = flat[f"{path}/a"], flat[f"{path}/b"]
        for name, index in layer_names(path, base.sites[path], shapes[path]).items():
            if a[index].any() or b[index].any():
                a_own, b_own = a[index][:, :rank], b[index][:rank]
                found[name] = peft.Factors(a_own, b_own, float(hp["scale"]))
    return found


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


def _meta(offset, seconds, losses) -> dict:
    return {"offset": offset, "seconds": seconds, "eval_loss": [_number(x) for x in losses]}


def _append(path: Path, lines: list[dict]) -> int:
    """Append JSON lines, on the disk when this returns; the file's new length in bytes."""
    with open(path, "ab") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _cut(path: Path, length: int) -> None:
    """Shorten a file to `length` bytes: what came after the checkpoint is done again."""
    with open(path, "ab") as file:
        file.truncate(length)
