"""A base that a mesh of devices divides: what reads its weights beside training finds what it finds
on one device, and no device or host ever gathers more than one layer's matrix."""

import functools
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pandas as pd
import pytest
from quick import jit
from safetensors.numpy import load_file
from small import three_layers
from support import few

import lorax
from lorax import adapters, config, decode, gather, methods, models, sharding, tasks
from lorax.methods import sensitivity, starts
from lorax.models import Base, gpt2
from lorax.tasks import kinds
from lorax.train import activations, evidence, layouts, stacks, trajectory
from lorax.train import step as steps
from lorax.train.members import placement

MESHES = ("fsdp=4,tensor=2", "member=2,fsdp=4")
LLAMA = dict(
    model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
)  # fmt: skip

MOMENTS = 68 * 68  # of the 64 inputs of down in a layer, their sums, and three columns for the mesh


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    directory = tmp_path_factory.mktemp("base")
    (directory / "config.json").write_text(json.dumps(LLAMA))
    return lorax.load(f"random:{directory}")


def divided(base: Base, shape: str) -> Base:
    """The base with its arrays in parts on the devices of a mesh."""
    mesh = sharding.mesh(sharding.parse(shape))
    places = sharding.shardings(base.params, base.sites, mesh)
    return base.replace(params=jax.device_put(base.params, places))


@pytest.fixture
def gathered(monkeypatch) -> list[int]:
    """Sizes of the arrays that were gathered on the host."""
    sizes, whole = [], gather.hosts.whole

    def count(x):
        sizes.extend(leaf.size for leaf in jax.tree.leaves(x))
        return whole(x)

    monkeypatch.setattr(gather.hosts, "whole", count)
    return sizes


def largest(base: Base) -> int:
    """Numbers in the largest matrix of one layer."""
    return max(np.prod(shape) for shape in models.kernels(base).shapes.values())


def assert_close(found, expected, tolerance=1e-5):
    """Trees of arrays that are the same to `tolerance` of each array's largest number."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        y = np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(initial=0))


def assert_same(found, expected):
    """Trees of arrays with the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def rows(n=8, width=9, vocabulary=64):
    tokens = np.random.default_rng(0).integers(3, vocabulary, (n, width)).astype(np.int32)
    return {"tokens": tokens, "mask": np.ones(tokens.shape, np.float32)}


# ---------------------------------------------------------------------------------- kernels, starts


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_kernels_are_read_layer_by_layer(base, shape, quant, gathered):
    one = base if quant is None else lorax.quantize(base, quant, double=True)
    kernels, many = models.kernels(one), models.kernels(divided(one, shape))
    assert list(many) == list(kernels) and many.shapes == kernels.shapes and not gathered
    assert_same(dict(many), dict(kernels))
    assert max(gathered) <= largest(base)


def test_kernels_of_files_are_read_from_them():
    base = models.unread("gpt2-nano")
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(base.params))
    assert_same(dict(models.kernels(base)), dict(models.kernels(lorax.load("gpt2-nano"))))


@pytest.fixture(scope="module")
def statistics(base):
    """Evidence of two kernels of the base on one device, and divided over a mesh."""
    batches = {name: x.reshape(2, 4, -1) for name, x in rows().items()}
    of = lambda base: sensitivity.evidence(
        base, kinds.TEXTS, batches, ("h/attn/q/kernel", "h/mlp/down/kernel"), sensitivity.STATISTICS
    )
    return of(base), of(divided(base, MESHES[0]))


def test_evidence_and_what_is_chosen_by_it(statistics, gathered):
    one, many = statistics
    for path, of_path in many.items():
        for name, x in of_path.items():
            for layer in ((0,), (1,)):
                assert_close(gather.layer(x, layer), gather.layer(one[path][name], layer))
            held = x.matrices if name == "moments" else x
            assert held.addressable_shards[0].data.size == held.size // 8
    most = 2 * 8 * 64 * 4
    choose = lambda x: sensitivity.choose(sensitivity.rank_matrices(x, 4), 4, n=3, budget=most)
    assert choose(many) == choose(one)
    allot = lambda worth: starts.redistribute(worth, 4)
    assert allot(sensitivity.spectra(many)) == allot(sensitivity.spectra(one))
    assert allot(starts.explained(many)) == allot(starts.explained(one))
    assert max(gathered) <= MOMENTS


