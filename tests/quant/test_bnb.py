"""Checkpoints that transformers has saved with bitsandbytes' 4 bits."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import data, require

import lorax
from lorax import intercept, ops, quant, tree

# All sizes are multiples of 64: bitsandbytes' own decoder is wrong for 16, 32, 48, 80...
TINY = dict(
    llama=dict(
        vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    ),
    gpt2=dict(vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=4),
    phi3=dict(
        vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        original_max_position_embeddings=64, pad_token_id=0,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(family, kind, double) -> (directory, model), quantised and saved by transformers."""
    transformers, torch = require("transformers"), require("torch")
    require("bitsandbytes")
    transformers.logging.set_verbosity_error()
    torch.compiler.set_stance("force_eager")

    def make(family, kind="nf4", double=True):
        torch.manual_seed(0)
        where = tmp_path_factory.mktemp("bnb")
        config = transformers.AutoConfig.for_model(family, **TINY[family])
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(where / "plain")
        how = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_pretrained(
            where / "plain", quantization_config=how, dtype=torch.float32, device_map="cpu"
        )
        model.save_pretrained(where / "coded")
        return where / "coded", model

    yield make
    torch.compiler.set_stance("default")


@pytest.mark.parametrize(
    ("family", "kind", "double"),
    [("llama", "nf4", True), ("llama", "fp4", False), ("gpt2", "nf4", True), ("phi3", "nf4", True)],
)
def test_logits_are_those_of_the_quantised_model(saved, family, kind, double):
    import torch

    directory, model = saved(family, kind, double)
    base = lorax.load(str(directory))
    linear = {p: leaf for p, leaf in tree.flatten(base.params).items() if ops.is_operator(leaf)}
    assert {path.split("/")[-2] for path in linear} >= set("qkvo") | {"up", "down"}
    assert all(leaf.kind == kind for leaf in linear.values())
    tokens = np.random.default_rng(0).integers(0, 64, (2, 12))
    # In training mode their layers multiply in full precision; there is no dropout to train with.
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = model(torch.tensor(tokens)).logits.detach().numpy()
    logits = intercept.apply(base.module, base.params, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    again = quant.quantize(base.params, sites=base.sites)  # what is in codes stays as it is
    assert tree.nbytes(again) == tree.nbytes(base.params)


def damaged(directory, tmp_path, change):
    shutil.copytree(directory, tmp_path / "copy")
    file = tmp_path / "copy/model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    return tmp_path / "copy"


def test_damaged_states_are_refused(saved, tmp_path):
    directory, _ = saved("llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    state = f"{name}.quant_state.bitsandbytes__nf4"

    def rewrite(**fields):
        def change(tensors):
            text = json.loads(tensors[state].tobytes()) | fields
            tensors[state] = np.frombuffer(json.dumps(text).encode(), np.uint8)

        return change

    cases = {
        "no state of bitsandbytes": lambda t: t.update({state: np.frombuffer(b"{not", np.uint8)}),
        "some of its layers are quantised": lambda t: t.pop(state),
        "its nf4 values are not": lambda t: t[f"{name}.quant_map"].__setitem__(3, 0.5),
        r"\(out, in\) = \(64, 32\)": rewrite(shape=[64, 32]),
        "blocks of 48": rewrite(blocksize=48),
        "nested in another way": rewrite(nested_blocksize=128),
        "JSON nested too deep": lambda t: t.update(
            {state: np.frombuffer(b"[" * 200_000, np.uint8)}
        ),
        r"\(out, in\) = \(64.0, 64\)": rewrite(shape=[64.0, 64]),
        "blocks of 64.0": rewrite(blocksize=64.0),
        "decoded to int32": rewrite(dtype="int32"),
        "nested_offset nan; it must be finite": rewrite(nested_offset=float("nan")),
        "no tensor .*absmax beside its codes": lambda t: t.pop(f"{name}.absmax"),
        "absmax: 3 scales; expected 64": lambda t: t.update(
            {f"{name}.absmax": t[f"{name}.absmax"][:3]}
        ),
        "absmax: I8 with 1 scales of their own; expected U8 with one": lambda t: t.update(
            {f"{name}.absmax": t[f"{name}.absmax"].view(np.int8)}
        ),
        "nested_absmax: NaN or infinity in it": lambda t: t[f"{name}.nested_absmax"].fill(np.nan),
        "nested_absmax: I32 given where weights belong": lambda t: t.update(
            {f"{name}.nested_absmax": np.ones(1, np.int32)}
        ),
        "norm.weight: NaN or infinity in it": lambda t: t["model.norm.weight"].fill(np.inf),
    }
    for i, (message, change) in enumerate(cases.items()):
        copy = damaged(directory, tmp_path / str(i), change)
        with pytest.raises(ValueError, match=message):
            lorax.load(str(copy))


def test_scales_that_are_none_are_refused(saved, tmp_path):
    """Without nested scales `absmax` itself holds floats."""
    directory, _ = saved("llama", "fp4", False)
    key = "model.layers.0.mlp.up_proj.weight.absmax"
    changes = {
        "NaN or infinity in it": lambda t: t[key].fill(np.inf),
        "U8 given where weights belong": lambda t: t.update({key: t[key].astype(np.uint8)}),
    }
    for i, (message, change) in enumerate(changes.items()):
        with pytest.raises(ValueError, match=f"model.safetensors: {key}: {message}"):
            lorax.load(str(damaged(directory, tmp_path / str(i), change)))


def test_other_quantisers_are_refused(saved, tmp_path):
    directory, _ = saved("gpt2")
    shutil.copytree(directory, tmp_path / "copy")
    file = tmp_path / "copy/config.json"
    fields = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="'gptq' is not supported; supported are bitsandbytes'"):
        lorax.load(str(tmp_path / "copy"))


def test_a_plain_directory_is_read_as_before():
    base = lorax.load(str(data("models/stories-llama-260k")))
    assert not any(ops.is_operator(leaf) for leaf in tree.flatten(base.params).values())
