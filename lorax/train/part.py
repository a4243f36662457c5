"""Trains one part of a group, the members of one program, from the newest checkpoint on.

Where a sweep is tuned by halving (`lorax.halving`), a part ends at a rung, and those of its members
that go on are packed into parts of the next leg (`apart`, `together`).
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from lorax import rundir, tree
from lorax.calls import steps_per_call
from lorax.tasks import scores
from lorax.train import checkpoint, trajectory
from lorax.train.batches import train_batches
from lorax.train.prepare import Group
from lorax.train.programs import Programs
from lorax.train.stacks import Stack
from lorax.train.step import MemberState


class Part(NamedTuple):
    """Everything that stays the same while a part is trained.

    name: of its files in the run directory (`rundir.part`). stack: M members of the group, on the
    host. params, eval_rows, constants, hyper: on the devices. until: the step at which it ends.
    start: where its members stood after the last leg, None at step 0. say: prints a line.
    """

    workdir: Path
    name: str
    group: Group
    stack: Stack
    programs: Programs
    params: dict
    eval_rows: dict
    constants: dict
    hyper: tuple
    until: int
    start: "Position | None"
    say: Callable[[str], None]


class Position(NamedTuple):
    """Progress of a part.

    state: of its members, on the devices. offset: bytes of metrics.jsonl so far. seconds: (M,)
    float64, each member's share of the wall clock; in_steps: the same of the seconds spent in
    training steps. losses, scores: (M,) and {metric: (M,)} float32 of the last evaluation.
    """

    step: int
    state: MemberState
    offset: int
    seconds: np.ndarray
    in_steps: np.ndarray
    losses: np.ndarray
    scores: dict[str, np.ndarray]


def train(part: Part, offset: int, progress: Callable[[int], None]) -> Position:
    """Train to the part's last step. offset: bytes of metrics.jsonl written so far. progress:
    called with the steps of all members in this part so far."""
    c, m = part.stack.config, len(part.stack.members)
    state = part.programs.place_state(part.stack.state)
    at = resume(part, state) or begin(part, state, offset)
    del state
    k, diverged = steps_per_call(c.eval.every, c.train.offload), diverged_at(part, at)
    first = part.start.step if part.start else 0
    while at.step < part.until:
        at = advance(part, at, k)
        before, diverged = diverged, diverged_at(part, at)
        for i in np.flatnonzero((diverged >= 0) & (before < 0)):
            name = part.stack.members[i].name
            part.say(f"member {name} diverged at step {diverged[i]}; it stays there")
        progress((at.step - first) * m)
    return at


def resume(part: Part, state: MemberState) -> Position | None:
    """The position of the newest intact checkpoint, None without any."""
    folder, steps = rundir.checkpoints(part.workdir, part.name), part.stack.config.train.steps
    restored = checkpoint.restore(folder, tree.shapes(state), part.say)
    if restored is None:
        return None
    step, saved, meta = restored
    # metrics.jsonl is shorter than at the checkpoint: an earlier group was rolled back.
    if meta["offset"] > rundir.metrics_size(part.workdir):
        shutil.rmtree(folder)
        return None
    if step < part.until:  # a finished part may be followed by lines of later groups
        rundir.cut_metrics(part.workdir, meta["offset"])
    if step:
        part.say(f"group {part.group.index}: continues at step {step} of {steps}")
    return Position(
        step,
        jax.device_put(saved, jax.tree.map(lambda x: x.sharding, state)),
        meta["offset"],
        np.array(meta["seconds"]),
        np.array(meta["in_steps"]),
        np.array(meta["eval_loss"], np.float32),
        {name: np.array(values, np.float32) for name, values in meta["scores"].items()},
    )


def begin(part: Part, state: MemberState, offset: int) -> Position:
    """Step 0: evaluate, and write the first metrics and checkpoint. In a later leg: only the
    checkpoint, as the last leg has measured its members where they stand."""
    if part.start:
        rundir.cut_metrics(part.workdir, offset)
        at = part.start._replace(state=state, offset=offset)
        save(part, at)
        return at
    nothing = np.zeros(len(part.stack.members))
    at = Position(0, state, offset, nothing, nothing, *evaluate(part, state))
    if part.stack.config.analysis.trajectory:
        write_spectra(part, at)
    rundir.cut_metrics(part.workdir, offset)
    lines = metrics(part, 0, "eval", loss=at.losses, **at.scores)
    at = at._replace(offset=rundir.append_metrics(part.workdir, lines))
    save(part, at)
    return at


def advance(part: Part, at: Position, k: int) -> Position:
    """One call of the program, k steps; at a checkpoint, evaluate and save as well."""
    c, m, began = part.stack.config, len(part.stack.members), time.monotonic()
    rows = train_batches(part.stack, part.group.task, at.step, k)
    batches = part.programs.place_batches(rows)
    state, logs = part.programs.train(part.params, part.constants, part.hyper, at.state, batches)
    real = min(k, part.until - at.step)  # steps past the last one change nothing
    logs = {name: np.asarray(x)[:m, :real] for name, x in logs.items()}
    in_steps = at.in_steps + (time.monotonic() - began) / m
    at = at._replace(step=at.step + real, state=state, in_steps=in_steps)
    norms = logs["grad_norm"][:, -1]
    lines = metrics(part, at.step, "train", loss=logs["loss"].mean(1), grad_norm=norms)
    at_checkpoint = at.step % c.eval.every == 0 or at.step == part.until
    if at_checkpoint:
        losses, scored = evaluate(part, state)
        at = at._replace(losses=losses, scores=scored)
        lines += metrics(part, at.step, "eval", loss=losses, **scored)
        if c.analysis.trajectory:
            write_spectra(part, at)
    seconds = at.seconds + (time.monotonic() - began) / m
    at = at._replace(seconds=seconds, offset=rundir.append_metrics(part.workdir, lines))
    if at_checkpoint:
        save(part, at)
    return at


def evaluate(part: Part, state: MemberState) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Current losses (M,) and {metric: (M,)} of the members."""
    arguments = part.params, part.constants, state.trainable, part.eval_rows
    losses, outputs = part.programs.evaluate(*arguments)
    m = len(part.stack.members)
    return np.asarray(losses)[:m], scores.of_members(part.group.task, outputs, m)


