"""LoHa and LoKr of LyCORIS in PEFT's and diffusers' files: both libraries compute the same dW."""

import importlib
import json

import numpy as np
import pytest
from format_files import dense, draw, written
from support import require

from lorax.interop import formats
from lorax.interop.formats import dotted, kohya, peft

LAYERS = "mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1"
LAYERS += ("mid_block.resnets.0.conv_shortcut",)
PAIRS = {"loha": "LohaModule", "lokr": "LokrModule"}
#: {case: (algorithm, arguments of LyCORIS's modules, fields of PEFT's config)}
CASES = {
    "loha": ("loha", {}, {}),
    "loha-tucker": ("loha", {"use_tucker": True}, {"use_effective_conv2d": True}),
    "lokr": ("lokr", {"factor": 4}, {"decompose_factor": 4}),
    "lokr-root": ("lokr", {}, {"decompose_factor": -1}),
    "lokr-both": (
        "lokr",
        {"decompose_both": True},
        {"decompose_both": True, "decompose_factor": -1},
    ),
    "lokr-whole": ("lokr", {"factor": 4, "full_matrix": True}, {}),
    "lokr-tucker": ("lokr", {"factor": 4, "use_tucker": True}, {"use_effective_conv2d": True}),
}


def model():
    """A layer and convolutions with diffusers' names."""
    import torch

    around = lambda **parts: torch.nn.ModuleDict(parts)
    linear = around(proj_in=torch.nn.Linear(24, 48, bias=False))
    sizes = {"conv1": 3, "conv_shortcut": 1}
    conv = around(**{name: torch.nn.Conv2d(24, 48, k, bias=False) for name, k in sizes.items()})
    block = around(attentions=torch.nn.ModuleList([linear]), resnets=torch.nn.ModuleList([conv]))
    return around(mid_block=block)


def of_lycoris(tmp_path, algorithm, arguments):
    """(the library's file of all layers, {module: the library's dW})."""
    require("lycoris.modules")
    import torch

    torch.manual_seed(0)
    kind = getattr(importlib.import_module(f"lycoris.modules.{algorithm}"), PAIRS[algorithm])
    tensors, changes, base = {}, {}, model()
    for i, name in enumerate(LAYERS):
        flat = f"lora_unet_{name.replace('.', '_')}"
        module = kind(flat, base.get_submodule(name), lora_dim=2, alpha=3.0 + i, **arguments)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p))
            changes[name] = module.get_weight(module.shape).numpy()
            for word, x in module.custom_state_dict().items():
                tensors[f"{flat}.{word}"] = x.detach().numpy()
    return written(tmp_path, tensors), changes


def check_library(adapted, changes):
    """The dW that a model of torch with PEFT's layers computes."""
    for name, want in changes.items():
        got = adapted.get_submodule(name).get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_lycoris_does_and_back(tmp_path, case):
    library = require("peft")
    algorithm, arguments, fields = CASES[case]
    file, changes = of_lycoris(tmp_path, algorithm, arguments)
    found = formats.read(file, as_stored=True)
    there = peft.write(tmp_path / "peft", found)
    config = json.loads((there / "adapter_config.json").read_text())
    assert {name: config[name] for name in fields} == fields
    adapted = library.PeftModel.from_pretrained(model(), there).base_model.model
    check_library(adapted, changes)
    read = formats.read(there, as_stored=True)
    back = formats.read(kohya.write(tmp_path / "back.safetensors", read), as_stored=True)
    theirs, ours = ({one.layer: one for one in x.updates} for x in (found, back))
    assert theirs.keys() == ours.keys()
    for layer, one in theirs.items():
        assert (ours[layer].kind, ours[layer].scale) == (one.kind, one.scale)
        assert ours[layer].stored.keys() == one.stored.keys()
        np.testing.assert_array_equal(dense(ours[layer]), dense(one))


@pytest.mark.parametrize("case", [case for case in CASES if "lokr" in case])
def test_diffusers_computes_what_lycoris_does(tmp_path, case):
    """`load_lora_adapter` of a model, as its own models have it."""
    mixin = require("diffusers.loaders.peft").PeftAdapterMixin
    file, changes = of_lycoris(tmp_path, *CASES[case][:2])
    found = formats.read(file, as_stored=True)
    folder = dotted.write(tmp_path / "diffusers", found)
    inner = model()
    adapted = type("Adapted", (mixin, type(inner)), {})(dict(inner.items()))
    adapted.load_lora_adapter(
        str(folder), weight_name=dotted.FILE, prefix="unet", adapter_name="default"
    )
    check_library(adapted, changes)
    again = formats.read(folder, as_stored=True)
    assert [one.scale for one in again.updates] == [one.scale for one in found.updates]
    assert again.updates[0].source == "metadata alpha / r"
    for one, other in zip(found.updates, again.updates, strict=True):
        np.testing.assert_array_equal(dense(other), dense(one))


WHOLE = {"lokr_w1": (4, 6), "lokr_w2": (12, 4)}


@pytest.mark.parametrize(
    "words, more, why",
    [
        ({"lokr_w1": (12, 4), "lokr_w2": (4, 6)}, {}, r"no decompose_factor .* \(12, 4\) x"),
        (WHOLE, {"lora_down.weight": (2, 9), "lora_up.weight": (9, 2)}, "LoKr in some of its"),
        ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 9), "hada_w2_a": (8, 3), "hada_w2_b": (3, 9)}, {},
         r"sides of ranks \[2, 3\]"),
    ],
)  # fmt: skip
def test_what_pefts_configs_can_not_say_is_refused(tmp_path, words, more, why):
    layer, other = (f"lora_unet_mid_block_attentions_0_proj_{x}" for x in ("in", "out"))
    tensors = {f"{layer}.{word}": draw(*shape) for word, shape in words.items()}
    tensors |= {f"{other}.{word}": draw(*shape) for word, shape in more.items()}
    found = formats.read(written(tmp_path, tensors), as_stored=True)
    with pytest.raises(ValueError, match=f"PEFT can't hold it: .*{why}"):
        peft.write(tmp_path / "out", found)


def test_lycoris_divides_some_sizes_otherwise(tmp_path):
    """24 by the factor 8 is (3, 8), and (8, 3) with PEFT."""
    file, _ = of_lycoris(tmp_path, "lokr", {"factor": 8})
    with pytest.raises(ValueError, match=r"no decompose_factor .*proj_in \(6, 3\) x \(8, 8\)"):
        peft.write(tmp_path / "out", formats.read(file, as_stored=True))


def test_diffusers_has_no_lokr_of_text_encoders(tmp_path):
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{layer}.lokr_w1": draw(4, 4), f"{layer}.lokr_w2": draw(4, 4)}
    found = formats.read(written(tmp_path, tensors), as_stored=True)
    with pytest.raises(ValueError, match="LoKr of text_encoder; it has LoRA alone"):
        dotted.write(tmp_path / "out", found)
