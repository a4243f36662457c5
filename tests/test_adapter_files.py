"""One save and one load for anything trained: PEFT's files where PEFT can, else lorax's own."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax import adapters, tree
from lorax.adapters import peft_methods
from lorax.interop import peft

LORA = (peft.CONFIG, peft.WEIGHTS)
OWN = ("method.json", "state.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    sizes |= dict(vocab_size=40, max_position_embeddings=12, model_type="llama")
    (directory / "config.json").write_text(json.dumps(sizes))
    return lorax.load(f"random:{directory}")


def finished(base, name, **hp):
    """(method, state) off the start."""
    method = lorax.method(name, **hp)
    state = method.init(jax.random.key(0), base.params, base.sites)
    moved = jax.tree.map(lambda x: x + 0.1, state.trainable)
    return method, state._replace(trainable=moved)


def export(directory, base, method, state):
    return adapters.save(directory, adapters.from_training(base, method, state), "some/base")


@pytest.mark.parametrize(
    ("name", "hp", "files"),
    [
        ("lora", dict(rank=2), LORA),
        ("adalora", dict(rank=2), LORA),  # stored as LoRA, which analysis reads
        ("loha", dict(rank=2), LORA),
        ("vera", dict(rank=2), LORA),
        ("lokr", dict(rank=2), (*LORA, *OWN, "delta.safetensors")),
        ("ia3", {}, (*LORA, *OWN, "delta.safetensors")),
        ("ln-tuning", {}, (*LORA, *OWN, "delta.safetensors")),
        ("prefix", dict(tokens=2), (*LORA, *OWN)),
        ("prompt", dict(tokens=2), (*LORA, *OWN)),
        ("llama-adapter", dict(tokens=2), (*LORA, *OWN)),
    ],
)
def test_peft_gets_its_files(name, hp, files, base, tmp_path):
    method, state = finished(base, name, **hp)
    assert export(tmp_path, base, method, state) == ""
    assert {file.name for file in tmp_path.iterdir()} == set(files)
    config = peft.read_config(tmp_path / peft.CONFIG)
    assert config["base_model_name_or_path"] == "some/base"
    if method.factors is not None:
        assert config["peft_type"] == "LORA"
        assert len(peft.load(tmp_path, base.sources).factors) == 4
        return
    again, own = peft_methods.load(tmp_path, base)
    assert again.name == name
    stored = safetensors.numpy.load_file(tmp_path / "state.safetensors")
    for path, leaf in tree.flatten(own.trainable).items():
        np.testing.assert_array_equal(leaf, stored[f"trainable/{path}"])


@pytest.mark.parametrize(
    ("name", "hp", "why"),
    [
        ("houlsby", {}, "houlsby: lorax does not write it in PEFT's format"),
        ("full", {"parameters": ("norms",)}, "full: lorax does not write it in PEFT's format"),
        ("subspace", {"dim": 9}, "subspace: lorax does not write it in PEFT's format"),
        ("lora-subspace", {"dim": 9}, ""),
        ("prefix", {"layers": (1,)}, "method.layers: PEFT has a prefix in all layers or in none"),
        ("lora", {"rank": 2, "full": ("re:h/attn/o/kernel",)}, ""),
    ],
)
def test_what_peft_does_not_have_is_kept_with_a_reason(name, hp, why, base, tmp_path):
    method, state = finished(base, name, **hp)
    assert export(tmp_path, base, method, state) == why
    stored = {file.name for file in tmp_path.iterdir()}
    assert ("delta.safetensors" in stored) == (name == "full")
    assert set(OWN if why else LORA) <= stored and (peft.CONFIG in stored) == (why == "")


@pytest.mark.parametrize(("name", "where"), [("ia3", peft_methods), ("lora", peft)])
def test_no_fault_of_an_export_ends_a_run(name, where, base, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("x")

    monkeypatch.setattr(where, "save", broken)
    method, state = finished(base, name)
    assert export(tmp_path, base, method, state) == "KeyError('x')"
    stored = safetensors.numpy.load_file(tmp_path / "state.safetensors")
    assert len(stored) == len(tree.flatten(state.trainable)) + len(tree.flatten(state.constants))
    assert json.loads((tmp_path / "method.json").read_text())["name"] == name
    assert (tmp_path / "delta.safetensors").exists()


def test_low_rank_export_is_the_adapter_of_the_state(base):
    method, state = finished(base, "loha", rank=2)
    adapter = adapters.factored(base, method, state)
    delta = method.delta(*state, base.params, base.sites)
    for i in (0, 1):
        a, b, s, _ = adapter.factors[f"h/{i}/attn/q"]
        np.testing.assert_allclose(s * a @ b, delta["h/attn/q/kernel"][i], atol=1e-6)
