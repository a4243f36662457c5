"""PEFT's files, read layer by layer, against the reading of whole files and against PEFT."""

import json

import numpy as np
import pytest
import safetensors.numpy
from format_files import dense, draw
from peft_files import UNTIED, foreign, random_adapter
from support import require

from lorax.interop import formats, peft
from lorax.interop.peft.files import serialise


def test_updates_are_those_of_the_whole_file(tmp_path):
    tensors = {"layers.0.q.lora_A.weight": draw(2, 8), "layers.0.q.lora_B.weight": draw(6, 2)}
    tensors |= {"layers.1.q.lora_A.default.weight": draw(4, 8)}
    tensors |= {"layers.1.q.lora_B.default.weight": draw(6, 4), "score.weight": draw(3, 8)}
    tensors = {name.replace(".default", ""): x for name, x in tensors.items()}
    config = dict(peft_type="LORA", r=2, lora_alpha=4, rank_pattern={"layers.1.q": 4})
    path = foreign(tmp_path / "adapter", tensors, **config, use_rslora=True)
    found, whole = formats.read(path), peft.load(path)
    assert found.format == "PEFT" and found.beside == {"score.weight": (3, 8)}
    assert [update.layer for update in found.updates] == [*whole.factors]
    for update in found.updates:
        a, b, s, m = update.read()
        want = whole.factors[update.layer]
        assert (s, update.scale, m) == (want.s, want.s, None)
        assert update.source == "config lora_alpha / sqrt r"
        np.testing.assert_array_equal(a, want.a)
        np.testing.assert_array_equal(b, want.b)


def test_the_parts_of_a_fused_module_of_ours_are_told_apart(tmp_path):
    adapter = random_adapter()
    path = peft.save(tmp_path / "adapter", adapter, UNTIED, "gpt2")
    found = {update.layer: update for update in formats.read(path).updates}
    assert len(found) == len(adapter.factors)
    for layer, want in adapter.factors.items():
        layer = layer.replace("h/", "transformer.h.").replace("/", ".")
        names = {"q": "c_attn.q", "k": "c_attn.k", "v": "c_attn.v", "o": "c_proj"}
        names |= {"up": "c_fc", "down": "c_proj"}
        around, _, name = layer.rpartition(".")
        layer = f"{around}.{names[name]}" if around else layer
        layer = f"transformer.{layer}" if layer in ("wte", "wpe") else layer
        update = found[layer]
        a, b, s, _ = update.read()
        assert update.shape == (want.a.shape[0], want.b.shape[1]) and s == update.scale == want.s
        assert update.rank == want.a.shape[1]
        np.testing.assert_array_equal(a, want.a)
        np.testing.assert_array_equal(b, want.b)


def test_metadata_that_does_not_fit_is_named(tmp_path):
    path = peft.save(tmp_path / "adapter", random_adapter(), UNTIED, "gpt2")
    file = path / "adapter_model.safetensors"
    with safetensors.safe_open(file, "numpy") as handle:
        metadata = json.loads(handle.metadata()["lorax"])
    tensors = safetensors.numpy.load_file(file)
    for change in ({"columns": "0:999"}, {"rows": "x"}, {"module": "other"}, {"scale": "1e"}):
        entries = json.loads(json.dumps(metadata))
        entries["factors"]["h/0/attn/q"] |= change
        file.write_bytes(serialise(tensors, {"lorax": json.dumps(entries)}))
        with pytest.raises(ValueError, match="its metadata 'lorax' does not fit"):
            for update in formats.read(path).updates:
                update.read()


def test_experts_are_updates_of_their_own(tmp_path):
    module = "model.layers.0.mlp.experts"
    tensors = {f"{module}.base_layer.lora_A.weight": draw(6, 8)}  # 3 experts of rank 2
    tensors |= {f"{module}.base_layer.lora_B.weight": draw(10, 6)}
    tensors |= {f"{module}.lora_A.weight": draw(6, 5), f"{module}.lora_B.weight": draw(8, 6)}
    targets = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    path = foreign(tmp_path / "adapter", tensors, r=2, target_parameters=targets)
    found, whole = formats.read(path).updates, peft.load(path).factors
    assert len(found) == 6 and {update.layer for update in found} == set(whole)
    for update in found:
        for got, want in zip(update.read(), whole[update.layer], strict=True):
            np.testing.assert_array_equal(got, want)


