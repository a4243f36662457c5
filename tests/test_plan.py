"""A plan says what the real thing takes: arrays, the compiled program, memory, FLOPs."""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import quick
from support import few, require

import lorax
from lorax import config, halving, methods, sharding, tasks, tree
from lorax.calls import steps_per_call
from lorax.devices import DEVICES
from lorax.memory import Free
from lorax.meshes import Shape
from lorax.models import shapes as architectures
from lorax.models.load import skeleton
from lorax.planning import compiled, costs, field, roofline, shapes, spread, tables
from lorax.train import fitting, layouts, mesh_costs, stacks
from lorax.train.batches import batch_shapes
from lorax.train.programs import compile_programs
from lorax.xla import program_bytes

ROOT = Path(__file__).parents[1]
TINY = {
    "tiny-gpt2": {
        "model_type": "gpt2",
        "vocab_size": 512,
        "n_positions": 128,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
    },
    "tiny-llama": {
        "model_type": "llama",
        "vocab_size": 500,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 172,
    },
    "wide-llama": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 688,
    },
    "deep-llama": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 344,
    },
    "tiny-roberta": {
        "model_type": "roberta",
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 130,
    },
}


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    for name, fields in TINY.items():
        monkeypatch.setitem(architectures.ARCHITECTURES, name, fields)


def members_of(base="tiny-gpt2", ranks=(8,), **changes):
    return config.members(config_of(base, ranks, **changes))


def config_of(base="tiny-gpt2", ranks=(8,), **changes):
    c = config.default()
    c.base = f"random:{base}"
    c.train.batch_size, c.train.seq_len, c.eval.every = 4, 64, 2
    c.sweep.rank = ranks
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (c[section] if section else c)[name] = value
    return c


def real_stack(members):
    """(`Base`, `Stack`) with arrays in place of shapes."""
    base, _ = shapes.shapes(members)
    base = base.replace(params=jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), base.params))
    return base, stacks.stack(members, stacks.build_methods(members, base), base)


# ------------------------------------------------------------------------------------------- exact


IMAGES = {"task__name": "mnist", "method__targets": ("re:(conv|dense)_2/kernel",)}
FAST = ["dora", "adalora", "bitfit", "houlsby", "llama-adapter"]


@pytest.mark.parametrize("name", few(methods.METHODS, FAST))
def test_shapes_are_those_of_the_arrays(name):
    """Of every method: the same trees, so that every exact number is exact."""
    base = "tiny-llama" if name == "llama-adapter" else "tiny-gpt2"
    changes = {"method__target_rank": 2} if name == "adalora" else {}
    ranks = (2, 4) if name == "gralora" else (2, 3)  # a multiple of its blocks
    if name in ("lora-subspace", "tinylora", "randlora"):  # members of a group share the rank
        ranks, changes = (2,), {"sweep__seed": (0, 1)}
    members = members_of(base, ranks=ranks, method__name=name, **changes)
    assert len(members) == 2
    _, shaped = shapes.shapes(members)
    _, stacked = real_stack(members)
    for found, want in zip(shaped[2:], stacked[2:], strict=True):
        assert found == jax.eval_shape(lambda t: t, want)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("tiny-gpt2", {}),
        ("tiny-llama", {"method__targets": ("all-linear",), "param_dtype": "bfloat16"}),
        ("tiny-llama", {"method__init": "pissa"}),
        ("tiny-gpt2", {"train__optimizer": "sgd"}),
        ("tiny-gpt2", {"train__optimizer": "muon"}),
        ("tiny-gpt2", {"train__optimizer": "adafactor"}),
        ("tiny-gpt2", {"train__optimizer": "schedule-free", "train__schedule": "constant"}),
        ("tiny-roberta", {"task__name": "glue", "task__subset": "cola"}),
        ("mnist-lenet", IMAGES),
    ],
)
def test_exact_numbers_are_the_arrays(base, changes, monkeypatch):
    nothing = compiled.Measured(0, 0, 0, 0)
    monkeypatch.setattr(compiled, "measure", lambda *_: {(w, False): nothing for w in (1, 2)})
    members = members_of(base, ranks=(2, 8), **changes)
    p = costs.plan(members)
    base, stacked = real_stack(members)
    assert p.weights == tree.nbytes(base.params) and p.parameters == tree.count(base.params)
    assert 2 * p.adapters == 2 * p.gradients == tree.nbytes(stacked.state.trainable)
    assert 2 * p.optimizer == tree.nbytes(stacked.state.opt_state)
    assert 2 * p.constants == tree.nbytes(stacked.constants)
    assert p.trainable == [m.count(base.params, base.sites) for m in stacked.methods]
    assert p.trainable[1] == tree.count(stacked.state.trainable) // 2  # the largest has no padding
    method = stacked.methods[1]
    if method.hp["init"] == "kaiming":
        state = jax.tree.map(lambda x: x[1], (stacked.state.trainable, stacked.constants))
        factors = method.factors(*state, base.params, base.sites)
        whole = {path: x for path, x in tree.flatten(state[0]).items() if path.endswith("/w")}
        arrays = [x for a, b, *_ in factors.values() for x in (a, b)] + [*whole.values()]
        assert p.files_exact and p.files[1] == 4 * tree.count(arrays)
    else:
        assert not p.files_exact and p.files[1] == 8 * p.trainable[1]  # also what is taken off


