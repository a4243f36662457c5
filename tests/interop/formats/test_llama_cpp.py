"""llama.cpp's adapters, written by the gguf package as its converter does, against dense
references."""

import json

import numpy as np
import pytest
from language_files import dense, draw
from language_files import gguf_file as written

from lorax.interop import formats
from lorax.interop.formats import heads

gguf = pytest.importorskip("gguf")
ALPHA, R, D, KV, V = 6.0, 4, 16, 8, 40
BASE = {"num_attention_heads": 4, "num_key_value_heads": 2}


def permute(weights, n):
    """LlamaModel.permute of llama.cpp's converter."""
    shape = n, 2, len(weights) // n // 2, *weights.shape[1:]
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def want(A, B, s=ALPHA / R):
    return s * (B.astype(np.float64) @ A).T


def test_scale_is_alpha_over_the_rank_in_the_file(tmp_path):
    A, B = draw(R, D), draw(KV, R)
    tensors = {"blk.7.attn_v.weight.lora_a": A, "blk.7.attn_v.weight.lora_b": B}
    tensors["blk.7.attn_norm.weight"] = draw(D)
    found = formats.read(written(tmp_path, tensors))
    (update,) = found.updates
    words = "blk.7.attn_v", "LoRA", (D, KV), R, 1.5, "adapter.lora.alpha / r", "F32"
    assert update[:7] == words and found.format == "GGUF"
    assert found.beside == {"blk.7.attn_norm.weight": (D,)}
    assert found.config["general.tags"] == ["text", "a list"] and "rsLoRA" in found.notes[0]
    np.testing.assert_allclose(dense(update), want(A, B), rtol=1e-6)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_no_alpha_is_a_scale_of_one(tmp_path, alpha):
    tensors = {"blk.0.ffn_up.weight.lora_a": draw(R, D), "blk.0.ffn_up.weight.lora_b": draw(KV, R)}
    (update,) = formats.read(written(tmp_path, tensors, alpha)).updates
    assert update.scale == 1 and ("no adapter" in update.source) == (alpha is None)


def test_rows_of_q_and_k_come_back_to_hugging_faces_order(tmp_path):
    made = {"q": (draw(R, D), draw(D, R), 4), "k": (draw(R, D), draw(KV, R), 2)}
    tensors = {}
    for name, (A, B, n) in made.items():
        tensors[f"blk.0.attn_{name}.weight.lora_a"] = A
        tensors[f"blk.0.attn_{name}.weight.lora_b"] = permute(B, n)
    file = written(tmp_path, tensors)
    for update in formats.read(file, BASE).updates:
        A, B, _ = made[update.layer[-1]]
        assert update.warnings == ()
        np.testing.assert_allclose(dense(update), want(A, B), rtol=1e-6)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": BASE}))
    q, _ = formats.read(file).updates
    np.testing.assert_allclose(dense(q), want(*made["q"][:2]), rtol=1e-6)
    (tmp_path / "config.json").unlink()
    q, _ = formats.read(file).updates
    assert "rotary order" in q.warnings[0]
    np.testing.assert_allclose(dense(q), want(made["q"][0], permute(made["q"][1], 4)), rtol=1e-6)
    (q, _) = formats.read(file, {"num_attention_heads": 3}).updates
    assert "not those of the base's 3 heads" in q.warnings[0]
    (q, _) = formats.read(written(tmp_path, tensors, arch="qwen2")).updates
    assert q.warnings == ()


@pytest.mark.parametrize(
    "config, want",
    [
        ({"text_config": BASE}, (4, 2)),
        ({"text_config": "damaged", **BASE}, (4, 2)),
        ({"num_attention_heads": 4, "num_key_value_heads": None}, (4, 4)),
        ({"num_attention_heads": "4"}, None),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, None),
        ({}, None),
    ],
)
def test_heads_of_a_config(config, want):
    assert heads.heads(config) == want


