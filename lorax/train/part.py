"""Trains one part of a group, the members of one program, from the newest checkpoint on.

Where a sweep is tuned by halving (`lorax.halving`), a part ends at a rung, and those of its members
that go on are packed into parts of the next leg. In between, their arrays are in checkpoints alone,
so that memory holds those of one part, however many members there are (`apart`, `together`).
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import hosts, losses, rundir
from lorax.calls import steps_per_call
from lorax.tasks import scores
from lorax.train import checkpoint, evaluation, trajectory
from lorax.train.batches import Evaluated, axes, train_batches
from lorax.train.evaluation import Measured
from lorax.train.members import filled
from lorax.train.prepare import Group
from lorax.train.programs import Programs
from lorax.train.stacks import Stack
from lorax.train.step import MemberState


class Part(NamedTuple):
    """Everything that stays the same while a part is trained.

    name: of its files in the run directory (`rundir.part`). stack: M members of the group, their
    state as shapes. params, splits ({"eval": rows, "test": rows, "also:NAME": rows}), constants,
    hyper: on the devices. base_test(): `evaluation.of_base` of the test rows. base_states: as for
    `step.compared_rows`, if the group compares its members with the base. compared: of each member,
    what its updates are compared with (`compared.of_members`). until: the step at which it ends.
    standing: where each member stood after the last leg, [] at step 0. say: prints a line.
    """

    workdir: Path
    name: str
    group: Group
    stack: Stack
    programs: Programs
    params: dict
    splits: dict[str, Evaluated]
    constants: dict
    hyper: tuple
    base_test: Callable[[], tuple[Measured, losses.Rows]]
    base_states: jax.Array | None
    compared: list[dict]
    until: int
    standing: "list[Standing]"
    say: Callable[[str], None]


class Kept(NamedTuple):
    """What is exported of each member: its trainable parameters, leaves (M, ...) on the devices,
    the steps (M,) that they are of, and the evaluation at that step."""

    trainable: dict
    steps: np.ndarray
    measured: Measured


class Position(NamedTuple):
    """Progress of a part.

    state: of its members, on the devices. offset: bytes of metrics.jsonl so far. seconds: (M,)
    float64, each member's share of the wall clock; in_steps: the same of the seconds spent in
    training steps. measured: the last evaluation. tests: the evaluations of the test rows so far,
    at step 0 and after the last step; () without test rows. kept: with `eval.keep` "best" what was
    best so far, else None.
    """

    step: int
    state: MemberState
    offset: int
    seconds: np.ndarray
    in_steps: np.ndarray
    measured: Measured
    tests: tuple[Measured, ...] = ()
    kept: Kept | None = None


class Standing(NamedTuple):
    """Where a member stands at a rung, as numbers without the axis M. Its arrays are at `index` of
    the checkpoint of `step` in `folder`. The other fields are those of a `Position`; kept_step and
    kept: with `eval.keep` "best", else None."""

    folder: Path
    index: int
    step: int
    diverged_at: int
    seconds: float
    in_steps: float
    measured: Measured
    tests: tuple[Measured, ...]
    kept_step: int | None
    kept: Measured | None


def train(
    part: Part, state: list[MemberState], offset: int, progress: Callable[[int], None]
) -> Position:
    """Train to the part's last step. state: of its members at step 0, on the devices, the only item
    of a list; it is taken out, so that nothing else holds what training replaces. offset: bytes of
    metrics.jsonl written so far. progress: called with the steps of all members in this part so
    far."""
    c, m = part.stack.config, len(part.stack.members)
    like = stored(part, state[0])
    at = resume(part, like) or begin(part, state, like, offset)
    state.clear()
    k, diverged = steps_per_call(c.eval.every, c.train.offload), diverged_at(part, at)
    first = part.standing[0].step if part.standing else 0
    while at.step < part.until:
        at = advance(part, at, k)
        before, diverged = diverged, diverged_at(part, at)
        for i in np.flatnonzero((diverged >= 0) & (before < 0)):
            name = part.stack.members[i].name
            part.say(f"member {name} diverged at step {diverged[i]}; it stays there")
        progress((at.step - first) * m)
    return at


def stored(part: Part, state: MemberState):
    """The shapes and shardings of the arrays of a checkpoint. state: on the devices."""
    like = saved_state(state, state.trainable if keeps_best(part) else None)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


def resume(part: Part, like) -> Position | None:
    """The position of the newest intact checkpoint, None without any. like: from `stored`."""
    folder, steps = rundir.checkpoints(part.workdir, part.name), part.stack.config.train.steps
    restored = checkpoint.restore(folder, like, part.say)
    if restored is None:
        return None
    step, saved, meta = restored
    # metrics.jsonl is shorter than at the checkpoint: an earlier group was rolled back.
    if hosts.agreed(meta["offset"] > rundir.metrics_size(part.workdir)):
        if hosts.first():
            shutil.rmtree(folder)
        return None
    if step < part.until:  # a finished part may be followed by lines of later groups
        rundir.cut_metrics(part.workdir, meta["offset"])
    if step:
        part.say(f"group {part.group.index}: continues at step {step} of {steps}")
    saved, kept = _refilled(part, saved), None
    saved = hosts.place(saved, jax.tree.map(lambda x: x.sharding, like))
    if keeps_best(part):
        best = meta["kept"]
        kept = Kept(saved["kept"], np.array(best["steps"]), read_measured(best))
    return Position(
        step,
        saved["state"] if keeps_best(part) else saved,
        meta["offset"],
        *(shares(meta[name], len(part.stack.members)) for name in ("seconds", "in_steps")),
        read_measured(meta),
        tuple(map(read_measured, meta.get("tests", ()))),
        kept,
    )


def _refilled(part: Part, saved):
    """What a checkpoint has, for so many members as the program: other devices may have written
    it, and filled up the members to another number."""
    members, size = len(part.stack.members), part.programs.layout.size
    if len(jax.tree.leaves(saved)[0]) == size:
        return saved
    return filled(jax.tree.map(lambda x: x[:members], hosts.whole(saved)), size)


def begin(part: Part, state: list[MemberState], like, offset: int) -> Position:
    """Step 0: evaluate, and write the first metrics and checkpoint. In a later leg: only the
    checkpoint, as the last leg has measured its members where they stand. state: as for `train`.
    like: from `stored`."""
    if part.standing:
        state.clear()
        at = together(part, like, offset)
        rundir.cut_metrics(part.workdir, offset)
        save(part, at)
        return at
    state = state.pop()
    nothing, learned = np.zeros(len(part.stack.members)), part.programs.learned(state)
    measured, lines = validate(part, learned, 0)
    at = Position(0, state, offset, nothing, nothing, measured)
    if keeps_best(part):
        copied = jax.tree.map(jnp.copy, learned)  # training reuses the state's memory
        at = at._replace(kept=Kept(copied, np.zeros(len(measured.losses), int), measured))
    if "test" in part.splits:
        tested, rows = evaluation.of_each(part.base_test(), len(part.stack.members))
        evaluation.write_start(part.workdir, part.stack.members, rows)
        tested = per_parameter(part, tested)
        at = at._replace(tests=(tested,))
        lines += metrics(part, 0, "test", loss=tested.losses, **tested.scores)
    if part.stack.config.analysis.trajectory:
        write_spectra(part, at)
    rundir.cut_metrics(part.workdir, offset)
    at = at._replace(offset=rundir.append_metrics(part.workdir, lines))
    save(part, at)
    return at


def advance(part: Part, at: Position, k: int) -> Position:
    """One call of the program, k steps; at a checkpoint, evaluate and save as well."""
    c, m, began = part.stack.config, len(part.stack.members), time.monotonic()
    needed = part.programs.needed((m, *axes(c.train, k)))
    rows = train_batches(part.stack, part.group.task, at.step, k, needed)
    batches = part.programs.place_batches(rows)
    state, logs = part.programs.train(part.params, part.constants, part.hyper, at.state, batches)
    real = min(k, part.until - at.step)  # steps past the last one change nothing
    logs = {name: x[:m, :real] for name, x in hosts.whole(logs).items()}
    in_steps = at.in_steps + (time.monotonic() - began) / m
    at = at._replace(step=at.step + real, state=state, in_steps=in_steps)
    norms = logs["grad_norm"][:, -1]
    lines = metrics(part, at.step, "train", loss=logs["loss"].mean(1), grad_norm=norms)
    at_checkpoint = at.step % c.eval.every == 0 or at.step == part.until
    if at_checkpoint:
        measured, more = validate(part, part.programs.learned(state), at.step)
        at, lines = at._replace(measured=measured), lines + more
        if at.step % c.eval.every == 0 or at.step == c.train.steps:  # not a rung alone
            at = keep_best(part, at)
        if c.analysis.trajectory:
            write_spectra(part, at)
    if at.step == c.train.steps and "test" in part.splits:
        at, more = test(part, at)
        lines += more
    seconds = at.seconds + (time.monotonic() - began) / m
    at = at._replace(seconds=seconds, offset=rundir.append_metrics(part.workdir, lines))
    if at_checkpoint:
        save(part, at)
    return at


def validate(part: Part, trainable, step: int) -> tuple[Measured, list[dict]]:
    """(The members' evaluation on the validation rows, rows of metrics.jsonl: of this evaluation,
    with the KL from the base if the group is compared with it, and of every further task)."""
    group, m, kl = part.group, len(part.stack.members), {}
    arguments = part.params, part.constants, trainable
    if group.compares:
        on = part.splits["eval"], part.base_states
        measured, kl["kl"] = evaluation.compare(part.programs, arguments, m, group.task, *on)
        measured = per_parameter(part, measured)
    else:
        measured, _ = evaluate(part, trainable, "eval")
    lines = metrics(part, step, "eval", loss=measured.losses, **measured.scores, **kl)
    for name, task in group.also.items():
        split = rundir.ALSO + name
        program = part.programs.also_rows
        also = evaluation.evaluate_rows(program, arguments, m, task, part.splits[split])
        lines += metrics(part, step, split, loss=also.losses, **also.scores)
    return measured, lines


def evaluate(part: Part, trainable, split: str) -> tuple[Measured, losses.Rows | None]:
    """The members' evaluation with these trainable parameters; see `evaluation.evaluate`."""
    arguments, m = (part.params, part.constants, trainable), len(part.stack.members)
    measured, rows = evaluation.evaluate(
        part.programs, arguments, m, part.group.task, split, part.splits[split]
    )
    return per_parameter(part, measured), rows