@pytest.mark.parametrize("name", ["digits", "planted"])
def test_batches_of_arrays_are_planned_without_reading_them(name):
    (member,) = members_of("mlp-64-12-10", task__name=name, method__targets=("re:.*",))
    c, base = member.config, lorax.load("random:mlp-64-12-10")
    task = tasks.build(c.task, None, c.train.seq_len, None, base)
    k = steps_per_call(c.eval.every)
    planned, real = shapes.rows(c, base), batch_shapes(c.train, task, k)
    flat = lambda batch: {name: (x.shape[:3], x.size, x.dtype) for name, x in batch.items()}
    assert flat(planned) == flat(real)
    p = costs.plan([member])
    assert p.name == "lora on random:mlp-64-12-10, 4 arrays a step" and p.parameters == 910


def test_weights_that_are_not_there_are_planned_all_the_same(tmp_path):
    """Of a directory only config.json is read, and a head that it does not name is new."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "num_hidden_layers": 1}'
    )
    base = skeleton(str(tmp_path), head="classification", labels=3)
    assert {path.split("/")[0] for path in base.fresh} == {"head"} and base.vocabulary is None
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(base.params))
    assert skeleton(str(tmp_path)).fresh == ()
    assert skeleton("gpt2-nano").sites == lorax.load("gpt2-nano").sites


# --------------------------------------------------------------------------------------- estimated


def compiled_sweep(members, width, monkeypatch, options=quick.OPTIONS, mode="none", shape=None):
    """The training program that a run compiles for these members."""
    shape = shape or Shape()
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=options))
    kept = []
    keep = lambda x: kept.append(x) or program_bytes(x)
    monkeypatch.setattr("lorax.xla.program_bytes", keep)
    base, stacked = shapes.shapes(members)
    batch = shapes.rows(members[0].config, base)
    evaluation = {
        name: jax.ShapeDtypeStruct((1, *x.shape[2:]), x.dtype) for name, x in batch.items()
    }
    devices = tuple(jax.devices()[: shape.size])
    layout = layouts.Layout(mode, devices, len(members), width, shape)
    kind = tasks.kind_of(members[0].config.task)
    programs = compile_programs(stacked, base, layout, batch, evaluation, kind)
    return programs.bytes, kept[0]


HALF = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
PEAKS = [
    ("tiny-gpt2", 1, 1, {}),
    ("tiny-gpt2", 3, 3, {"train__remat": "full", "train__accumulate": 2}),
    ("tiny-gpt2", 4, 4, {"train__remat": "full", "method__dropout": 0.1}),
    ("tiny-gpt2", 2, 2, {"method__init": "pissa"}),
    ("tiny-llama", 2, 2, {"train__remat": "full"}),
    ("tiny-llama", 2, 2, {"train__remat": "dots"}),
    ("tiny-gpt2", 2, 1, {"train__remat": "dots", "train__accumulate": 2}),
    ("tiny-llama", 3, 3, {"train__offload": "optimizer"}),
    ("tiny-gpt2", 4, 2, {"train__offload": "optimizer", "train__remat": "full"}),
    ("tiny-llama", 4, 2, {"train__accumulate": 2}),
    ("tiny-llama", 4, 2, HALF),
    ("tiny-llama", 2, 1, {"operands": "bfloat16"}),
    ("tiny-llama", 2, 2, {"quant": "nf4", "train__remat": "full"}),
    ("tiny-gpt2", 3, 1, {"quant": "nf4", **HALF}),
    ("tiny-llama", 1, 1, {"quant": "int8", "double_quant": False}),
    ("mnist-lenet", 2, 2, IMAGES),
    ("tiny-llama", 1, 1, {"train__seq_len": 1024, "train__batch_size": 1}),
]


@pytest.mark.parametrize(
    ("base", "n", "width", "changes"), few(PEAKS, [], [PEAKS[i] for i in (1, 5, 8, 10, 12)])
)
def test_peak_is_the_compiled_programs(base, n, width, changes, monkeypatch):
    """Within 3 %, of the program that a CPU would run; temporaries dominate it."""
    members = members_of(base, ranks=(8, 4, 2, 1)[:n], train__width=width, **changes)
    p = costs.plan(members, ["cpu"])
    found, _ = compiled_sweep(members, width, monkeypatch)
    assert p.cpu.width == p.width == width and p.cpu.temporaries > found / 3
    assert p.peak(n, p.cpu) == pytest.approx(found, rel=0.03)


BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u8": 1, "pred": 1}


def received(text: str, layers: int) -> dict[str, float]:
    """{collective: bytes that a device receives} of a compiled step. layers: how often operations
    of the loop over layers count, which is there with remat alone."""
    total = {}
    for line in text.splitlines():
        found = re.search(r"= (.*?) (all-gather|all-reduce|all-to-all)(?:-start)?\(", line)
        if not found:
            continue
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
        size = sum(
            BYTES[kind] * math.prod(map(int, filter(None, n.split(",")))) for kind, n in arrays
        )
        if named := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):
            sizes = dict(part.split("=") for part in named[1].split(","))
            among = math.prod(int(sizes[axis.strip()]) for axis in named[2].split(","))
        elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
            among = len(listed[1].split(","))
        else:
            among = int(re.search(r"replica_groups=\[\d+,(\d+)\]", line)[1])
        turns = 2 if found[2] == "all-reduce" else 1
        turns *= layers if re.search(r'op_name="[^"]*Decoder.hidden\)+/while', line) else 1
        key = f"{found[2]} of {among}"
        total[key] = total.get(key, 0) + turns * size * (among - 1) / among
    return total


MESHES = [
    ("deep-llama", Shape(1, 4, 2), {"train__remat": "full"}),
    ("deep-llama", Shape(2, 4, 1), {}),
    ("wide-llama", Shape(1, 4, 1), {"quant": "nf4"}),
    ("tiny-llama", Shape(1, 4, 2), {"method__name": "full"}),
    ("tiny-gpt2", Shape(2, 2, 2), {"train__offload": "optimizer"}),
]


@pytest.mark.parametrize(("base", "shape", "changes"), few(MESHES, MESHES[:3]))
def test_bytes_of_a_device_of_a_mesh_are_the_compiled_programs(base, shape, changes, monkeypatch):
    """Within 10 %, and what it receives is what the program sends."""
    members = members_of(base, ranks=(8, 4)[: shape.member], train__batch_size=8, **changes)
    p = spread.plan(members, "cpu", shape.size, str(shape))
    assert p.each == p.width == 1 and p.spread.shape == shape
    found, program = compiled_sweep(members, 1, monkeypatch, mode="mesh", shape=shape)
    assert p.peak(1, p.at(1)._replace(temporaries=_temporaries(p))) == pytest.approx(found, rel=0.1)
    whole = tree.nbytes(p.load.base.params)
    assert p.weights < 1.1 * whole / (shape.fsdp * shape.tensor)
    if base == "deep-llama":
        layers = 6 if "train__remat" in changes else 1
        sent, got = received(program.as_text(), layers), mesh_costs.traffic(p.load, shape)
        assert sent["all-gather of 4"] == pytest.approx(got.weights, rel=0.1)
        if shape.tensor > 1:
            assert sent["all-reduce of 2"] == pytest.approx(got.activations, rel=0.1)


def _temporaries(p):
    """Without the whole weight that only an accelerator decodes."""
    return p.at(1).temporaries - compiled.widest_decoded(p.load.base.params, "float32")


@pytest.fixture
def quickly(monkeypatch):
    """Nothing is compiled: temporaries of 1,000 bytes for each member."""

    def measured(stacked, base, batch, wanted, spread=None):
        return {key: compiled.Measured(1000 * key[0], 1e6, 0, 1e3) for key in wanted}

    monkeypatch.setattr(compiled, "measure", measured)


@pytest.mark.parametrize(
    ("n", "rows", "memory", "mode", "shape"),
    [
        (8, 4, 1e9, "members", Shape(8, 1, 1)),
        (3, 8, 1e9, "batch", Shape(1, 8, 1)),
        (3, 4, 1e9, "none", Shape()),
        (8, 8, 2.2e6, "mesh", None),
        (1, 8, 1, "mesh", None),
    ],
)
def test_the_mesh_is_the_one_that_a_run_takes(n, rows, memory, mode, shape, monkeypatch, quickly):
    """With room for it the base is copied to every device, as `layouts.layout` has it; without it
    is divided as `fitting.base_mesh` does."""
    members = members_of("wide-llama", ranks=tuple(range(1, n + 1)), train__batch_size=rows)
    monkeypatch.setattr(spread, "memory_of", lambda name: memory)
    p = spread.plan(members, "h200", 8, "auto")
    assert p.spread.mode == mode and p.spread.shape == (shape or p.spread.shape)
    c, base = members[0].config, p.load.base
    if shape:
        devices = tuple(Faked("gpu") for _ in range(8))
        chosen = layouts.layout(n, c.train, base, devices)
        assert (chosen.mode, chosen.shape) == p.spread
    else:
        devices = tuple(jax.devices())
        monkeypatch.setattr("lorax.train.fitting.memory_limit", lambda *_: Free(int(memory), ""))
        monkeypatch.setattr("lorax.train.fitting.of_kind", lambda _: DEVICES["h200"])
        c.unlock()
        c.train.memory_gb = 1.0  # so that a CPU's devices are taken for several
        taken = fitting.base_mesh(c, lambda: base, n, devices)
        assert sharding.shape_of(taken) == p.spread.shape and p.spread.shape.size > 1


class Faked(NamedTuple):
    platform: str


def test_the_sweep_takes_its_steps_and_evaluations(quickly):
    members = members_of("wide-llama", ranks=(1, 2, 3, 4, 5, 6, 7, 8), train__batch_size=8)
    one = spread.plan(members, "h200", 1, None)
    wide = spread.plan(members, "h200", 8, "member=8")
    on_one, on_eight = (roofline.on_device(p, "h200") for p in (one, wide))
    assert wide.each == 1 and on_eight.communication_seconds == 0
    assert on_one.compute_seconds == pytest.approx(on_eight.compute_seconds)  # of one width
    assert on_eight.sweep_seconds > one.steps[0] * on_eight.step_seconds
    none = wide._replace(evaluated=(0, 0))
    steps = roofline.on_device(none, "h200").sweep_seconds
    assert steps == pytest.approx(one.steps[0] * on_eight.step_seconds)
    divided = spread.plan(members, "h200", 8, "fsdp=4,tensor=2")
    on = roofline.on_device(divided, "h200")
    assert on.step_seconds == max(on.compute_seconds, on.moving_seconds, on.communication_seconds)
    assert on.apart_seconds > on.step_seconds > on_eight.step_seconds
    # Machines that do not talk: each has a part of the members.
    parts = roofline.in_parts(divided, "h200", 32)
    assert parts[:3] == (4, 8, "fsdp=4,tensor=2")
    halved = roofline.in_parts(divided._replace(members=16), "h200", 32)
    assert parts.seconds < halved.seconds <= 2 * parts.seconds
    assert roofline.in_parts(wide, "h200", 8)[:3] == (1, 8, "member=8")


def test_many_devices_are_shown_and_in_columns(quickly):
    c = config_of("wide-llama", train__batch_size=8)
    (row,) = lorax.plan(c, "h200", mesh="fsdp=4,tensor=2").to_dict("records")
    base = skeleton("random:wide-llama")
    assert row["weights"] == mesh_costs.nbytes(base, Shape(1, 4, 2)) < tree.nbytes(base.params) / 7
    assert (row["mesh"], row["mode"], row["devices"]) == ("fsdp=4,tensor=2", "mesh", 8)
    assert row["weights_received"] > row["gradients_received"] > 0 < row["activations_received"]
    assert row["apart_seconds"] > row["step_seconds"] >= row["communication_seconds"] > 0
    assert row["gathered"] == mesh_costs.gathered(base, Shape(1, 4, 2))
    p = spread.plan(config.members(c), "h200", 8, "fsdp=4,tensor=2")
    first, second = tables.describe_mesh(0, p, "h200", 8)
    assert first.title == "Group 0 on 8 h200: fsdp=4,tensor=2" and "DGX H200" in first.note
    cells = {line[0]: line[1] for line in first.rows}
    assert cells["weights"] == tables.bytes_text(row["weights"])
    assert cells["received in a step: weights"] == tables.bytes_text(row["weights_received"])
    assert second.rows[0][0] == "fsdp=4,tensor=2 (taken)" and second.rows[1][0].startswith("1 part")
    assert len({len(line) for line in [second.headings, *second.rows]}) == 1


@pytest.mark.parametrize(
    ("mesh", "hosts", "message"),
    [
        ("data=2", None, "train.mesh: 'data=2' given, must be auto or sizes of member"),
        ("fsdp=16", 1, "--mesh: fsdp=16 needs 16 devices, and 1 host has 8"),
        ("auto", 0, "--hosts: 0 given, must be at least 1"),
        ("fsdp=8", None, "--mesh: fsdp=8 does not divide the 4 rows"),
        (
            "fsdp=4,tensor=4",
            None,
            "is compiled for 16 devices of a CPU, and JAX has started with 8",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(mesh, hosts, message):
    c = config_of(train__batch_size=4)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        lorax.plan(c, "h200", mesh=mesh, hosts=hosts)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_made_again_costs_work_and_saves_memory():
    """Activations as the plan shows them: none > dots > full, and FLOPs the other way round."""
    words = ("none", "dots", "full")
    plans = [costs.plan(members_of("wide-llama", train__remat=word)) for word in words]
    none, dots, full = (p.at(1) for p in plans)
    assert none.temporaries > dots.temporaries > full.temporaries
    assert none.full < dots.full < full.full
    shown = [tables.describe(0, p, [])[0].rows for p in plans]
    labels = [next(row[0] for row in rows if row[0].startswith("activations")) for rows in shown]
    assert [label.split(", ")[1] for label in labels] == [
        "kept for the backward pass",
        "recomputed except products",
        "recomputed in the backward pass",
    ]


def test_long_rows_take_memory_as_their_length_and_not_as_its_square():
    rows = (dict(train__seq_len=t, train__batch_size=1) for t in (1024, 2048))
    one, two = (costs.plan(members_of("tiny-llama", **row)).at(1).temporaries for row in rows)
    assert 1.8 * one < two < 2.1 * one


def test_an_offloaded_state_is_shown_and_not_on_the_device(monkeypatch):
    measured = {(1, False): compiled.Measured(10**7, 0, 0, 0)}
    monkeypatch.setattr(compiled, "measure", lambda *_: measured)
    here, away = (
        costs.plan(members_of(ranks=(8,), train__offload=where)) for where in (None, "optimizer")
    )
    rest = here.rest - away.rest  # of batches: one step a call and not two
    assert here.optimizer == away.optimizer > 2 * here.adapters and here.state == away.state
    peak = lambda p: p.peak(1, p.at(1))
    assert peak(here) - peak(away) - rest == here.optimizer
    small = away.at(1)._replace(temporaries=0)  # then the update takes the most
    assert away.peak(1, small) == away.weights + away.state + away.gradients + away.constants
    lines = {row[0]: row[1] for row in tables.describe(0, away, [])[0].rows}
    assert lines["optimiser state, in the host memory"] == tables.bytes_text(away.optimizer)


@pytest.mark.parametrize("changes", few([{}, {"method__name": "full"}], [{}]))
def test_flops_are_the_compiled_programs(changes, monkeypatch):
    """Of a program without loops, which XLA counts whole. Of the first layer it computes less: what
    is before it does not ask for a gradient."""
    members = members_of("wide-llama", eval__every=1, **changes)
    cost = costs.plan(members).at(1)
    _, program = compiled_sweep(members, 1, monkeypatch)
    assert cost.half == 0
    assert cost.full == pytest.approx(program.cost_analysis()["flops"], rel=0.06)


def test_work_counts_loops_what_is_made_again_and_nothing_dead():
    n, turns = 8, 5
    w, x = jnp.ones((turns, n, n)), jnp.ones((3, n))
    one = lambda x, w: (jnp.sin(x @ w), jnp.sum(x @ (2 * w)))  # the second is never read
    run = lambda x, w: jax.lax.scan(one, x, w)[0]
    again = lambda x, w: jax.lax.scan(jax.checkpoint(one, prevent_cse=False), x, w)[0]
    product = 2 * 3 * n * n
    flops = lambda f, *args: compiled.work(jax.make_jaxpr(f)(*args))[:2].tolist()
    assert flops(run, x, w) == [0, turns * product]
    loss = lambda f: jax.grad(lambda x: jnp.sum(f(x, w)))
    assert flops(loss(run), x) == [0, 2 * turns * product]
    assert flops(loss(again), x) == [0, 3 * turns * product]
    half = lambda t: t.astype(jnp.bfloat16)
    assert flops(run, half(x), half(w)) == [turns * product, 0]
    assert compiled.work(jax.make_jaxpr(jnp.matmul)(x, w[0]))[2] == 4 * (2 * 3 * n + n * n)
    kernel = jnp.ones((3, n, 4))  # a window of 3 over 4 groups of features
    wide = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    assert flops(wide, jnp.ones((2, 7, n)), kernel) == [0, 2 * (2 * 7 * 4) * (3 * n)]


def test_steps_that_halving_saves_are_not_planned(monkeypatch):
    nothing = compiled.Measured(0, 0, 0, 0)
    monkeypatch.setattr(compiled, "measure", lambda *given: dict.fromkeys(given[3], nothing))
    c = config.default()
    c.base, c.train.steps = "random:tiny-gpt2", 80
    c.sweep.rank, c.sweep.lr = (2, 8), (1e-3, 2e-3, 3e-3, 4e-3, 5e-3)
    whole, tuned = {}, {}
    for found, c.sweep.tune in ((whole, None), (tuned, "lr")):
        (found["row"],) = lorax.plan(c).to_dict("records")
        members = config.members(c)
        p = costs.plan(members, (), halving.race(c, members))
        lines = tables.describe(0, p, [])[0].rows
        (found["line"],) = (x for x in lines if "steps of" in x[0])
        (found["rows"],) = (x for x in lines if "rows evaluated" in x[0])
    assert whole["row"]["steps"] == 800 and whole["line"][1:] == ("80", "800", "exact")
    assert tuned["row"]["steps"] == 2 * (5 * 10 + 2 * 10 + 60)
    assert tuned["line"][1:] == ("80", "260", "estimated")
    assert whole["rows"][1:] == ("768", "7,680", "at most")  # 256 rows at steps 0, 50 and 80
    assert tuned["rows"][1:] == ("1,280", "12,800", "at most")  # and at the rungs, steps 10 and 20


def test_members_that_fit_are_the_most_that_fit():
    line = costs.Cost(1, 100.0, 1.0, 0.0, 1.0), costs.Cost(5, 460.0, 5.0, 0.0, 5.0)
    sizes = dict(weights=1000, adapters=3, constants=1, gradients=3, optimizer=6, rest=2)
    p = costs.Plan(
        members=5, steps=(1, 5), width=5, name="", remat="none", offload=False, parameters=0,
        trainable=[1], files=[1], files_exact=True, costs=list(line), cpu=None, **sizes,
    )  # fmt: skip
    assert p.at(3).temporaries == 280 and p.at(9).temporaries == 820
    assert p._replace(costs=[line[0]]).at(3).temporaries == 300
    for side_by_side in (True, False):
        peak = lambda n, s=side_by_side: p.peak(n, p.at(n if s else 1))
        for memory in (1000, 1112, 1113, 1500, 12345, 123456):
            n = p.most(memory, side_by_side)
            assert (n == 0 or peak(n) <= memory) and peak(n + 1) > memory
    assert p.most(1500, False) > p.most(1500, True) > 0


RSS = """
import os, resource, sys
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp
from lorax import config, tasks
from lorax.planning import costs, shapes
from lorax.models import shapes as architectures
from lorax.train import fitting, layouts, mesh_costs, stacks
from lorax.train.programs import compile_programs

