"""Results of trained members: adapters, final rows, CKA, texts and images."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax

from lorax import adapters, gather, hosts, methods, rundir, tasks
from lorax.errors import of_machine, reason
from lorax.files import remove
from lorax.train import activations, benchmarks, kept_rank, pictures, sharpness
from lorax.train.evaluation import Measured
from lorax.train.part import Part, Position, Standing, decimal, diverged_at, exported
from lorax.train.prepare import drawn
from lorax.train.texts import scored, side_by_side, write_base_texts, write_texts


def of_part(part: Part, at: Position, finished: Callable[[dict], None]) -> dict[int, dict]:
    """{member: its final row}, see `loop.train`. All adapters are exported before anything is
    measured, as measuring may fail. finished: called with the row of each member."""
    m = len(part.stack.members)
    trainable = jax.tree.map(lambda x: of_members(x, m), exported(part, at).trainable)
    diverged = diverged_at(part, at)
    write_adapters(part, trainable)
    rows = {
        member.index: row(part, at, i, int(diverged[i]))
        for i, member in enumerate(part.stack.members)
    }
    trained = [i for i in range(m) if diverged[i] < 0]
    if part.stack.config.analysis.cka and trained:
        measure_cka(part, trainable, trained, rows)
    if part.stack.config.analysis.kept_ranks and trained:
        measure_kept_ranks(part, trainable, trained, rows)
    if part.stack.config.analysis.sharpness and trained:
        measure_sharpness(part, trainable, trained, rows)
    generates = bool(tasks.prompts(part.group.task, part.stack.config.eval.generate))
    if generates and trained:
        measure_base_texts(part, trained, rows)
        measure_texts(part, trainable, trained, rows)
    elif not generates:
        remove(rundir.texts(part.workdir, rundir.BASE))
    draws = bool(part.group.task.pictures and part.stack.config.eval.samples)
    if draws and trained:
        measure_base_pictures(part, trained, rows)
    elif not draws:
        remove(rundir.base_samples(part.workdir, part.group.index))
    for i, member in enumerate(part.stack.members):
        if not (generates and i in trained):  # of an evaluation that is no longer configured
            remove(rundir.texts(part.workdir, member.index))
        if draws and i in trained:
            measure_pictures(part, trainable, i, rows)
        else:
            remove(rundir.samples(part.workdir, member.index))
        if part.stack.config.eval.harness and i in trained:
            measure_tasks(part, trainable, i, rows)
        finished({"member": member.index, "name": member.name} | rows[member.index])
    return rows


def of_members(x: jax.Array, m: int):
    """The first m members' arrays on the host; of a parameter that is trained in full and divided
    as the base is, on the devices."""
    return x[:m] if gather.is_divided(x) else hosts.whole(x)[:m]


def row(part: Part, at: Position, i: int, diverged: int) -> dict:
    """The final row of member i; diverged: the step at which it did, or -1."""
    steps, fine = part.stack.config.train.steps, diverged < 0
    kept, test = exported(part, at), {}
    if at.tests:
        before, after = at.tests
        test = {
            "base_test_loss": decimal(before.losses[i]),
            "test_loss": decimal(after.losses[i]) if fine else None,
            "test_scores": scores_of(after, i) if fine else {},
        }
    return {
        "status": "finished" if fine else "diverged",
        "diverged_at": None if fine else diverged,
        "eval_loss": decimal(kept.measured.losses[i]) if fine else None,
        "seconds": round(float(at.seconds[i]), 3),
        "step_ms": round(1e3 * float(at.in_steps[i]) / steps, 3),
        "scores": scores_of(kept.measured, i) if fine else {},
        **test,
        **({"kept_step": int(kept.steps[i])} if at.kept else {}),
    }


def stopped(workdir: Path, member: int, at: Standing | None) -> dict:
    """The row of a member that halving has stopped; it keeps no file of test rows. at: where it
    stands, None if it never began. One that has diverged by then is "diverged"."""
    remove(rundir.rows(workdir, member))
    if at is None:
        seconds, in_steps, step, diverged = 0.0, 0.0, 0, -1
    else:
        seconds, in_steps, step, diverged = at.seconds, at.in_steps, at.step, at.diverged_at
    fine = diverged < 0
    return {
        "status": "stopped" if fine else "diverged",
        "diverged_at": None if fine else int(diverged),
        "stopped_at": step,
        "eval_loss": None,
        "seconds": round(float(seconds), 3),
        "step_ms": round(1e3 * float(in_steps) / step, 3) if step else None,
        "scores": {},
    }


def scores_of(measured: Measured, i: int) -> dict[str, float | None]:
    """{metric: value} of member i."""
    return {name: decimal(values[i]) for name, values in measured.scores.items()}


def state_of(part: Part, trainable, i: int) -> tuple[dict, dict]:
    """(trainable, constants) of member i, from trees with a member axis."""
    return jax.tree.map(lambda x: x[i], (trainable, part.stack.constants))


def write_adapters(part: Part, trainable) -> None:
    """Export every member; prints each reason why PEFT can't read an adapter."""
    reported, base = set(), part.group.base
    for i, (member, method) in enumerate(zip(part.stack.members, part.stack.methods, strict=True)):
        folder = rundir.adapter(part.workdir, member.index)
        state = methods.State(*state_of(part, trainable, i))
        learned = adapters.from_training(base, method, state)
        why = adapters.save(folder, learned, member.config.base)
        if why and why not in reported:
            part.say(f"member {member.name}: exported only in lorax's own format: {why}")
            reported.add(why)