def per_parameter(part: Part, measured: Measured) -> Measured:
    """The evaluation with the scores that the task also reports per trainable parameter."""
    names, base = part.group.task.per_parameter, part.group.base
    if not names:
        return measured
    counts = [method.count(base.params, base.sites) for method in part.stack.methods]
    counts = np.array(counts, np.float32)
    more = {scores.per_parameter(name): measured.scores[name] / counts for name in names}
    return measured._replace(scores=measured.scores | more)


def test(part: Part, at: Position) -> tuple[Position, list[dict]]:
    """After the last step: evaluate what is exported on the test rows, and write what became of
    each; (the position with that evaluation, rows of metrics.jsonl)."""
    tested, rows = evaluate(part, exported(part, at).trainable, "test")
    evaluation.write_end(part.workdir, part.stack.members, rows, diverged_at(part, at) >= 0)
    lines = metrics(part, at.step, "test", loss=tested.losses, **tested.scores)
    return at._replace(tests=(*at.tests, tested)), lines


def keeps_best(part: Part) -> bool:
    """Whether the step of the lowest validation loss is exported, not the last."""
    return part.stack.config.eval.keep == "best"


def keep_best(part: Part, at: Position) -> Position:
    """The position after an evaluation; what was evaluated is kept of the members that have never
    had a loss as low."""
    if at.kept is None:
        return at
    new, old = at.measured, at.kept.measured
    better = (new.losses < old.losses) | np.isnan(old.losses) & np.isfinite(new.losses)
    pick = lambda new, old: np.where(better, new, old)
    every = np.arange(part.programs.layout.size) < 0
    every[: len(better)] = better  # a program may have more members, copies of the last one
    kept = Kept(
        _picked(every, part.programs.learned(at.state), at.kept.trainable),
        pick(at.step, at.kept.steps),
        jax.tree.map(pick, new, old),
    )
    return at._replace(kept=kept)