@pytest.mark.parametrize("shape", MESHES)
def test_starts_are_those_of_one_device(base, statistics, shape, gathered):
    """The same bits of the same evidence, as the same routine decomposes the same matrix."""
    spread, (one, many) = divided(base, shape), statistics
    for init in starts.STARTS:
        if init == "loftq":
            continue
        method = lorax.method("lora", rank=3, init=init, targets=("q", "down"))
        start = lambda base, seen, m=method: m.init(
            jax.random.key(0), base.params, base.sites, evidence=seen
        )
        expected = start(base, one)
        assert_same(start(spread, one), expected)
        if shape == MESHES[0]:
            assert_close(_products(start(spread, many)), _products(expected), 1e-4)
    # Lengths of columns are summed in another order in a stack of layers.
    dora = lorax.method("dora", rank=3, targets=("q", "down"))
    assert_close(*(dora.init(jax.random.key(0), b.params, b.sites) for b in (spread, base)), 1e-6)
    assert max(gathered) <= MOMENTS


def _products(state) -> dict:
    """{path: a b} of the factors that start, without what is subtracted."""
    return {path: np.asarray(f["a"] @ f["b"]) for path, f in methods.joined(*state).items()}


@pytest.mark.parametrize("shape", few(MESHES, keep=MESHES[:1]))
def test_loftq_starts_from_what_a_layer_loses_in_codes(base, shape, gathered):
    coded = lorax.quantize(base, "nf4")
    method = lorax.method("lora", rank=3, init="loftq", targets=("q", "down"))

    def start(base):
        residual = evidence.residual(base, base.name, method.adapts(base.params, base.sites))
        return method.init(jax.random.key(0), base.params, base.sites, evidence=residual)

    expected = start(coded)
    assert any(np.any(x) for x in jax.tree.leaves(expected.trainable))
    assert_same(start(divided(coded, shape)), expected)
    assert max(gathered) <= largest(base)


# ------------------------------------------------------------------------------- trained members


