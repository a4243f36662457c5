"""Measure lorax on this machine, beside what one would use without it.

    python -m lorax.bench sweep
    python -m lorax.bench sweep --shapes=nano --rounds=5 --json=sweep.json

A row is a time, what it is compared with, and the median over rounds of their ratio (above 1 is
faster than the baseline), the range over rounds in brackets. The sides of a ratio run in turn
within a round, because a machine's speed drifts; compare rows of one run only.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from lorax import config, ops, tasks, tree
from lorax.files import write_bytes
from lorax.models import Base, gpt2
from lorax.train import sweep


class Row(NamedTuple):
    """One measurement: value and baseline in `unit`; ratio = baseline / value, with its range."""

    name: str
    value: float
    unit: str
    baseline: float
    ratio: float
    low: float
    high: float
    against: str
    machine: str


class Shape(NamedTuple):
    """A GPT-2 and the batch of one member: `batch` sequences of `seq` tokens."""

    config: gpt2.Config
    batch: int
    seq: int
    steps: int  # in one timed call


def _gpt2(d, layers, heads, vocab):
    return gpt2.Config(vocab_size=vocab, n_positions=128, n_embd=d, n_layer=layers, n_head=heads)


SHAPES = {
    "d64": Shape(_gpt2(64, 2, 4, 1024), 2, 128, 10),
    "nano": Shape(_gpt2(128, 4, 4, 1024), 16, 128, 10),
    "small": Shape(_gpt2(768, 12, 12, 50257), 1, 128, 2),
}
MEMBERS, RANK = 8, 8


def bench_sweep(shapes: list[str], rounds: int) -> list[Row]:
    """Training time a member and step of 8 LoRA members (r = 8 on q and v) together.

    Against the same program for one member eight times over, and against PEFT in float32 where
    torch is installed.
    """
    rows = []
    for name in shapes:
        shape = SHAPES[name]
        sides = {"together": _ours(shape, MEMBERS), "alone": _ours(shape, 1)}
        peft = _peft(shape)
        if peft:
            sides["peft"] = peft
        seconds = _measure(sides, rounds)
        tokens = f"{shape.batch} x {shape.seq}"
        for baseline, text in (
            ("alone", "lorax, one by one"),
            ("peft", "PEFT float32, one by one"),
        ):
            if baseline in seconds:
                label = f"sweep of {MEMBERS}, {name} (d {shape.config.n_embd}, {tokens})"
                rows.append(_row(label, seconds["together"], seconds[baseline], text))
    return rows


def _ours(shape: Shape, members: int) -> Callable[[], float]:
    """Function that trains for a while and returns the seconds of a member's step."""
    c = config.default()
    c.train.update(batch_size=shape.batch, seq_len=shape.seq, steps=1_000_000, warmup=0)
    c.method.rank = RANK
    c.sweep.seed = tuple(range(members))
    module = gpt2.GPT2(shape.config)
    example = np.zeros((1, 1), np.int32)
    params = jax.jit(module.init)(jax.random.key(0), example)["params"]
    base = Base(
        module, params, shape.config, None, ops.sites(module, params, example), "gpt2", "", ""
    )
    tokens = np.random.default_rng(0).integers(0, shape.config.vocab_size, (256, shape.seq + 1))
    rows = {"tokens": tokens.astype(np.int32), "mask": np.ones(tokens.shape, np.float32)}
    task = tasks.Task("random", rows, {name: x[:1] for name, x in rows.items()}, "")

    chosen = config.members(c)
    stacked = sweep.stack(chosen, sweep.build_methods(chosen, base), base)
    k = shape.steps
    host = sweep.train_batches(stacked, task, 0, k)
    one = tree.shapes({name: x[0] for name, x in host.items()})
    evals = tree.shapes(sweep.eval_batches(task, 1))
    programs = sweep.fit(stacked, base, chosen[0].config.train, one, evals)
    params, batches = programs.place_base(base.params), programs.place_batches(host)
    constants, hyper = programs.place(stacked.constants), programs.place(stacked.hyper)
    state = programs.place(stacked.state)

    def run() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(programs.train(params, constants, hyper, state, batches))
        return (time.perf_counter() - begin) / (members * k)

    return run


def _peft(shape: Shape) -> Callable[[], float] | None:
    """The same for one member under PEFT (c_attn at the same rank has as many parameters)."""
    try:
        import peft
        import torch
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    c = shape.config
    hf = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.n_positions, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    lora = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(hf).to(device), lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3)
    tokens = torch.randint(0, c.vocab_size, (shape.batch, shape.seq + 1), device=device)

    def loss():
        logits = model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def run(steps=shape.steps) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            loss().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    return run


def _measure(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each side in each round, after one round to warm up."""
    found = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            seconds = run()
            if i:
                found[name].append(seconds)
    return {name: np.array(seconds) for name, seconds in found.items()}


def _row(name, seconds, baseline, against) -> Row:
    ratios = baseline / seconds
    middle = float(np.median(ratios))
    times = float(np.median(seconds)) * 1e3, float(np.median(baseline)) * 1e3
    return Row(
        name, times[0], "ms", times[1], middle, float(ratios.min()), float(ratios.max()),
        against, _machine(),
    )  # fmt: skip


def _machine() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores"


BENCHES = {"sweep": bench_sweep}


def main(arguments: list[str]) -> int:
    """The command line: measure, print a table and, where asked, write its rows as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m lorax.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="+", choices=BENCHES, help="what to measure")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=7, help="of each comparison")
    parser.add_argument("--json", help="file for the rows")
    given = parser.parse_args(arguments)
    shapes = given.shapes.split(",")
    if set(shapes) - set(SHAPES):
        parser.error(f"--shapes: {given.shapes!r} given; there is {', '.join(SHAPES)}")
    sweep.split_cpu()
    rows = [row for name in given.name for row in BENCHES[name](shapes, given.rounds)]
    table = Table(title=f"{_machine()}, jax {jax.__version__}", title_justify="left")
    for heading in ("", "time", "against", "its time", "ratio"):
        table.add_column(heading, justify="left" if heading in ("", "against") else "right")
    for row in rows:
        times = (f"{row.value:.2f} {row.unit}", row.against, f"{row.baseline:.2f} {row.unit}")
        table.add_row(row.name, *times, f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]")
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    if given.json:
        text = json.dumps([row._asdict() for row in rows], indent=1) + "\n"
        write_bytes(given.json, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
