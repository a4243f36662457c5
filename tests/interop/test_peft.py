"""PEFT's on-disk format: exact there and back, and PEFT computes with our files what we do."""

import functools
import json
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from peft_files import (
    CONTEXT,
    TIED,
    TINY,
    UNTIED,
    VOCABULARY,
    WIDTH,
    as_running,
    assert_same,
    dense,
    edit,
    factor,
    foreign,
    lora_of,
    random_adapter,
)
from quick import jit
from support import data, require

import lorax
from lorax import adapters
from lorax.interop import peft
from lorax.interop.peft import Adapter, Factors
from lorax.models import gpt2
from lorax.models.families import FAMILIES

FOREIGN = "adapters/peft_gpt2_lora"


# ------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("with_sources", [True, False])
def test_round_trip_is_bit_identical(tmp_path, with_sources):
    adapter = random_adapter()
    directory = peft.save(tmp_path / "adapter", adapter, UNTIED, "gpt2")
    assert_same(peft.load(directory, UNTIED if with_sources else None), adapter)
    first = (directory / "adapter_model.safetensors").read_bytes()
    peft.save(tmp_path / "again", adapter, UNTIED, "gpt2")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == first


@pytest.mark.parametrize("scale_v", [0.7, -3.0, -1e-3, 0.0, 1e30])
def test_different_scales_in_one_module_keep_update_and_scale(tmp_path, scale_v):
    """Also without our metadata, as another program reads it."""
    factors = random_adapter(scale_v).factors
    peft.save(tmp_path, factors, UNTIED, "gpt2")
    own = peft.load(tmp_path).factors
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(safetensors.numpy.save(safetensors.numpy.load_file(file)))
    plain = peft.load(tmp_path, UNTIED).factors
    for path in ("h/0/attn/q", "h/0/attn/v"):
        size = np.abs(dense(factors[path])).max()
        assert own[path].s == factors[path].s
        for loaded in (own, plain):
            np.testing.assert_allclose(
                dense(loaded[path]), dense(factors[path]), rtol=1e-5, atol=1e-6 * size
            )
    np.testing.assert_array_equal(plain["h/0/attn/k"].b, 0)


def test_fused_module_is_joined_exactly(tmp_path):
    adapter = random_adapter()
    peft.save(tmp_path, adapter, UNTIED, "gpt2")
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.0.attn.c_attn."
    q, v = adapter.factors["h/0/attn/q"], adapter.factors["h/0/attn/v"]
    np.testing.assert_array_equal(tensors[key + "lora_A.weight"], np.concatenate([q.a.T, v.a.T]))
    expected = np.zeros((3 * WIDTH, 5), np.float32)
    expected[:WIDTH, :2] = q.b.T
    expected[2 * WIDTH :, 2:] = v.b.T
    np.testing.assert_array_equal(tensors[key + "lora_B.weight"], expected)
    biases = [adapter.weights[f"h/0/attn/{part}/bias"] for part in "qkv"]
    np.testing.assert_array_equal(tensors[key + "base_layer.bias"], np.concatenate(biases))


def test_config_is_what_peft_wants(tmp_path):
    peft.save(tmp_path, random_adapter(), UNTIED, "gpt2", dropout=0.1)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    module = "transformer.h.0.attn.c_attn"
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert config["init_lora_weights"] is True and config["fan_in_fan_out"] is True
    assert config["base_model_name_or_path"] == "gpt2" and config["lora_dropout"] == 0.1
    assert config["r"] == 2 and config["rank_pattern"][module] == 5
    assert config["alpha_pattern"].get(module, config["lora_alpha"]) == 3.0 * 5
    assert config["bias"] == "all" and config["modules_to_save"] == ["transformer.ln_f"]
    assert list(config) == sorted(config)
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_dora_of_a_fused_module_needs_all_its_parts(tmp_path):
    factors = {
        f"h/1/attn/{part}": factor(WIDTH, 2, WIDTH, 0.5, i, True) for i, part in enumerate("qkv")
    }
    assert_same(
        peft.load(peft.save(tmp_path / "all", factors, UNTIED, "gpt2")), Adapter(factors, {}, {})
    )
    with pytest.raises(ValueError, match="h/1/attn/k: not adapted, but a part of .*c_attn"):
        peft.save(
            tmp_path / "x", {p: f for p, f in factors.items() if p[-1] != "k"}, UNTIED, "gpt2"
        )
    with pytest.raises(ValueError, match="h/0/attn/o: no magnitudes"):
        peft.save(
            tmp_path / "x", factors | {"h/0/attn/o": factor(WIDTH, 2, WIDTH, 1.0)}, UNTIED, "x"
        )
    assert not (tmp_path / "x").exists()