architectures.ARCHITECTURES["gpt2-of-8"] = {
    "model_type": "gpt2", "n_layer": 8, "n_embd": 512, "n_head": 8, "vocab_size": 8192
}
c = config.default()
c.base, c.train.batch_size, c.train.seq_len, c.eval.every = "random:gpt2-of-8", 8, 256, 1
members = config.members(c)
expected = costs.plan(members, ["cpu"])
base, shaped = shapes.shapes(members)
batch = shapes.rows(c)
layout = layouts.Layout("none", tuple(jax.devices()[:1]), 1, 1)
evaluation = {name: jax.ShapeDtypeStruct((1, *x.shape[2:]), x.dtype) for name, x in batch.items()}
kind = tasks.kind_of(c.task)
programs = compile_programs(shaped, base, layout, batch, evaluation, kind)
resident = lambda key: next(
    1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)
)
filled = lambda t: jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), t)
stacked = stacks.stack(members, shaped.methods, base)  # adapters alone; reads no weights
before = resident("VmRSS")
base = base.replace(params=filled(base.params))
batches = jax.tree.map(lambda x: jnp.ones((1, *x.shape), x.dtype), batch)
state, logs = programs.train(base.params, stacked.constants, stacked.hyper, stacked.state, batches)
assert jnp.isfinite(logs["loss"]).all()
print(resident("VmHWM") - before, expected.peak(1, expected.cpu))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_is_the_memory_that_a_step_takes():
    out = run_python("-c", RSS)
    grown, expected = map(int, out.stdout.split())
    assert expected == pytest.approx(grown, rel=0.1) and grown > 300e6


