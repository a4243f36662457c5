"""Measure lorax on this machine against the alternatives.

    python -m lorax.bench sweep
    python -m lorax.bench step mixed
    python -m lorax.bench load --rounds=3
    python -m lorax.bench sweep --shapes=nano --rounds=5 --json=sweep.json

A row has a time, what it is compared with, and the median ratio over rounds (above 1: faster than
the baseline) with its range in brackets. The two sides of a ratio take turns within each round,
because a machine's speed drifts; compare only rows of the same run.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from rich.table import Table

from lorax import analysis, config, decode, intercept, leaves, methods, models, quant, tasks, tree
from lorax.console import console
from lorax.files import write_bytes
from lorax.models import Base, gpt2
from lorax.train import fitting, layouts, stacks
from lorax.train.batches import eval_batches, train_batches


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
STEP = Shape(dataclasses.replace(SHAPES["small"].config, n_positions=256), 4, 256, 3)
MEMBERS, RANK = 8, 8
SVD_WIDTHS = (768, 1024, 2048, 4096)


def bench_sweep(shapes: list[str], rounds: int) -> list[Row]:
    """Training time per member and step of 8 LoRA members (r = 8 on q and v) trained together.

    The baselines are the same program for one member, run eight times, and PEFT in float32 if torch
    is installed.
    """
    rows = []
    for name in shapes:
        shape = SHAPES[name]
        sides = {"together": _train(shape, MEMBERS), "alone": _train(shape, 1)}
        if _torch():
            sides["peft"] = _peft_train(shape)
        seconds = _measure(sides, rounds)
        label = f"sweep of {MEMBERS}, {name} (d {shape.config.n_embd}, {shape.batch} x {shape.seq})"
        rows.append(_row(label, seconds["together"], seconds["alone"], "lorax, one by one"))
        if "peft" in seconds:
            rows.append(_row(label, seconds["together"], seconds["peft"], "PEFT, one by one"))
    return rows


def bench_step(shapes: list[str], rounds: int) -> list[Row]:
    """Time of one LoRA training step (r = 8 on q and v) against PEFT's in float32: GPT-2 small with
    4 sequences of 256 tokens, in float32 and with bfloat16 operands."""
    shape = STEP
    sides = {operands: _train(shape, 1, operands) for operands in ("float32", "bfloat16")}
    if not _torch():
        raise SystemExit("bench step compares with PEFT: pip install torch peft transformers")
    sides["peft"] = _peft_train(shape)
    seconds = _measure(sides, rounds)
    label = f"step, GPT-2 small, {shape.batch} x {shape.seq}"
    return [
        _row(f"{label}, {operands}", seconds[operands], seconds["peft"], "PEFT float32")
        for operands in ("float32", "bfloat16")
    ]


def bench_dora(shapes: list[str], rounds: int) -> list[Row]:
    """Time of one DoRA training step against LoRA's (r = 8 on q and v), one member."""
    rows = []
    for name in shapes:
        sides = {method: _train(SHAPES[name], 1, name=method) for method in ("dora", "lora")}
        seconds = _measure(sides, rounds)
        rows.append(_row(f"DoRA step, {name}", seconds["dora"], seconds["lora"], "LoRA"))
    return rows


def bench_subspace(shapes: list[str], rounds: int) -> list[Row]:
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
        ("gpt2-nano", SHAPES["nano"], kinds),
        ("GPT-2 small", STEP._replace(steps=6), ("Fastfood",)),
    ):
        sides = {kind: _train(shape, 1, dim=1000, **kinds[kind]) for kind in chosen}
        seconds = _measure(sides | {"full": _train(shape, 1, name="full")}, rounds)
        for kind in chosen:
            label = f"subspace step, {kind}, {name}, {shape.batch} x {shape.seq}"
            rows.append(_row(label, seconds[kind], seconds["full"], "full fine-tuning"))
    return rows


def bench_mixed(shapes: list[str], rounds: int) -> list[Row]:
    """Forward pass of a batch whose 8 rows use 8 adapters (r = 8 on q, k, v, o, up, down) against
    PEFT's mixed batch: reading a prompt, then one more token with a cache."""
    if not _torch():
        raise SystemExit("bench mixed compares with PEFT: pip install torch peft transformers")
    rows = []
    for name, shape in (("nano", SHAPES["nano"]), ("small", SHAPES["small"])):
        for reads, tokens in (("prompts of 32 tokens", 32), ("the next token", 1)):
            sides = {"lorax": _mixed(shape, tokens), "peft": _peft_mixed(shape, tokens)}
            seconds = _measure(sides, rounds)
            label = f"8 rows with 8 adapters, {name}, {reads}"
            rows.append(_row(label, seconds["lorax"], seconds["peft"], "PEFT, mixed batch"))
    return rows


