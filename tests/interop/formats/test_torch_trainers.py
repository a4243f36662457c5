"""Adapters of torchtune, Megatron and Tinker, by their documented layouts, against dense
references."""

import numpy as np
import pytest
from language_files import dense, draw
from language_files import directory as written

from lorax.interop import formats

R, D, KV, HEADS, GROUPS = 4, 16, 8, 4, 2
BASE = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "model_type": "llama"}


def check(update, A, B, s):
    """A (r, in), B (out, r)."""
    np.testing.assert_allclose(dense(update), s * (B.astype(np.float64) @ A).T, rtol=1e-6)


# --------------------------------------------------------------------------------------- torchtune

TUNE = {"r": R, "lora_alpha": 8, "peft_type": "LORA", "target_modules": ["q_proj"]}


def to_tune(B, n):
    """`hf_to_tune` of torchtune for the rows of B."""
    return B.reshape(n, 2, len(B) // n // 2, -1).swapaxes(1, 2).reshape(B.shape)


@pytest.mark.parametrize("q, k", [("attn.q_proj", "attn.k_proj"), ("attention.wq", "attention.wk")])
def test_torchtune_has_rows_of_q_and_k_in_metas_order(tmp_path, q, k):
    A, Bq, Bk, m = draw(R, D), draw(D, R), draw(KV, R), draw(D)
    tensors = {f"layers.0.{q}.lora_a.weight": A, f"layers.0.{k}.lora_a.weight": A}
    tensors[f"layers.0.{q}.lora_b.weight"] = to_tune(Bq, HEADS)
    tensors[f"layers.0.{k}.lora_b.weight"] = to_tune(Bk, GROUPS)
    tensors[f"layers.0.{q}.magnitude"] = to_tune(m[:, None], HEADS)[:, 0]
    tensors["layers.0.mlp.w2.lora_a.weight"] = draw(R, D)
    tensors["layers.0.mlp.w2.lora_b.weight"] = draw(KV, R)
    found = formats.read(written(tmp_path, tensors, TUNE), BASE)
    assert found.format == "torchtune"
    by_layer = {update.layer: update for update in found.updates}
    check(by_layer[f"layers.0.{q}"], A, Bq, 2.0)
    check(by_layer[f"layers.0.{k}"], A, Bk, 2.0)
    check(by_layer["layers.0.mlp.w2"], draw(R, D), draw(KV, R), 2.0)
    assert by_layer[f"layers.0.{q}"].kind == "DoRA"
    np.testing.assert_array_equal(by_layer[f"layers.0.{q}"].read().m, m)
    assert by_layer[f"layers.0.{q}"].source == "config lora_alpha / r"


def test_torchtune_without_the_bases_heads_and_of_qwen(tmp_path):
    B = draw(D, R)
    tensors = {"layers.0.attn.q_proj.lora_a.weight": draw(R, D)}
    tensors["layers.0.attn.q_proj.lora_b.weight"] = B
    written(tmp_path, tensors, TUNE)
    (update,) = formats.read(tmp_path).updates
    assert "rotary order" in update.warnings[0]
    (update,) = formats.read(tmp_path, BASE | {"model_type": "qwen2"}).updates
    assert update.warnings == ()
    check(update, draw(R, D), B, 2.0)


def test_torchtunes_experts_are_in_our_orientation(tmp_path):
    a, b = draw(3, D, R), draw(3, R, KV)
    name = "layers.1.mlp.experts.lora_gate_"
    found = formats.read(written(tmp_path, {f"{name}a": a, f"{name}b": b}, TUNE))
    for e, update in enumerate(found.updates):
        assert update.layer == f"layers.1.mlp.experts.{e}.gate"
        check(update, a[e].T, b[e].T, 2.0)


# ---------------------------------------------------------------------------------------- Megatron


def fused(q, k, v):
    """Rows of q, k and v by query group, as `merge_qkv_weights` of Megatron-Bridge puts them."""
    d, each = len(q) // HEADS, HEADS // GROUPS
    q, k, v = (x.reshape(-1, d, x.shape[-1]) for x in (q, k, v))
    rows = [(q[g * each : (g + 1) * each], k[g : g + 1], v[g : g + 1]) for g in range(GROUPS)]
    return np.concatenate([x for group in rows for x in group]).reshape(-1, q.shape[-1])


@pytest.mark.parametrize("word", ["linear_qkv.adapter", "adapter_layer.lora_kqv_adapter"])
def test_megatrons_fused_rows_come_apart_by_query_group(tmp_path, word):
    A, q, k, v = draw(R, D), draw(D, R), draw(KV, R) + 1, draw(KV, R)
    layer = f"decoder.layers.0.self_attention.{word}"
    tensors = {f"{layer}.linear_in.weight": A, f"{layer}.linear_out.weight": fused(q, k, v)}
    (tmp_path / "run_config.yaml").write_text("peft: {_target_: lora.LoRA, dim: 4, alpha: 32}\n")
    found = formats.read(written(tmp_path, tensors), BASE)
    (update,) = found.updates
    assert (found.format, update.rank) == ("Megatron", R)
    assert (update.scale, update.source) == (8.0, "config alpha / dim")
    check(update, A, np.concatenate([q, k, v]), 8.0)
    assert "share A" in update.warnings[-1]
    (update,) = formats.read(tmp_path).updates
    assert "by query group" in update.warnings[-1]
    check(update, A, fused(q, k, v), 8.0)
    (update,) = formats.read(tmp_path, {"num_attention_heads": 7}).updates
    assert "not those of the base's 7 heads" in update.warnings[-1]


def test_megatrons_canonical_parts_and_experts(tmp_path):
    qkv, fc1 = "layers.0.self_attention.linear_qkv.adapter", "layers.0.mlp.experts.linear_fc1"
    tensors = {f"{qkv}.adapter_q.linear_in.weight": draw(R, D)}
    tensors[f"{qkv}.adapter_q.linear_out.weight"] = draw(KV, R)
    tensors[f"{fc1}.adapter.linear_in.weight"] = draw(2, R, D)
    tensors[f"{fc1}.adapter.linear_out.weight"] = draw(2, KV, R)
    found = formats.read(written(tmp_path, tensors))
    by_layer = {update.layer: update for update in found.updates}
    names = [f"layers.0.mlp.experts.{e}.linear_fc1" for e in range(2)]
    assert [*by_layer] == [*names, "layers.0.self_attention.linear_qkv.q"]
    check(by_layer["layers.0.self_attention.linear_qkv.q"], draw(R, D), draw(KV, R), 1.0)
    for e, name in enumerate(names):
        check(by_layer[name], draw(2, R, D)[e], draw(2, KV, R)[e], 1.0)
        assert by_layer[name].source == "default 1: the file has none"


# ------------------------------------------------------------------------------------------ Tinker


@pytest.mark.parametrize("shared", ["A", "B", ""])
def test_tinkers_experts_may_share_a_side(tmp_path, shared):
    A, B = draw(1 if shared == "A" else 3, R, D), draw(1 if shared == "B" else 3, KV, R)
    module = "base_model.model.model.layers.2.mlp.experts.w1"
    tensors = {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    head = "base_model.model.model.unembed_tokens"
    tensors |= {f"{head}.lora_A.weight": draw(R, D), f"{head}.lora_B.weight": draw(30, R)}
    empty = module.replace("w1", "w3")
    tensors[f"{empty}.lora_A.weight"] = np.zeros((3, R, 0), np.float32)
    tensors[f"{empty}.lora_B.weight"] = np.zeros((3, 0, R), np.float32)
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 32}
    found = formats.read(written(tmp_path, tensors, config))
    assert found.format == "Tinker" and "no such matrix" in found.notes[0]
    *experts, last = sorted(found.updates)
    check(last, draw(R, D), draw(30, R), 8.0)
    assert last.layer == "model.unembed_tokens"
    for e, update in enumerate(experts):
        assert update.layer == f"model.layers.2.mlp.experts.{e}.w1"
        check(update, A[e % len(A)], B[e % len(B)], 8.0)
        assert (f"{shared} is one for all 3" in "".join(update.warnings)) == bool(shared)


# ----------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "tensors, config, named",
    [
        ({"layers.0.attn.q_proj.lora_a.weight": (R, D)}, TUNE, "q_proj: needs both"),
        (
            {"layers.0.attn.q_proj.lora_a.weight": (R, D), "layers.0.sa_norm.scale": (D,)},
            TUNE,
            "layers.0.sa_norm.scale: a tensor that torchtune's adapters don't have",
        ),
        (
            {
                "layers.0.attn.v_proj.lora_a.weight": (R, D),
                "layers.0.attn.v_proj.lora_b.weight": (D, R),
            },
            TUNE | {"r": "4"},
            "r: '4' given",
        ),
        (
            {
                "linear_proj.adapter.linear_in.weight": (2, D),
                "linear_proj.adapter.linear_out.weight": (D, R),
            },
            None,
            "tensor parallelism",
        ),
        ({"linear_proj.adapter.linear_in.weight": (R, D)}, None, "linear_proj: needs both"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, tensors, config, named):
    written(tmp_path, {name: draw(*shape) for name, shape in tensors.items()}, config)
    with pytest.raises(ValueError, match=named):
        formats.read(tmp_path)
