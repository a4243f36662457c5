"""The families of `decoder.Decoder`, a row each, and their Hugging Face layout.

A row says what follows from a `model_type`: fields of `decoder.Config` that no config.json has,
defaults for those that one leaves out, options that the family has and others have not, and the
names of its tensors where they are not LLaMA's.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lorax import fields
from lorax.interop.hf import Source
from lorax.models import rope
from lorax.models.decoder import FULL, SLIDING, Config
from lorax.models.layers import ACTIVATION

#: Options that only some families have: field of a config.json -> what is computed without it.
#: Other values are refused for a family that lacks the option.
OPTIONS = {
    "attention_bias": False,
    "mlp_bias": False,
    "no_rope_layers": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "query_pre_attn_scalar": None,
    "logits_scaling": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "clip_qkv": None,
    "router_jitter_noise": 0.0,
    "mlp_only_layers": (),
    "decoder_sparse_step": 1,
}
#: The options of families whose layers may see a window. Others ignore these, as in transformers.
WINDOW = ("sliding_window", "layer_types")


class Family(NamedTuple):
    """What a `model_type` means.

    name: of transformers' classes, "Llama" of "LlamaForCausalLM". options: the keys of `OPTIONS`
    and the fields of windows that its config.json has. defaults: fields that a config.json leaves
    out, where they differ from those of `Config`. fixed: fields of `Config` that no config.json
    has. full_every: every so many layers one sees all tokens, and the others a window, if the file
    has no `layer_types`; None: all see the window. theta: its `rope_theta` by default.
    sliding_theta: that of layers with a window, if the file has a rotation for each type of layers;
    None: all layers have the same. sliding_theta_field: where files before transformers 5 have it.
    rope_options: the keys of `rope.OPTIONS` that it has. rope: its rotation if a file has none.
    renamed: field of `Config` -> its name in config.json, where it differs. meant: the fields of a
    config.json -> the same with older values as transformers reads them. written: the fields that
    we write -> the same as transformers 4 takes them, too. tensors: our module -> its name in a
    layer of theirs, where it is not that of `TENSORS`; modules with the same name lie side by side
    in one tensor, in this order.
    text: in a model that reads images, too, the `model_type` of the part that reads text, which is
    all that is computed here: config.json has it as `text_config`.
    """

    name: str
    options: tuple[str, ...] = ()
    defaults: Mapping = {}
    fixed: Mapping = {}
    full_every: int | None = None
    theta: float = 10000.0
    sliding_theta: float | None = None
    sliding_theta_field: str = "rope_theta"
    rope_options: tuple[str, ...] = ()
    rope: Mapping = {}
    renamed: Mapping[str, str] = {}
    meant: Callable[[dict], dict] = dict
    written: Callable[[dict], dict] = dict
    tensors: Mapping[str, str] = {}
    text: str | None = None


#: Our module in a layer -> its name in Hugging Face's layer, for most families.
TENSORS = {
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "post_norm_1": "post_attention_layernorm",
    "post_norm_2": "post_feedforward_layernorm",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    **{f"attn/{name}": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "experts/router": "mlp.gate",
    **{f"experts/{name}": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
}

_MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_QWEN_WINDOW = ("use_sliding_window", "max_window_layers", *WINDOW)
_MIXTURE = ("num_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")
_OLMO = {"vocab_size": 50304, "rms_norm_eps": 1e-5}
_GEMMA = {
    "vocab_size": 256000,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA_2 = _GEMMA | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_FIXED = {"scale_embeddings": True, "norm_offset": 1.0}
_GEMMA_2_TENSORS = {"norm_2": "pre_feedforward_layernorm"}


def _gemma(hf: dict) -> dict:
    """The first files say "gelu" for its approximation, and null for the default activation."""
    hf = {name: x for name, x in hf.items() if (name, x) != ("hidden_activation", None)}
    return hf | ({"hidden_act": "gelu_pytorch_tanh"} if hf.get("hidden_act") == "gelu" else {})


def _phi3(hf: dict) -> dict:
    """LongRoPE was called "su" and "yarn" first; 4096 is the length of the texts before it."""
    hf = {"original_max_position_embeddings": 4096} | hf
    for place in ("rope_parameters", "rope_scaling"):
        given = hf.get(place) or {}
        if given.get("rope_type", given.get("type")) in ("su", "yarn"):
            hf[place] = given | {"rope_type": "longrope"}
    return hf


def _phi3_written(hf: dict) -> dict:
    """transformers 4 takes three fields of LongRoPE alone, and computes the others from lengths."""
    long = hf["rope_scaling"] or {}
    usual = hf["max_position_embeddings"] / hf.get("original_max_position_embeddings", 1)
    if long.get("rope_type") != "longrope" or "attention_factor" in long or long["factor"] != usual:
        return hf
    factors = {name: long[name] for name in ("short_factor", "long_factor")}
    return hf | {"rope_scaling": {"type": "longrope"} | factors}


_GEMMA_3 = Family(  # arXiv:2503.19786; transformers caps no scores
    "Gemma3",
    options=(
        *("attention_bias", "query_pre_attn_scalar", "final_logit_softcapping"),
        *("sliding_window_pattern", *WINDOW),
    ),
    defaults=_GEMMA_2 | {"vocab_size": 262208, "max_position_embeddings": 131072},
    fixed=_GEMMA_FIXED | {"norms": "both", "qk_norm": "head"},
    full_every=6,
    theta=1e6,
    sliding_theta=1e4,
    sliding_theta_field="rope_local_base_freq",
    renamed={"hidden_act": "hidden_activation"},
    meant=_gemma,
    tensors=_GEMMA_2_TENSORS,
)

#: model_type -> its row.
FAMILIES = {
    # LLaMA 1 to 3.3, SmolLM 1 and 2, and many others
    "llama": Family("Llama", options=("attention_bias", "mlp_bias")),
    "mistral": Family("Mistral", options=("sliding_window",), defaults=_MISTRAL),
    "ministral": Family("Ministral", options=WINDOW, defaults=_MISTRAL),
    "ministral3": Family(
        "Ministral3",
        options=("sliding_window",),
        defaults={
            "vocab_size": 131072,
            "intermediate_size": 14336,
            "num_hidden_layers": 34,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
        },
        rope_options=("llama_4_scaling_beta",),
        rope={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "qwen2": Family("Qwen2", options=_QWEN_WINDOW, defaults=_QWEN, fixed={"qkv_bias": True}),
    "qwen3": Family(  # arXiv:2505.09388
        "Qwen3",
        options=("attention_bias", *_QWEN_WINDOW),
        defaults=_QWEN | {"head_dim": 128},
        fixed={"qk_norm": "head"},
    ),
    "smollm3": Family(
        "SmolLM3",
        options=("attention_bias", "mlp_bias", "no_rope_layers", "use_sliding_window", *WINDOW),
        defaults={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        theta=2e6,
    ),
    "olmo2": Family(  # arXiv:2501.00656
        "Olmo2",
        options=("attention_bias",),
        defaults=_OLMO,
        fixed={"norms": "post", "qk_norm": "whole"},
    ),
    "olmo3": Family(
        "Olmo3",
        options=("attention_bias", *WINDOW),
        defaults=_OLMO | {"sliding_window": 4096},
        fixed={"norms": "post", "qk_norm": "whole"},
        full_every=4,
        theta=5e5,
        sliding_theta=5e5,
    ),
    "granite": Family(  # arXiv:2408.13359
        "Granite",
        options=(
            *("attention_bias", "mlp_bias", "embedding_multiplier", "residual_multiplier"),
            *("attention_multiplier", "logits_scaling"),
        ),
        defaults={"attention_multiplier": 1.0},
    ),
    "gemma": Family(  # arXiv:2403.08295
        "Gemma",
        options=("attention_bias",),
        defaults=_GEMMA
        | {
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
        },
        fixed=_GEMMA_FIXED,
        meant=_gemma,
    ),
    "gemma2": Family(  # arXiv:2408.00118
        "Gemma2",
        options=(
            *("attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping"),
            *("final_logit_softcapping", *WINDOW),
        ),
        defaults=_GEMMA_2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        fixed=_GEMMA_FIXED | {"norms": "both"},
        full_every=2,
        renamed={"hidden_act": "hidden_activation"},
        meant=_gemma,
        tensors=_GEMMA_2_TENSORS,
    ),
    "gemma3_text": _GEMMA_3,
    "gemma3": _GEMMA_3._replace(text="gemma3_text"),
    "phi3": Family(  # Phi-3, 3.5 and 4, arXiv:2404.14219, 2412.08905
        "Phi3",
        options=("sliding_window",),
        defaults={
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        rope_options=("partial_rotary_factor",),
        meant=_phi3,
        written=_phi3_written,
        tensors={
            **{f"attn/{name}": "self_attn.qkv_proj" for name in "qkv"},
            **{f"mlp/{name}": "mlp.gate_up_proj" for name in ("gate", "up")},
        },
    ),
    "mixtral": Family(  # arXiv:2401.04088
        "Mixtral",
        options=("sliding_window", *_MIXTURE),
        defaults={
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "num_experts": 8,
        },
        theta=1e6,
        renamed={"num_experts": "num_local_experts"},
        tensors={
            "experts/router": "block_sparse_moe.gate",
            "experts/gate": "block_sparse_moe.experts.{}.w1",
            "experts/up": "block_sparse_moe.experts.{}.w3",
            "experts/down": "block_sparse_moe.experts.{}.w2",
        },
    ),
    "qwen3_moe": Family(  # arXiv:2505.09388
        "Qwen3Moe",
        options=(
            *("attention_bias", "use_sliding_window", "sliding_window", *_MIXTURE),
            *("norm_topk_prob", "moe_intermediate_size"),
        ),
        defaults={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        fixed={"qk_norm": "head"},
    ),
    "olmoe": Family(  # arXiv:2409.02060
        "Olmoe",
        options=("attention_bias", "clip_qkv", "norm_topk_prob", *_MIXTURE),
        defaults={
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.01,
            "norm_topk_prob": False,
        },
        fixed={"qk_norm": "whole"},
    ),
    "gpt_oss": Family(  # arXiv:2508.10925
        "GptOss",
        options=("attention_bias", *WINDOW, "swiglu_limit", "swiglu_alpha", *_MIXTURE),
        defaults={
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "attention_bias": True,
            "num_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
        },
        fixed={"attention_sinks": True, "expert_bias": True},
        full_every=2,
        theta=150000.0,
        rope={
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
        renamed={"num_experts": "num_local_experts"},
        tensors={
            "experts/router": "mlp.router",
            "experts/gate": "mlp.experts.gate_up_proj",
            "experts/up": "mlp.experts.gate_up_proj",
            "experts/down": "mlp.experts.down_proj",
        },
    ),
}  # fmt: skip

#: Names of the number of experts in a config.json.
EXPERTS = ("num_experts", "num_local_experts")
#: Fields of `Config` that every family's config.json has.
_COMMON = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
)
#: Options that are not fields of `Config` by the same name and type.
_READ_APART = (
    *("use_sliding_window", "max_window_layers", "sliding_window_pattern", "layer_types"),
    "no_rope_layers",
)

#: Fields read from a config.json.
FIELDS = {
    "model_type": fields.TEXT,
    "vocab_size": fields.ROWS,
    "max_position_embeddings": fields.ROWS,
    **dict.fromkeys(("hidden_size", "intermediate_size"), fields.SIZE),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), fields.SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), fields.optional(fields.SIZE)),
    "hidden_act": ACTIVATION,
    "hidden_activation": fields.optional(ACTIVATION),
    "rms_norm_eps": fields.POSITIVE,
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), fields.FLAG),
    "sliding_window": fields.optional(fields.ROWS),
    "use_sliding_window": fields.optional(fields.FLAG),
    "max_window_layers": fields.COUNT,
    "sliding_window_pattern": fields.SIZE,
    "layer_types": fields.optional(fields.each(fields.one_of((FULL, SLIDING)))),
    "no_rope_layers": fields.optional(fields.each(fields.whole(0, 1))),
    "no_rope_layer_interval": fields.SIZE,
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), fields.POSITIVE),
    **dict.fromkeys(("attention_multiplier", "logits_scaling"), fields.POSITIVE),
    **dict.fromkeys(
        ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        fields.optional(fields.POSITIVE),
    ),
    "use_bidirectional_attention": fields.optional(fields.FLAG),
    "rope_local_base_freq": fields.above(1),
    "text_config": fields.optional(fields.OBJECT),
    "clip_qkv": fields.optional(fields.POSITIVE),
    **dict.fromkeys((*EXPERTS, "num_experts_per_tok"), fields.SIZE),
    "moe_intermediate_size": fields.SIZE,
    **dict.fromkeys(("norm_topk_prob", "output_router_logits"), fields.FLAG),
    **dict.fromkeys(("router_aux_loss_coef", "router_jitter_noise"), fields.NOT_NEGATIVE),
    "mlp_only_layers": fields.optional(fields.each(fields.COUNT))._replace(
        read=lambda x: tuple(x or ())
    ),
    "decoder_sparse_step": fields.SIZE,
    **dict.fromkeys(("swiglu_limit", "swiglu_alpha"), fields.POSITIVE),
    **rope.FIELDS,
}


#: Fields of a config.json that change nothing that a model computes from given weights.
_BOOKKEEPING = (
    r"_.*|model_type|architectures|auto_map|transformers_version|(torch_)?dtype|initializer_.*|"
    r"use_cache|pretraining_tp|.*_token_id|.*(dropout|_pdrop).*|.*label.*|problem_type|"
    r"quantization_config|output_.*|return_dict|is_.*|no_rope_layer_interval|task_.*"
)


def unread(hf: Mapping) -> list[str]:
    """The fields of a config.json that are set and that no family of decoders reads: what stands in
    the way of a `model_type` that is not one of `FAMILIES`."""
    off = (None, False, 0, 1, "", [], {})
    return [
        name
        for name, value in hf.items()
        if name not in FIELDS and value not in off and not re.fullmatch(_BOOKKEEPING, name)
    ]


def config_from_hf(hf: dict, **run) -> Config:
    """Config from the fields of a `config.json`; run: `dtype`, `remat`, `unroll`.

    Raises ValueError for options that the family does not have or the module does not compute, and
    as `fields.read` does.
    """
    hf = fields.read(hf, FIELDS)
    model_type = hf.get("model_type", "llama")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not one of {[*FAMILIES]}")
    family = FAMILIES[model_type]
    hf = family.meant(hf if family.text is None else _text_part(hf, family))
    # transformers 5 writes either name, whatever the family's own is.
    counts = {hf[name] for name in EXPERTS if name in hf}
    if len(counts) > 1:
        raise ValueError(f"{' and '.join(EXPERTS)}: {sorted(counts)} given, must be one number")
    hf |= {name: count for name in EXPERTS for count in counts}
    for option, without in OPTIONS.items():
        if option not in family.options and hf.get(option) not in (None, without):
            value = fields.shown(hf[option])
            raise ValueError(f"{option}={value} is not supported for {model_type}")
    names = {name: theirs for name, theirs in _read(family).items() if theirs in hf}
    arguments = family.defaults | {name: hf[theirs] for name, theirs in names.items()}
    if "use_sliding_window" in family.options and not hf.get("use_sliding_window"):
        arguments["sliding_window"] = None
    config = Config(**family.fixed | arguments | {"model_type": model_type}, **run)
    _check_heads(config, arguments.get("head_dim") is not None)
    if config.num_experts and config.num_experts_per_tok > config.num_experts:
        raise ValueError(
            f"num_experts_per_tok {config.num_experts_per_tok} is more than num_experts "
            f"{config.num_experts}"
        )
    if "no_rope_layers" in family.options:
        config = _with_no_rope_layers(hf, config)
    config = dataclasses.replace(config, **_ropes(hf, family, config))
    return _with_layer_types(hf, family, config)


def _text_part(hf: dict, family: Family) -> dict:
    """The fields of the part that reads text."""
    text = fields.read(hf.get("text_config") or {}, FIELDS, "text_config")
    if text.get("model_type", family.text) != family.text:
        raise ValueError(
            f"text_config: model_type {text['model_type']!r} given, must be {family.text!r}"
        )
    return text | {name: hf[name] for name in ("tie_word_embeddings",) if name in hf}


def _read(family: Family) -> dict[str, str]:
    """{field of `Config`: its name in the family's config.json} of those that mean the same."""
    names = [*_COMMON, *(name for name in family.options if name not in _READ_APART)]
    return {name: family.renamed.get(name, name) for name in names}


def _check_heads(config: Config, with_size: bool) -> None:
    """Raises ValueError for heads that don't fit; with_size: whether `head_dim` was given."""
    heads = config.num_attention_heads
    if not with_size and config.hidden_size % heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"head_dim {config.head_dim} is odd; RoPE rotates pairs of features (its default is "
            f"hidden_size {config.hidden_size} / num_attention_heads {heads})"
        )
    if heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{config.num_key_value_heads}"
        )