@jax.jit
def _picked(which, new, old):
    """Of trees with leaves (M, ...), the new leaves of the members `which` (M,) bool."""
    wide = lambda x: which.reshape(-1, *(1,) * (x.ndim - 1))
    return jax.tree.map(lambda x, y: jnp.where(wide(x), x, y), new, old)


def exported(part: Part, at: Position) -> Kept:
    """What is exported: what was kept, or the members as they are."""
    steps = np.full(len(part.stack.members), at.step)
    return at.kept or Kept(part.programs.learned(at.state), steps, at.measured)


def write_spectra(part: Part, at: Position) -> None:
    """Write the current spectra of all updates to a file, if the method has any."""
    members, learned = part.stack.members, part.programs.learned(at.state)
    spectra = part.programs.spectra(part.params, part.constants, learned, part.compared)
    if spectra:
        file = rundir.spectra(part.workdir, part.name, at.step)
        trajectory.write(file, spectra, members, part.group.base)


def diverged_at(part: Part, at: Position) -> np.ndarray:
    """(M,) int32: the step at which each member diverged, -1 for the others."""
    return hosts.whole(at.state.diverged_at)[: len(part.stack.members)]


def apart(part: Part, at: Position) -> dict[int, Standing]:
    """{member: where it stands}, once the position is saved."""
    folder, diverged = rundir.checkpoints(part.workdir, part.name), diverged_at(part, at)
    kept = (at.kept.steps, at.kept.measured) if at.kept else (None, None)
    numbers = at.seconds, at.in_steps, at.measured, at.tests, *kept
    own = lambda i: jax.tree.map(lambda x: x[i], numbers)
    return {
        member.index: Standing(folder, i, at.step, int(diverged[i]), *own(i))
        for i, member in enumerate(part.stack.members)
    }


