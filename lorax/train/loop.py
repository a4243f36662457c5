"""From members to a run directory: train every group, checkpoint, log, export the adapters."""

import functools
import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from lorax import (
    adapters,
    decode,
    memory,
    methods,
    peft_methods,
    quant,
    rundir,
    states,
    tasks,
    tree,
)
from lorax.config import Member, axes, group_key
from lorax.errors import nearest, reason
from lorax.files import write_bytes
from lorax.interop import peft
from lorax.methods import prefix
from lorax.models import Base, load
from lorax.models.load import skeleton
from lorax.tasks import kinds, scores
from lorax.train import activations, checkpoint, evidence, sweep, trajectory


class Terminal(NamedTuple):
    """How the loop speaks: say(line), progress(steps done, in all), finished(row of a member)."""

    say: Callable[[str], None]
    progress: Callable[[float, float], None]
    finished: Callable[[dict], None]


class Group(NamedTuple):
    """Members that share a compiled program, with what they are trained on.

    rankings: {member: rows of `evidence.decide`} of those whose targets or ranks evidence chose.
    """

    index: int
    base: Base
    task: tasks.Task
    stack: sweep.Stack
    rankings: dict[int, list[dict]] = {}


class Loaded(NamedTuple):
    """Bases and tasks by what was asked for, which the rounds of a run share."""

    bases: dict[str, Base]
    tasks: dict[str, tasks.Task]


def prepare(
    members: list[Member],
    say: Callable[[str], None],
    first: int = 0,
    loaded: Loaded | None = None,
) -> list[Group]:
    """Load bases and tasks, check every member against its base, and start all members.

    first: number of the first group. loaded: what is there already; what is read is added.
    Raises ValueError or FileNotFoundError for what a user can mend, before anything is trained.
    """
    bases, task_cache = loaded or Loaded({}, {})
    groups = []
    ordered = sorted(members, key=group_key)
    parts = [list(part) for _, part in itertools.groupby(ordered, key=group_key)]
    parts.sort(key=lambda part: part[0].index)
    for index, part in enumerate(parts, first):
        c = part[0].config
        # ------------------------------------------------------------------------------- base
        labels = tasks.outputs(c.task)
        head = {"head": "classification", "labels": labels} if labels else {}
        run = {"dtype": c.dtype, "param_dtype": c.param_dtype} | head
        if c.train.remat != "none":  # not every family has it
            run["remat"] = c.train.remat
        key = json.dumps([c.base, run, c.quant, c.double_quant])
        if key not in bases:
            check_weights(c.base, run)
            base = load(c.base, **run)
            if c.quant:
                params = quant.quantize(base.params, c.quant, c.double_quant, sites=base.sites)
                params = quant.placed(params, jax.local_devices()[0], c.dtype)
                base = base.replace(params=params)
            bases[key] = base
            say(
                f"base {c.base}: {base.family}, {tree.count(base.params):,} parameters, "
                f"{tree.nbytes(base.params) / 1e6:.1f} MB"
            )
            if base.fresh:
                say(f"base {c.base}: no weights for {', '.join(base.fresh)}: drawn, and trained")
        base = bases[key]
        tasks.check_base(c.task, base, c.train.seq_len)
        activations.check(base, c.analysis.cka)
        reads_text = tasks.kind_of(c.task).reads == "tokens"
        if reads_text and base.vocabulary is None:
            raise ValueError(
                f"base: {c.base} has no tokenizer.json, which task {c.task.name} needs"
            )
        hps = {member.index: sweep.hyperparameters(member, base) for member in part}
        automatic = [member for member in part if evidence.is_automatic(member, hps[member.index])]
        sweep.build_methods([m for m in part if m not in automatic], base)  # a mistake shows here

        # ------------------------------------------------------------------------------- task
        asked = [member.config.task.n_train for member in part]
        settings = c.task.to_dict() | {"n_train": None if None in asked else max(asked)}
        made_for = [c.base, c.train.seq_len] if reads_text else key
        key = json.dumps([settings, made_for, c.eval.examples], sort_keys=True)
        if key not in task_cache:
            task_cache[key] = tasks.build(
                settings, base.vocabulary, c.train.seq_len, c.eval.examples, base
            )
            say(f"task {task_cache[key].note}")
        task = task_cache[key]
        for member in part:
            tasks.train_size(member.config.task, task)  # raises where there are not so many
        if c.eval.generate and not task.prompts:
            raise ValueError(
                f"eval.generate: {c.eval.generate} given, task {c.task.name} has no prompts"
            )
        # -------------------------------------------------------------------------- evidence
        if automatic:
            say(f"group {index}: choosing targets and ranks of {len(automatic)} members")
        rankings, seen = {}, {}
        for member in automatic:
            hp = hps[member.index]
            hps[member.index], rankings[member.index] = evidence.decide(
                member, hp, base, task, seen
            )
        built = sweep.build_methods(part, base, hps)
        stacked = sweep.stack(part, built, base, task, seen)
        groups.append(Group(index, base, task, stacked, rankings))
        # ------------------------------------------------- what would only show when it is trained
        check_positions(groups[-1])
        if c.eval.generate:
            check_texts(groups[-1], say)
        if c.analysis.cka:
            state = stacked.state.trainable, stacked.constants
            activations.rehearse(base, built[0], *state, task, c.analysis.cka, c.eval.batch_size)
    for line in idle(groups):
        say(line)
    return groups


