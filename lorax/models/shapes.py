"""Architectures by name, as fields of Hugging Face's `config.json`.

`load("random:llama-7b")` and `skeleton` build them without any file. Sources: `gpt2.SIZES` names
its own; LLaMA arXiv:2302.13971, table 2; LLaMA 2 arXiv:2307.09288, table 1, with the widths of the
released models; Falcon arXiv:2311.16867, table 16; RoBERTa arXiv:1907.11692, section 5; DeBERTa v2
XXL as its authors released it (arXiv:2006.03654); the fully connected networks and LeNets
arXiv:1804.08838, sections 3.1 and 3.2. Other fully connected networks are named by their widths.
"""

import re

from lorax.models import gpt2


def _llama(layers, hidden, heads, inner, positions=2048, kv_heads=None, epsilon=1e-6):
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "rms_norm_eps": epsilon,
    }


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
    "falcon-7b": {"model_type": "falcon"},  # 6,921,720,704
    "falcon-40b": _falcon(60, 8192, 128, 8),  # 41,303,293,952
    "falcon-180b": _falcon(80, 14848, 232, 8),  # 178,557,088,768 with its tied head counted once
    "roberta-base": _roberta(12, 768, 12),
    "roberta-large": _roberta(24, 1024, 16),
    "deberta-v2-xxlarge": _DEBERTA,
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