def _with_no_rope_layers(hf: dict, config: Config) -> Config:
    """The config with `no_rope_layers` as in hf, None if all layers have positions."""
    count, every = config.num_hidden_layers, hf.get("no_rope_layer_interval", 4)
    on = hf.get("no_rope_layers")
    if on is None:
        on = tuple(int((i + 1) % every != 0) for i in range(count))
    if len(on) < count:
        raise ValueError(f"no_rope_layers: {len(on)} given for num_hidden_layers {count}")
    on = on[:count]
    return dataclasses.replace(config, no_rope_layers=None if all(on) else on)


def _ropes(hf: dict, family: Family, config: Config) -> dict[str, rope.Rope]:
    """The fields of `Config` with rotations, as in hf."""
    theta = hf.get("rope_theta") or family.theta
    place = rope.place_of(hf)
    read = functools.partial(
        rope.from_hf,
        hf,
        features=config.head_dim,
        longest=config.max_position_embeddings,
        options=family.rope_options,
    )
    if family.sliding_theta is None:
        return {"rope_parameters": read(place, hf.get(place) or dict(family.rope), theta)}
    # Before transformers 5, `rope_scaling` was that of the layers that see all tokens.
    given = hf.get("rope_parameters") or {}
    if given and not given.keys() & {FULL, SLIDING}:
        raise ValueError(
            f"rope_parameters: {config.model_type} has one for each of {FULL} and {SLIDING}; given "
            f"are {fields.shown(sorted(given))}"
        )
    given = fields.read(
        given, dict.fromkeys((FULL, SLIDING), fields.optional(fields.OBJECT)), "rope_parameters"
    )
    full = (given.get(FULL) or {}) | (hf.get("rope_scaling") or {})
    local = hf.get(family.sliding_theta_field) or family.sliding_theta
    return {
        "rope_parameters": read(place, full, theta),
        "sliding_rope": read(f"rope_parameters: {SLIDING}", given.get(SLIDING) or {}, local),
    }


