"""CLIP's text encoder against transformers', and its adapters in files of diffusers and kohya."""

import functools

import jax
import numpy as np
import pytest
import small
from quick import jit
from safetensors.numpy import load_file, save_file
from support import require

import lorax
from lorax import adapters, convert

END = 39
SMALL = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, bos_token_id=1,
    num_attention_heads=2, max_position_embeddings=12, eos_token_id=END,
)  # fmt: skip


def reference(**fields):
    """transformers' model, with weights and biases large enough to matter."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**SMALL | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(transformers' model, its directory, ours)."""
    directory = tmp_path_factory.mktemp("text_encoder")
    model = reference()
    model.save_pretrained(directory)
    return model, directory, lorax.load(str(directory))


def tokens() -> np.ndarray:
    """Three texts, which end at different places; the first has two ends."""
    texts = np.random.default_rng(0).integers(3, END, (3, 11)).astype(np.int32)
    texts[[0, 0, 1, 2], [4, 9, 7, 10]] = END
    return texts


def encoded(model) -> tuple[np.ndarray, np.ndarray]:
    """transformers' (hidden states, pooled)."""
    torch = require("torch")
    with torch.no_grad():
        out = model(torch.tensor(tokens()).long())
    return out.last_hidden_state.numpy(), out.pooler_output.numpy()


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu", "eos_token_id": 2}])
def test_it_encodes_as_transformers_does(fields, tmp_path):
    """An end of 2 is a mistake in old files, whose texts end at their largest id."""
    model = reference(**fields)
    model.save_pretrained(tmp_path)
    base = lorax.load(str(tmp_path))
    hidden, pooled = encoded(model)
    assert np.ptp(hidden) > 1
    run = functools.partial(lorax.apply, base.module, base.params)
    close(jit(run)(tokens()), hidden)
    close(jit(functools.partial(run, method="pooled"))(tokens()), pooled)


def test_files_of_pipelines_have_another_first_word(made, tmp_path):
    _, directory, base = made
    tensors = load_file(directory / "model.safetensors")
    assert not any(name.startswith("text_model.") for name in tensors)
    longer = {f"text_model.{name}": x for name, x in tensors.items()}
    save_file(longer, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    again = lorax.load(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again.params, base.params)


def test_it_has_no_head_and_refuses_other_models(made, tmp_path):
    base = made[2]
    assert not base.causal and base.traits.outputs is None and base.positions == 12
    with pytest.raises(ValueError, match="13 tokens, but max_position_embeddings is 12"):
        lorax.apply(base.module, base.params, np.ones((1, 13), np.int32))
    text = (made[1] / "config.json").read_text()
    other = text.replace('"CLIPTextModel"', '"CLIPTextModelWithProjection"')
    (tmp_path / "config.json").write_text(other)
    with pytest.raises(ValueError, match="architectures: .* given, must be CLIPTextModel alone"):
        lorax.load(f"random:{tmp_path}")


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    """LoRA of ours on each matrix, in PEFT's files: (folder, our hidden states)."""
    base = made[2]
    method = lorax.method("lora", rank=2, alpha=3, targets=("all-linear",))
    state = method.init(jax.random.key(0), base.params, base.sites)
    state = state._replace(trainable=small.noisy(state.trainable))
    folder = tmp_path_factory.mktemp("exported")
    assert not adapters.save(folder / "peft", adapters.from_training(base, method, state))
    bound = method.bind(*state, base.params, sites=base.sites)
    return folder, run(base, bound)


def run(base, params) -> np.ndarray:
    return np.asarray(jit(functools.partial(lorax.apply, base.module))(params, tokens()))


@pytest.mark.filterwarnings("ignore")  # what PEFT warns about is not ours
def test_peft_loads_our_adapter(made, exported):
    folder, expected = exported
    assert np.abs(expected - run(made[2], made[2].params)).max() > 0.1
    model = require("peft").PeftModel.from_pretrained(reference(), folder / "peft").eval()
    close(encoded(model)[0], expected)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_its_names_are_those_of_pipelines(format, made, exported):
    (folder, expected), base = exported, made[2]
    out = folder / f"{format}.safetensors" if format == "kohya" else folder / format
    assert convert.main(["to", format, str(folder / "peft"), str(out)]) == 0
    names = load_file(out if out.is_file() else out / "pytorch_lora_weights.safetensors")
    prefix = {"diffusers": "text_encoder.text_model.", "kohya": "lora_te_text_model_"}[format]
    assert all(name.startswith(prefix) for name in names)
    close(run(base, adapters.load(out, base).bind()), expected)
