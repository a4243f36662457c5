"""PEFT's on-disk format: exact there and back, and PEFT itself reads what we write."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy
from support import DATA, require

from lorax.interop import peft
from lorax.interop.peft import Factors

FOREIGN = DATA / "adapters" / "peft_gpt2_lora"
WIDTH, VOCABULARY, CONTEXT = 16, 40, 32


def random_factors(scale_v: float = 0.7) -> dict[str, Factors]:
    """Every kind of place: fused q and v of different rank and scale, q alone, plain, embedding."""
    rng = np.random.default_rng(0)

    def factor(d_in, r, d_out, s):
        a, b = rng.standard_normal((d_in, r)), rng.standard_normal((r, d_out))
        return Factors(a.astype(np.float32), b.astype(np.float32), s)

    return {
        "h/0/attn/q": factor(WIDTH, 2, WIDTH, 3.0),
        "h/0/attn/v": factor(WIDTH, 3, WIDTH, scale_v),
        "h/0/attn/o": factor(WIDTH, 2, WIDTH, 16 / 3),
        "h/1/attn/k": factor(WIDTH, 4, WIDTH, 2.0),
        "h/1/mlp/up": factor(WIDTH, 2, 4 * WIDTH, 0.5),
        "h/1/mlp/down": factor(4 * WIDTH, 1, WIDTH, 1.0),
        "wte": factor(VOCABULARY, 2, WIDTH, 0.25),
        "wpe": factor(CONTEXT, 2, WIDTH, 0.25),
    }


def dense(factor: Factors) -> np.ndarray:
    return factor.s * factor.a @ factor.b


def edit(directory: pathlib.Path, **fields) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def plain_lora(directory: pathlib.Path, module: str, A, B, **config) -> pathlib.Path:
    """An adapter as another program would write it."""
    directory.mkdir(parents=True)
    key = f"base_model.model.{module}."
    tensors = {f"{key}lora_A.weight": A, f"{key}lora_B.weight": B}
    (directory / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    config = {"peft_type": "LORA", "r": A.shape[0], "lora_alpha": 8, **config}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


# ------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("scale_v", [3.0, 0.7, -3.0, 1e-3, 0.0, 1e30])
def test_round_trip_is_bit_identical(tmp_path, scale_v):
    factors = random_factors(scale_v)
    loaded = peft.load(peft.save(tmp_path / "adapter", factors, "gpt2"))
    assert set(loaded) == set(factors)
    for path, (a, b, s) in factors.items():
        assert loaded[path].a.dtype == loaded[path].b.dtype == np.float32
        np.testing.assert_array_equal(loaded[path].a, a)
        np.testing.assert_array_equal(loaded[path].b, b)
        assert loaded[path].s == s


def test_fused_module_is_joined_exactly(tmp_path):
    factors = random_factors(scale_v=3.0)
    peft.save(tmp_path, factors, "gpt2")
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.0.attn.c_attn."
    A, B = tensors[key + "lora_A.weight"], tensors[key + "lora_B.weight"]
    q, v = factors["h/0/attn/q"], factors["h/0/attn/v"]
    np.testing.assert_array_equal(A, np.concatenate([q.a.T, v.a.T]))
    expected = np.zeros((3 * WIDTH, 5), np.float32)
    expected[:WIDTH, :2] = q.b.T
    expected[2 * WIDTH :, 2:] = v.b.T
    np.testing.assert_array_equal(B, expected)


def test_different_scales_keep_the_update(tmp_path):
    """Without our metadata, as another program reads it, the c_attn update is still ours."""
    factors = random_factors(scale_v=0.7)
    peft.save(tmp_path, factors, "gpt2")
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(safetensors.numpy.save(safetensors.numpy.load_file(file)))
    loaded = peft.load(tmp_path)
    for path in ("h/0/attn/q", "h/0/attn/v"):
        np.testing.assert_allclose(dense(loaded[path]), dense(factors[path]), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(loaded["h/0/attn/k"].b, 0)


def test_config_is_what_peft_wants(tmp_path):
    peft.save(tmp_path, random_factors(), "gpt2", dropout=0.1)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert config["init_lora_weights"] is True and config["fan_in_fan_out"] is True
    assert config["base_model_name_or_path"] == "gpt2" and config["lora_dropout"] == 0.1
    assert config["r"] == 2 and config["rank_pattern"]["transformer.h.0.attn.c_attn"] == 5
    module = "transformer.h.0.attn.c_attn"
    assert config["alpha_pattern"].get(module, config["lora_alpha"]) == 3.0 * 5
    assert list(config) == sorted(config)
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_foreign_fused_module_is_split(tmp_path):
    rng = np.random.default_rng(1)
    A = rng.standard_normal((2, WIDTH)).astype(np.float32)
    B = rng.standard_normal((3 * WIDTH, 2)).astype(np.float32)
    loaded = peft.load(plain_lora(tmp_path / "x", "transformer.h.11.attn.c_attn", A, B))
    assert list(loaded) == ["h/11/attn/q", "h/11/attn/k", "h/11/attn/v"]
    for n, factor in enumerate(loaded.values()):
        np.testing.assert_array_equal(factor.a, A.T)
        np.testing.assert_array_equal(factor.b, B[n * WIDTH : (n + 1) * WIDTH].T)
        assert factor.s == 4.0


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"c_proj": 2}}, 0.5),
        ({"alpha_pattern": {"h.1.attn.c_proj": 2, "c_proj": 12}}, 3.0),
        ({"r": 64, "rank_pattern": {"mlp.c_proj": 4}}, 2.0),
        ({"r": 64, "rank_pattern": {"mlp.c_proj": 4}, "use_rslora": True}, 4.0),
    ],
)
def test_scale_follows_peft(tmp_path, config, scale):
    A, B = np.ones((4, 4 * WIDTH), np.float32), np.ones((WIDTH, 4), np.float32)
    loaded = peft.load(plain_lora(tmp_path / "x", "transformer.h.0.mlp.c_proj", A, B, **config))
    assert loaded["h/0/mlp/down"].s == scale


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 3, "rank_pattern": {}}, "rank 3"),
        ({"lora_alpha": "many", "alpha_pattern": {}}, "lora_alpha"),
        ({"lora_alpha": 77, "alpha_pattern": {}}, "scale"),
    ],
)
def test_unreadable_config_is_refused_by_name(tmp_path, fields, words):
    peft.save(tmp_path, random_factors(), "gpt2")
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=words) as error:
        peft.load(tmp_path)
    assert "adapter_" in str(error.value)


def test_unknown_field_warns_and_changes_nothing(tmp_path):
    peft.save(tmp_path, random_factors(), "gpt2")
    edit(tmp_path, field_of_the_future=1)
    with pytest.warns(UserWarning, match="field_of_the_future"):
        assert set(peft.load(tmp_path)) == set(random_factors())


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        peft.load(tmp_path / "nothing")
    peft.save(tmp_path, random_factors(), "gpt2")
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"\x00" * 64, b""):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="adapter_model.safetensors"):
            peft.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        peft.load(tmp_path)


def test_tensors_of_another_family_are_named(tmp_path):
    A, B = np.ones((2, WIDTH), np.float32), np.ones((WIDTH, 2), np.float32)
    directory = plain_lora(tmp_path / "x", "model.layers.0.self_attn.q_proj", A, B)
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj"):
        peft.load(directory)


@pytest.mark.parametrize(
    ("path", "factor", "words"),
    [
        ("h/0/attn/x", Factors(np.ones((4, 1)), np.ones((1, 4)), 1.0), "h/0/attn/x"),
        ("h/0/attn/q", Factors(np.ones((4, 2)), np.ones((1, 4)), 1.0), "h/0/attn/q"),
        ("h/0/attn/q", Factors(np.ones((4, 0)), np.ones((0, 4)), 1.0), "rank 0"),
        ("h/0/attn/q", Factors(np.ones((4, 1)), np.ones((1, 4)), float("inf")), "finite"),
    ],
)
def test_save_refuses_what_does_not_fit(tmp_path, path, factor, words):
    with pytest.raises(ValueError, match=words):
        peft.save(tmp_path, {path: factor}, "gpt2")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- references


@pytest.mark.skipif(not FOREIGN.exists(), reason="needs the shared data folder")
def test_real_adapter():
    """What PEFT trained on GPT-2 small: r = 8, alpha = 32 on c_attn, attn.c_proj, mlp.c_proj."""
    loaded = peft.load(FOREIGN)
    assert len(loaded) == 12 * 5
    stored = safetensors.numpy.load_file(FOREIGN / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.7.attn.c_attn."
    update = 4.0 * stored[key + "lora_B.weight"] @ stored[key + "lora_A.weight"]  # (2304, 768)
    ours = np.concatenate([dense(loaded[f"h/7/attn/{part}"]) for part in "qkv"], axis=1)
    np.testing.assert_allclose(ours, update.T, rtol=0, atol=1e-5)


@pytest.mark.skipif(not FOREIGN.exists(), reason="needs the shared data folder")
def test_real_adapter_survives_our_export(tmp_path):
    loaded = peft.load(FOREIGN)
    again = peft.load(peft.save(tmp_path, loaded, "gpt2"))
    assert all(np.array_equal(loaded[path].b, again[path].b) for path in loaded)
    assert all(np.array_equal(loaded[path].a, again[path].a) for path in loaded)


@pytest.mark.filterwarnings("ignore")  # what PEFT and transformers warn about is not ours
def test_peft_reads_our_export(tmp_path):
    torch, transformers, library = require("torch"), require("transformers"), require("peft")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=WIDTH, vocab_size=VOCABULARY, n_positions=CONTEXT,
        tie_word_embeddings=False,
    )  # fmt: skip
    base = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.arange(12)[None] % VOCABULARY
    with torch.no_grad():
        before = base(tokens).logits.clone()
    factors = random_factors()
    peft.save(tmp_path / "adapter", factors, "random")
    model = library.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()

    def delta(module: str) -> np.ndarray:
        layer = model.base_model.model.get_submodule(f"transformer.{module}")
        return layer.get_delta_weight("default").detach().numpy()

    zero = np.zeros((WIDTH, WIDTH), np.float32)
    fused = [dense(factors["h/0/attn/q"]), zero, dense(factors["h/0/attn/v"])]
    expected = {
        "h.0.attn.c_attn": np.concatenate(fused, axis=1),
        "h.1.attn.c_attn": np.concatenate([zero, dense(factors["h/1/attn/k"]), zero], axis=1),
        "h.0.attn.c_proj": dense(factors["h/0/attn/o"]),
        "h.1.mlp.c_fc": dense(factors["h/1/mlp/up"]),
        "h.1.mlp.c_proj": dense(factors["h/1/mlp/down"]),
        "wte": dense(factors["wte"]),
        "wpe": dense(factors["wpe"]),
    }
    for module, update in expected.items():
        np.testing.assert_allclose(delta(module), update, rtol=0, atol=1e-5, err_msg=module)
    with torch.no_grad():
        after = model(tokens).logits
    assert float((after - before).abs().max()) > 1e-2

    # What PEFT saves of it has lost our metadata and still means the same.
    model.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
    again = peft.load(tmp_path / "again")
    for path, factor in factors.items():
        np.testing.assert_allclose(dense(again[path]), dense(factor), rtol=0, atol=1e-5)
    shutil.rmtree(tmp_path / "again")