def _implied_types(hf: dict, family: Family, config: Config) -> list[str]:
    """The type of each layer if a config.json doesn't have it."""
    count = range(config.num_hidden_layers)
    if config.sliding_window is None:
        return [FULL for _ in count]
    if "max_window_layers" in family.options:
        return [SLIDING if i >= hf.get("max_window_layers", 28) else FULL for i in count]
    if "no_rope_layers" in family.options:
        on = config.no_rope_layers or [1 for _ in count]
        return [FULL if on[i] else SLIDING for i in count]
    every = family.full_every
    if "sliding_window_pattern" in family.options:
        every = hf.get("sliding_window_pattern", every)
    return [FULL if every and (i + 1) % every == 0 else SLIDING for i in count]


def _with_layer_types(hf: dict, family: Family, config: Config) -> Config:
    """The config with `layer_types` as in hf, and no window or rotation that no layer uses."""
    window, count = config.sliding_window, config.num_hidden_layers
    implied = _implied_types(hf, family, config)
    types = list(hf.get("layer_types") or implied)
    if len(types) != count:
        raise ValueError(f"layer_types: {len(types)} given for num_hidden_layers {count}")
    if types != implied and ("layer_types" not in family.options or window is None):
        raise ValueError(
            f"layer_types {fields.shown(types)} are not supported for {config.model_type} with "
            f"sliding_window={window}, where they are {fields.shown(implied)}"
        )
    full, sliding = config.rope_parameters, config.sliding_rope
    if SLIDING not in types:
        return dataclasses.replace(config, sliding_window=None, sliding_rope=None)
    if FULL not in types:
        return dataclasses.replace(config, rope_parameters=sliding or full, sliding_rope=None)
    sliding = None if sliding == full else sliding
    return dataclasses.replace(config, layer_types=tuple(types), sliding_rope=sliding)