def check_weights(name: str, run: dict) -> None:
    """Raises MemoryError where a base's weights have no room; nothing is allocated."""
    needs, there = tree.nbytes(skeleton(name, **run).params), memory.free()
    if needs > there.bytes:
        raise MemoryError(
            f"base: {name} has {needs / 1e9:.2f} GB of weights in {run['param_dtype']} and "
            f"{there.bytes / 1e9:.2f} GB {there.limit}; take a smaller base"
            + ", or param_dtype=bfloat16"
            * (run["param_dtype"] == "float32")
        )


def virtual_tokens(group: Group) -> int:
    """Positions that a group's method takes ahead of every text."""
    method, base = group.stack.methods[0], group.base
    one = jax.tree.map(lambda x: x[0], (group.stack.state.trainable, group.stack.constants))
    bound = jax.eval_shape(lambda s, p: method.bind(*s, p, sites=base.sites), one, base.params)
    return prefix.ahead(bound).tokens


def check_positions(group: Group) -> None:
    """Raises ValueError where virtual tokens leave a base no positions for its texts."""
    c, most = group.stack.members[0].config, group.base.positions
    kind, ahead = group.task.kind, virtual_tokens(group)
    columns = kinds.columns(kind, group.task.train)
    if most and columns and ahead:
        columns -= kind.ahead
        if columns + ahead > most:
            raise ValueError(
                f"method.tokens: {ahead} given, but texts of {columns} tokens (train.seq_len "
                f"{c.train.seq_len}) leave {max(most - columns, 0)} of the {most} positions of "
                f"{group.base.name}"
            )


def decoding_options(c) -> decode.DecodingOptions:
    """The options of config.eval. Raises ValueError for one that is out of range."""
    options = decode.DecodingOptions(
        max_new_tokens=c.new_tokens,
        num_beams=c.beams,
        length_penalty=c.length_penalty,
        no_repeat_ngram_size=c.no_repeat_ngram,
    )
    return decode.check(options, c.batch_size)


def check_texts(group: Group, say: Callable[[str], None]) -> None:
    """Raises ValueError where a group's members can't complete or score what `eval.generate` asks
    for; says which scores are missing."""
    c = group.stack.members[0].config.eval
    prompts = tasks.prompts(group.task, c.generate)
    if len(prompts) < c.generate:
        say(
            f"eval.generate: {c.generate} given, the task has {len(prompts)} prompts: all are taken"
        )
    asked, references = [p.text for p in prompts], [p.references for p in prompts]
    try:
        decode.encode(group.base, asked, decoding_options(c).max_new_tokens, virtual_tokens(group))
        scores.of_texts(group.task, asked, references, lambda line: say(f"eval.generate: {line}"))
    except ValueError as error:
        raise ValueError(f"eval.generate: {error}") from None


def idle(groups: list[Group]) -> list[str]:
    """A line for every reason for which members can't change their base, with their names."""
    whys = {
        "train.lr: 0": lambda m, _: m.config.train.lr == 0,
        "method.alpha: 0": lambda _, method: method.hp.get("scale", method.hp.get("alpha")) == 0,
    }
    lines = []
    for field, found in whys.items():
        names = [
            member.name
            for group in groups
            for member, method in zip(group.stack.members, group.stack.methods, strict=True)
            if found(member, method)
        ]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            what = (
                "nothing is learned"
                if field.startswith("train")
                else "the update counts for nothing"
            )
            lines.append(f"{field} in member {', '.join(names[:3])}{more}: {what}")
    return lines


