"""A base is read straight into the parts that a mesh of devices divides it into."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import lorax
from lorax import adapters, memory, methods, models, quant, sharding, tree
from lorax.interop import hf, tensors
from lorax.models.load import skeleton

SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
CODED = SIZES | dict(
    hidden_size=256, intermediate_size=512, quantization_config={"load_in_4bit": True}
)  # of 64 neighbours for each of the devices
FIELDS = {
    "llama": dict(model_type="llama", tie_word_embeddings=False) | SIZES,
    "tied": dict(model_type="llama", tie_word_embeddings=True) | SIZES,
    "gpt2": dict(model_type="gpt2", vocab_size=64, n_positions=16, n_embd=64, n_layer=2, n_head=4),
    "phi3": dict(model_type="phi3", pad_token_id=0) | SIZES,
    "falcon": dict(
        model_type="falcon", vocab_size=64, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True,
    ),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2) | SIZES,
    "coded": dict(model_type="llama") | CODED,
    "coded phi3": dict(model_type="phi3", pad_token_id=0) | CODED,
}  # fmt: skip
#: Of which a block of 64 is no part of an output.
ODD = FIELDS["llama"] | dict(hidden_size=24, intermediate_size=40)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """stored(name) -> a directory with random weights, in 4 bits where the name says so."""
    made = {}

    def make(name):
        if name not in made:
            directory = made[name] = tmp_path_factory.mktemp("stored")
            fields = (FIELDS | {"odd": ODD})[name]
            (directory / "config.json").write_text(json.dumps(fields))
            shapes, rng = skeleton(f"random:{directory}"), np.random.default_rng(0)
            draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
            models.save(directory, shapes.replace(params=jax.tree.map(draw, shapes.params)))
            (directory / "config.json").write_text(json.dumps(fields))
            if "coded" in name:
                in_4_bits(directory)
        return made[name]

    return make


def in_4_bits(directory):
    """Replace the linear layers' weights by codes, as bitsandbytes stores them."""
    held = {}
    for name, weight in load_file(directory / hf.SINGLE).items():
        held[name] = weight
        if name.endswith("proj.weight"):
            leaf = quant.quantise(weight.T, double=True)
            nested = leaf.absmax
            state = dict(blocksize=64, dtype="float32", shape=weight.shape, nested_blocksize=256)
            state = json.dumps(state | {"nested_offset": float(nested.offset)}).encode()
            held[name] = np.asarray(leaf.codes).reshape(-1, 1)
            held |= {
                f"{name}.absmax": np.asarray(nested.codes).reshape(-1),
                f"{name}.nested_absmax": np.asarray(nested.absmax),
                f"{name}.nested_quant_map": quant.nf4.DYNAMIC.values,
                f"{name}.quant_map": quant.CODES["nf4"].values,
                f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
            }
    save_file(held, directory / hf.SINGLE)


def places(text):
    """How `load` is told to divide a base over a mesh of the devices."""
    mesh = sharding.mesh(sharding.parse(text))
    return lambda params, sites: sharding.shardings(params, sites, mesh)


@pytest.fixture
def reads(monkeypatch):
    """Bytes of each read from a file, in order."""
    seen, read = [], tensors.Stored.read

    def counted(self, index=None):
        value = read(self, index)
        seen.append(value.nbytes)
        return value

    monkeypatch.setattr(tensors.Stored, "read", counted)
    return seen


@pytest.fixture
def blocks(monkeypatch):
    """Bytes of every buffer that a parameter is read into."""
    seen, aligned = [], hf._aligned

    def counted(shape, dtype):
        seen.append(int(np.prod(shape)) * dtype.itemsize)
        return aligned(shape, dtype)

    monkeypatch.setattr(hf, "_aligned", counted)
    return seen