def test_without_a_config_the_scale_is_not_known(tmp_path):
    path = foreign(tmp_path / "a", {"q.lora_A.weight": draw(2, 8), "q.lora_B.weight": draw(6, 2)})
    (path / "adapter_config.json").unlink()
    found = formats.read(path)
    assert found.updates[0].scale == 1 and "no adapter_config.json" in found.updates[0].source
    assert "every s is taken as 1" in found.notes[0]


@pytest.mark.parametrize("kind", ["VERA", "IA3", "OFT", "HIRA", "PROMPT_TUNING"])
def test_what_needs_its_base_is_named(tmp_path, kind):
    path = foreign(tmp_path / "adapter", {"q.x": draw(2, 8)}, peft_type=kind)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": config["peft_type"]}))
    with pytest.raises(ValueError, match=f"{kind}: no update of weights that can be read without"):
        formats.read(path)


def test_a_matrix_that_adalora_pruned_to_rank_0_is_named(tmp_path):
    ranks = {"a": 0, "b": 2}
    tensors = {f"{name}.lora_A": draw(r, 8) for name, r in ranks.items()}
    tensors |= {f"{name}.lora_B": draw(6, r) for name, r in ranks.items()}
    tensors |= {f"{name}.lora_E": draw(r, 1) for name, r in ranks.items()}
    path = foreign(tmp_path / "adapter", tensors, peft_type="ADALORA", init_r=3)
    found = formats.read(path)
    assert [(update.layer, update.rank) for update in found.updates] == [("b", 2)]
    assert found.notes == ("a has no update: AdaLoRA pruned it to rank 0",)


def model():
    import torch

    torch.manual_seed(0)
    parts = {"emb": torch.nn.Embedding(12, 16), "lin": torch.nn.Linear(16, 24)}
    parts |= {"conv": torch.nn.Conv2d(4, 6, 3), "out": torch.nn.Linear(24, 8)}
    return torch.nn.ModuleDict(parts)


KINDS = {
    "lora": ("LoraConfig", dict(r=2, lora_alpha=3, target_modules=["emb", "lin", "conv"])),
    "dora": ("LoraConfig", dict(r=2, use_dora=True, target_modules=["lin", "conv"])),
    "adalora": (
        "AdaLoraConfig",
        dict(init_r=3, lora_alpha=5, target_modules=["lin"], total_step=10, tinit=1, tfinal=1),
    ),
    "loha": ("LoHaConfig", dict(r=2, alpha=3, target_modules=["lin", "conv"])),
    "lokr": ("LoKrConfig", dict(r=2, alpha=3, target_modules=["lin", "conv"])),
    "lokr-whole": ("LoKrConfig", dict(r=64, alpha=3, target_modules=["lin"])),
}


@pytest.mark.parametrize("case", KINDS)
def test_updates_are_pefts(tmp_path, case):
    library, torch = require("peft"), require("torch")
    kind, arguments = KINDS[case]
    adapted = library.get_peft_model(model(), getattr(library, kind)(**arguments))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    adapted.save_pretrained(tmp_path)
    found = formats.read(tmp_path).updates
    assert sorted(update.layer for update in found) == sorted(arguments["target_modules"])
    for update in found:
        layer = adapted.base_model.model.get_submodule(update.layer)
        want = layer.get_delta_weight("default").detach().numpy()
        if update.layer == "emb":
            want = want.T  # an embedding (V, d) is applied as it is
        want = want.reshape(len(want), -1).T
        np.testing.assert_allclose(dense(update), want, atol=1e-6, err_msg=update.layer)
        assert np.linalg.matrix_rank(dense(update), tol=1e-5) <= update.rank
        if case == "dora":
            m = layer.lora_magnitude_vector["default"].weight.detach().numpy()
            np.testing.assert_array_equal(update.read().m, m.reshape(-1))