def hf_tensors(config: Config) -> dict[str, Source]:
    """{parameter path: its place in Hugging Face's tensors}. torch's `Linear` stores kernels (out,
    in)."""
    family = FAMILIES[config.model_type]
    first = "model" if family.text is None else "model.language_model"
    head = "lm_head.weight" if config.tie_word_embeddings else None
    names = {
        "embed/embedding": Source(f"{first}.embed_tokens.weight", tied=head),
        "norm/scale": Source(f"{first}.norm.weight"),
    }
    if not config.tie_word_embeddings:
        names["lm_head/kernel"] = Source("lm_head.weight", axes=(1, 0))
    theirs = TENSORS | family.tensors
    for module in _norms(config):
        names[f"h/{module}/scale"] = Source(f"{first}.layers.{{}}.{theirs[module]}.weight")
    linears = _linears(config)
    for module, (width, bias) in linears.items():
        name = f"{first}.layers.{{}}.{theirs[module]}"
        beside = [other for other in linears if theirs[other] == theirs[module]]
        start = sum(linears[other][0] for other in beside[: beside.index(module)])
        part = slice(start, start + width) if len(beside) > 1 else None
        names[f"h/{module}/kernel"] = Source(f"{name}.weight", (1, 0), part)
        if bias:
            names[f"h/{module}/bias"] = Source(f"{name}.bias", None, part)
    if config.attention_sinks:
        names["h/attn/sinks"] = Source("model.layers.{}.self_attn.sinks")
    return names | (_experts(config, theirs) if config.num_experts else {})