def describe(group: Group) -> list[dict]:
    """The lines of members.jsonl for a group's members."""
    rows = []
    opt_bytes = tree.nbytes(group.stack.state.opt_state) // len(group.stack.members)
    for member, method in zip(group.stack.members, group.stack.methods, strict=True):
        c, hp = member.config, {"rank": None, "scale": None} | method.hp
        rows.append(
            {
                "member": member.index,
                "group": group.index,
                "name": member.name,
                "method": method.name,
            }
            | hp
            | ({"targets": c.method.targets} if member.index in group.rankings else {})
            | {
                "base": c.base,
                "quant": c.quant,
                "lr": c.train.lr,
                "weight_decay": c.train.weight_decay,
            }
            | {"steps": c.train.steps, "seed": c.seed, "n_train": c.task.n_train}
            | {
                axis: v
                for axis, v in member.point.items()
                if not axes()[axis].startswith("method.")
            }
            | {"train_examples": tasks.train_examples(c.task, group.task)}
            | dict(group.task.facts)
            | {"trainable_params": method.count(group.base.params, group.base.sites)}
            | {"optimizer_bytes": opt_bytes}
        )
    return rows


def check_metric(groups: list[Group], metric: str) -> None:
    """Raises ValueError where a group's task does not measure what a search goes by."""
    for group in groups:
        c, task = group.stack.members[0].config, group.task
        names = ["loss", *scores.names(task, bool(c.eval.generate))]
        if metric not in names:
            raise ValueError(
                f"search.metric: {metric!r} given, task {c.task.name} measures "
                f"{', '.join(names)}{nearest(metric, names)}"
            )


def write_rankings(workdir: Path, groups: list[Group]) -> None:
    """analysis/sensitivity.csv: what evidence said of every matrix, where it chose any."""
    lines = [
        {"member": member} | row
        for group in groups
        for member, rows in group.rankings.items()
        for row in rows
    ]
    if lines:
        text = [",".join(lines[0]), *(",".join(map(str, line.values())) for line in lines)]
        write_bytes(rundir.table(workdir, "sensitivity"), ("\n".join(text) + "\n").encode())


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
        c = group.stack.members[0].config
        k = sweep.steps_per_call(c.eval.every, c.train.offload)
        eval_batches = sweep.eval_batches(group.task, c.eval.batch_size)
        began, ahead = time.monotonic(), 0.0
        last, key = key, _program_key(group)
        if key != last:  # groups that differ in their data alone run in turn, and share one
            programs, ahead = fitted.pop(key, None) or (_fit(group), 0.0)
        for width in tasks.widths(group.task):
            programs.narrow(width)
        chunks = sweep.chunks(group.stack, programs.layout.size)
        terminal.say(_plan_line(group, programs, chunks, ahead + time.monotonic() - began))
        if c.analysis.trajectory:
            one = jax.tree.map(lambda x: x[0], (group.stack.constants, group.stack.state.trainable))
            why = trajectory.left_out(group.stack.methods[0], group.base, *one)
            if why:
                terminal.say(f"group {group.index}: analysis.trajectory: {why}")
        params = programs.place_base(group.base.params)
        eval_batches = jax.device_put(eval_batches)
        for number, chunk in enumerate(chunks):
            part = rundir.part(group.index, number, len(chunks))
            offset, finals = _train_chunk(
                workdir, part, chunk, group, programs, params, eval_batches, k, offset,
                lambda steps, before=done: terminal.progress(before + steps, total), terminal,
            )  # fmt: skip
            rows |= finals
            done += len(chunk.members) * c.train.steps
    return rows, offset


def member_steps(members: list[Member]) -> int:
    """Steps of all members together."""
    return sum(member.config.train.steps for member in members)


def _train_chunk(
    workdir, part, chunk, group, programs, params, eval_batches, k, offset, progress, terminal
):
    """One call of the compiled programs after another; (offset in metrics.jsonl, {member: row})."""
    c = chunk.members[0].config
    where, m = rundir.checkpoints(workdir, part), len(chunk.members)
    constants, hyper = programs.place(chunk.constants), programs.place(chunk.hyper)
    state = programs.place_state(chunk.state)

    def evaluate():
        """Loss (m,) and {metric: (m,)} of every member as it is now."""
        losses, outputs = programs.evaluate(params, constants, state.trainable, eval_batches)
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
        batches = programs.place_batches(sweep.train_batches(chunk, group.task, step, k))
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
        why = export(rundir.adapter(workdir, member.index), member, method, *take(i), group)
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
            write = functools.partial(write_texts, workdir, member, group, bound, terminal.say)
            rows[member.index]["scores"] |= measured("eval.generate", [member], write) or {}
        else:  # those of an evaluation that is no longer asked for
            rundir.texts(workdir, member.index).unlink(missing_ok=True)
        terminal.finished({"member": member.index, "name": member.name} | rows[member.index])
    return offset, rows


