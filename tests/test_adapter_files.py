"""One save and one load for anything trained: PEFT's files where PEFT can, else lorax's own."""

import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from quick import jit

import lorax
from lorax import adapters, tree
from lorax.adapters import peft_methods
from lorax.interop import peft, reading

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


# ------------------------------------------------------------------------------------------- load

EVERY = {
    "lora": dict(rank=2, full=("norms",)),
    "dora": dict(rank=2, targets=("q", "up")),
    "adalora": dict(rank=2),  # as the LoRA that its export is
    "loha": dict(rank=2),
    "lokr": dict(rank=2),
    "vera": dict(rank=2),
    "ia3": {},
    "ln-tuning": {},
    "full": dict(parameters=("re:h/attn/q/kernel", "norms")),
    "subspace": dict(dim=9),  # stores no dW
    "prefix": dict(tokens=2),
    "houlsby": dict(rank=4),
}


def logits(base, params):
    tokens = np.arange(7, dtype=np.int32)[None] + 3
    return jit(functools.partial(lorax.apply, base.module))(params, tokens)


@pytest.mark.parametrize("name", EVERY)
def test_whatever_was_saved_is_loaded_bound_told_and_merged_alike(name, base, tmp_path):
    method, state = finished(base, name, **EVERY[name])
    adapters.save(tmp_path, adapters.from_training(base, method, state))
    trained = adapters.load(tmp_path, base)
    want = logits(base, method.bind(*state, base.params, sites=base.sites))
    np.testing.assert_allclose(logits(base, trained.bind()), want, rtol=0, atol=2e-5)
    assert (
        repr(trained).startswith("Trained('") and f"{len(trained.updates)} matrices" in f"{trained}"
    )
    if method.delta is None:
        assert trained.updates == {} and "no change of weights" in trained.content.notes()[0]
        with pytest.raises(ValueError, match=f"{name}: is no change of weights"):
            trained.merge()
        return
    delta = method.delta(*state, base.params, base.sites)
    for layer, update in trained.updates.items() if name != "dora" else ():
        path, index = base.layers[layer]
        dw = update if method.factors is None else update.s * update.a @ update.b
        np.testing.assert_allclose(dw, base.sites[path].to_matrix(delta[path])[index], atol=1e-5)
    merged = trained.merge()
    np.testing.assert_allclose(logits(base, merged.params), want, rtol=0, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, adapters.unmerge(merged), base.params)


def test_a_checkpoint_of_loralib_needs_its_alpha_and_a_name_will_do_for_the_base(base, tmp_path):
    module, rng = "model.layers.0.self_attn.q_proj", np.random.default_rng(0)
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 16), (16, 2)))
    np.savez(tmp_path / "x.npz", **{f"{module}.lora_A": A, f"{module}.lora_B": B})
    name = base.name.removeprefix("random:")
    trained = adapters.load(tmp_path / "x.npz", name, alpha=8, weights=False)
    assert trained.name == "lora" and isinstance(
        trained.base.params["norm"]["scale"], jax.ShapeDtypeStruct
    )
    a, b, s, _ = trained.updates["h/0/attn/q"]
    np.testing.assert_array_equal(s * a @ b, 4 * (B @ A).T)
    with pytest.raises(ValueError, match="alpha: .*x.npz does not say how"):
        adapters.load(tmp_path / "x.npz", base)
    adapters.save(tmp_path / "peft", trained)
    with pytest.raises(ValueError, match="alpha: .*peft already has a scale"):
        adapters.load(tmp_path / "peft", base, alpha=8)


def test_updates_are_read_without_the_base_where_they_are_stored(base, tmp_path):
    for name in ("lora", "lokr", "subspace"):
        method, state = finished(base, name, **EVERY[name])
        adapters.save(tmp_path / name, adapters.from_training(base, method, state))
    low_rank, dense = (reading.read(tmp_path / name) for name in ("lora", "lokr"))
    assert low_rank.facts()["Kind"] == "LoRA" and low_rank.updates["h/0/attn/q"].a.shape == (16, 2)
    assert dense.facts()["Kind"] == "lokr" and dense.updates["h/0/attn/q"].shape == (16, 16)
    with pytest.raises(ValueError, match="subspace: no update .* without its base"):
        reading.read(tmp_path / "subspace")
    with pytest.raises(FileNotFoundError, match="no such file"):
        reading.read(tmp_path / "nothing")
