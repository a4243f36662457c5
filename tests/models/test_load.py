"""Names, directories and what is wrong with them."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from support import require
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import lorax
from lorax import models, tree
from lorax.models import gpt2
from lorax.models.families import FAMILIES, WHOLE
from lorax.models.load import config_fields, skeleton

CONFIG = dict(vocab_size=20, n_positions=6, n_embd=8, n_layer=3, n_head=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model with a tokenizer."""
    directory = tmp_path_factory.mktemp("architecture")
    fields = gpt2.hf_config(gpt2.Config(**CONFIG))
    (directory / "config.json").write_text(json.dumps(fields))
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(directory / "tokenizer.json"))
    return lorax.load(f"random:{directory}")


@pytest.fixture
def directory(base, tmp_path):
    """A sound model directory, to be damaged."""
    models.save(tmp_path, base)
    return tmp_path


def edit_config(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(directory, **tensors):
    """Replace tensors, or remove those that are None."""
    file = directory / "model.safetensors"
    have = safetensors.numpy.load_file(file) | {k.replace("__", "."): v for k, v in tensors.items()}
    safetensors.numpy.save_file({k: v for k, v in have.items() if v is not None}, file)


def shard(directory):
    """Two shards and their index, as transformers writes them."""
    have = safetensors.numpy.load_file(directory / "model.safetensors")
    names = sorted(have)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        part = {name: have[name] for name in names if where[name] == file}
        safetensors.numpy.save_file(part, directory / file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


# -------------------------------------------------------------------------------------- what loads


def test_random_draws_the_architecture_from_its_config_alone(base):
    assert base.sha256 == "random" and base.family == "gpt2"
    assert base.config == gpt2.Config(**CONFIG)
    kernel = np.asarray(base.params["h"]["mlp"]["up"]["kernel"])
    assert kernel.shape == (3, 8, 32)
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)


def test_load_is_the_inverse_of_save(base, directory):
    back = lorax.load(str(directory))
    jax.tree.map(np.testing.assert_array_equal, back.params, base.params)
    assert back.config == base.config and back.sites == base.sites
    assert back.tokenizer.encode("b").ids == [1]
    weights = (directory / "model.safetensors").read_bytes()
    assert back.sha256 == hashlib.sha256(weights).hexdigest()


def test_the_hash_is_of_the_files_that_were_loaded(directory):
    """It is computed when it is asked for: only a run does."""
    base = lorax.load(str(directory))
    edit_tensors(directory, transformer__wpe__weight=np.ones((6, 8), np.float32))
    os.utime(directory / "model.safetensors", ns=(0, 0))
    with pytest.raises(ValueError, match="model.safetensors: it has changed since it was loaded"):
        _ = base.replace(name="other").sha256


def test_a_model_without_a_tokenizer_loads(directory):
    (directory / "tokenizer.json").unlink()
    assert lorax.load(str(directory)).tokenizer is None


def test_how_to_run_a_model_is_a_matter_of_load(directory):
    half = lorax.load(str(directory), "bfloat16", jnp.bfloat16, remat="full", unroll=3)
    assert (half.config.dtype, half.config.remat, half.config.unroll) == ("bfloat16", "full", 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}


def test_a_shipped_name_is_a_folder_of_the_assets(directory, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("lorax.models.directories"), "ASSETS", directory.parent
    )
    assert lorax.load(directory.name).config == gpt2.Config(**CONFIG)
    with pytest.raises(FileNotFoundError, match=f"did you mean '{directory.name}'"):
        lorax.load(directory.name + "x")


def test_shards_load_as_the_whole(base, directory):
    shard(directory)
    jax.tree.map(np.testing.assert_array_equal, lorax.load(str(directory)).params, base.params)


def test_a_single_file_is_taken_before_the_shards_of_an_index(base, directory):
    whole = (directory / "model.safetensors").read_bytes()
    shard(directory)
    for file in directory.glob("model-*.safetensors"):
        other = {name: x + 1 for name, x in safetensors.numpy.load_file(file).items()}
        safetensors.numpy.save_file(other, file)
    (directory / "model.safetensors").write_bytes(whole)
    jax.tree.map(np.testing.assert_array_equal, lorax.load(str(directory)).params, base.params)
    for file in directory.glob("model-*.safetensors"):
        file.unlink()
    assert lorax.load(str(directory)).sha256 == hashlib.sha256(whole).hexdigest()


def test_shards_that_are_links_load_as_in_the_hubs_cache(base, directory):
    shard(directory)
    (directory / "blobs").mkdir()
    for i, file in enumerate(directory.glob("model-*.safetensors")):
        file.rename(directory / "blobs" / str(i))
        file.symlink_to(Path("blobs") / str(i))
    jax.tree.map(np.testing.assert_array_equal, lorax.load(str(directory)).params, base.params)


def test_weights_too_large_for_the_type_they_are_asked_in(directory):
    with_one(70000.0, "transformer.wpe.weight")(directory)
    assert np.isfinite(lorax.load(str(directory)).params["wpe"]["embedding"]).all()
    with pytest.raises(ValueError, match="wpe.weight: 7e.04 in it is too large for float16"):
        lorax.load(str(directory), param_dtype=jnp.float16)


def test_what_the_model_does_not_read_may_be_anything(base, directory):
    """GPT-2's first checkpoints hold the masks of attention, of bytes."""
    edit_tensors(directory, transformer__h__0__attn__bias=np.ones((6, 6), np.uint8))
    jax.tree.map(np.testing.assert_array_equal, lorax.load(str(directory)).params, base.params)


@pytest.mark.parametrize("keep", [True, False], ids=["both", "head alone"])
def test_a_tied_weight_is_read_under_either_name(base, directory, keep):
    embedding = np.asarray(base.params["wte"]["embedding"])
    kept = {} if keep else {"transformer__wte__weight": None}
    edit_tensors(directory, lm_head__weight=embedding, **kept)
    jax.tree.map(np.testing.assert_array_equal, lorax.load(str(directory)).params, base.params)


TIED = {
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=20, n_embd=8, n_layer=1, n_head=2)),
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", dict(num_key_value_heads=2)),
    "falcon": ("FalconForCausalLM", {}),
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForMaskedLM", {}),
    "deberta-v2": ("DebertaV2ForMaskedLM", {}),
}
SMALL = dict(
    vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
)


