"""A sweep on a mesh of devices, each of which holds a part of the base, is the sweep of one
device."""

import functools
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from quick import jit
from safetensors.numpy import load_file
from support import few

from lorax import catalogue, config, quant, sharding, tasks, tree, xla
from lorax.models import directories, load
from lorax.train import fitting, loop, prepare, stacks
from lorax.train.batches import batch_shapes, eval_batches, train_batches

LAYERS, WIDTH, INNER, VOCABULARY, LENGTH, ROWS = 3, 512, 512, 96, 32, 16
ONE, FLAT, LINES, CUBE = "auto", "fsdp=4,tensor=2", "member=2,fsdp=4", "member=2,fsdp=2,tensor=2"


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """Of a Llama with random weights."""
    fields = dict(
        model_type="llama", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("llama")
    (directory / "config.json").write_text(json.dumps(fields))
    return f"random:{directory}"


def counting() -> tasks.Task:
    """Rows of growing numbers."""
    rng = np.random.default_rng(0)

    def rows(n):
        tokens = np.cumsum(rng.integers(1, 3, (n, LENGTH + 1)), axis=1).astype(np.int32)
        mask = np.ones(tokens.shape, np.float32)
        mask[:, :3] = 0
        return {"tokens": tokens % VOCABULARY, "mask": mask}

    return tasks.Task("count", rows(32), rows(8), "")


class Trained:
    """Three steps of a sweep's members on a mesh: base, programs, state, losses (M, 3), loss of the
    evaluation (M,), compiled: the programs that train."""

    def __init__(self, name, task, mesh, axes, changes=(), quantised=None):
        members = config.members(settings(mesh, axes, dict(changes)))
        c = members[0].config
        on = fitting.base_mesh(c, None, len(members))
        place = on and (lambda params, sites: sharding.shardings(params, sites, on))
        base = load(name, place=place, remat=c.train.remat)
        if quantised:
            params = quant.quantize(base.params, quantised, sites=base.sites)
            base = base.replace(params=params)
        self.base, stack = base, stacks.stack(members, stacks.build_methods(members, base), base)
        k, evals = 1 if c.train.offload else 3, eval_batches(task, 8)
        shapes = tree.shapes(batch_shapes(c.train, task, k)), tree.shapes(evals)
        with pytest.MonkeyPatch.context() as patch:
            self.compiled = seen(patch)
            patch.setattr(jax, "jit", jit)
            self.programs = fitting.fit(stack, base, c.train, *shapes, task.kind)
        p = self.programs
        self.params, state = p.place_base(base.params), p.place_state(stack.state)
        others, losses = (p.place(stack.constants), p.place(stack.hyper)), []
        for first in range(0, 3, k):
            batches = p.place_batches(train_batches(stack, task, first, k))
            state, logs = p.train(self.params, *others, state, batches)
            losses.append(np.asarray(logs["loss"])[: len(members)])
        self.state, self.losses = state, np.concatenate(losses, axis=1)
        rows = p.place_rows(evals)
        self.loss = p.evaluate(self.params, others[0], p.learned(state), rows)[0][: len(members)]


def settings(mesh, axes, changes):
    c = config.default()
    c.train.update(steps=3, batch_size=ROWS, seq_len=LENGTH, warmup=0, lr=5e-3, mesh=mesh)
    c.train.update(schedule="constant", parallel="none" if mesh == ONE else "auto")
    c.eval.update(every=3, batch_size=8, test=0)
    c.update_from_flattened_dict(changes)
    for axis, values in axes.items():
        c.sweep[axis] = values
    return c


def seen(patch) -> list:
    """The programs whose bytes are asked for."""
    programs, count = [], xla.program_bytes
    patch.setattr(xla, "program_bytes", lambda p: programs.append(p) or count(p))
    return programs


def assert_same(ours: Trained, reference: Trained):
    np.testing.assert_allclose(ours.losses, reference.losses, rtol=1e-5)
    np.testing.assert_allclose(ours.loss, reference.loss, rtol=1e-5)
    assert (np.asarray(reference.losses)[:, -1] != np.asarray(reference.losses)[:, 0]).all()


LAYER = WIDTH * INNER  # numbers of the largest kernel of one layer


def assert_divided(ours: Trained, each: int = 1):
    """Each device has its part of every kernel, and of what full fine-tuning makes of it, and the
    compiled program has no array of floats as large as a stack of whole kernels; what devices send
    to each other of a weight is at most one layer of it. each: members with weights of their own,
    side by side."""
    shape = ours.programs.layout.shape
    parts = shape.fsdp * shape.tensor
    for path in ours.base.sites:
        for x in jax.tree.leaves(tree.flatten(ours.params)[path]):
            if x.size > LAYER // 64:
                assert x.addressable_shards[0].data.size * parts == x.size, path
    for x in jax.tree.leaves((ours.state.trainable, ours.state.opt_state)):
        if x.size >= LAYERS * LAYER:  # trained in full, of all members
            assert x.addressable_shards[0].data.size * shape.size == x.size
    size = lambda axes: math.prod(map(int, axes.split(",")))
    sent = []
    for program in ours.compiled:
        text = program.as_text()
        arrays = re.findall(r"(?:f32|bf16|u8)\[([\d,]+)\]", text)
        assert max(map(size, arrays)) < LAYERS * LAYER
        sent += re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    assert sent and max(map(size, sent)) <= each * LAYER // shape.tensor


METHODS = {
    "lora": ({"rank": (2, 4)}, None),
    "dora": ({"method": ("dora",), "seed": (0, 1)}, None),
    "nf4": ({"rank": (2, 4)}, "nf4"),
    "full": ({"method": ("full",), "seed": (0, 1)}, None),
}


CASES = [(method, mesh) for method in METHODS for mesh in (FLAT, LINES, CUBE)]
#: Each method once and each mesh; the rest of the product is soak.
QUICK, SLOW = [("lora", CUBE), ("nf4", FLAT)], [("full", LINES), ("dora", FLAT)]


@pytest.fixture(scope="module")
def task():
    return counting()


@functools.cache
def on_one_device(name, method):
    axes, quantised = METHODS[method]
    return Trained(name, counting(), ONE, axes, quantised=quantised)


@pytest.mark.parametrize(("method", "mesh"), few(CASES, QUICK, SLOW))
def test_a_mesh_trains_what_one_device_trains(name, task, method, mesh):
    axes, quantised = METHODS[method]
    one = on_one_device(name, method)
    ours = Trained(name, task, mesh, axes, quantised=quantised)
    assert one.programs.layout.mode == "none" and str(ours.programs.layout.shape) == mesh
    assert_same(ours, one)
    assert_divided(ours, ours.programs.layout.width if method == "full" else 1)


@pytest.mark.slow
def test_what_changes_a_step_changes_it_the_same_on_a_mesh(name, task):
    """Dropout, parts of batches, recomputed layers, an offloaded optimiser that averages."""
    changes = {"method.dropout": 0.2, "train.accumulate": 2, "train.remat": "full"}
    changes |= {"train.offload": "optimizer", "train.optimizer": "schedule-free"}
    one, ours = (Trained(name, task, mesh, {"rank": (2, 4)}, changes) for mesh in (ONE, CUBE))
    assert_same(ours, one)
    assert_divided(ours)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(ours.state.opt_state)}
    assert kinds == {"pinned_host"}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """The name of a GPT-2 with random weights: with biases, and a head that is its embedding."""
    fields = dict(model_type="gpt2", vocab_size=1024, n_positions=64, n_embd=64, n_layer=2)
    directory = tmp_path_factory.mktemp("gpt2")
    (directory / "config.json").write_text(json.dumps(fields | {"n_head": 4}))
    shutil.copy(directories.find("gpt2-nano") / "tokenizer.json", directory)
    return f"random:{directory}"