# ---------------------------------------------------------------------------------- known numbers


def run_python(*arguments, check=True):
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=plain,
        capture_output=True,
        text=True,
        check=check,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("name", "rank", "targets", "count"),
    [
        ("gpt3-175b", 1, ("q", "v"), 4_718_592),  # LoRA, arXiv:2106.09685, table 4
        ("gpt3-175b", 4, ("q", "v"), 18_874_368),  # table 5
        ("gpt3-175b", 8, ("q",), 18_874_368),
        ("gpt3-175b", 2, ("attention",), 18_874_368),
        ("gpt3-175b", 8, ("q", "v"), 37_748_736),  # table 4
        ("gpt2-medium", 4, ("q", "v"), 393_216),  # table 3 has 0.35M
        ("gpt2-large", 4, ("q", "v"), 737_280),
        ("roberta-base", 8, ("q", "v"), 294_912),  # table 2: 0.3M
        ("roberta-large", 8, ("q", "v"), 786_432),  # 0.8M
        ("deberta-v2-xxlarge", 16, ("q", "v"), 4_718_592),  # 4.7M
    ],
)
def test_trainable_parameters_of_the_lora_paper(name, rank, targets, count):
    base = field.architecture_of(name)
    assert lorax.method("lora", rank=rank, targets=targets).count(base.params, base.sites) == count


