"""Architectures by name, as fields of Hugging Face's `config.json`.

`load("random:llama-7b")` and `skeleton` build them without any file. Sources: `gpt2.SIZES` names
its own; LLaMA arXiv:2302.13971, table 2; LLaMA 2 arXiv:2307.09288, table 1, with the widths of the
released models; Gemma 1, 2 and 3 (arXiv:2403.08295, 2408.00118, 2503.19786), Phi-3 and 4
(arXiv:2404.14219, 2412.08905) and other newer decoders as released; Falcon arXiv:2311.16867, table
16; RoBERTa arXiv:1907.11692, section 5; DeBERTa v2 XXL as its authors released it
(arXiv:2006.03654); DiT, for latents of 32 x 32, arXiv:2212.09748, table 1; the fully connected
networks and LeNets arXiv:1804.08838, sections 3.1 and 3.2. Other fully connected networks are named
by their widths.
"""

import re

from lorax.models import gpt2


def _decoder(model_type, layers, hidden, heads, inner, kv_heads=None, **more):
    """A row of `decoder_families`."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "intermediate_size": inner,
    } | more


def _llama(layers, hidden, heads, inner, positions=2048, kv_heads=None, epsilon=1e-6):
    more = {"max_position_embeddings": positions, "rms_norm_eps": epsilon}
    return _decoder("llama", layers, hidden, heads, inner, kv_heads, **more)


def _llama3(layers, hidden, heads, inner, stretch=None, tied=False):
    """LLaMA 3 (stretch None), or 3.1 to 3.3, for texts `stretch` times as long as trained on."""
    more = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    more |= {"max_position_embeddings": 8192 if stretch is None else 131072}
    if stretch is not None:
        more["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": stretch,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return _decoder("llama", layers, hidden, heads, inner, 8, tie_word_embeddings=tied, **more)


def _smollm2(layers, hidden, heads, inner, kv_heads):
    more = {"vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    more |= {"rope_theta": 1e5, "tie_word_embeddings": True}
    return _decoder("llama", layers, hidden, heads, inner, kv_heads, **more)


def _qwen25(layers, hidden, heads, inner, kv_heads, vocabulary=151936, tied=False):
    more = {"vocab_size": vocabulary, "rope_theta": 1e6, "tie_word_embeddings": tied}
    return _decoder("qwen2", layers, hidden, heads, inner, kv_heads, **more)


def _qwen3(layers, hidden, heads, inner, tied=False):
    more = {"max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": tied}
    return _decoder("qwen3", layers, hidden, heads, inner, 8, **more)


def _olmo2(layers, hidden, heads, inner, kv_heads=None):
    more = {"vocab_size": 100352, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    return _decoder("olmo2", layers, hidden, heads, inner, kv_heads, rope_theta=5e5, **more)


def _olmo3(layers, hidden, heads, inner, kv_heads=None):
    more = {"vocab_size": 100278, "max_position_embeddings": 65536, "rms_norm_eps": 1e-6}
    more["rope_scaling"] = {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "attention_factor": 1.2079441541679836,
        "original_max_position_embeddings": 8192,
    }
    return _decoder("olmo3", layers, hidden, heads, inner, kv_heads, rope_theta=5e5, **more)


def _mistral(layers, hidden, inner, vocabulary, positions, window=None, theta=1e6):
    more = {"vocab_size": vocabulary, "max_position_embeddings": positions, "rms_norm_eps": 1e-5}
    more |= {"sliding_window": window, "head_dim": 128, "rope_theta": theta}
    return _decoder("mistral", layers, hidden, 32, inner, 8, **more)


def _granite(hidden, inner, attention, logits):
    more = {"vocab_size": 49159, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    more |= {"rope_theta": 1e7, "tie_word_embeddings": True, "embedding_multiplier": 12.0}
    more |= {"residual_multiplier": 0.22, "attention_multiplier": attention}
    return _decoder("granite", 40, hidden, 32, inner, 8, logits_scaling=logits, **more)


def _gemma(layers, hidden, heads, inner, kv_heads):
    return _decoder("gemma", layers, hidden, heads, inner, kv_heads)


def _gemma2(layers, hidden, heads, inner, features=256, scalar=256):
    more = {"head_dim": features, "query_pre_attn_scalar": scalar}
    return _decoder("gemma2", layers, hidden, heads, inner, heads // 2, **more)


def _gemma3(layers, hidden, heads, inner, kv_heads, features=256, scalar=256):
    """The text model; the sizes up to 1B read no images, and shorter texts."""
    small = layers <= 26
    more = {"vocab_size": 262144 if small else 262208, "sliding_window": 512 if small else 1024}
    more |= {"max_position_embeddings": 32768 if small else 131072}
    more |= {"head_dim": features, "query_pre_attn_scalar": scalar}
    if not small:
        more["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    return _decoder("gemma3_text", layers, hidden, heads, inner, kv_heads, **more)


# Of Phi-4-mini, as released.
_PHI_LONG = [
    *(1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817),
    *(2.187582649, 2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023),
    *(4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372),
    *(10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807),
    *(22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66),
    *(32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77),
]


def _phi(layers, hidden, heads, inner, kv_heads, **more):
    return _decoder("phi3", layers, hidden, heads, inner, kv_heads, **more)


def _experts(model_type, layers, hidden, heads, inner, kv_heads, experts, per_token, **more):
    more |= {"num_experts": experts, "num_experts_per_tok": per_token}
    if model_type == "qwen3_moe":
        more["moe_intermediate_size"] = inner
    return _decoder(model_type, layers, hidden, heads, inner, kv_heads, **more)


def _falcon(layers, hidden, heads, kv_heads):
    return {
        "model_type": "falcon",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "new_decoder_architecture": True,
    }


def _roberta(layers, hidden, heads):
    return {
        "model_type": "roberta",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }


_DEBERTA = {
    "model_type": "deberta-v2",
    "num_hidden_layers": 48,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}

_DIT = {"model_type": "DiTTransformer2DModel", "out_channels": 8}

#: name -> fields of a config.json; other fields have the family's defaults (`config_from_hf`).
ARCHITECTURES: dict[str, dict] = {
    **{name: {"model_type": "gpt2"} | fields for name, fields in gpt2.SIZES.items()},
    "llama-7b": _llama(32, 4096, 32, 11008),  # 6,738,415,616 parameters
    "llama-13b": _llama(40, 5120, 40, 13824),  # 13,015,864,320
    "llama-30b": _llama(60, 6656, 52, 17920),  # 32,528,943,616: the "33B" of the paper
    "llama-65b": _llama(80, 8192, 64, 22016),  # 65,285,660,672
    "llama2-7b": _llama(32, 4096, 32, 11008, 4096, epsilon=1e-5),
    "llama2-13b": _llama(40, 5120, 40, 13824, 4096, epsilon=1e-5),
    "llama2-70b": _llama(80, 8192, 64, 28672, 4096, kv_heads=8, epsilon=1e-5),  # 68,976,648,192
    "llama3-8b": _llama3(32, 4096, 32, 14336),
    "llama3-70b": _llama3(80, 8192, 64, 28672),
    "llama3.1-8b": _llama3(32, 4096, 32, 14336, 8.0),
    "llama3.1-70b": _llama3(80, 8192, 64, 28672, 8.0),
    "llama3.1-405b": _llama3(126, 16384, 128, 53248, 8.0),
    "llama3.2-1b": _llama3(16, 2048, 32, 8192, 32.0, tied=True),
    "llama3.2-3b": _llama3(28, 3072, 24, 8192, 32.0, tied=True),
    "smollm2-135m": _smollm2(30, 576, 9, 1536, 3),
    "smollm2-360m": _smollm2(32, 960, 15, 2560, 5),
    "smollm2-1.7b": _smollm2(24, 2048, 32, 8192, 32),
    "smollm3-3b": {"model_type": "smollm3", "max_position_embeddings": 65536, "rope_theta": 5e6},
    "mistral-7b": _mistral(32, 4096, 14336, 32000, 32768, 4096, 1e4),
    "mistral-nemo-12b": _mistral(40, 5120, 14336, 131072, 1024000),
    "mistral-small-24b": _mistral(40, 5120, 32768, 131072, 32768, theta=1e8),
    "ministral-8b": _mistral(36, 4096, 12288, 131072, 32768, 32768, 1e8),
    "qwen2.5-0.5b": _qwen25(24, 896, 14, 4864, 2, tied=True),
    "qwen2.5-1.5b": _qwen25(28, 1536, 12, 8960, 2, tied=True),
    "qwen2.5-3b": _qwen25(36, 2048, 16, 11008, 2, tied=True),
    "qwen2.5-7b": _qwen25(28, 3584, 28, 18944, 4, 152064),
    "qwen2.5-14b": _qwen25(48, 5120, 40, 13824, 8, 152064),
    "qwen2.5-32b": _qwen25(64, 5120, 40, 27648, 8, 152064),
    "qwen2.5-72b": _qwen25(80, 8192, 64, 29568, 8, 152064),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288),
    "qwen3-14b": _qwen3(40, 5120, 40, 17408),
    "qwen3-32b": _qwen3(64, 5120, 64, 25600),
    "olmo2-1b": _olmo2(16, 2048, 16, 8192),
    "olmo2-7b": _olmo2(32, 4096, 32, 11008),
    "olmo2-13b": _olmo2(40, 5120, 40, 13824),
    "olmo2-32b": _olmo2(64, 5120, 40, 27648, 8),
    "olmo3-7b": _olmo3(32, 4096, 32, 11008),
    "olmo3-32b": _olmo3(64, 5120, 40, 27648, 8),
    "granite3.3-2b": _granite(2048, 8192, 0.015625, 8.0),
    "granite3.3-8b": _granite(4096, 12800, 0.0078125, 16.0),
    "gemma-2b": _gemma(18, 2048, 8, 16384, 1),  # 2,506,172,416
    "gemma-7b": _gemma(28, 3072, 16, 24576, 16),  # 8,537,680,896
    "gemma2-2b": _gemma2(26, 2304, 8, 9216),  # 2,614,341,888
    "gemma2-9b": _gemma2(42, 3584, 16, 14336),  # 9,241,705,984
    "gemma2-27b": _gemma2(46, 4608, 32, 36864, 128, 144),  # 27,227,128,320
    "gemma3-270m": _gemma3(18, 640, 4, 2048, 1),  # 268,098,176
    "gemma3-1b": _gemma3(26, 1152, 4, 6912, 1),  # 999,885,952
    "gemma3-4b": _gemma3(34, 2560, 8, 10240, 4),  # 3,880,263,168
    "gemma3-12b": _gemma3(48, 3840, 16, 15360, 8),  # 11,766,034,176
    "gemma3-27b": _gemma3(62, 5376, 32, 21504, 16, 128, 168),  # 27,009,346,304
    "phi3-mini": _phi(32, 3072, 32, 8192, 32, sliding_window=2047),  # 3,821,079,552
    "phi3-medium": _phi(40, 5120, 40, 17920, 10, sliding_window=2047),  # 13,960,238,080
    "phi4-mini": _phi(
        *(32, 3072, 24, 8192, 8),
        vocab_size=200064,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": _PHI_LONG},
        tie_word_embeddings=True,
        sliding_window=262144,
    ),
    "phi4": _phi(  # 14,659,507,200
        *(40, 5120, 40, 17920, 10),
        vocab_size=100352,
        max_position_embeddings=16384,
        rope_theta=250000.0,
    ),
    "mixtral-8x7b": _experts("mixtral", 32, 4096, 32, 14336, 8, 8, 2),
    "qwen3-30b-a3b": _experts(
        *("qwen3_moe", 48, 2048, 32, 768, 4, 128, 8),
        **{"head_dim": 128, "norm_topk_prob": True, "rope_theta": 1e6},
    ),
    "olmoe-1b-7b": _experts("olmoe", 16, 2048, 16, 1024, 16, 64, 8),
    "gpt-oss-20b": _experts("gpt_oss", 24, 2880, 64, 2880, 8, 32, 4),
    "falcon-7b": {"model_type": "falcon"},  # 6,921,720,704
    "falcon-40b": _falcon(60, 8192, 128, 8),  # 41,303,293,952
    "falcon-180b": _falcon(80, 14848, 232, 8),  # 178,557,088,768 with its tied head counted once
    "bert-base": {"model_type": "bert"},  # 109,514,298 with its masked language model's head
    "roberta-base": _roberta(12, 768, 12),
    "roberta-large": _roberta(24, 1024, 16),
    "deberta-v2-xxlarge": _DEBERTA,
    "vit-base": {"model_type": "vit"},
    "dit-b-2": _DIT | {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "dit-l-2": _DIT | {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "dit-xl-2": _DIT,
    "stable-diffusion-1-unet": {  # 859,520,964 parameters
        "model_type": "UNet2DConditionModel",
        "sample_size": 64,
        "cross_attention_dim": 768,
    },
    "stable-diffusion-1-text": {  # 123,060,480: the text encoder of clip-vit-large-patch14
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
    },
    "mnist-fc": {"model_type": "mlp", "widths": [784, 200, 200, 10]},  # 199,210
    "cifar-fc": {"model_type": "mlp", "widths": [3072, 200, 200, 10]},  # 656,810
    "mnist-lenet": {"model_type": "lenet"},  # 44,426
    "cifar-lenet": {"model_type": "lenet", "image_size": 32, "num_channels": 3},  # 62,006
}


def architecture(name: str) -> dict | None:
    """The config.json fields of a named architecture, None for an unknown name.

    A name is a key of `ARCHITECTURES`, or "mlp-64-32-10": a fully connected network of 64 inputs,
    32 hidden units and 10 scores; two widths make a single layer.
    """
    if re.fullmatch(r"mlp(-\d+)+", name):
        return {"model_type": "mlp", "widths": [int(x) for x in name.split("-")[1:]]}
    return ARCHITECTURES.get(name)