def bench_nf4(shapes: list[str], rounds: int) -> list[Row]:
    """A 4096 x 4096 weight in NF4 with blocks of 64: quantising, dequantising, and its product with
    1 to 4096 rows in float32, against bitsandbytes and the product with the unquantised weight."""
    if not importlib.util.find_spec("bitsandbytes"):
        raise SystemExit("bench nf4 compares with bitsandbytes: pip install bitsandbytes torch")
    import bitsandbytes
    import torch

    n, rng = 4096, np.random.default_rng(0)
    w = rng.standard_normal((n, n)).astype(np.float32)  # (out, in)
    ours, theirs = jax.numpy.asarray(w.T), torch.tensor(w)
    leaf = quant.quantise(ours)
    codes, state = bitsandbytes.functional.quantize_4bit(theirs, quant_type="nf4")
    # Its layer repacks the codes for evaluation.
    layer = bitsandbytes.nn.Linear4bit(n, n, bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(theirs, quant_type="nf4", requires_grad=False)
    layer = layer.to("cpu").eval()
    decode = jax.jit(quant.Quantised.rows_of_outputs)
    sides = {
        "quantise": lambda: quant.quantise(ours).codes,
        "quantise, theirs": lambda: bitsandbytes.functional.quantize_4bit(theirs, quant_type="nf4"),
        "dequantise": lambda: decode(leaf),
        "dequantise, theirs": lambda: bitsandbytes.functional.dequantize_4bit(codes, state),
    }
    rows = []
    with torch.no_grad():
        seconds = _measure({name: _timed(run) for name, run in sides.items()}, rounds)
        for name in ("quantise", "dequantise"):
            theirs_in = seconds[f"{name}, theirs"]
            rows.append(_row(f"NF4, 4096 x 4096, {name}", seconds[name], theirs_in, "bitsandbytes"))
        product = jax.jit(lambda x, leaf: leaf.product(x, 0))
        dense = jax.jit(lambda x, w: x @ w)
        for count in (1, 16, 256, 4096):
            x = rng.standard_normal((count, n)).astype(np.float32)
            rows_in, theirs_in = jax.numpy.asarray(x), torch.tensor(x)
            against = {
                "bitsandbytes, matmul_4bit": lambda x=theirs_in: bitsandbytes.matmul_4bit(
                    x, codes.t(), state
                ),
                "bitsandbytes, layer in evaluation": lambda x=theirs_in: layer(x),
                "JAX, float32 weight": lambda x=rows_in: dense(x, ours),
            }
            sides = {"lorax": lambda x=rows_in: product(x, leaf)} | against
            seconds = _measure({name: _timed(run) for name, run in sides.items()}, rounds)
            for name in against:
                label = f"NF4, product with {count} rows"
                rows.append(_row(label, seconds["lorax"], seconds[name], name))
    return rows


def bench_svd(shapes: list[str], rounds: int) -> list[Row]:
    """SVD of an update dW = a @ b from its factors (r = 8 and 64) against numpy's SVD of the dense
    product, both in float64. The first is the fastest of three calls, the second a single call;
    4096 x 4096 takes so long that it gets one round."""
    rows, rng = [], np.random.default_rng(0)
    for n in SVD_WIDTHS:
        for r in (8, 64):
            a, b = rng.standard_normal((n, r)), rng.standard_normal((r, n))
            sides = {
                "factors": _timed(lambda a=a, b=b: analysis.factor_svd(a, b)),
                "dense": _once(lambda a=a, b=b: np.linalg.svd(a @ b, full_matrices=False)),
            }
            seconds = _measure(sides, min(rounds, 1) if n >= 4096 else rounds)
            label = f"SVD of dW, {n} x {n}, r = {r}"
            rows.append(_row(label, seconds["factors"], seconds["dense"], "numpy, dense"))
    return rows


LOAD = """
import json, sys, time
start, (side, path, dtype) = time.process_time(), sys.argv[1:]
if side == "lorax":
    import jax, lorax
    lorax.load("gpt2-nano")
else:
    import torch, transformers
    from transformers import AutoModelForCausalLM
    transformers.utils.logging.disable_progress_bar()
    from transformers.models.llama import modeling_llama
def peak():  # Linux's; `getrusage` has that of the process which started this one, too
    lines = [line.split() for line in open("/proc/self/status")]
    return next(1024 * int(words[1]) for words in lines if words[0] == "VmHWM:")
before, begin = peak(), time.process_time()
if side == "lorax":
    loaded = jax.block_until_ready(jax.tree.leaves(lorax.load(path, param_dtype=dtype).params))
    size = sum(x.nbytes for x in loaded)
else:
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).parameters()
    loaded = [x.detach() for x in loaded]
    [x.sum() for x in loaded]
    size = sum(x.nbytes for x in loaded)
end = time.process_time()
print(json.dumps([end - begin, end - start, (peak() - before) / size]))
"""


def bench_load(shapes: list[str], rounds: int) -> list[Row]:
    """Loading a LLaMA of 135 million parameters (SmolLM2's shape; 538 MB in float32) against
    transformers' `from_pretrained`, each in a process of its own: CPU time of the call alone, and
    with the imports before it. transformers maps the files into memory, so its side ends when every
    weight has been read once. Memory is the peak of the process above what it has before the call,
    as a multiple of the weights in the dtype that is asked for."""
    if not _torch():
        raise SystemExit("bench load compares with transformers: pip install torch transformers")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for stored, asked in (
            ("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"),
        ):  # fmt: skip
            path = os.path.join(directory, stored)
            if not os.path.exists(path):
                base = models.load("random:smollm2-135m", param_dtype=stored)
                models.save(path, base, stored)
            sides = {
                side: functools.partial(_loading, side, path, asked)
                for side in ("lorax", "transformers")
            }
            found = _measure(sides, rounds)
            for i, what in enumerate(
                ("CPU time of the call", "CPU time with imports", "peak memory")
            ):
                ours, theirs = (found[side][:, i] for side in sides)
                row = _row(f"load, {asked} from {stored}, {what}", ours, theirs, "from_pretrained")
                per = 1e-3 if what == "peak memory" else 1
                unit = "x weights" if what == "peak memory" else "ms"
                rows.append(
                    row._replace(value=per * row.value, baseline=per * row.baseline, unit=unit)
                )
    return rows


def _loading(side: str, path: str, dtype: str) -> list[float]:
    """[CPU seconds of the call, the same with imports, peak memory] of one process."""
    command = [sys.executable, "-c", LOAD, side, path, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _once(run: Callable) -> Callable[[], float]:
    """Seconds of one call."""

    def seconds():
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    return seconds


def _timed(run: Callable) -> Callable[[], float]:
    """Seconds of one call, the fastest of three."""

    once = _once(run)
    return lambda: min(once() for _ in range(3))


def _base(shape: Shape, param_dtype: str = "float32") -> Base:
    config = shape.config
    module = gpt2.GPT2(config)
    example = np.zeros((1, 1), np.int32)
    params = jax.jit(module.init)(jax.random.key(0), example)["params"]
    params = jax.tree.map(lambda x: x.astype(param_dtype), params)
    return Base(module, params, config, None, intercept.sites(module, params, example), "gpt2", "")


def _train(shape: Shape, members: int, operands="float32", **method) -> Callable[[], float]:
    """A function that trains for a few steps and returns the seconds per member and step. method:
    keys of `config.method`."""
    c = config.default()
    c.train.update(batch_size=shape.batch, seq_len=shape.seq, steps=1_000_000, warmup=0)
    c.method.update({"rank": RANK} | method)
    c.operands = c.param_dtype = operands
    c.sweep.seed = tuple(range(members))
    base = _base(shape, operands)
    tokens = np.random.default_rng(0).integers(0, shape.config.vocab_size, (256, shape.seq + 1))
    rows = {"tokens": tokens.astype(np.int32), "mask": np.ones(tokens.shape, np.float32)}
    task = tasks.Task("random", rows, {name: x[:1] for name, x in rows.items()}, "")

    chosen = config.members(c)
    stacked = stacks.stack(chosen, stacks.build_methods(chosen, base), base)
    k = shape.steps
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


def _mixed(shape: Shape, tokens: int, adapters: int = 8) -> Callable[[], float]:
    """Seconds of one pass over (8, tokens), row i with adapter i, after a cache of 32 tokens."""
    base, rng = _base(shape), np.random.default_rng(0)
    flat, n = tree.flatten(base.params), adapters
    for path, site in methods.resolve(("attention", "mlp"), base.sites).items():
        (layers,), n_in, n_out = site.matrix_shape(flat[path].shape)
        draw = lambda *shape: jax.numpy.asarray(0.02 * rng.standard_normal(shape), "float32")
        a, b = draw(layers, n, n_in, RANK), draw(layers, n, RANK, n_out)
        s, rows = (
            np.ones((layers, n), np.float32),
            np.tile(np.arange(n, dtype=np.int32), (layers, 1)),
        )
        flat[path] = leaves.Mixed(flat[path], a, b, jax.numpy.asarray(s), jax.numpy.asarray(rows))
    params = tree.unflatten(flat)
    ids = rng.integers(0, shape.config.vocab_size, (n, 64)).astype(np.int32)
    read = jax.jit(lambda params, ids, cache: decode.read(base.module, params, ids, None, cache))
    cache = base.module.empty_cache(n, 64)
    if tokens == 1:
        _, cache = read(params, ids[:, :32], cache)
    part = ids[:, -tokens:]

    def run(times=4) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            jax.block_until_ready(read(params, part, cache)[0])
        return (time.perf_counter() - begin) / times

    return run


def _torch() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "peft", "transformers"))


