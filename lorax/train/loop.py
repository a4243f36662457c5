"""Trains groups of members one after another, each in parts (`lorax.train.part`)."""

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import jax

from lorax import halving, hosts, outside, rundir, tasks, tree
from lorax.calls import steps_per_call
from lorax.config import Member, group_key
from lorax.files import write_bytes
from lorax.halving import Race
from lorax.train import (
    compared,
    evaluation,
    fitting,
    layouts,
    part,
    prepare,
    results,
    stacks,
    trajectory,
)
from lorax.train.batches import Evaluated, batch_shapes, splits
from lorax.train.prepare import Group
from lorax.train.programs import Programs
from lorax.train.step import MemberState


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
    race: Race | None = None,
    devices: int | None = None,
) -> tuple[dict[int, dict], int]:
    """Train all groups in turn, from the newest checkpoints; ({member: its final row}, bytes of
    metrics.jsonl up to their end).

    offset: bytes of metrics.jsonl written by earlier calls. before, after: steps of members that
    earlier calls have trained or later ones may train, for the progress of the whole run. race:
    which members stop at which steps in favour of others; without one all train to the end.
    devices: of the machine that would train all members of the groups, if it is not this one: the
    members that are trained here run in its programs.

    A row has "status" ("finished", "diverged" or "stopped"), "diverged_at" (step or None),
    "eval_loss" (nats per completion token, a classifier's loss, or the squared error of values;
    None unless it finished), "seconds", "step_ms" (of training alone; both are a member's share)
    and "scores" ({metric: value} of a classifier, of tokens, of generated texts or of the tasks of
    `eval.harness`); one that a race stopped also "stopped_at". With test rows it has
    "base_test_loss", that of step 0, "test_loss" and "test_scores" (None and {} unless it
    finished); with `eval.keep` "best" it has "kept_step", the step that was exported, whose results
    these are. If it finished, it has "cka" (per layer) with `analysis.cka`, "kept_rank" (rows of
    `kept_rank.measure`) with `analysis.kept_ranks`, "sharpness" ({"start" and "end": {"value",
    "residual"}}) with `analysis.sharpness`, and "base_scores" (of the base's own texts) with
    `eval.generate`. "failed" ({config key: reason}) is set if one of these, texts or tasks of a
    trained member failed. If training is killed at any moment and called
    again, metrics, adapters and trajectories are bit for bit the same as without the interruption.
    """
    members = [member for group in groups for member in group.stack.members]
    race = race or halving.without(members)
    mine = {member.index for member in members}
    total, done = before + halving.all_steps(race, mine) + after, before
    programs = Compiled(groups, race, terminal.say, devices)
    running, at, rows = race.starters & mine, {}, {}
    for leg in range(len(halving.planned(race))):
        for group in groups:
            stack = stacks.pick(group.stack, running)
            if not stack.members:
                continue
            progress = lambda steps, before=done: terminal.progress(before + steps, total)
            place = Place(workdir, group, stack, leg, programs)
            finals, reached, offset = _train_group(place, race, at, offset, terminal, progress)
            rows, at = rows | finals, at | reached
            done += halving.member_steps(race, [m.index for m in stack.members], leg)
        left = halving.survivors(race, leg, running, _losses(rows, at, running))
        left = set(hosts.agreed(sorted(left)))
        if leg < len(race.rungs):
            rows |= {i: results.stopped(workdir, i, at[i]) for i in running - left}
            at = {i: at[i] for i in left}
            terminal.say(_rung_line(race, leg, running, left))
        running = left
    never = mine - rows.keys()
    return rows | {i: results.stopped(workdir, i, None) for i in never}, offset


def _losses(rows: dict[int, dict], at: dict[int, part.Standing], running) -> dict[int, float]:
    """{member: its loss at the end of a leg}, NaN for one that has diverged."""
    losses = {}
    for i in running:
        if i in rows:
            loss = rows[i]["eval_loss"]
            losses[i] = math.nan if loss is None else loss
        else:
            losses[i] = float(at[i].measured.losses) if at[i].diverged_at < 0 else math.nan
    return losses


class Place(NamedTuple):
    """What is trained where: a leg of some members of a group."""

    workdir: Path
    group: Group
    stack: stacks.Stack
    leg: int
    compiled: "Compiled"