def measure_cka(part: Part, trainable, trained: list[int], rows: dict[int, dict]) -> None:
    """Add "cka" to the rows of the members that did not diverge."""
    c, group, stack = part.stack.config, part.group, part.stack
    members = [stack.members[i] for i in trained]
    similarity = lambda: activations.similarity(
        group.base, stack.methods[0], trainable, stack.constants, group.task,
        c.analysis.cka, c.eval.batch_size,
    )  # fmt: skip
    alike = attempt(part, "analysis.cka", members, rows, similarity)
    for i in trained if alike is not None else ():
        rows[stack.members[i].index]["cka"] = [decimal(value) for value in alike[i]]


def measure_kept_ranks(part: Part, trainable, trained: list[int], rows: dict[int, dict]) -> None:
    """Add "kept_rank" to the rows of the members that did not diverge, if their updates have
    ranks."""
    stack = part.stack
    if why := kept_rank.why_not(stack.methods[0], part.group.base):
        part.say(f"analysis.kept_ranks: {why}")
        return
    members = [stack.members[i] for i in trained]
    measure = functools.partial(kept_rank.measure, part, trainable, trained)
    kept = attempt(part, "analysis.kept_ranks", members, rows, measure)
    for member, of_member in zip(members, kept or (), strict=bool(kept)):
        rows[member.index]["kept_rank"] = of_member


def measure_sharpness(part: Part, trainable, trained: list[int], rows: dict[int, dict]) -> None:
    """Add "sharpness" at step 0 and after training to the rows of the members that did not
    diverge."""
    if why := sharpness.why_not(trainable):
        part.say(f"analysis.sharpness: {why}; it is not measured")
        return
    members = [part.stack.members[i] for i in trained]
    batches = part.stack.config.analysis.sharpness

    def measure():
        states = {"start": drawn(part.group, part.stack).state.trainable, "end": trainable}
        of = functools.partial(sharpness.measure, part, batches=batches, trained=trained)
        return {when: of(state) for when, state in states.items()}

    found = attempt(part, "analysis.sharpness", members, rows, measure) or {}
    for when, of_members in found.items():
        for i, member in enumerate(members):
            numbers = {"value": of_members.value[i], "residual": of_members.residual[i]}
            numbers = {name: decimal(x) for name, x in numbers.items()}
            rows[member.index].setdefault("sharpness", {})[when] = numbers


def measure_base_texts(part: Part, trained: list[int], rows: dict[int, dict]) -> None:
    """Let the base complete the task's prompts, and add "base_scores", the scores of its texts, to
    the rows of the members that did not diverge."""
    members = [part.stack.members[i] for i in trained]
    arguments = part.workdir, members[0], part.group.base, part.group.task, part.say
    write = functools.partial(write_base_texts, *arguments)
    values = attempt(part, "eval.generate", members, rows, write)
    for member in members if values is not None else ():
        rows[member.index]["base_scores"] = values