def _experts(config: Config, theirs: Mapping[str, str]) -> dict[str, Source]:
    """The places of all experts and their routers. A file has a tensor for each expert, or one for
    all of a layer (out before in), as transformers 5 holds them in memory; gpt-oss' always has the
    latter, with in before out and with gate and up interleaved."""
    size, experts, names = config.expert_size, config.num_experts, {}
    together = theirs["experts/gate"] == theirs["experts/up"]
    halves = slice(0, 2 * size, 2), slice(1, 2 * size, 2)
    halves = halves if together else (slice(0, size), slice(size, 2 * size))
    for name, part in zip(("gate", "up", "down"), (*halves, None), strict=True):
        fused = f"model.layers.{{}}.mlp.experts.{'down' if part is None else 'gate_up'}_proj"
        layer = f"h/{{}}/experts/{{}}/{name}"
        axes = None if together else (0, 2, 1)
        place = Source(fused, axes, part, layer=f"{layer}/kernel", experts=experts)
        if together:
            bias = Source(f"{fused}_bias", None, part, layer=f"{layer}/bias", experts=experts)
            names[f"h/experts/{name}/bias"] = bias
        else:
            one = f"model.layers.{{}}.{theirs[f'experts/{name}']}.weight"
            place = Source(one, (1, 0), layer=f"{layer}/kernel", other=place)
        names[f"h/experts/{name}/kernel"] = place
    router = f"model.layers.{{}}.{theirs['experts/router']}"
    newer = Source("model.layers.{}.mlp.gate.weight", (1, 0))
    other = None if together or newer.name == f"{router}.weight" else newer
    names["h/experts/router/kernel"] = Source(f"{router}.weight", (1, 0), other=other)
    if config.expert_bias:
        names["h/experts/router/bias"] = Source(f"{router}.bias")
    return names