def _train_group(
    place: Place, race: Race, at: dict[int, part.Standing], offset: int,
    terminal: Terminal, progress: Callable[[float], None],
) -> tuple[dict[int, dict], dict[int, part.Standing], int]:  # fmt: skip
    """Train a leg of a group part by part; ({member: its final row}, {member: where it stands at
    the rung}, bytes of metrics.jsonl). at: where members stood after the last leg."""
    workdir, group, stack, leg, compiled = place
    programs = compiled.get(group, stack)
    parts = stacks.parts(stack, programs.layout.size)
    rows, reached, done = {}, {}, 0
    params = programs.place_base(group.base.params)
    size = group.config.eval.batch_size
    evaluated = splits(group.task, size)
    for name, task in group.also.items():
        evaluated[rundir.ALSO + name] = splits(task, size)["eval"]
    evaluated = {
        name: split._replace(batches=programs.place_rows(split.batches))
        for name, split in evaluated.items()
    }
    base_test = lambda: compiled.base_test(group, programs, params, evaluated["test"])
    known = compiled.compared(group, stack)
    for number, stack in enumerate(parts):
        members = [member.index for member in stack.members]
        state, stack = _drawn(programs, group, stack)
        current = part.Part(
            workdir=workdir,
            name=rundir.part(group.index, number, len(parts), leg),
            group=group,
            stack=stack,
            programs=programs,
            params=params,
            splits=evaluated,
            constants=programs.place(stack.constants),
            hyper=programs.place(stack.hyper),
            base_test=base_test,
            base_states=compiled.base_states(group, programs, params, evaluated["eval"]),
            compared=[known[i] for i in members],
            until=race.ends(members[0], leg)[1],
            standing=[at[i] for i in members if i in at],
            say=terminal.say,
        )
        tell = lambda steps, before=done: progress(before + steps)
        finals, standing, offset = _train_part(current, state, offset, tell, terminal.finished)
        rows, reached = rows | finals, reached | standing
        done += halving.member_steps(race, members, leg)
        del current, stack  # before the next members are drawn
    return rows, reached, offset


def _drawn(programs: Programs, group: Group, stack: stacks.Stack) -> tuple[list, stacks.Stack]:
    """(the only holder of the members' state on the devices, as for `part.train`; the stack with
    their constants and hyper, and the state as shapes)."""
    drawn = prepare.drawn(group, stack)
    return [programs.place_state(drawn.state)], drawn._replace(state=stack.state)


def _train_part(
    current: part.Part, state: list[MemberState], offset: int, progress, finished
) -> tuple[dict[int, dict], dict[int, part.Standing], int]:
    """Like `_train_group`, for one part; its state on the devices is freed on return. state: as for
    `part.train`."""
    at = part.train(current, state, offset, progress)
    if at.step < current.stack.config.train.steps:
        return {}, part.apart(current, at), at.offset
    return results.of_part(current, at, finished), {}, at.offset


def member_steps(members: Iterable[Member]) -> int:
    """Steps of all members together, without a race."""
    return sum(member.config.train.steps for member in members)


class Compiled:
    """The programs of a run. `get` compiles what no earlier call has asked for; the largest group's
    are compiled at once, to fail before anything is trained if that does not fit. say: prints a
    line, also before something is compiled. devices: as for `train`."""

    def __init__(
        self,
        groups: list[Group],
        race: Race,
        say: Callable[[str], None],
        devices: int | None = None,
    ):
        self.race, self.say, self.made, self.shown, self.last = race, say, {}, set(), ""
        self.share = Fraction(len(jax.devices()), devices) if devices else Fraction(1)
        self.base_tests, self.states = {}, ("", None)
        self.of_weights, self.of_groups = {}, {}
        first = max(groups, key=_largest)
        self._fit(first, stacks.pick(first.stack, race.starters))

    def get(self, group: Group, stack: stacks.Stack) -> Programs:
        """The programs for some members of a group; says how they run when the group is new."""
        key = self._key(group, stack)
        if not self.race.rungs and key != self.last:  # groups that follow each other share one
            self.made.pop(self.last, None)
        programs, seconds = self.made.get(key) or self._fit(group, stack)
        began, self.last = time.monotonic(), key
        for width in tasks.widths(group.task):
            programs.narrow(width)
        if group.index not in self.shown:
            n_parts = len(stacks.parts(stack, programs.layout.size))
            seconds += time.monotonic() - began
            self.say(_plan_line(group, programs, n_parts, seconds))
            if why := _without_spectra(group):
                self.say(f"group {group.index}: analysis.trajectory: {why}")
        self.shown.add(group.index)
        self.made[key] = programs, 0.0
        return programs

    def base_test(self, group: Group, programs: Programs, params, on: Evaluated):
        """`evaluation.of_base`, once for groups with the same base and task."""
        key = id(group.base), id(group.task), group.config.operands
        if key not in self.base_tests:
            began = time.monotonic()
            found = evaluation.of_base(programs, params, group.task, on)
            self.base_tests[key] = found
            seconds = time.monotonic() - began
            loss = f"loss {found[0].losses[0]:.4f}, {seconds:.1f} s"
            self.say(f"group {group.index}: the base on {on.rows:,} test rows: {loss}")
        return self.base_tests[key]

    def base_states(self, group: Group, programs: Programs, params, on: Evaluated):
        """`evaluation.states_of_base`, once for groups that follow each other with the same base
        and task; None if nothing is compared with the base."""
        if not group.compares:
            return None
        placed = programs.layout.mode, programs.layout.devices
        key = id(group.base), id(group.task), group.config.operands, placed
        if key != self.states[0]:
            self.states = "", None  # free the last ones first
            self.states = key, evaluation.states_of_base(programs, params, on)
        return self.states[1]

    def compared(self, group: Group, stack: stacks.Stack) -> dict[int, dict]:
        """{member: what its updates are compared with over training (`compared.of_members`)}, once
        for all legs of a group. stack: the members of this leg, of which some may have waited."""
        known = self.of_groups.setdefault(group.index, {})
        new = [member for member in stack.members if member.index not in known]
        of_members = [{}] * len(new)
        if new and group.config.analysis.trajectory:
            paths = trajectory.paths(stack.methods[0], group.base, *_first(stack))
            arguments = group.base, group.task, stack._replace(members=new), paths, self.of_weights
            of_members = compared.of_members(*arguments)
        known |= {member.index: x for member, x in zip(new, of_members, strict=True)}
        return known

    def _fit(self, group: Group, stack: stacks.Stack) -> tuple[Programs, float]:
        """The programs, and the seconds that it took to compile them."""
        n = len(stack.members)
        self.say(f"group {group.index}: compiling for {n} member{'s' * (n > 1)} ...")
        began, kind = time.monotonic(), group.task.kind
        whole = group.stack._replace(members=group.members)
        arguments = whole, group.base, group.config.train, *_shapes(group), kind
        batches = 0  # on which members are compared with the base
        if group.compares:
            batches = splits(group.task, group.config.eval.batch_size)["eval"].n
        of_legs = legs(group, stack, self.race)
        programs = fitting.fit(*arguments, None, of_legs, self.share, batches)
        made = programs, time.monotonic() - began
        self.made[self._key(group, stack)] = made
        return made

    def _key(self, group: Group, stack: stacks.Stack) -> str:
        return json.dumps([_program_key(group), legs(group, stack, self.race)])