def _moved(trainable, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(draw, trainable)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_spectra_are_those_of_one_device(base, name, gathered):
    hp = {"lora": dict(rank=3), "full": dict(parameters=("q", "embed"))}[name]
    method = lorax.method(name, **hp)
    state = method.init(jax.random.key(0), base.params, base.sites)
    trainable = jax.tree.map(lambda *x: np.stack(x), *(_moved(state.trainable, i) for i in (1, 2)))
    constants = jax.tree.map(lambda x: np.stack([x, x]), state.constants)
    decompose = trajectory.decomposer(method, base.sites)
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = decompose(*jax.device_put((base.params, constants, trainable), alone), [{}, {}])
    spread = divided(base, MESHES[1])
    mesh = layouts.Layout("mesh", tuple(jax.devices()), 2, 1, sharding.parse(MESHES[1]))
    placed = [
        jax.device_put(x, placement(mesh, base).of_members(x)) for x in (constants, trainable)
    ]
    found = decompose(spread.params, *placed, [{}, {}])
    assert_close(found, expected)
    assert max(gathered) <= largest(base)


def test_similarity_of_activations_is_that_of_one_device(base):
    method = lorax.method("lora", rank=3)
    state = method.init(jax.random.key(0), base.params, base.sites)
    trees = (jax.tree.map(lambda x: np.stack([x]), t) for t in (_moved(state.trainable), state[1]))
    trees, task = [*trees], tasks.Task("random", rows(), rows(), "")
    cka = lambda base: activations.similarity(base, method, *trees, task, 8, 4)
    expected = cka(base)
    assert expected.min() < 0.999
    np.testing.assert_allclose(cka(divided(base, MESHES[0])), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("beams", few([1, 2], keep=[1]))
def test_texts_are_those_of_one_device(base, beams):
    method = lorax.method("lora", rank=3)
    state = method.init(jax.random.key(0), base.params, base.sites)
    state = state._replace(trainable=_moved(state.trainable))
    options = decode.DecodingOptions(max_new_tokens=6, ends=(1,), num_beams=beams)
    tokens = rows(4)["tokens"]

    def write(base):
        bound, mesh = (
            method.bind(*state, base.params, sites=base.sites),
            gather.mesh_of(base.params),
        )
        given = gather.side_by_side((tokens, np.ones_like(tokens)), mesh, axis=0)
        lowered = decode.generate.lower(
            base.module, bound, *given, jax.random.key(0), options, mesh
        )
        compiled = lowered.compile()
        return compiled(bound, *given, jax.random.key(0)), compiled.memory_analysis()

    (expected, whole), (found, parts) = write(base), write(divided(base, MESHES[0]))
    np.testing.assert_array_equal(found, expected)
    assert parts.temp_size_in_bytes < whole.temp_size_in_bytes / 2


# ------------------------------------------------------------------------------------ every method

HP = {
    "lora": dict(rank=2), "adalora": dict(rank=3), "subspace": dict(dim=5), "said": dict(dim=14),
    "lora-subspace": dict(dim=5, rank=2), "prefix": dict(tokens=2), "prompt": dict(tokens=2),
    "oft": dict(block_size=4), "fourierft": dict(frequencies=9), "randlora": dict(rank=4),
    "llama-adapter": dict(tokens=2), "lora+": dict(rank=2, full=("norms", "embed")),
    "miss": dict(rank=5), "hira": dict(rank=2), "shira": dict(rank=2),
}  # fmt: skip


@functools.cache
def _gpt2() -> Base:
    small = three_layers()
    c = gpt2.Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2, n_inner=12)
    return Base(small.module, small.params, c, None, small.sites, "gpt2", "tiny")


#: One of each kind, beside full fine-tuning; the others are soak.
KINDS = ["adalora", "lokr", "vera", "prefix", "said"]


@pytest.mark.parametrize("name", few(list(methods.METHODS), ["full"], KINDS))
def test_a_method_starts_trains_and_is_exported(name, tmp_path, gathered):
    method, c = lorax.method(name, **HP.get(name, {})), config.default()
    c.train.update(
        lr=0.01, warmup=0, optimizer="sgd"
    )  # Adam divides the rounding of zeros by itself
    batches = {k: x[:, None] for k, x in rows(8, 7, 20).items()}
    batches = jax.tree.map(lambda x: x.reshape(2, 1, 4, 7), batches)
    member = config.Member(0, "0", {}, c)

    def trained(base, folder):
        program = steps.Program(
            base.module, method, base.sites, c.train, dropout=False, merge=False, kind=kinds.TEXTS
        )
        constants, hyper, state = stacks.start(member, method, base, stacks.padding([method], base))
        given = gather.side_by_side(batches, gather.mesh_of(base.params), axis=2)
        step = jit(functools.partial(steps.train_steps, program))
        state, logs = step(base.params, constants, hyper, state, given)
        learned = adapters.from_training(base, method, methods.State(state.trainable, constants))
        adapters.save(folder, learned, "tiny")
        arrays = {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
        return np.asarray(logs["loss"]), arrays

    one = trained(_gpt2(), tmp_path / "one")
    gathered.clear()
    losses, arrays = trained(divided(_gpt2(), MESHES[0]), tmp_path / "many")
    np.testing.assert_allclose(losses, one[0], rtol=1e-5)
    assert arrays.keys() == one[1].keys() and arrays
    for file, expected in one[1].items():
        assert arrays[file].keys() == expected.keys()
        for key, x in expected.items():
            np.testing.assert_allclose(arrays[file][key], x, rtol=0, atol=1e-5, err_msg=key)
    own = max(x.size for of_file in arrays.values() for x in of_file.values())
    assert max(gathered, default=0) <= (20 * 8 if name == "full" else max(20 * 8, own))


# ------------------------------------------------------------------------------------- a whole run


def spanned(file):
    """The arrays of a file; of directions what they span together, because their signs, and which
    is which of two that are nearly as large, are rounding."""
    span = lambda x: x @ np.swapaxes(x, -1, -2)
    return {k: span(x) if k.endswith("/directions") else x for k, x in load_file(file).items()}


@pytest.mark.slow
def test_a_run_is_that_of_one_device(tmp_path):
    """Start, evaluation, test rows, spectra, CKA, texts, adapters and the report's tables."""

    def run(folder, **train):
        c = config.default()
        c.base, c.task.name, c.sweep.rank = "gpt2-nano", "restaurants", (1, 2)
        c.method.update(init="pissa", targets=("q", "down"))
        c.train.update(steps=3, batch_size=8, seq_len=64, warmup=0, **train)
        c.eval.update(every=3, batch_size=8, examples=16, test=16, generate=4, new_tokens=4)
        c.analysis.update(cka=16, trajectory=True)
        return lorax.run(c, tmp_path / folder).directory

    one, many = run("one", parallel="none"), run("many", mesh=MESHES[0])
    assert json.loads((many / "status.json").read_text()).get("failed") is None
    compared = 0
    for file in sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file()):
        if file.parts[0] == "texts":
            assert (many / file).read_text() == (one / file).read_text()
        elif file.suffix == ".safetensors" and file.parts[0] in ("adapters", "trajectory"):
            assert_close(spanned(many / file), spanned(one / file), 1e-4)
        elif file.suffix == ".csv" and file.name not in ("members.csv", "amplification.csv"):
            pd.testing.assert_frame_equal(
                pd.read_csv(many / file), pd.read_csv(one / file), rtol=1e-4, atol=1e-5
            )
        else:
            continue
        compared += 1
    assert compared > 15


# -------------------------------------------------------------------------------- two processes

TOGETHER = """
import json, sys
import jax, numpy as np
import lorax
from lorax import adapters, decode, gather, hosts, methods, models, sharding
from lorax.methods import sensitivity
from lorax.tasks import kinds
from lorax.train import evidence, trajectory

address, process, name, out = sys.argv[1:]
hosts.start(hosts.Coordinator(address, 2, int(process)))
mesh = sharding.mesh(sharding.parse("fsdp=4,tensor=2"))
place = lambda params, sites: sharding.shardings(params, sites, mesh)
one, many = lorax.load(name), lorax.load(name, place=place)
assert not gather.is_here(many.params)


def check(function, tolerance=0.0):
    for x, y in zip(*(jax.tree.leaves(hosts.whole(function(b))) for b in (one, many)), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=tolerance * np.abs(x).max(initial=0))


tokens = np.random.default_rng(0).integers(3, 64, (2, 4, 9)).astype(np.int32)
batches = {"tokens": tokens, "mask": np.ones(tokens.shape, np.float32)}
path, start = "h/attn/q/kernel", lambda method, base, seen=None: method.init(
    jax.random.key(0), base.params, base.sites, evidence=seen
)
lora = lambda init: lorax.method("lora", rank=3, init=init, targets=("q",))
seen = lambda base: sensitivity.evidence(base, kinds.TEXTS, batches, (path,), ("gradient",))
check(lambda base: dict(models.kernels(base)))
check(seen, 1e-5)
check(lambda base: start(lora("pissa"), base))
check(lambda base: start(lorax.method("dora", rank=3), base), 1e-6)
gradients = seen(many)
check(lambda base: start(lora("lora-ga"), base, gradients))

options = decode.DecodingOptions(max_new_tokens=4, ends=(1,))
prompts = tokens[0], np.ones_like(tokens[0])


def write(base):
    across = gather.mesh_of(base.params)
    given = gather.side_by_side(prompts, across, axis=0)
    return decode.generate(base.module, base.params, *given, jax.random.key(0), options, across)


check(write)

for method in (lora("kaiming"), lorax.method("full", parameters=("q", "embed"))):
    moved = lambda x: x + 0.125 if x.dtype == np.float32 else x
    learned = lambda base: jax.tree.map(moved, start(method, base))
    stacked = lambda base: jax.tree.map(lambda x: x[None], learned(base))
    decompose = trajectory.decomposer(method, one.sites)
    alone = lambda trees: jax.device_put(trees, jax.local_devices()[0])
    on = lambda base, trees: trees if base is many else alone(trees)
    check(lambda base: decompose(*on(base, (base.params, *stacked(base)[::-1])), [{}]), 1e-5)
    for base, folder in ((one, "one"), (many, "many")):
        trained = adapters.from_training(base, method, learned(base))
        adapters.save(f"{out}/{folder}/{method.name}", trained, "tiny")
hosts.meet("the end")
"""


@pytest.mark.soak
def test_two_processes_find_what_one_device_finds(base, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = lambda i: [sys.executable, "-c", TOGETHER, address, str(i), base.name, str(tmp_path)]
    started = [subprocess.Popen(command(i), env=environment) for i in range(2)]
    assert [process.wait(300) for process in started] == [0, 0]
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "many" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