@pytest.mark.parametrize("family", TIED)
def test_tied_weights_have_the_names_of_transformers(family, tmp_path):
    """A file with the head's name alone for each tied weight gives transformers' own logits."""
    transformers, torch = require("transformers"), require("torch")
    name, fields = TIED[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SMALL | fields), tie_word_embeddings=True)
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    have = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for head, embedding in model.all_tied_weights_keys.items():
        have[head] = have.pop(embedding)
    safetensors.numpy.save_file(have, tmp_path / "model.safetensors", {"format": "pt"})
    tokens = np.array([[3, 7, 5, 9]])
    expected = model(torch.tensor(tokens)).logits.detach().numpy()
    base = lorax.load(str(tmp_path))
    logits = base.module.apply({"params": base.params}, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


def test_kernels_take_stacked_layers_apart(base):
    kernels, flat = models.kernels(base), tree.flatten(base.params)
    words = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down")
    names = {f"h/{layer}/{word}" for layer in range(3) for word in words}
    assert set(kernels) == names | {"wte", "wpe"}
    np.testing.assert_array_equal(kernels["h/2/mlp/up"], flat["h/mlp/up/kernel"][2])
    np.testing.assert_array_equal(kernels["wte"], flat["wte/embedding"])
    assert {kernel.dtype for kernel in kernels.values()} == {np.dtype("float32")}


# --------------------------------------------------------------------------------- drawn, by name


@pytest.mark.parametrize(
    ("name", "family", "count", "reads"),
    [
        ("mnist-fc", "mlp", 199_210, (1, 784, 1)),
        ("cifar-fc", "mlp", 656_810, (1, 3072, 1)),
        ("mnist-lenet", "lenet", 44_426, (28, 28, 1)),
        ("cifar-lenet", "lenet", 62_006, (32, 32, 3)),
        ("mlp-64-32-10", "mlp", 65 * 32 + 33 * 10, (1, 64, 1)),
        ("mlp-64-10", "mlp", 650, (1, 64, 1)),
        ("mlp-8-7-6-5-4", "mlp", 63 + 48 + 35 + 24, (1, 8, 1)),
    ],
)
def test_small_image_classifiers_by_name(name, family, count, reads):
    base = skeleton(f"random:{name}")
    assert (base.family, tree.count(base.params)) == (family, count)
    assert base.config.image_shape == reads and base.fresh == ()
    assert base.config.labels == base.params["head"]["kernel"].shape[1]
    kernels = {path for path in tree.flatten(base.params) if path.endswith("kernel")}
    assert {*base.sites} == kernels and base.vocabulary is None


def test_a_seed_behind_the_name_draws_other_weights():
    load = lambda name: tree.flatten(lorax.load(name).params)["dense_1/kernel"]
    zero, three = load("random:mlp-64-32-10"), load("random:mlp-64-32-10@3")
    module = lorax.load("random:mlp-64-32-10").module
    image = jnp.zeros((1, 64), jnp.float32)
    for seed, drawn in ((0, zero), (3, three)):
        again = jax.jit(module.init)(jax.random.key(seed), image)["params"]["dense_1"]["kernel"]
        np.testing.assert_array_equal(drawn, again)
    assert (zero != three).mean() > 0.99
    np.testing.assert_array_equal(zero, load("random:mlp-64-32-10@0"))
    np.testing.assert_array_equal(three, load("random:mlp-64-32-10@3"))


def test_a_seed_goes_with_any_random_name_and_a_directory_comes_first(base, directory):
    kernel = lambda name: np.asarray(tree.flatten(lorax.load(name).params)["h/mlp/up/kernel"])
    drawn = kernel(f"random:{directory}@1")
    assert (drawn != np.asarray(base.params["h"]["mlp"]["up"]["kernel"])).mean() > 0.99
    named = directory.parent / f"{directory.name}@1"
    directory.rename(named)
    np.testing.assert_array_equal(
        kernel(f"random:{named}"), base.params["h"]["mlp"]["up"]["kernel"]
    )
    np.testing.assert_array_equal(kernel(f"random:{named}@1"), drawn)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:mnist-fc@x", r"base: random:mnist-fc@x: 'x' given as the seed after @"),
        ("random:mnist-fc@", "'' given as the seed after @"),
        ("random:mnist-fc@-1", "'-1' given as the seed"),
        ("random:mnist-fc@2147483648", "a whole number below"),
        (
            "random:mlp-64",
            r"base: random:mlp-64: widths: \[64\] given, .* list of 2 or more",
        ),
        ("random:mlp-64-0-10", r"widths: \[64, 0, 10\] given, .* each a whole number from 1"),
    ],
)
def test_names_that_mean_no_network(name, message):
    with pytest.raises(ValueError, match=message):
        lorax.load(name)