def together(part: Part, like, offset: int) -> Position:
    """The position of a part whose members stand at the same step; inverse of `apart`. like: from
    `stored`. Raises ValueError if a checkpoint that has their arrays is gone or damaged."""
    standing, size = part.standing, part.programs.layout.size
    empty = lambda x: np.empty((len(standing), *x.shape[1:]), x.dtype)
    arrays, step = jax.tree.map(empty, like), standing[0].step
    for folder in dict.fromkeys(one.folder for one in standing):
        restored = checkpoint.restore(folder, like, part.say)
        if restored is None or restored[0] != step:
            raise ValueError(
                f"{folder}: the checkpoint of step {step} is gone or damaged; the same command "
                "trains its members again"
            )
        saved = hosts.whole(restored[1])
        for i, one in enumerate(standing):
            if one.folder == folder:
                for room, x in zip(*map(jax.tree.leaves, (arrays, saved)), strict=True):
                    room[i] = x[one.index]
    placed = hosts.place(filled(arrays, size), jax.tree.map(lambda x: x.sharding, like))
    numbers = jax.tree.map(lambda *x: np.stack(x), *(one[4:] for one in standing))
    seconds, in_steps, measured, tests, kept_step, kept = numbers
    if not keeps_best(part):
        return Position(step, placed, offset, seconds, in_steps, measured, tests)
    kept = Kept(placed["kept"], kept_step, kept)
    return Position(step, placed["state"], offset, seconds, in_steps, measured, tests, kept)


def save(part: Part, at: Position) -> None:
    """Write a checkpoint of everything that `resume` needs."""
    meta = {"offset": at.offset}
    meta |= {"seconds": at.seconds.tolist(), "in_steps": at.in_steps.tolist()}
    meta |= written(at.measured)
    if at.tests:
        meta["tests"] = [written(measured) for measured in at.tests]
    if at.kept:
        meta["kept"] = written(at.kept.measured) | {"steps": at.kept.steps.tolist()}
    state = saved_state(at.state, at.kept.trainable if at.kept else None)
    checkpoint.save(rundir.checkpoints(part.workdir, part.name), at.step, state, meta)


def shares(seconds: list[float] | float, m: int) -> np.ndarray:
    """(m,) seconds of each member, from a checkpoint; lorax 0.1.0 stored their sum."""
    return np.array(seconds) if isinstance(seconds, list) else np.full(m, seconds / m)


def saved_state(state: MemberState, kept: dict | None):
    """The arrays of a checkpoint: the state of the members, and what is kept of them."""
    return state if kept is None else {"state": state, "kept": kept}


def written(measured: Measured) -> dict:
    """An evaluation as JSON; `read_measured` reads it."""
    scores = {name: [decimal(x) for x in values] for name, values in measured.scores.items()}
    return {"eval_loss": [decimal(x) for x in measured.losses], "scores": scores}


def read_measured(meta: dict) -> Measured:
    """An evaluation from JSON."""
    array = lambda values: np.array(values, np.float32)
    scores = {name: array(values) for name, values in meta["scores"].items()}
    return Measured(array(meta["eval_loss"]), scores)


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