def write_texts(workdir: Path, member: Member, group: Group, params, say) -> dict[str, float]:
    """Complete the task's prompts with one member's parameters, keep the texts, score them.

    Writes texts/<member>.jsonl: {"prompt", "text", "references"} a line. Returns {metric: value}.
    """
    c, prompts = member.config.eval, tasks.prompts(group.task, member.config.eval.generate)
    options = decoding_options(c)
    began = told = time.monotonic()

    def tell(done, total):
        nonlocal told
        if time.monotonic() - told > 10 and done < total:
            told = time.monotonic()
            left = (told - began) * (total - done) / done
            say(f"member {member.name}: {done} of {total} texts, {left:.0f} s left")

    asked = [p.text for p in prompts]
    texts = decode.complete(
        group.base, asked, params, options, batch_size=c.batch_size, progress=tell
    )
    texts = [text.strip() for text in texts]
    found = scores.of_texts(group.task, texts, [p.references for p in prompts])
    lines = [
        {"prompt": p.text, "text": text, "references": p.references}
        for p, text in zip(prompts, texts, strict=True)
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(rundir.texts(workdir, member.index), content.encode())
    say(f"member {member.name}: {len(texts)} texts in {time.monotonic() - began:.0f} s")
    return {name: round(float(value), 5) for name, value in found.items()}


def export(directory: Path, member: Member, method, trainable, constants, group: Group) -> str:
    """Write what one member has learned; "", or why PEFT can't read it.

    An update of low rank becomes a LoRA adapter in PEFT's format. Any other method leaves its
    arrays in lorax's own format (`lorax.states`); beside them, where PEFT has the method, its files
    of it.
    """
    base, state = group.base, methods.State(trainable, constants)
    why = ""
    if method.factors is not None:
        adapter = adapters.exported(method, state, base)
        # PEFT takes the whole head from a classifier's adapter: only one that has it is called so.
        classifier = "SEQ_CLS" if any(p.startswith("head/") for p in adapter.weights) else None
        kind = classifier if group.task.outputs else "CAUSAL_LM"
        if group.task.kind.reads != "tokens":
            kind = None  # it has no word for models that read no text
        try:
            peft.save(
                directory,
                adapter,
                base.sources,
                member.config.base,
                dropout=method.hp.get("dropout", 0.0),
                task_type=kind,
            )
            return ""
        except OSError:  # the disk's, and no peculiarity of the method
            raise
        except Exception as error:  # what was learned is kept all the same
            why = _reason(error)
    states.save(directory, method, state, base)
    if method.factors is None:
        try:
            peft_methods.save(directory, method, state, base, member.config.base)
        except OSError:
            raise
        except Exception as error:
            why = _reason(error)
    return why


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else repr(error)


def _shapes(group: Group):
    """Shapes of the batches of one call to train, and of the evaluation's."""
    c = group.stack.members[0].config
    k = sweep.steps_per_call(c.eval.every, c.train.offload)
    batches = sweep.batch_shapes(c.train, group.task, k)
    return batches, tree.shapes(sweep.eval_batches(group.task, c.eval.batch_size))


def _fit(group: Group) -> sweep.Programs:
    train = group.stack.members[0].config.train
    return sweep.fit(group.stack, group.base, train, *_shapes(group), None, group.task.kind)


def _largest(group: Group) -> float:
    """About how many bytes one member needs: what is there, and what its layers put out."""
    c, params = group.stack.members[0].config, jax.tree.leaves(group.base.params)
    put_out = sum(x.size / x.shape[-2] for x in params if x.ndim > 1)
    rows = c.train.batch_size // c.train.accumulate * sweep.row_tokens(c.train, group.base)
    state = tree.nbytes(group.stack.state) / len(group.stack.members)
    return tree.nbytes(group.base.params) + state + 4 * rows * put_out


def _program_key(group: Group) -> str:
    """All that `sweep.fit` compiles for; what the task's rows hold is no part of it."""
    settings = json.loads(group_key(group.stack.members[0]))
    del settings["task"]
    dropout = any(member.config.method.dropout > 0 for member in group.stack.members)
    shapes = tree.shapes(group.stack[2:]), *_shapes(group)
    return json.dumps([settings, dropout, str(shapes)], sort_keys=True)


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