@pytest.mark.parametrize("name", ["mlp-64-12-10", "mlp-64-10", "mnist-lenet"])
def test_image_classifiers_are_saved_and_loaded(name, tmp_path):
    base = lorax.load(f"random:{name}@1")
    models.save(tmp_path, base)
    back = lorax.load(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, back.params, base.params)
    assert (back.config, back.sites, back.fresh) == (base.config, base.sites, ())
    assert {*base.sources} == {*tree.flatten(base.params)}
    drawn = lorax.load(f"random:{tmp_path}@1")
    jax.tree.map(np.testing.assert_array_equal, drawn.params, base.params)
    assert base.positions is None


def test_kernels_of_a_convolution_are_matrices_of_windows():
    base = lorax.load("random:mnist-lenet")
    kernels, flat = models.kernels(base), tree.flatten(base.params)
    shapes = {name: kernel.shape for name, kernel in kernels.items()}
    assert shapes == {
        "conv_1": (25, 6),
        "conv_2": (150, 16),
        "dense_1": (256, 120),
        "dense_2": (120, 84),
        "head": (84, 10),
    }
    # A window's values in the kernel's order: row by row, pixel by pixel, its channels together.
    windows = flat["conv_2/kernel"].reshape(150, 16)
    np.testing.assert_array_equal(kernels["conv_2"], windows)
    np.testing.assert_array_equal(kernels["dense_1"], flat["dense_1/kernel"])


