"""Training steps: members together, one step, DoRA, subspaces."""

import time
from collections.abc import Callable

import jax
import numpy as np

from lorax import config, tasks, tree
from lorax.bench import bases, peft_models, timing
from lorax.models import Base
from lorax.train import fitting, stacks
from lorax.train.batches import eval_batches, train_batches

MEMBERS = 8


def bench_sweep(shapes: list[str], rounds: int) -> list[timing.Row]:
    """Training time per member and step of 8 LoRA members (r = 8 on q and v) trained together.

    The baselines are the same program for one member, run eight times, and PEFT in float32 if torch
    is installed. With bfloat16 operands the baseline is float32.
    """
    rows = []
    for name in shapes:
        shape = bases.SHAPES[name]
        sides = {"together": gpt2_stepping(shape, MEMBERS), "alone": gpt2_stepping(shape, 1)}
        sides["bfloat16"] = gpt2_stepping(shape, MEMBERS, "bfloat16")
        if peft_models.found():
            sides["peft"] = peft_models.train(shape)
        seconds = timing.measure(sides, rounds)
        label = f"sweep of {MEMBERS}, {name} (d {shape.config.n_embd}, {shape.batch} x {shape.seq})"
        rows.append(timing.row(label, seconds["together"], seconds["alone"], "lorax, one by one"))
        if "peft" in seconds:
            rows.append(timing.row(label, seconds["together"], seconds["peft"], "PEFT, one by one"))
        halves = seconds["bfloat16"], seconds["together"]
        rows.append(timing.row(f"{label}, bfloat16", *halves, "lorax, float32"))
    return rows


def bench_step(shapes: list[str], rounds: int) -> list[timing.Row]:
    """Time of one LoRA training step (r = 8 on q and v) against PEFT's in float32: GPT-2 small with
    4 sequences of 256 tokens, in float32 and with bfloat16 operands."""
    shape = bases.STEP
    sides = {operands: gpt2_stepping(shape, 1, operands) for operands in ("float32", "bfloat16")}
    if not peft_models.found():
        raise SystemExit("bench step compares with PEFT: pip install torch peft transformers")
    sides["peft"] = peft_models.train(shape)
    seconds = timing.measure(sides, rounds)
    label = f"step, GPT-2 small, {shape.batch} x {shape.seq}"
    rows = [
        timing.row(f"{label}, {operands}", seconds[operands], seconds["peft"], "PEFT float32")
        for operands in ("float32", "bfloat16")
    ]
    halves = seconds["bfloat16"], seconds["float32"]
    return [*rows, timing.row(f"{label}, bfloat16", *halves, "lorax float32")]


def bench_dora(shapes: list[str], rounds: int) -> list[timing.Row]:
    """Time of one DoRA training step against LoRA's (r = 8 on q and v), one member."""
    rows = []
    for name in shapes:
        sides = {
            method: gpt2_stepping(bases.SHAPES[name], 1, name=method) for method in ("dora", "lora")
        }
        seconds = timing.measure(sides, rounds)
        rows.append(timing.row(f"DoRA step, {name}", seconds["dora"], seconds["lora"], "LoRA"))
    return rows


def bench_subspace(shapes: list[str], rounds: int) -> list[timing.Row]:
    """Time of a training step in a random subspace (d = 1000) against one of full fine-tuning, for
    the shapes of gpt2-nano with 16 x 128 tokens and GPT-2 small with 4 x 256. P is drawn once per
    call; a call has 10 and 6 steps here, and up to 10 in training."""
    kinds = {
        "Fastfood": dict(name="subspace"),
        "Fastfood a tensor": dict(name="subspace", granularity="tensor"),
        "sparse": dict(name="subspace", projection="sparse"),
    }
    rows = []
    for name, shape, chosen in (
        ("gpt2-nano", bases.SHAPES["nano"], kinds),
        ("GPT-2 small", bases.STEP._replace(steps=6), ("Fastfood",)),
    ):
        sides = {kind: gpt2_stepping(shape, 1, dim=1000, **kinds[kind]) for kind in chosen}
        seconds = timing.measure(sides | {"full": gpt2_stepping(shape, 1, name="full")}, rounds)
        for kind in chosen:
            label = f"subspace step, {kind}, {name}, {shape.batch} x {shape.seq}"
            rows.append(timing.row(label, seconds[kind], seconds["full"], "full fine-tuning"))
    return rows


def gpt2_stepping(
    shape: bases.Shape, members: int, operands="float32", **method
) -> Callable[[], float]:
    """`stepping` of a GPT-2."""
    rows = shape.batch, shape.seq, shape.steps
    return stepping(bases.random(shape, operands), rows, members, operands, **method)


def stepping(
    base: Base, rows: tuple[int, int, int], members: int, operands="float32", **method
) -> Callable[[], float]:
    """A function that trains for a few steps and returns the seconds per member and step.

    rows: (sequences of a member's batch, tokens of each, steps of a call). method: keys of
    `config.method`.
    """
    batch, seq, k = rows
    c = config.default()
    c.train.update(batch_size=batch, seq_len=seq, steps=1_000_000, warmup=0)
    c.method.update({"rank": bases.RANK} | method)
    c.operands = c.param_dtype = operands
    c.sweep.seed = tuple(range(members))
    tokens = np.random.default_rng(0).integers(0, base.config.vocab_size, (256, seq + 1))
    task_rows = {"tokens": tokens.astype(np.int32), "mask": np.ones(tokens.shape, np.float32)}
    task = tasks.Task("random", task_rows, {name: x[:1] for name, x in task_rows.items()}, "")

    chosen = config.members(c)
    stacked = stacks.stack(chosen, stacks.build_methods(chosen, base), base)
    host = train_batches(stacked, task, 0, k)
    batch_shapes = tree.shapes({name: x[0] for name, x in host.items()})
    evals = tree.shapes(eval_batches(task, 1))
    programs = fitting.fit(stacked, base, chosen[0].config.train, batch_shapes, evals, task.kind)
    params, batches = programs.place_base(base.params), programs.place_batches(host)
    constants, hyper = programs.place(stacked.constants), programs.place(stacked.hyper)
    state = programs.place(stacked.state)

    def run() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(programs.train(params, constants, hyper, state, batches))
        return (time.perf_counter() - begin) / (members * k)

    return run