OTHERS = [method for method in catalogue.ROWS if method not in METHODS]
#: One of each kind: triplets that are pruned, layers between others, what is put before the text,
#: one vector for all weights.
KINDS = ["adalora", "pfeiffer", "prefix", "subspace"]


@pytest.mark.parametrize("method", few(OTHERS, [], KINDS))
def test_every_method_trains_on_a_mesh(gpt2, task, method):
    axes = {"method": (method,), "seed": (0, 1)}
    one, ours = (Trained(gpt2, task, mesh, axes, {}) for mesh in (ONE, CUBE))
    assert_same(ours, one)


def run(workdir, base, mesh):
    """A run of two members as `lorax.run` makes it; what was said."""
    rows = [{"prompt": f"{i} is", "completion": "odd" if i % 2 else "even"} for i in range(60)]
    file = workdir.parent / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = settings(mesh, {"seed": (0, 1)}, {"train.steps": 4, "train.seq_len": 12})
    c.eval.update(every=2, examples=8, batch_size=8, test=8)
    c.base, c.analysis.trajectory = base, True
    c.task.update(name="instruct", path=str(file))
    workdir.mkdir(exist_ok=True)
    said = []
    groups = prepare.groups(config.members(c), said.append)
    terminal = loop.Terminal(said.append, lambda done, total: None, lambda row: None)
    loop.train(workdir, groups, terminal)
    return said


def written(workdir):
    """Losses, and the arrays of the adapters."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    files = sorted((workdir / "adapters").rglob("*.safetensors"))
    arrays = {(file.parent.name, name): x for file in files for name, x in load_file(file).items()}
    assert len(files) == 2
    return [line["loss"] for line in lines], arrays


def test_a_run_on_a_mesh_is_that_of_one_device_and_goes_on_on_any_mesh(gpt2, tmp_path):
    one, whole, torn, other = (tmp_path / name for name in ("one", "whole", "torn", "other"))
    run(one, gpt2, ONE)
    said = run(whole, gpt2, CUBE)
    assert any(f"on 8 cpu devices, {CUBE};" in line for line in said)
    for copy in (torn, other):
        shutil.copytree(whole, copy)
        shutil.rmtree(copy / "checkpoints/0-0/4")
        shutil.rmtree(copy / "adapters")
    assert any("continues at step 2 of 4" in line for line in run(torn, gpt2, CUBE))
    assert any("continues at step 2 of 4" in line for line in run(other, gpt2, ONE))
    losses, adapters = written(whole)
    same, exported = written(torn)
    assert same == losses
    for name, x in exported.items():
        np.testing.assert_array_equal(x, adapters[name])
    for elsewhere in (one, other):
        found, exported = written(elsewhere)
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        for name, x in exported.items():
            np.testing.assert_allclose(x, adapters[name], atol=1e-5)
