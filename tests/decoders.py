"""Tiny random models of every family of decoders, for tests over all of them.

    for case in decoders.CASES.values():
        theirs = decoders.reference(case.name)           # transformers' model, with large weights
        directory = decoders.saved(case.name)            # its directory, saved once
        base = lorax.load(str(directory))

A family has one case for each of its options, and the last one has several.
"""

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from support import require

VOCABULARY = 40
TINY = dict(
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=20, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LONG = dict(rope_type="longrope", original_max_position_embeddings=8)
LONG |= dict(short_factor=[1.0, 1.5, 2.0], long_factor=[1.0, 3.0, 5.0])

#: The words of `lorax.methods.targets` that a decoder with a head of its own answers to.
WORDS = ("q", "k", "v", "o", "gate", "up", "down", "embed", "head")
EXPERTS = (*("q", "k", "v", "o", "experts.gate", "experts.up", "experts.down", "router"),)
EXPERTS += ("embed", "head")
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (3, 12), np.int32)


#: Fields of a tiny Gemma 3 of texts and images.
SEEING = dict(
    text_config=TINY | dict(head_dim=6, sliding_window=3, sliding_window_pattern=2),
    vision_config=dict(
        model_type="siglip_vision_model", hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, image_size=8, patch_size=4,
    ),
    mm_tokens_per_image=4, image_token_index=39,
)  # fmt: skip


class Case(NamedTuple):
    """name: of the case. model_type: Hugging Face's. options: fields of transformers' config beside
    those of `TINY`. words: the target words that mean something here."""

    name: str
    model_type: str
    options: Mapping
    words: tuple[str, ...]


def _case(name, model_type, words=WORDS, **options):
    if options.get("tie_word_embeddings"):
        words = tuple(word for word in words if word != "head")
    return Case(name, model_type, options, words)


