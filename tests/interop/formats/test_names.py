"""Names of a language model's matrices, against the gguf package's table."""

import pytest

from lorax.interop.formats import names

ENDS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
HUGGING_FACE = [f"model.layers.11.{end}" for end in ENDS] + ["model.embed_tokens", "lm_head"]


def test_llama_cpps_names_are_those_of_its_package():
    gguf = pytest.importorskip("gguf")
    for arch in ("LLAMA", "QWEN2", "QWEN3", "GEMMA3", "SMOLLM3"):
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 12)
        for name in HUGGING_FACE[: -1 if arch == "GEMMA3" else None]:  # whose head is tied
            assert names.llama_cpp(name) == table.get_name(name)
            assert names.hugging_face(names.llama_cpp(name)) == name


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("layers.3.attn.output_proj", "model.layers.3.self_attn.o_proj"),
        ("layers.3.attention.wk", "model.layers.3.self_attn.k_proj"),
        ("layers.3.mlp.w3", "model.layers.3.mlp.up_proj"),
        ("decoder.layers.3.mlp.linear_fc2", "model.layers.3.mlp.down_proj"),
        ("module.decoder.layers.3.self_attention.linear_qkv.v", "model.layers.3.self_attn.v_proj"),
        (
            "decoder.layers.3.self_attention.linear_qkv",
            "decoder.layers.3.self_attention.linear_qkv",
        ),
        ("model.layers.3.mlp.experts.7.w2", "model.layers.3.mlp.experts.7.down_proj"),
        ("model.unembed_tokens", "lm_head"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
    ],
)
def test_other_names(theirs, ours):
    assert names.hugging_face(theirs) == ours and names.hugging_face(ours) == ours
    assert names.llama_cpp("transformer.h.0.attn.c_attn") is None