def test_an_update_of_a_tied_embedding_is_written_for_the_head_as_well(tmp_path):
    factors = {"wte": factor(VOCABULARY, 2, WIDTH, 0.25)}
    peft.save(tmp_path, factors, TIED, "gpt2")
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        tensors["base_model.model.lm_head.lora_A.weight"], factors["wte"].b
    )
    for given in (None, TIED):
        loaded = peft.load(tmp_path, given)
        assert_same(loaded, Adapter(factors, {}, {}))
        assert loaded.config["ensure_weight_tying"] is True


# ------------------------------------------------------------------------------------ other's files


@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["head", "bare"])
def test_foreign_fused_module_is_split(tmp_path, prefix):
    stored = lora_of(f"{prefix}h.11.attn.c_attn", WIDTH, 3 * WIDTH)
    stored |= {f"{prefix}h.11.attn.c_attn.base_layer.bias": np.arange(3 * WIDTH, dtype=np.float32)}
    loaded = peft.load(foreign(tmp_path / "x", stored, bias="lora_only"), UNTIED)
    assert list(loaded.factors) == ["h/11/attn/q", "h/11/attn/k", "h/11/attn/v"]
    A, B = list(stored.values())[:2]
    for i, part in enumerate(loaded.factors.values()):
        np.testing.assert_array_equal(part.a, A.T)
        np.testing.assert_array_equal(part.b, B[i * WIDTH : (i + 1) * WIDTH].T)
        assert part.s == 4.0
    np.testing.assert_array_equal(
        loaded.weights["h/11/attn/v/bias"], np.arange(2 * WIDTH, 3 * WIDTH)
    )
    # Saved again, the parts share the rows of A as they did.
    peft.save(tmp_path / "again", loaded, UNTIED, "gpt2")
    again = safetensors.numpy.load_file(tmp_path / "again" / "adapter_model.safetensors")
    module = "base_model.model.transformer.h.11.attn.c_attn"
    np.testing.assert_array_equal(again[f"{module}.lora_A.weight"], A)
    np.testing.assert_array_equal(again[f"{module}.lora_B.weight"], B)


def test_without_sources_a_foreign_adapter_keeps_its_names(tmp_path):
    stored = lora_of("model.layers.0.self_attn.q_proj", 6, 4) | {"score.weight": np.ones((3, 6))}
    loaded = peft.load(foreign(tmp_path / "x", stored))
    factors = loaded.factors["model.layers.0.self_attn.q_proj"]
    assert factors.a.shape == (6, 2) and factors.b.shape == (2, 4)
    np.testing.assert_array_equal(loaded.weights["score.weight"], np.ones((3, 6)))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lora_of("model.layers.0.self_attn.q_proj", 4, 4), "model.layers.0.self_attn.q_proj"),
        (lora_of("transformer.h.0.attn.c_attn", WIDTH, 40), "40 outputs, the base's has 48"),
        (lora_of("h.0.mlp.c_fc", 4, 4) | {"score.weight": np.ones((2, 4))}, "score.weight .* head"),
        ({"h.0.mlp.c_fc.lora_A.weight": np.ones((2, 4))}, "need A .r, in. and B"),
        ({"h.0.mlp.c_fc.weight": np.ones((2, 4))}, "no lora_A"),
        (
            lora_of("h.0.mlp.c_fc", 4, 4) | {"h.0.mlp.c_fc.lora_magnitude_vector": np.ones(4)},
            "use_dora=False",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, tensors, words):
    with pytest.raises(ValueError, match=f"adapter_model.safetensors: .*{words}"):
        peft.load(foreign(tmp_path / "x", tensors), UNTIED)