def test_bytes_of_the_lora_and_qlora_papers():
    full, _, lora = field.compare("gpt3-175b").values()
    # "from 1.2TB ...": the paper does not say of what. In 16 bits all of it is 1.27 TiB, 1.40 TB.
    assert full.total16 == 8 * full.trainable
    assert full.total16 / 2**40 == pytest.approx(1.2, rel=0.07)
    assert lora.total32 == 2 * full.trainable + 12 * lora.trainable
    assert lora.total32 / 1e9 == pytest.approx(350, rel=0.01)  # "... to 350GB"
    assert lora.checkpoint / 2**20 == pytest.approx(35, rel=0.03)  # "from 350GB to 35MB"
    assert full.checkpoint / lora.checkpoint == pytest.approx(10_000, rel=0.08)
    full, _, qlora = field.compare("llama-65b").values()
    assert full.total32 / 1e9 == pytest.approx(780, rel=0.01)  # "> 780 GB"
    assert qlora.total32 < 48e9  # "a single 48GB GPU"


def test_bits_of_a_quantised_parameter():
    """4.5 bits, 4.127 with double quantisation (QLoRA, section 3), of the linear kernels alone."""
    base = field.architecture_of("llama-65b")
    kernels = sum(
        leaf.size for path, leaf in tree.flatten(base.params).items() if path.startswith("h/")
        and path.endswith("kernel")
    )  # fmt: skip
    rest = 2 * (tree.count(base.params) - kernels)
    size = lambda kind, double: tree.nbytes(shapes.quantised(base, kind, double).params) - rest
    assert size("nf4", False) * 8 / kernels == 4.5
    assert size("nf4", True) * 8 / kernels == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-6)
    saved = size("nf4", False) - size("nf4", True)
    assert saved / 1e9 == pytest.approx(3.03, rel=0.01)  # "approximately 3 GB for a 65B model"
    assert size("fp4", True) == size("nf4", True)
    assert size("int8", False) * 8 / kernels == 8.5
    coded = shapes.quantised(base, "nf4", True)
    assert compiled.widest_decoded(coded.params, "bfloat16") == 2 * 8192 * 22016


