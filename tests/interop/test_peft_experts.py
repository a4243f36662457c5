"""LoRA for each expert in PEFT's files: what PEFT computes, there and back."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from decoders import TOKENS, reference, saved
from peft_files import edit, foreign
from quick import jit
from small import noisy
from support import few, require

import lorax
from lorax import adapters, methods, tree
from lorax.interop import formats, peft

# PEFT says so of patterns for parameters, which it nevertheless reads.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
FAMILIES = ("mixtral", "qwen3-moe", "gpt-oss")
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WORDS = ("q", "experts", "router")


@functools.cache
def base(name):
    return lorax.load(str(saved(name)))


def wrapped(name, **config):
    """PEFT's model with random numbers in A and B, around a copy of the reference."""
    library, torch, transformers = require("peft"), require("torch"), require("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(saved(name))
    model = library.get_peft_model(model, library.LoraConfig(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(0.2 * torch.randn_like(p))
    return model.eval()


def torch_logits(model):
    torch = require("torch")
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS).long()).logits.numpy()


def logits(name, params):
    return np.asarray(jit(functools.partial(lorax.apply, base(name).module))(params, TOKENS))


@pytest.mark.parametrize("name", few(FAMILIES, ["mixtral", "gpt-oss"]))
def test_a_file_of_pefts_is_what_peft_computes(name, tmp_path):
    router = "mlp.router.weight" if name == "gpt-oss" else "mlp.gate.weight"
    model = wrapped(
        name, target_modules=["q_proj"], target_parameters=[*PARAMETERS, router], r=3,
        lora_alpha=6, rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 5},
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    trained = adapters.load(tmp_path, base(name))
    layers = {re.sub(r"\d+", "0", layer) for layer in trained.updates}
    words = {f"h/0/experts/0/{word}" for word in ("gate", "up", "down")}
    assert layers == words | {"h/0/attn/q", "h/0/experts/router"}
    assert len(trained.updates) == 2 * (2 + 3 * base(name).config.num_experts)
    expected = torch_logits(model)
    assert np.abs(expected - torch_logits(reference(name))).max() > 0.1
    np.testing.assert_allclose(logits(name, trained.bind()), expected, rtol=0, atol=1e-4)
    merged = trained.merge().params
    np.testing.assert_allclose(logits(name, merged), expected, rtol=0, atol=1e-4)
    theirs = {k: v.numpy() for k, v in model.merge_and_unload().state_dict().items()}
    ours = tree.flatten(merged)["h/experts/down/kernel"]
    for layer in range(2):
        down = theirs[f"model.layers.{layer}.mlp.experts.down_proj"]
        down = down if name == "gpt-oss" else down.transpose(0, 2, 1)
        np.testing.assert_allclose(ours[layer], down, rtol=1e-5, atol=1e-5)


def trained_here(name, seed=0, **hp):
    method = lorax.method("lora", **{"rank": 3, "alpha": 5, "targets": WORDS} | hp)
    state = method.init(jax.random.key(seed), base(name).params, base(name).sites)
    state = methods.State(noisy(state.trainable, 0.2, seed), state.constants)
    return adapters.from_training(base(name), method, state)


@pytest.mark.parametrize("name", few(FAMILIES, ["mixtral", "gpt-oss"]))
def test_peft_computes_what_lorax_has_written(name, tmp_path):
    library, transformers = require("peft"), require("transformers")
    trained = trained_here(name, dropout=0.1)
    assert adapters.save(tmp_path, trained) == ""
    model = transformers.AutoModelForCausalLM.from_pretrained(saved(name))
    model = library.PeftModel.from_pretrained(model, tmp_path).eval()
    expected = logits(name, trained.bind())
    np.testing.assert_allclose(torch_logits(model), expected, rtol=0, atol=1e-4)
    # The file's own words are enough to have every factor again.
    again = adapters.load(tmp_path, base(name))
    assert trained.updates.keys() == again.updates.keys()
    for layer, factors in trained.updates.items():
        for ours, back in zip(factors[:3], again.updates[layer][:3], strict=True):
            np.testing.assert_allclose(ours, back, rtol=1e-6)
    without_base = peft.load(tmp_path)
    assert without_base.factors.keys() == trained.updates.keys()


def test_some_layers_and_some_experts(tmp_path):
    """An expert that is not adapted is zero in the file, which PEFT reads as well."""
    library, transformers = require("peft"), require("transformers")
    trained = trained_here("mixtral", layers=(1,), targets=("experts.up", "experts.down"))
    factors = {layer: x for layer, x in trained.updates.items() if layer != "h/1/experts/2/up"}
    longer = factors["h/1/experts/0/down"]
    wide = np.concatenate([longer.a, longer.a], axis=1), np.concatenate([longer.b, longer.b])
    factors["h/1/experts/0/down"] = longer._replace(a=wide[0], b=wide[1], s=0.25)
    adapter = adapters.Adapter(factors, {}, {})
    adapters.save(tmp_path, adapters.Trained(base("mixtral"), adapter))
    model = transformers.AutoModelForCausalLM.from_pretrained(saved("mixtral"))
    model = library.PeftModel.from_pretrained(model, tmp_path).eval()
    expected = logits("mixtral", adapters.bind(base("mixtral"), adapter))
    np.testing.assert_allclose(torch_logits(model), expected, rtol=0, atol=1e-4)
    again = adapters.load(tmp_path, base("mixtral"))
    np.testing.assert_allclose(logits("mixtral", again.bind()), expected, rtol=0, atol=1e-4)


def test_gate_and_up_of_an_expert_are_updates_of_their_own(tmp_path):
    """As they were trained, read without the base and a matrix at a time."""
    trained = trained_here("mixtral")
    adapters.save(tmp_path, trained)
    found = {update.layer: update for update in formats.read(tmp_path).updates}
    names = {"gate": "gate_up_proj.gate", "up": "gate_up_proj.up", "down": "down_proj"}
    for layer, want in trained.updates.items():
        if "/experts/" in layer and "router" not in layer:
            _, block, _, expert, word = layer.split("/")
            got = found.pop(f"model.layers.{block}.mlp.experts.{expert}.{names[word]}").read()
            np.testing.assert_allclose(got.s * got.a @ got.b, want.s * want.a @ want.b, rtol=1e-5)
    assert len(found) == 4  # q and the router of two layers


# ------------------------------------------------------------------------- files of transformers 4

NAMES = {"qwen3-moe": ("mlp", "gate_proj", "up_proj", "down_proj")}
NAMES["mixtral"] = ("block_sparse_moe", "w1", "w3", "w2")


def older(name, directory):
    """A file with a module for each expert."""
    c, (block, gate, up, down) = base(name).config, NAMES[name]
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(2):
        sizes = {f"{block}.gate": (c.hidden_size, c.num_experts)}
        for e in range(c.num_experts):
            at = f"{block}.experts.{e}."
            sizes |= dict.fromkeys((at + gate, at + up), (c.hidden_size, c.expert_size))
            sizes[at + down] = (c.expert_size, c.hidden_size)
        for module, (n_in, n_out) in sizes.items():
            for side, shape in (("A", (2, n_in)), ("B", (n_out, 2))):
                value = 0.3 * rng.standard_normal(shape).astype(np.float32)
                tensors[f"model.layers.{layer}.{module}.lora_{side}.weight"] = value
    return foreign(directory, tensors, target_modules=["gate", gate, up, down])


@pytest.mark.parametrize("name", few(NAMES, ["mixtral"]))
def test_a_file_with_a_module_for_each_expert(name, tmp_path):
    library, transformers = require("peft"), require("transformers")
    directory = older(name, tmp_path / "v4")
    model = transformers.AutoModelForCausalLM.from_pretrained(saved(name))
    model = library.PeftModel.from_pretrained(model, directory).eval()
    trained = adapters.load(directory, base(name))
    np.testing.assert_allclose(logits(name, trained.bind()), torch_logits(model), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------- experts that are missing


def without(directory, pattern):
    """Remove the tensors with these names from a file."""
    file = directory / "adapter_model.safetensors"
    stored = safetensors.numpy.load_file(file)
    kept = {key: value for key, value in stored.items() if not re.search(pattern, key)}
    assert len(kept) < len(stored)
    file.write_bytes(safetensors.numpy.save(kept))


def test_an_expert_that_a_file_leaves_out_is_an_error(tmp_path):
    directory = older("mixtral", tmp_path / "v4")
    without(directory, r"layers\.1\..*experts\.3\.w2")
    with pytest.raises(ValueError, match=r"layers.1.block_sparse_moe.experts: w2 of experts 3 has"):
        adapters.load(directory, base("mixtral"))
    directory = older("mixtral", tmp_path / "last")
    without(directory, r"experts\.4\.w2")
    with pytest.raises(ValueError, match="w2 of experts 4 has no update, of the others it has"):
        adapters.load(directory, base("mixtral"))


def packed(directory, experts=5, r=2, **config):
    draw = lambda *shape: np.ones(shape, np.float32)
    at = "model.layers.0.mlp.experts"
    tensors = {
        f"{at}.base_layer.lora_A.weight": draw(experts * r, 24),
        f"{at}.base_layer.lora_B.weight": draw(40, experts * r),
        f"{at}.lora_A.weight": draw(experts * r, 20),
        f"{at}.lora_B.weight": draw(24, experts * r),
    }
    config = {"target_modules": [], "target_parameters": PARAMETERS} | config
    return foreign(directory, tensors, **config)


def test_a_packed_file_must_have_all_experts_of_all_parameters(tmp_path):
    adapters.load(packed(tmp_path / "whole"), base("mixtral"))
    with pytest.raises(ValueError, match=r"A \(8, 24\) and B .* 5 experts of rank 2 have A \(10"):
        adapters.load(packed(tmp_path / "four", 4), base("mixtral"))
    directory = packed(tmp_path / "half")
    without(directory, "base_layer")
    with pytest.raises(ValueError, match="updates of 1 parameters, and .* gate_up_proj, down_proj"):
        adapters.load(directory, base("mixtral"))
    directory = packed(tmp_path / "none")
    edit(directory, target_parameters=None)
    with pytest.raises(ValueError, match="updates of 2 parameters, .* has none of them"):
        adapters.load(directory, base("mixtral"))


def test_experts_trained_in_full_have_no_place_in_pefts_files(tmp_path):
    trained = trained_here("mixtral", targets=("q",))
    weight = np.zeros((24, 20), np.float32)
    adapter = trained.adapter._replace(weights={"h/0/experts/1/up/kernel": weight})
    with pytest.raises(
        ValueError, match="PEFT can't store a single expert that was trained in full"
    ):
        adapters.save(tmp_path, adapters.Trained(base("mixtral"), adapter))


def test_a_batch_with_several_adapters_is_refused():
    trained = trained_here("mixtral")
    with pytest.raises(ValueError, match="updates of experts can't differ from row to row"):
        adapters.mixed(base("mixtral"), [trained.adapter, None], jnp.array([0, 1, 0]))