@pytest.mark.filterwarnings("ignore:.*no fields of LOHA")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa.*path_initial_model"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga.*path_initial_model"),
        ({"r": 3, "rank_pattern": {}}, "r or rank_pattern: .* rank 3"),
        ({"lora_alpha": "many", "alpha_pattern": {}}, "lora_alpha"),
        ({"lora_alpha": 77, "alpha_pattern": {}}, "scale"),
    ],
)
def test_unreadable_config_is_refused_by_name(tmp_path, fields, words):
    peft.save(tmp_path, random_adapter(), UNTIED, "gpt2")
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"adapter_(?s:.)*{words}"):
        peft.load(tmp_path)


def test_unknown_field_warns_and_changes_nothing(tmp_path):
    peft.save(tmp_path, random_adapter(), UNTIED, "gpt2")
    edit(tmp_path, field_of_the_future=1)
    with pytest.warns(UserWarning, match="field_of_the_future"):
        assert_same(peft.load(tmp_path), random_adapter())


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        peft.load(tmp_path / "nothing")
    peft.save(tmp_path, random_adapter(), UNTIED, "gpt2")
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"\x00" * 64, b""):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="adapter_model.safetensors"):
            peft.load(tmp_path)
    for metadata in ("{", "[]", '{"factors": {}}', '{"factors": {"x": {"module": "y"}}}'):
        tensors = safetensors.numpy.load(whole)
        file.write_bytes(safetensors.numpy.save(tensors, {"lorax": metadata}))
        with pytest.raises(ValueError, match="metadata 'lorax' does not fit"):
            peft.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        peft.load(tmp_path)


@pytest.mark.parametrize(
    ("factors", "weights", "words"),
    [
        ({"h/0/attn/x": factor(4, 1, 4, 1.0)}, {}, "h/0/attn/x: the base has no such layer"),
        ({"h/0/attn/q": Factors(np.ones((4, 2)), np.ones((1, 4)), 1.0)}, {}, "h/0/attn/q: need a"),
        ({"h/0/attn/q": factor(WIDTH, 2, 8, 1.0)}, {}, "need a .16, r. and b .r, 16. in .*c_attn"),
        ({"h/0/attn/q": factor(4, 0, 4, 1.0)}, {}, "rank 0"),
        ({"h/0/attn/q": factor(4, 1, 4, float("inf"))}, {}, "finite"),
        ({"wpe": factor(4, 1, 4, 1.0)._replace(m=np.ones(3))}, {}, "magnitudes m .4,."),
        ({}, {}, "nothing to save"),
        ({"wpe": factor(4, 1, 4, 1.0)}, {"h/0/x/bias": np.ones(3)}, "no such parameter"),
        ({"wpe": factor(4, 1, 4, 1.0)}, {"h/0/attn/k/bias": np.ones(3)}, "with h/0/attn/q/bias"),
        ({"wpe": factor(4, 1, 4, 1.0)}, {"ln_f/scale": np.ones(3)}, "missing is .*ln_f.bias"),
    ],
)
def test_save_refuses_what_does_not_fit(tmp_path, factors, weights, words):
    with pytest.raises(ValueError, match=words):
        peft.save(tmp_path, Adapter(factors, weights, {}), UNTIED, "gpt2")
    assert not list(tmp_path.iterdir())