def _peft_model(shape: Shape, targets):
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    on_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    c = shape.config
    hf = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.n_positions, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    lora = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=targets, fan_in_fan_out=True)
    model = transformers.GPT2LMHeadModel(hf).to("cuda" if on_gpu else "cpu")
    return peft.get_peft_model(model, lora), lora


def _peft_train(shape: Shape) -> Callable[[], float]:
    """`_train` of one member with PEFT (c_attn with the same rank has as many parameters)."""
    import torch

    model, _ = _peft_model(shape, ["c_attn"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3)
    tokens = torch.randint(0, shape.config.vocab_size, (shape.batch, shape.seq + 1))
    tokens = tokens.to(model.device)

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
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    return run


def _peft_mixed(shape: Shape, tokens: int, adapters: int = 8) -> Callable[[], float]:
    """`_mixed` with PEFT: `adapter_names` holds each row's adapter."""
    import copy

    import torch

    model, lora = _peft_model(shape, ["c_attn", "c_proj", "c_fc"])
    names = ["default"] + [f"adapter{i}" for i in range(1, adapters)]
    for name in names[1:]:
        model.add_adapter(name, lora)
    model.eval()
    ids = torch.randint(0, shape.config.vocab_size, (adapters, 64)).to(model.device)

    @torch.no_grad()
    def run(times=4) -> float:
        past = None
        if tokens == 1:
            past = model(input_ids=ids[:, :32], adapter_names=names, use_cache=True).past_key_values
        caches = [copy.deepcopy(past) for _ in range(times)]
        begin = time.perf_counter()
        for cache in caches:
            model(
                input_ids=ids[:, -tokens:], adapter_names=names, use_cache=True,
                past_key_values=cache, logits_to_keep=1,
            )  # fmt: skip
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times

    return run


def _measure(sides: dict[str, Callable], rounds: int) -> dict[str, np.ndarray]:
    """What each side returns, seconds, in each round, after a warm-up round."""
    times = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            seconds = run()
            if i:
                times[name].append(seconds)
    return {name: np.array(seconds) for name, seconds in times.items()}


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


BENCHES = {
    "sweep": bench_sweep,
    "step": bench_step,
    "dora": bench_dora,
    "subspace": bench_subspace,
    "mixed": bench_mixed,
    "nf4": bench_nf4,
    "svd": bench_svd,
    "load": bench_load,
}


def main(arguments: list[str]) -> int:
    """The command line: measure, print a table and, if asked, write its rows as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m lorax.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="+", choices=BENCHES, help="what to measure")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each comparison")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args(arguments)
    shapes = args.shapes.split(",")
    if set(shapes) - set(SHAPES):
        parser.error(f"--shapes: {args.shapes!r} given; there is {', '.join(SHAPES)}")
    layouts.split_cpu()
    # Otherwise torch's threads spin after each call and take cores from the side that runs next.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rows = [row for name in args.name for row in BENCHES[name](shapes, args.rounds)]
    table = Table(title=f"{_machine()}, jax {jax.__version__}", title_justify="left")
    for heading in ("", "time", "against", "its time", "ratio"):
        table.add_column(heading, justify="left" if heading in ("", "against") else "right")
    for row in rows:
        times = (f"{row.value:.2f} {row.unit}", row.against, f"{row.baseline:.2f} {row.unit}")
        table.add_row(row.name, *times, f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]")
    console(width=None if sys.stdout.isatty() else 130).print(table)
    if args.json:
        text = json.dumps([row._asdict() for row in rows], indent=1) + "\n"
        write_bytes(args.json, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