CASES = {
    case.name: case
    for case in (
        _case("llama-biases", "llama", head_dim=10, attention_bias=True, mlp_bias=True),
        _case("llama-dynamic", "llama", rope_parameters=dict(rope_type="dynamic", factor=3.0)),
        _case("llama-longrope", "llama", rope_parameters=LONG, num_key_value_heads=1),
        _case(
            "llama-3", "llama", tie_word_embeddings=True, rms_norm_eps=0.01,
            rope_parameters=LLAMA3, max_position_embeddings=128,
        ),
        _case(
            "mistral-full", "mistral",
            sliding_window=None, num_key_value_heads=4, hidden_act="gelu",
        ),
        _case("mistral", "mistral", sliding_window=3, head_dim=4),
        _case("qwen2", "qwen2", rope_parameters=YARN, max_position_embeddings=64),
        _case(
            "qwen2-mixed", "qwen2",
            use_sliding_window=True, sliding_window=3, max_window_layers=1,
        ),
        _case(
            "ministral", "ministral",
            head_dim=6, sliding_window=3, layer_types=["full_attention", "sliding_attention"],
        ),
        _case(
            "ministral3", "ministral3", head_dim=8, tie_word_embeddings=True,
            rope_parameters=YARN | dict(
                rope_theta=1e4, original_max_position_embeddings=3, llama_4_scaling_beta=0.3,
                mscale=1.0, mscale_all_dim=1.0,
            ),
        ),
        _case("qwen3", "qwen3", head_dim=8, tie_word_embeddings=True),
        _case(
            "qwen3-mixed", "qwen3", head_dim=8, attention_bias=True,
            use_sliding_window=True, sliding_window=3, max_window_layers=1,
        ),
        _case("smollm3", "smollm3", no_rope_layers=[1, 0], tie_word_embeddings=False),
        _case(
            "smollm3-windows", "smollm3", num_hidden_layers=3, no_rope_layer_interval=2,
            tie_word_embeddings=True,
            use_sliding_window=True, sliding_window=3, attention_bias=True, mlp_bias=True,
        ),
        _case("olmo2", "olmo2", attention_bias=True),
        _case(
            "olmo3", "olmo3", num_hidden_layers=4, sliding_window=3, attention_bias=True,
            tie_word_embeddings=True,
        ),
        _case(
            "olmo3-ropes", "olmo3", sliding_window=3, num_key_value_heads=4,
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": YARN | dict(rope_theta=5000.0),
                "sliding_attention": dict(rope_type="default", rope_theta=300.0),
            },
        ),
        _case("granite", "granite", attention_bias=True, mlp_bias=True),
        _case(
            "granite-multipliers", "granite", tie_word_embeddings=True, embedding_multiplier=3.0,
            residual_multiplier=0.4, attention_multiplier=0.3, logits_scaling=2.0,
        ),
        _case(
            "gemma", "gemma", head_dim=8, num_key_value_heads=1, attention_bias=True,
            tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=50.0),
        ),
        _case(
            "gemma2", "gemma2", head_dim=8, num_hidden_layers=3, sliding_window=3,
            query_pre_attn_scalar=5, attn_logit_softcapping=2.0, final_logit_softcapping=6.0,
            tie_word_embeddings=True,
        ),
        _case(
            "gemma2-free", "gemma2", head_dim=4, attention_bias=True, tie_word_embeddings=False,
            attn_logit_softcapping=None, final_logit_softcapping=None, rms_norm_eps=0.01,
            hidden_activation="gelu", sliding_window=3, query_pre_attn_scalar=8,
            layer_types=["full_attention", "sliding_attention"],
        ),
        _case(
            "gemma3", "gemma3_text", head_dim=8, num_hidden_layers=7, sliding_window=3,
            query_pre_attn_scalar=5, tie_word_embeddings=True,
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=4.0, rope_theta=900.0),
                "sliding_attention": dict(rope_type="default", rope_theta=50.0),
            },
        ),
        _case(
            "gemma3-capped", "gemma3_text", head_dim=6, num_hidden_layers=3, sliding_window=3,
            attention_bias=True, final_logit_softcapping=6.0, sliding_window_pattern=2,
            tie_word_embeddings=True,
        ),
        _case(
            "phi3", "phi3", hidden_size=32, sliding_window=3,
            rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5, rope_theta=50.0),
        ),
        _case(
            "phi3-long", "phi3", hidden_size=32, num_key_value_heads=1, tie_word_embeddings=True,
            original_max_position_embeddings=8, max_position_embeddings=64,
            rope_parameters=LONG | dict(partial_rotary_factor=0.75),
        ),
        _case("mixtral", "mixtral", EXPERTS, num_local_experts=5, num_experts_per_tok=2),
        _case(
            "mixtral-window", "mixtral", EXPERTS, num_local_experts=3, num_experts_per_tok=1,
            sliding_window=3, head_dim=8, tie_word_embeddings=True,
        ),
        _case(
            "qwen3-moe", "qwen3_moe", EXPERTS, num_experts=6, num_experts_per_tok=3, head_dim=8,
            moe_intermediate_size=12, norm_topk_prob=True,
        ),
        _case(
            "qwen3-moe-window", "qwen3_moe", EXPERTS, num_experts=4, num_experts_per_tok=2,
            head_dim=8, moe_intermediate_size=12, norm_topk_prob=False, attention_bias=True,
            use_sliding_window=True, sliding_window=3,
        ),
        _case("olmoe", "olmoe", EXPERTS, num_experts=6, num_experts_per_tok=2, clip_qkv=1.5),
        _case(
            "olmoe-normed", "olmoe", EXPERTS, num_experts=4, num_experts_per_tok=2,
            norm_topk_prob=True, attention_bias=True,
        ),
        _case(
            "gpt-oss", "gpt_oss", EXPERTS, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
            sliding_window=3, swiglu_limit=1.5, max_position_embeddings=64,
            rope_parameters=YARN | dict(truncate=False),
        ),
    )
}  # fmt: skip


#: model_type -> the last case of the family.
OF_FAMILY = {case.model_type: case.name for case in CASES.values()}


@functools.cache
def reference(name: str):
    """transformers' model of a case in float32, with random weights, biases and norms that are
    large enough to matter."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    case = CASES[name]
    config = transformers.AutoConfig.for_model(case.model_type, **TINY | case.options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            by = 5 if parameter.ndim == 2 else 1
            parameter.copy_(by * parameter + 0.2 * torch.randn_like(parameter))
    return model


def logits(model, tokens=TOKENS, mask=None) -> np.ndarray:
    """Those of a model of transformers. mask: (B, T), 0 for padding."""
    torch = require("torch")
    with torch.no_grad():
        mask = None if mask is None else torch.from_numpy(mask)
        return model(torch.from_numpy(tokens).long(), attention_mask=mask).logits.numpy()


@functools.cache
def saved(name: str) -> Path:
    """The directory of `reference`, as transformers saves it."""
    directory = Path(_directory().name) / name
    reference(name).save_pretrained(directory)
    return directory


@functools.cache
def _directory():
    return tempfile.TemporaryDirectory()  # removed when Python ends