def test_a_classifier_is_saved_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match="task_type SEQ_CLS: PEFT reads the head"):
        peft.save(tmp_path, random_adapter(), UNTIED, "gpt2", task_type="SEQ_CLS")


def test_real_adapter(tmp_path):
    """What PEFT trained on GPT-2 small: r = 8, alpha = 32 on c_attn, attn.c_proj, mlp.c_proj."""
    small = gpt2.hf_tensors(gpt2.Config())
    loaded = peft.load(data(FOREIGN), small)
    assert len(loaded.factors) == 12 * 5 and not loaded.weights
    stored = safetensors.numpy.load_file(data(FOREIGN) / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.7.attn.c_attn."
    update = 4.0 * stored[key + "lora_B.weight"] @ stored[key + "lora_A.weight"]  # (2304, 768)
    ours = np.concatenate([dense(loaded.factors[f"h/7/attn/{part}"]) for part in "qkv"], axis=1)
    np.testing.assert_allclose(ours, update.T, rtol=0, atol=1e-5)
    peft.save(tmp_path, loaded, small, "gpt2")
    again = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert set(again) == set(stored)
    assert all(np.array_equal(again[key], stored[key]) for key in stored)


# ------------------------------------------------------------------------------------- with PEFT


class Model(NamedTuple):
    """A tiny model of transformers: the class's name without "Config" and what follows, options."""

    family: str
    stem: str
    kind: str
    options: dict


LLAMA = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20)
LLAMA |= dict(num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
ROBERTA = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
ROBERTA |= dict(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, type_vocab_size=1)
FALCON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY)
FALCON |= dict(new_decoder_architecture=True, num_kv_heads=2, bias=True)
SMALL = LLAMA | dict(pad_token_id=0, sliding_window=3, head_dim=4)
MODELS = {
    "gpt2": Model("gpt2", "GPT2", "LMHeadModel", TINY | {"tie_word_embeddings": False}),
    "gpt2-tied": Model("gpt2", "GPT2", "LMHeadModel", TINY),
    "llama": Model("llama", "Llama", "ForCausalLM", LLAMA),
    "llama-tied": Model("llama", "Llama", "ForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "roberta": Model("roberta", "Roberta", "ForSequenceClassification", ROBERTA),
    "bert": Model("bert", "Bert", "ForMaskedLM", ROBERTA),
    "falcon": Model("falcon", "Falcon", "ForCausalLM", FALCON),
    "phi3": Model("phi3", "Phi3", "ForCausalLM", SMALL),
    "gemma2": Model("gemma2", "Gemma2", "ForCausalLM", SMALL),
}
ALL = ["c_attn", "c_proj", "c_fc"]
PATTERNS = dict(rank_pattern={"c_attn": 3, "h.1.mlp.c_proj": 1}, alpha_pattern={"h.0.*": 5})
FUSED = dict(modules_to_save=["h.1.self_attention.query_key_value"], bias="lora_only")
CASES = {
    "plain": ("gpt2", dict(target_modules=["c_attn"])),
    "patterns": ("gpt2", dict(target_modules=ALL, r=2, lora_alpha=3, **PATTERNS)),
    "dora": ("gpt2", dict(target_modules=[*ALL, "wte"], r=2, use_dora=True)),
    "save-head": ("gpt2", dict(target_modules=["c_attn"], modules_to_save=["lm_head", "ln_f"])),
    "bias-all": ("gpt2", dict(target_modules=["c_attn", "c_fc"], bias="all")),
    "bias-targets": ("gpt2", dict(target_modules=["c_attn", "c_fc"], bias="lora_only")),
    "embeddings": ("gpt2", dict(target_modules=["wte", "wpe", "c_proj"])),
    "tied-lookup": ("gpt2-tied", dict(target_modules=["wte", "c_attn"])),
    "tied-apart": ("gpt2-tied", dict(target_modules=["lm_head", "wte"])),
    "tied-save": ("gpt2-tied", dict(target_modules=["c_attn"], modules_to_save=["lm_head"])),
    "llama": ("llama", dict(target_modules="all-linear", use_rslora=True)),
    "llama-dora": ("llama", dict(target_modules=["k_proj", "down_proj"], use_dora=True)),
    "llama-embed": ("llama", dict(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "llama-tied": (
        "llama-tied",
        dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    ),
    "llama-tied-save": (
        "llama-tied",
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "llama-save": ("llama", dict(target_modules=["v_proj"], modules_to_save=["embed_tokens"])),
    "roberta-bias": ("roberta", dict(target_modules=["query", "dense"], bias="all")),
    "bert-lookup": ("bert", dict(target_modules=["query", "word_embeddings"], task_type=None)),
    "roberta-head": ("roberta", dict(target_modules=["value"], task_type="SEQ_CLS")),
    "falcon": ("falcon", dict(target_modules=["h.0.self_attention.query_key_value"], **FUSED)),
    "phi3": ("phi3", dict(target_modules="all-linear", rank_pattern={"qkv_proj": 3})),
    "phi3-dora": ("phi3", dict(target_modules=["qkv_proj", "gate_up_proj"], use_dora=True)),
    "phi3-save": (
        "phi3",
        dict(target_modules=["qkv_proj"], modules_to_save=["gate_up_proj", "input_layernorm"]),
    ),
    "gemma2": ("gemma2", dict(target_modules="all-linear", modules_to_save=["norm"])),
    "gemma2-embed": (
        "gemma2",
        dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    ),
    "gemma2-lookup": ("gemma2", dict(target_modules=["embed_tokens"], use_dora=True)),
}
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (3, 9), np.int32)


def random_model(name, directory):
    """The directory of a model whose random weights and biases are large enough to matter."""
    torch, transformers = require("torch"), require("transformers")
    model = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, model.stem + "Config")(**model.options)
    reference = getattr(transformers, model.stem + model.kind)(config)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(5 * parameter + 0.1 * torch.randn_like(parameter))
    reference.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (its directory, our base)."""
    tmp = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name):
        if MODELS[name].family not in FAMILIES:
            pytest.skip(f"no {MODELS[name].family}")
        return random_model(name, tmp / name), lorax.load(str(tmp / name))

    return make


def reference(name, directory):
    transformers, model = require("transformers"), MODELS[name]
    return getattr(transformers, model.stem + model.kind).from_pretrained(directory).eval()


def torch_logits(model):
    torch = require("torch")
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


@pytest.mark.filterwarnings("ignore")  # what PEFT and transformers warn about is not ours
@pytest.mark.parametrize("case", CASES)
def test_peft_and_we_compute_the_same_with_each_others_files(case, made, tmp_path):
    """PEFT trains an adapter, we load it; we save it again, PEFT loads that."""
    name, options = CASES[case]
    torch, library = require("torch"), require("peft")
    directory, base = made(name)
    torch.manual_seed(1)
    task = "SEQ_CLS" if "Classification" in MODELS[name].kind else "CAUSAL_LM"
    config = library.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": task} | options)
    task = config.task_type
    model = library.get_peft_model(reference(name, directory), config)
    before = torch_logits(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.from_numpy(TOKENS).long()).logits.square().mean().backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(model)
    assert np.abs(expected - before).max() > 0.5

    adapter = peft.load(tmp_path / "theirs", base.sources)
    ours = jit(functools.partial(lorax.apply, base.module))(adapters.bind(base, adapter), TOKENS)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)

    running = as_running(tmp_path / "theirs", model, tmp_path / "running")
    assert_same(peft.load(running, base.sources), adapter)

    peft.save(tmp_path / "ours", adapter, base.sources, str(directory), task_type=task)
    again = library.PeftModel.from_pretrained(reference(name, directory), tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(again), expected, rtol=0, atol=1e-4)
    assert_same(peft.load(tmp_path / "ours", base.sources), adapter)