def write_spectra(part: Part, at: Position) -> None:
    """Write the current spectra of all updates to a file, if the method has any."""
    members = part.stack.members
    arguments = part.params, part.constants, at.state.trainable, len(members)
    spectra = part.programs.spectra(*arguments)
    if spectra:
        file = rundir.spectra(part.workdir, part.name, at.step)
        trajectory.write(file, spectra, members, part.group.base)


def diverged_at(part: Part, at: Position) -> np.ndarray:
    """(M,) int32: the step at which each member diverged, -1 for the others."""
    return np.asarray(at.state.diverged_at)[: len(part.stack.members)]


def apart(part: Part, at: Position) -> dict[int, Position]:
    """{member: its position, without the axis M, on the host}."""
    host = jax.device_get(at._replace(step=None, offset=None))
    of = lambda i: jax.tree.map(lambda x: x[i], host)._replace(step=at.step, offset=at.offset)
    return {member.index: of(i) for i, member in enumerate(part.stack.members)}


def together(positions: list[Position]) -> Position:
    """The position of a part whose members stand at the same step; inverse of `apart`."""
    of_members = [at._replace(step=None, offset=None) for at in positions]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *of_members)
    return stacked._replace(step=positions[0].step, offset=positions[0].offset)


def save(part: Part, at: Position) -> None:
    """Write a checkpoint of everything that `resume` needs."""
    meta = {
        "offset": at.offset,
        "seconds": at.seconds.tolist(),
        "in_steps": at.in_steps.tolist(),
        "eval_loss": [decimal(x) for x in at.losses],
        "scores": {name: [decimal(x) for x in values] for name, values in at.scores.items()},
    }
    checkpoint.save(rundir.checkpoints(part.workdir, part.name), at.step, at.state, meta)


def metrics(part: Part, step: int, split: str, **values) -> list[dict]:
    """Rows of metrics.jsonl, one for each member. values: {name: (M,)}."""
    return [
        {"member": member.index, "step": step, "split": split}
        | {name: decimal(value[i]) for name, value in values.items()}
        for i, member in enumerate(part.stack.members)
    ]


def decimal(x) -> float | None:
    """The shortest decimal that rounds to a float32, or None if it is not finite."""
    return float(str(np.float32(x))) if np.isfinite(x) else None