def test_the_two_orders_of_rows_are_inverse():
    there, back = heads.to_hugging_face(2, 12), heads.from_hugging_face(2, 12)
    np.testing.assert_array_equal(there[back], np.arange(12))
    np.testing.assert_array_equal(permute(np.arange(12), 2), back)


def test_embedding_and_experts(tmp_path):
    embed, gate = (draw(V, R), draw(D, R)), (draw(3, R, D), draw(3, KV, R))
    tensors = {"token_embd.weight.lora_a": embed[0], "token_embd.weight.lora_b": embed[1]}
    names = [f"blk.1.ffn_gate_exps.weight.lora_{side}" for side in "ab"]
    first, *experts = formats.read(
        written(tmp_path, tensors | dict(zip(names, gate, strict=True)))
    ).updates
    assert first.shape == (V, D)
    np.testing.assert_allclose(dense(first), want(embed[0].T, embed[1]), rtol=1e-6)
    for e, update in enumerate(experts):
        assert update.layer == f"blk.1.ffn_gate_exps.{e}"
        np.testing.assert_allclose(dense(update), want(gate[0][e], gate[1][e]), rtol=1e-6)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_other_types_of_numbers_are_decoded(tmp_path, kind):
    known = gguf.GGMLQuantizationType[kind]
    A, B = draw(32, 64), draw(64, 32)
    tensors = {"blk.0.ffn_up.weight.lora_a": A, "blk.0.ffn_up.weight.lora_b": B}
    (update,) = formats.read(written(tmp_path, tensors, quantised=known)).updates
    A, B = (gguf.quants.dequantize(gguf.quants.quantize(x, known), known) for x in (A, B))
    assert update.dtype == kind
    np.testing.assert_allclose(dense(update), want(A, B, ALPHA / 32), rtol=1e-6)


def test_numbers_that_are_not_finite_come_through(tmp_path):
    A = draw(R, D).astype(np.float16)
    A[0, :2] = np.inf, np.array(0x7D00, np.uint16).view(np.float16)  # a signalling NaN
    tensors = {"blk.0.ffn_up.weight.lora_a": A, "blk.0.ffn_up.weight.lora_b": draw(KV, R)}
    (update,) = formats.read(written(tmp_path, tensors)).updates
    with np.errstate(all="raise"):
        a = update.read().a
    assert a[0, 0] == np.inf and np.isnan(a[1, 0]) and np.isfinite(a[2:]).all()


def test_header_is_that_of_the_package(tmp_path):
    file = written(tmp_path, {"blk.0.attn_norm.weight": draw(D), "blk.1.attn_norm.weight": draw(V)})
    ours, theirs = formats.gguf_file.read_header(file), gguf.GGUFReader(file)
    assert [*ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.tensors[tensor.name].read(), tensor.data)
    fields = {name: field.contents() for name, field in theirs.fields.items()}
    assert ours.fields == {k: v for k, v in fields.items() if not k.startswith("GGUF.")}


def test_what_is_no_adapter_is_refused_by_name(tmp_path):
    file = written(tmp_path, {}, kind="model")
    with pytest.raises(ValueError, match="general.type 'model'"):
        formats.read(file)
    A, B = draw(R, D), draw(KV, R)
    with pytest.raises(ValueError, match="blk.0.ffn_up.weight: neither"):
        formats.read(written(tmp_path, {"blk.0.ffn_up.weight": A}))
    with pytest.raises(ValueError, match="blk.0.ffn_up: needs both"):
        formats.read(written(tmp_path, {"blk.0.ffn_up.weight.lora_a": A}))
    tensors = {"blk.0.ffn_up.weight.lora_a": A, "blk.0.ffn_up.weight.lora_b": B.T.copy()}
    with pytest.raises(ValueError, match="don't fit together"):
        formats.read(written(tmp_path, tensors))
    file.write_bytes(file.read_bytes()[:4] + b"\0\0\0\3" + file.read_bytes()[8:])
    with pytest.raises(ValueError, match="big-endian"):
        formats.read(file)