CLASSES = {
    "roberta": "RobertaForMaskedLM",
    "deberta-v2": "DebertaV2ForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "falcon": "FalconForCausalLM",
}


@pytest.mark.parametrize(
    "name",
    ["gpt2-xl", "llama-65b", "llama2-70b", "falcon-7b", "falcon-180b", "roberta-large"]
    + ["deberta-v2-xxlarge"],
)
def test_architectures_are_as_large_as_in_transformers(name):
    torch, transformers = require("torch"), require("transformers")
    fields = architectures.ARCHITECTURES[name]
    model = getattr(transformers, CLASSES[fields["model_type"]])
    with torch.device("meta"):
        theirs = model(model.config_class(**fields | {"num_hidden_layers": 2, "n_layer": 2}))
    ours = dict(fields, **{"n_layer" if "n_layer" in fields else "num_hidden_layers": 2})
    architectures.ARCHITECTURES[name] = ours
    try:
        count = tree.count(skeleton(f"random:{name}").params)
    finally:
        architectures.ARCHITECTURES[name] = fields
    assert count == sum(p.numel() for p in theirs.parameters())


# -------------------------------------------------------------------------------- the command line

CONFIG = "--config=configs/gpt2_rank_sweep.py"
GPT3 = """
import resource, sys
from lorax import plan
code = plan.main(["plan", *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_SELF)
resident = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, used.ru_utime + used.ru_stime, 1024 * int(resident.split()[1]))
"""