def legs(group: Group, stack: stacks.Stack, race: Race) -> list[tuple[int, int]]:
    """(members, steps) of each leg that one program trains; () if no member stops on the way.

    On a CPU, where members run a few at a time, one program of few members trains all legs; an
    accelerator runs them side by side, so there each leg has a program of its size. stack: the
    members of this leg, of those of the group that are trained here.
    """
    if not race.rungs:
        return []
    if not layouts.on_cpu():
        of_all = Fraction(len(group.members), len(group.stack.members))
        return [(math.ceil(len(stack.members) * of_all), 1)]
    mine, found = {member.index for member in group.members}, []
    for leg, members in enumerate(halving.planned(race)):
        of = mine & set(members)
        found.append((len(of), halving.member_steps(race, list(of)[:1], leg)))
    return [(n, steps) for n, steps in found if n]


def _shapes(group: Group):
    """Shapes of the batches of one call to train, and of the evaluation."""
    c = group.config
    k = steps_per_call(c.eval.every, c.train.offload)
    batches = batch_shapes(c.train, group.task, k)
    return batches, tree.shapes(splits(group.task, c.eval.batch_size)["eval"].batches)


def _without_spectra(group: Group) -> str:
    """What trajectories leave out of the updates; "" for nothing or without trajectories."""
    analysis, stack = group.config.analysis, group.stack
    if not analysis.trajectory:
        return ""
    method, first = stack.methods[0], _first(stack)
    without = trajectory.left_out(method, group.base, *first)
    if analysis.first_gradient and not any(trajectory.paths(method, group.base, *first).values()):
        without += "; " * bool(without)
        without += f"analysis.first_gradient: {method.name} trains no a to compare with a gradient"
    return without


def _first(stack: stacks.Stack) -> tuple[dict, dict]:
    """The shapes of (constants, trainable) of one member."""
    constants, _, state = stack.one
    return constants, state.trainable


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
    if outside.base_name(group.config.base) is None:  # of lorax's own, which a repr describes
        settings["base"] = [repr(group.base.module), str(tree.shapes(group.base.params))]
    dropout = any(member.config.method.dropout > 0 for member in group.members)
    shapes = tree.shapes(group.stack[2:]), *_shapes(group)
    kind = group.task.kind
    return json.dumps([settings, dropout, kind.name, kind.scored, str(shapes)], sort_keys=True)


def _plan_line(group: Group, programs: Programs, n_parts: int, seconds: float) -> str:
    layout, n = programs.layout, len(group.stack.members)
    where = f"{len(layout.devices)} {layout.devices[0].platform} device"
    where += "s" * (len(layout.devices) > 1)
    split = "" if layout.mode == "none" else f", {layout.mode} spread"
    if layout.mode == "mesh":
        split = f", {layout.shape}"
    parts = f" in {n_parts} parts" if n_parts > 1 else ""
    return (
        f"group {group.index}: {n} members{parts}, {layout.width} side by side on {where}{split}; "
        f"compiled in {seconds:.1f} s, {programs.bytes / 1e6:,.0f} MB"
    )


def _rung_line(race: Race, leg: int, running: set[int], left: set[int]) -> str:
    steps = sorted({race.ends(i, leg)[1] for i in running})
    at = f"step {steps[0]}" if len(steps) == 1 else f"{100 * race.rungs[leg]:.3g}% of the steps"
    points = halving.values(race, left).items()
    values = ", ".join(f"{value} at {n} point{'s' * (n > 1)}" for value, n in points)
    return (
        f"rung {leg + 1} of {len(race.rungs)}, {at}: {len(left)} of {len(running)} members go on, "
        f"with {race.axis} {values or 'of none'}"
    )