def _norms(config: Config) -> list[str]:
    """The norms of a layer."""
    c = config
    names = [] if c.norms == "post" else ["norm_1", "norm_2"]
    names += [] if c.norms == "pre" else ["post_norm_1", "post_norm_2"]
    return names + [f"attn/{name}_norm" for name in "qk" if c.qk_norm != "none"]


def _linears(config: Config) -> dict[str, tuple[int, bool]]:
    """{linear module of a layer: (outputs, whether it has a bias)}."""
    c = config
    qkv_bias, keys = c.attention_bias or c.qkv_bias, c.num_key_value_heads * c.head_dim
    return {
        "attn/q": (c.num_attention_heads * c.head_dim, qkv_bias),
        "attn/k": (keys, qkv_bias),
        "attn/v": (keys, qkv_bias),
        "attn/o": (c.hidden_size, c.attention_bias),
    } | (
        {}
        if c.num_experts
        else {
            "mlp/gate": (c.intermediate_size, c.mlp_bias),
            "mlp/up": (c.intermediate_size, c.mlp_bias),
            "mlp/down": (c.hidden_size, c.mlp_bias),
        }
    )


def hf_config(config: Config) -> dict:
    """The fields of a `config.json` from which transformers 4 and 5 build the same model."""
    family = FAMILIES[config.model_type]
    described = {theirs: getattr(config, name) for name, theirs in _read(family).items()}
    full, sliding = config.rope_parameters, config.sliding_rope or config.rope_parameters
    if family.sliding_theta is not None:
        described[family.sliding_theta_field] = sliding.rope_theta
    described |= rope.to_hf(full)
    if family.sliding_theta is not None:
        each = {FULL: full, SLIDING: sliding}
        described["rope_parameters"] = {
            kind: rope.to_hf(r)["rope_parameters"] for kind, r in each.items()
        }
    if "use_sliding_window" in family.options:
        described["use_sliding_window"] = config.sliding_window is not None
    if "layer_types" in family.options:
        described["layer_types"] = list(config.types)
    if "no_rope_layers" in family.options:
        all_on = (1,) * config.num_hidden_layers
        described["no_rope_layers"] = list(config.no_rope_layers or all_on)
    described = family.written(described)
    if family.text is None:
        return described | {"architectures": [f"{family.name}ForCausalLM"]}
    return {
        "model_type": config.model_type,
        "tie_word_embeddings": config.tie_word_embeddings,
        "text_config": described | {"model_type": family.text},
        "architectures": [f"{family.name}ForConditionalGeneration"],
    }