def test_gpt3_takes_seconds_and_little_memory():
    """Time of the processor, which others on the machine don't lengthen: on its own it is less."""
    changes = {"base": "random:gpt3-175b", "dtype": "bfloat16", "param_dtype": "bfloat16"}
    changes |= {"train.remat": "full", "train.batch_size": 1, "train.seq_len": 2048}
    changes |= {"sweep.rank": "(4,)", "sweep.seed": "(0,)", "sweep.full_lr": "()"}
    changes |= {"method.targets": "('q','v')"}
    given = [f"--config.{key}={value}" for key, value in changes.items()]
    out = run_python("-c", GPT3, CONFIG, *given).stdout
    code, seconds, peak = map(float, out.splitlines()[-1].split())
    assert code == 0 and seconds < 10 and peak < 1e9
    for line in ("18,874,368", "174,604,259,328", "349 GB", "75.5 MB", "151 MB", "does not fit"):
        assert line in out, line
    assert out.count("exact") >= 10 and out.count("estimated") >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "lorax: --config is missing"),
        (
            [CONFIG, "--device=h20"],
            "lorax: --device: 'h20' is not one of h200.*did you mean 'h200'",
        ),
        ([CONFIG, "--config.base=random:lama-7b"], "lorax: base: 'lama-7b' is neither shipped"),
        ([CONFIG, "--tabel"], "lorax: Unknown command line flag 'tabel'"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    done = run_python("-m", "lorax.plan", *arguments, check=False)
    assert done.returncode == 2 and re.match(message, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("tiny-gpt2", {"train__seq_len": 4096}, "train.seq_len: 4096 given, .* has 128 positions"),
        ("tiny-gpt2", {"ranks": (512,)}, "method.rank: 512 given, but .* at most 64"),
        ("tiny-gpt2", {"method__targets": ("auto:3",)}, "decided by training batches"),
        ("tiny-roberta", {}, "is no causal model: restaurants"),
        ("mnist-fc", {}, "reads images, but task 'restaurants' has texts"),
        ("tiny-gpt2", {"task__name": "mnist"}, "reads tokens, but task 'mnist' has arrays"),
        ("mnist-fc", {"task__name": "mnist", "train__remat": "full"}, "has no setting remat"),
    ],
)
def test_what_does_not_fit_the_base_is_an_error(base, changes, message):
    with pytest.raises(ValueError, match=message):
        shapes.shapes(members_of(base, **changes))


def test_tables_in_markdown():
    out = run_python("-m", "lorax.plan", "--table", "--markdown").stdout
    assert "| gpt3-175b, LoRA r = 4, q+v | 18,874,368 | 349 GB |" in out
    assert "| falcon-7b, q+v |" in out and out.count("\n| --- |") == 4
    page = (ROOT / "docs/many_machines.md").read_text().splitlines()
    shown = [line for line in page if " h200 | fsdp=" in line]
    assert len(shown) == 9 and all(line in out for line in shown)


def test_help_helps():
    out = run_python("-m", "lorax.plan", "--help").stdout
    assert all(word in out for word in ("--config", "--device", "--table", "h200", "Estimated"))