def measure_texts(part: Part, trainable, trained: list[int], rows: dict[int, dict]) -> None:
    """Let the members that did not diverge complete the task's prompts, side by side, and add the
    scores of their texts to their rows. If that fails, each does so alone, and only those that fail
    then have no texts."""
    layout, base, task = part.programs.layout, part.group.base, part.group.task
    members = [part.stack.members[i] for i in trained]

    def write(its: list[int], params: dict, over=None) -> list[list[str]]:
        bind = lambda j: bound_to(part, trainable, its[j], params)
        of_program = [part.stack.members[i] for i in its]
        return write_texts(part.workdir, of_program, base, task, bind, over, part.say)

    spread = side_by_side() and layout.mode == "members" and len(layout.devices) > 1
    spread = spread and not hosts.are_many()
    texts = None
    if len(trained) > 1:
        try:
            texts = write(trained, *((part.params, layout.mesh) if spread else (base.params,)))
        except Exception as error:
            message = kept_message(part, error)
            part.say(f"eval.generate of {len(trained)} members together: {message}; now one by one")
    if texts is None:
        alone = lambda i: write([i], base.params)[0]
        texts = [
            attempt(part, "eval.generate", [member], rows, functools.partial(alone, i))
            for i, member in zip(trained, members, strict=True)
        ]
    prompts = tasks.prompts(task, part.stack.config.eval.generate)
    for member, its in zip(members, texts, strict=True):
        if its is not None:
            score = functools.partial(scored, task, prompts, its)
            values = attempt(part, "eval.generate", [member], rows, score)
            rows[member.index]["scores"] |= values or {}


def measure_base_pictures(part: Part, trained: list[int], rows: dict[int, dict]) -> None:
    """Let the base make images, and add "base_scores", their scores, to the rows of the members
    that did not diverge."""
    members, base = [part.stack.members[i] for i in trained], part.group.base
    file = rundir.base_samples(part.workdir, part.group.index)
    values = _pictures(part, file, members, rows, base.params, f"base {base.name}")
    for member in members if values else ():
        rows[member.index]["base_scores"] = values


def measure_pictures(part: Part, trainable, i: int, rows: dict[int, dict]) -> None:
    """Let member i make images, and add their scores to its row."""
    member, bound = part.stack.members[i], bound_to(part, trainable, i)
    file = rundir.samples(part.workdir, member.index)
    values = _pictures(part, file, [member], rows, bound, f"member {member.name}")
    rows[member.index]["scores"] |= values or {}


def _pictures(part: Part, file: Path, members, rows: dict[int, dict], params, named: str):
    """The scores of images made with these parameters, None if that failed."""
    say = lambda line: part.say(f"{named}: {line}")
    arguments = file, part.group.base, part.group.task, part.stack.config.eval, params, say
    write = functools.partial(pictures.write, *arguments)
    return attempt(part, "eval.samples", members, rows, write)


def measure_tasks(part: Part, trainable, i: int, rows: dict[int, dict]) -> None:
    """Let member i do the tasks of `eval.harness`, and add their results to the scores of its
    row."""
    base, member, bound = part.group.base, part.stack.members[i], bound_to(part, trainable, i)
    measure = functools.partial(benchmarks.scores, base, bound, member.config.eval)
    rows[member.index]["scores"] |= attempt(part, "eval.harness", [member], rows, measure) or {}


def bound_to(part: Part, trainable, i: int, params: dict | None = None) -> dict:
    """The parameters of member i: the base's, with its adapter. params: the base's, None for those
    that it was loaded with."""
    base, method = part.group.base, part.stack.methods[i]
    params = base.params if params is None else params
    return method.bind(*state_of(part, trainable, i), params, sites=base.sites)


def attempt(part: Part, key: str, members, rows: dict[int, dict], work: Callable):
    """work(), or None if it fails; then prints a line and adds "failed" to the members' rows,
    unless the error is one that ends the run (`kept_message`)."""
    try:
        return work()
    except Exception as error:
        message = kept_message(part, error)
        part.say(f"{key} of member {members[0].name}: {message}")
        for member in members:
            rows[member.index].setdefault("failed", {})[key] = reason(error)


def kept_message(part: Part, error: Exception) -> str:
    """What to say of an error, which is kept in the run directory.

    Several processes do the same work and fail alike, except for what is wrong with one machine:
    such an error is raised again and ends the run, as the others would wait for its process
    forever.
    """
    if hosts.are_many() and (of_machine(error) or isinstance(error, jax.errors.JaxRuntimeError)):
        raise error
    return rundir.keep_error(part.workdir, error)