def test_a_lenet_of_too_small_images(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lenet", "image_size": 15}')
    with pytest.raises(ValueError, match="image_size: 15 given, must be a whole number from 16"):
        lorax.load(f"random:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "lenet", "image_size": 16}')
    assert lorax.load(f"random:{tmp_path}").params["dense_1"]["kernel"].shape == (16, 120)


def test_every_family_says_what_can_be_set():
    for family, (source, _) in FAMILIES.items():
        fields = config_fields(family)
        assert "dtype" in fields and (family in WHOLE) == ("remat" not in fields), family
        assert family in WHOLE or fields == tuple(source.Config.__dataclass_fields__)


# ----------------------------------------------------------------------------------- what does not


def damage_bytes(content):
    return lambda directory: (directory / "model.safetensors").write_bytes(content)


def truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def only_pickles(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def lose_a_shard(directory):
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def index(content=None, **where):
    """Damage to the index of shards: `content`, or other files for some of its tensors."""

    def damage(directory):
        shard(directory)
        file = directory / "model.safetensors.index.json"
        named = json.loads(file.read_text())["weight_map"]
        named |= {name.replace("__", "."): other for name, other in where.items()}
        file.write_text(json.dumps({"weight_map": named} if content is None else content))

    return damage


def elsewhere(directory):
    """The index leads to a sound shard outside the folder."""
    shard(directory)
    file = directory / "model-00002-of-00002.safetensors"
    file.rename(directory.parent / f"{directory.name}-{file.name}")
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(file.name, f"../{directory.name}-{file.name}"))


def twice(directory):
    """A tensor of the second shard in the first as well."""
    shard(directory)
    one, two = sorted(directory.glob("model-*.safetensors"))
    (name, value), *_ = safetensors.numpy.load_file(two).items()
    more = {name: value.copy()}
    more |= {name: x.copy() for name, x in safetensors.numpy.load_file(one).items()}
    safetensors.numpy.save_file(more, one)


def swapped(directory):
    """Two shards under each other's names."""
    shard(directory)
    one, two = sorted(directory.glob("model-*.safetensors"))
    one.rename(directory / "one")
    two.rename(one)
    (directory / "one").rename(two)


def with_one(value, name="transformer.h.1.mlp.c_fc.weight", dtype=np.float32):
    """Damage to one number of a tensor, or to the type of all."""

    def damage(directory):
        have = safetensors.numpy.load_file(directory / "model.safetensors")
        have[name] = have[name].astype(dtype)
        have[name][-1] = value
        safetensors.numpy.save_file(have, directory / "model.safetensors")

    return damage


def float8(directory):
    """A tensor in 8 bits, which numpy has no type for."""
    torch = require("torch")
    from safetensors.torch import load_file, save_file

    have = load_file(directory / "model.safetensors")
    have["transformer.ln_f.bias"] = have["transformer.ln_f.bias"].to(torch.float8_e4m3fn)
    save_file(have, directory / "model.safetensors")


def pointer(directory):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (directory / "model.safetensors").write_text(text)


WRONG_SHAPE = np.zeros((8, 25), np.float32)
DAMAGE = {
    "no config": (
        lambda d: (d / "config.json").unlink(),
        (FileNotFoundError, "is a directory without config.json"),
    ),
    "config not JSON": (
        lambda d: (d / "config.json").write_text("{"),
        (ValueError, "config.json:1: not JSON"),
    ),
    "config no object": (
        lambda d: (d / "config.json").write_text("[]"),
        (ValueError, "config.json: a JSON object is expected, not a list"),
    ),
    "family": (
        lambda d: edit_config(d, model_type="mamba"),
        (ValueError, "model_type 'mamba' is not one of gpt2"),
    ),
    "family with fields of its own": (
        lambda d: edit_config(d, model_type="gpt_neo", architectures=["GPTNeoForCausalLM"]),
        (ValueError, "'gpt_neo' is not one of .*; no decoder among these computes with its "),
    ),
    "option": (
        lambda d: edit_config(d, scale_attn_by_inverse_layer_idx=True),
        (ValueError, "scale_attn_by_inverse_layer_idx=true is not supported"),
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        (FileNotFoundError, "no model.safetensors"),
    ),
    "pickles": (
        only_pickles,
        (FileNotFoundError, "only pickled weights.*Convert: .*save_pretrained"),
    ),
    "empty": (
        damage_bytes(b""),
        (ValueError, "model.safetensors: not a readable safetensors file"),
    ),
    "garbage": (
        damage_bytes(b"\x80\x02pickle" * 9),
        (ValueError, "not a readable safetensors file"),
    ),
    "truncated": (truncate, (ValueError, "model.safetensors: not a readable safetensors file")),
    "shard": (lose_a_shard, (FileNotFoundError, "shards .*model-00002-of-00002.*are missing")),
    "pointer": (pointer, (ValueError, "model.safetensors: not a readable .* Git LFS pointer")),
    "index": (index({}), (ValueError, "model.safetensors.index.json: no 'weight_map'")),
    "index of a list": (index({"weight_map": ["x"]}), (ValueError, "json: no 'weight_map'")),
    "index of nothing": (index({"weight_map": {}}), (ValueError, "json: no 'weight_map'")),
    "shard in a list": (index(x=["a"]), (ValueError, r"weight_map: x: \['a'\] given")),
    "shard of a number": (index(x=3), (ValueError, "weight_map: x: 3 given.*in this folder")),
    "shard of no name": (index(x=""), (ValueError, "weight_map: x: '' given")),
    "shard with NUL": (index(x="a\0b"), (ValueError, "weight_map: x: .* given")),
    "shard of a long name": (index(x="a" * 5000), (ValueError, "weight_map: x: 'a{12}.* given")),
    "shard above": (index(x=".."), (ValueError, r"weight_map: x: '\.\.' given")),
    "shard elsewhere": (
        elsewhere,
        (ValueError, r"weight_map: .*: '\.\./.*' given; it must be the"),
    ),
    "absolute shard": (index(x="/etc/x"), (ValueError, "weight_map: x: '/etc/x' given")),
    "shard in a folder": (index(x="a/b"), (ValueError, "weight_map: x: 'a/b' given")),
    "tensor twice": (twice, (ValueError, "transformer.* is in model-00001-of-.* and model-00002")),
    "swapped shards": (
        swapped,
        (ValueError, "transformer.* is in model-0.*, and model.safetensors.index.json says in mod"),
    ),
    "nan": (
        with_one(np.nan),
        (ValueError, "model.safetensors: transformer.h.1.mlp.c_fc.weight: NaN or infinity in it"),
    ),
    "infinity": (
        with_one(np.inf, "transformer.wte.weight", np.float16),
        (ValueError, "model.safetensors: transformer.wte.weight: NaN or infinity in it"),
    ),
    "double": (
        with_one(-1e300, dtype=np.float64),
        (ValueError, r"c_fc.weight: 1e\+300 in it is too large for float32"),
    ),
    "int32": (with_one(1, dtype=np.int32), (ValueError, "c_fc.weight: I32 .*expected float32")),
    "uint8": (with_one(1, dtype=np.uint8), (ValueError, "c_fc.weight: U8 given where weights")),
    "bool": (with_one(1, dtype=bool), (ValueError, "c_fc.weight: BOOL given where weights")),
    "float8": (
        float8,
        (ValueError, "model.safetensors: transformer.ln_f.bias: F8_E4M3 given where weights"),
    ),
    "tied apart": (
        lambda d: edit_tensors(d, lm_head__weight=np.ones((20, 8), np.float32)),
        (ValueError, "lm_head.weight differs from .*wte.weight.*tie_word_embeddings must be false"),
    ),
    "tied of another shape": (
        lambda d: edit_tensors(d, lm_head__weight=np.ones((21, 8), np.float32)),
        (ValueError, "lm_head.weight differs from transformer.wte.weight"),
    ),
    "shape": (
        lambda d: edit_tensors(d, transformer__h__1__attn__c_attn__weight=WRONG_SHAPE),
        (ValueError, r"h.1.attn.c_attn.weight has shape \(8, 25\), config.json says \(8, 24\)"),
    ),
    "rank of shape": (
        lambda d: edit_tensors(d, transformer__ln_f__weight=np.zeros((), np.float32)),
        (ValueError, r"ln_f.weight has shape \(\), config.json says \(8,\)"),
    ),
    "tensor": (
        lambda d: edit_tensors(d, transformer__h__2__mlp__c_fc__bias=None),
        (ValueError, "no tensor 'transformer.h.2.mlp.c_fc.bias'"),
    ),
    "head": (
        lambda d: edit_config(d, tie_word_embeddings=False),
        (ValueError, "no tensor 'lm_head.weight'"),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_directory_is_one_clear_error(directory, name):
    damage, (kind, message) = DAMAGE[name]
    damage(directory)
    with pytest.raises(kind, match=message) as caught:
        lorax.load(str(directory))
    assert directory.name in str(caught.value) or name == "option"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nobody/nothing",
            r"neither shipped .*Download https://huggingface.co/nobody/nothing .*safe",
        ),
        ("gpt2-nothing", "https://huggingface.co/gpt2-nothing"),
        ("random:nobody/nothing", "https://huggingface.co/nobody/nothing"),
        ("/no/such/folder", "no directory /no/such/folder"),
        ("./nothing", "no directory ./nothing"),
        ("a/b/c", "no directory a/b/c"),
        ("mnist-fc", "base: mnist-fc has no weights to load; use random:mnist-fc"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_to_do(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        lorax.load(name)


# ------------------------------------------------------------------------------------------ memory

PEAK = """
import sys, threading, time
import jax
import lorax
from lorax import tree

def anonymous():  # not the pages of the mapped files, which the system takes back at will
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

lorax.load("gpt2-nano")
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
base = lorax.load(sys.argv[1])
jax.block_until_ready(base.params)
done.set()
thread.join()
print((peak[0] - before) / tree.nbytes(base.params))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_of_loading_is_at_most_a_fifth_above_the_tree(tmp_path):
    """GPT-2 small: 498 MB, of them 154 in one array."""
    models.save(tmp_path, lorax.load("random:gpt2"))
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    assert 0.99 < float(out.stdout) < 1.2  # below 1: the system took back what came before


@pytest.mark.parametrize(("name", "count"), [("gpt2", 124_439_808), ("gpt3-175b", 174_604_259_328)])
def test_published_sizes(name, count):
    module = gpt2.GPT2(gpt2.Config(**gpt2.SIZES[name]))
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert tree.count(params) == count
    if name == "gpt3-175b":  # LoRA paper, table 4
        assert lorax.method("lora", rank=1, targets=("q", "v")).count(params) == 4_718_592