def assert_same(loaded, expected):
    pairs = jax.tree.leaves(loaded.params), jax.tree.leaves(expected.params)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected.params)
    for ours, theirs in zip(*pairs, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", FIELDS)
def test_shards_hold_what_load_gives_and_every_byte_is_read_once(name, stored, reads, blocks):
    directory = str(stored(name))
    expected = lorax.load(directory)
    alone = sum(reads)
    reads.clear(), blocks.clear()
    place = places("fsdp=4,tensor=2")
    base = lorax.load(directory, place=place)
    assert alone <= sum(reads) <= 1.01 * alone  # a scale of scales may serve two blocks
    assert_same(base, expected)
    planned = jax.tree.leaves(place(tree.shapes(expected.params), expected.sites))
    largest = 0
    for leaf, at in zip(jax.tree.leaves(base.params), planned, strict=True):
        assert leaf.sharding == at
        part = int(np.prod(at.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {part}
        largest = max(largest, part)
    assert max(blocks) <= largest < tree.nbytes(base.params) / 8
    per_device = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(base.params)
    )
    assert per_device < 0.2 * tree.nbytes(base.params)


def test_a_block_that_several_devices_hold_is_read_once(stored, reads):
    directory = str(stored("llama"))
    expected = lorax.load(directory)
    reads.clear()
    base = lorax.load(directory, place=places("member=2,fsdp=4"))
    assert sum(reads) == tree.nbytes(expected.params)
    assert_same(base, expected)


@pytest.mark.parametrize(
    ("name", "mesh", "largest"),
    [("odd", None, 4 * 64 * 24), ("mixtral", "fsdp=4,tensor=2", 4 * 4 * 64 * 128 // 8)],
    ids=["one device", "experts on a mesh"],
)
def test_kernels_are_quantised_layer_by_layer_as_they_are_read(name, mesh, largest, stored, blocks):
    """The largest buffer is the embedding, or a layer of all experts."""
    directory = str(stored(name))
    expected = lorax.quantize(lorax.load(directory), double=True)
    blocks.clear()
    place = mesh and places(mesh)
    base = lorax.load(directory, place=place, quant="nf4", double_quant=True)
    assert_same(base, expected)
    assert max(blocks) == largest
    if mesh:
        planned = jax.tree.leaves(place(tree.shapes(expected.params), expected.sites))
        assert [leaf.sharding for leaf in jax.tree.leaves(base.params)] == planned


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_random_weights_are_those_of_one_device(name, stored):
    name = f"random:{stored(name)}@1"
    base = lorax.load(name, param_dtype="bfloat16", place=places("fsdp=4,tensor=2"))
    assert_same(base, lorax.load(name, param_dtype="bfloat16"))
    assert base.params["h"]["attn"]["q"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")


def test_a_module_of_ones_own_is_divided_too(tmp_path):
    """Drawn, read from its file, and given by its function."""
    place = places("fsdp=4,tensor=2")
    drawn = lorax.load(tower, place=place)
    assert_same(drawn, lorax.load(tower))
    assert drawn.params["up"]["kernel"].sharding.spec == P("fsdp", "tensor")
    models.save(tmp_path, drawn)
    name = f"{drawn.name}@{tmp_path}"
    assert_same(lorax.load(name, place=place), drawn)
    given = lorax.load(of_ones, place=place)
    assert given.params["up"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert_same(given, lorax.load(of_ones))
    assert given.sha256 == lorax.load(of_ones).sha256


class Tower(nn.Module):
    """Two layers that read arrays."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="down")(nn.relu(nn.Dense(16, name="up")(x)))


def tower():
    return Tower(), np.zeros((1, 8), np.float32)


def of_ones():
    weights = {
        "up": {"kernel": np.ones((8, 16)), "bias": np.ones(16)},
        "down": {"kernel": np.ones((16, 4)), "bias": np.ones(4)},
    }
    return models.Model(*tower(), weights=lambda: weights)


def test_the_room_that_a_base_needs_is_that_of_its_parts(stored, monkeypatch):
    directory, place = str(stored("llama")), places("fsdp=4,tensor=2")
    whole = tree.nbytes(lorax.load(directory).params)
    monkeypatch.setattr(memory, "free", lambda: memory.Free(whole - 1, "are free"))
    with pytest.raises(MemoryError, match="GB of weights in float32 here and 0.00 GB are free"):
        lorax.load(directory, place=place)
    stats = {"bytes_limit": whole // 4, "bytes_in_use": 0}
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    lorax.load(directory, place=place)
    stats["bytes_in_use"] = whole // 8
    with pytest.raises(MemoryError, match="are free on a device; take a smaller base, or par"):
        lorax.load(directory, place=place)


def test_a_divided_base_is_merged_and_saved_as_one_on_a_single_device(stored, tmp_path, blocks):
    """With a method's state, and with an adapter's factors; both stay divided."""
    directory = str(stored("tied"))
    alone = lorax.load(directory)
    divided = lorax.load(directory, place=places("fsdp=4,tensor=2"))
    method = lorax.method("lora", rank=2, targets=("q", "down"))
    state = method.init(jax.random.key(0), alone.params, alone.sites)
    state = (jax.tree.map(jnp.ones_like, state[0]), state[1])
    merged = lorax.merge(method, state, divided.params, divided.sites)
    expected = lorax.merge(method, state, alone.params, alone.sites)
    assert_divided_alike(merged, divided.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), merged, expected)

    def trained(base):
        return adapters.from_training(base, method, methods.State(*state)).merge()

    assert_divided_alike(trained(divided).params, divided.params)
    for name, base in (("alone", alone), ("divided", divided)):
        models.save(tmp_path / name, base.replace(params=trained(base).params))
    files = [(tmp_path / name / hf.SINGLE).read_bytes() for name in ("alone", "divided")]
    assert files[0] == files[1]


def assert_divided_alike(params, expected):
    where = lambda params: [leaf.sharding for leaf in jax.tree.leaves(params)]
    assert where(params) == where(expected)


#: What each of two processes reads, has and saves: two lines of JSON.
TWO = """
import hashlib, json, sys
from lorax import hosts
coordinator, (_, directory, out) = hosts.flags(sys.argv)
hosts.start(coordinator)
import jax, numpy as np
import lorax
from lorax import models, sharding
from lorax.interop import tensors

seen, read = [], tensors.Stored.read
tensors.Stored.read = lambda self, index=None: (seen.append(x := read(self, index)), x)[1]
mesh = sharding.mesh(sharding.parse("fsdp=4,tensor=2"))
place = lambda params, sites: sharding.shardings(params, sites, mesh)

def described(base):
    bytes_read = sum(x.nbytes for x in seen)
    seen.clear()
    digest = hashlib.sha256()
    for x in jax.tree.leaves(hosts.whole(base.params)):
        digest.update(x.tobytes())
    return [bytes_read, digest.hexdigest(), base.sha256]

base = lorax.load(directory, place=place)
plain = described(base)
models.save(out, base)
coded = described(lorax.load(directory, place=place, quant="nf4", double_quant=True))
print(json.dumps([plain, coded]))
"""


def test_each_of_two_processes_reads_its_half(stored, tmp_path):
    directory, out = stored("llama"), tmp_path / "out"
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    command = [sys.executable, "-c", TWO, str(directory), str(out), *flags]
    here = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    started = [
        subprocess.Popen([*command, f"--process={i}"], env=here, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    ends = [process.communicate(timeout=300)[0].splitlines()[-1] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    base = lorax.load(str(directory))
    total = tree.nbytes(base.params)
    for found, expected in zip(
        zip(*map(json.loads, ends), strict=True),
        (base, lorax.quantize(base, double=True)),
        strict=True,
    ):
        digest = hashlib.sha256()
        for x in jax.tree.leaves(expected.params):
            digest.update(np.asarray(x).tobytes())
        for bytes_read, values, sha256 in found:
            assert values == digest.hexdigest() and sha256 == base.sha256
            assert 0.5 * total <= bytes_read < 0.51 * total  # norms are in both halves
    assert (out / hf.SINGLE).read_bytes() == (directory / hf.SINGLE).read_bytes()
