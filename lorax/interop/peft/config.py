"""The fields of PEFT's adapter_config.json, for every kind of adapter that can be read.

Each field has a type. Some fields change the meaning of the tensors in a way that is not supported
here; they raise an error if they are set. Fields, meanings and defaults are those of PEFT 0.21.
"""

from __future__ import annotations

import math
import pathlib
import re
import reprlib
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from lorax.files import read_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MOST = 2**31 - 1  # the largest whole number
LARGEST = float(np.finfo(np.float32).max)
_SHORT = reprlib.Repr()  # of a value in an error
_SHORT.maxstring = _SHORT.maxother = 100


class Want(NamedTuple):
    """What a field should be. words: for an error. fits: whether a value is that."""

    words: str
    fits: Callable[[Any], bool]


def _or_null(want: Want) -> Want:
    return Want(f"{want.words} or null", lambda x: x is None or want.fits(x))


def _whole(words: str, least: int) -> Want:
    return Want(words, lambda x: type(x) is int and least <= x <= MOST)


def _list(want: Want, words: str) -> Want:
    return Want(words, lambda x: isinstance(x, list) and all(map(want.fits, x)))


def _either(words: str, *wants: Want) -> Want:
    return Want(words, lambda x: any(want.fits(x) for want in wants))


def _map(want: Want, words: str) -> Want:
    fits = lambda x: isinstance(x, dict) and all(map(want.fits, x.values()))
    return Want(words, lambda x: x is None or fits(x) and all(map(_compiles, x)))


def _one_of(*values) -> Want:
    words = ", ".join("null" if value is None else value for value in values)
    return Want(f"one of {words}", lambda x: x is None or isinstance(x, str) and x in values)


def _compiles(pattern: str) -> bool:
    """Whether a text is a valid regex; PEFT uses names in patterns as regexes."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


ANY = Want("anything", lambda x: True)
FLAG = Want("true or false", lambda x: x is None or isinstance(x, bool))  # null is false in PEFT
TEXT = Want("a text", lambda x: isinstance(x, str))
NUMBER = Want(
    "a finite number",
    lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= LARGEST,
)
POSITIVE = Want("a finite number of at least 0", lambda x: NUMBER.fits(x) and x >= 0)
SHARE = Want("a number from 0 to below 1", lambda x: NUMBER.fits(x) and 0 <= x < 1)
COUNT = _whole("a whole number of at least 1", 1)
INDEX = _whole("a whole number of at least 0", 0)
WHOLE = _whole("a whole number", -MOST)
TERMS = Want("a whole number from 1 to 64", lambda x: type(x) is int and 1 <= x <= 64)
REGEX = Want("a regex", lambda x: isinstance(x, str) and _compiles(x))
NAMES = _or_null(_either("a list of names, a regex", _list(TEXT, "a list of names"), REGEX))
LIST = _or_null(_list(TEXT, "a list of names"))
LAYERS = _or_null(_either("a list of layers' numbers, one", _list(INDEX, ""), INDEX))
PATTERNS = _or_null(_either("a list of regexes, one", _list(REGEX, ""), REGEX))
RANKS = _map(COUNT, "names of modules with whole numbers of at least 1")
ALPHAS = _map(NUMBER, "names of modules with finite numbers")
KEPT = _map(
    _list(Want("", lambda x: isinstance(x, bool)), ""),
    "names of modules with lists of true and false",
)
BIAS = lambda own: Want(f"none, all or {own}", lambda x: x in ("none", "all", own))
TASKS = "SEQ_CLS SEQ_2_SEQ_LM CAUSAL_LM TOKEN_CLS QUESTION_ANS FEATURE_EXTRACTION".split()

_EACH = {"peft_type": TEXT, "task_type": _one_of(*TASKS, None)}
_EACH |= {"base_model_name_or_path": _or_null(TEXT), "revision": _or_null(TEXT)}
_EACH |= {"inference_mode": FLAG} | dict.fromkeys(("auto_mapping", "peft_version"), ANY)
_TARGETS = _EACH | {"target_modules": NAMES, "modules_to_save": LIST}
_LAYERS = _TARGETS | {"layers_to_transform": LAYERS, "layers_pattern": PATTERNS}

# Fields that only matter for initialisation, training or the base's memory layout are ignored here.
_LORA = _LAYERS | {"exclude_modules": NAMES, "fan_in_fan_out": FLAG, "bias": BIAS("lora_only")}
_LORA |= {"r": COUNT, "rank_pattern": RANKS, "lora_alpha": NUMBER, "alpha_pattern": ALPHAS}
_LORA |= {"use_rslora": FLAG, "use_dora": FLAG, "lora_dropout": SHARE}
_LORA |= {"init_lora_weights": _either("true, false or a text", FLAG, TEXT)}
_LORA |= {"ensure_weight_tying": FLAG}
_LORA |= dict.fromkeys(
    """corda_config eva_config loftq_config lora_ga_config megatron_config megatron_core
    merge_weights qalora_group_size runtime_config velora_config""".split(),
    ANY,
)
_LYCORIS = _LAYERS | {"exclude_modules": NAMES, "r": COUNT, "rank_pattern": RANKS}
_LYCORIS |= {"alpha": NUMBER, "alpha_pattern": ALPHAS, "use_effective_conv2d": FLAG}
_LYCORIS |= {"rank_dropout": SHARE, "module_dropout": SHARE, "init_weights": ANY}
_TOKENS = _EACH | {"num_virtual_tokens": COUNT, "modules_to_save": LIST} | dict.fromkeys(
    "token_dim num_transformer_submodules num_attention_heads num_layers".split(), _or_null(COUNT)
)  # fmt: skip

#: Fields that, when set, change the meaning of the tensors in an unsupported way.
_REFUSED = {
    "LORA": """alora_invocation_tokens arrow_config enable_lora kasa_config layer_replication
    lora_bias monteclora_config trainable_token_indices use_bdlora use_qalora""".split()
}
_REFUSED["ADALORA"] = [*_REFUSED["LORA"], "target_parameters", "use_dora"]
_REFUSED["GRALORA"] = ["hybrid_r"]
_REFUSED["OFT"] = ["coft", "block_share"]
_REFUSED["HRA"] = ["apply_GS"]
_LORA |= dict.fromkeys(_REFUSED["LORA"], ANY) | {"target_parameters": LIST}
#: Initialisations that subtract something from the base: the factors then update a changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

#: Last words of the modules that PEFT adapts together with ensure_weight_tying.
_TIED = ("lm_head", "embed_tokens", "word_embeddings", "wte")

#: {peft_type: {field: what it should be}}
FIELDS: dict[str, dict[str, Want]] = {
    "LORA": _LORA,
    "ADALORA": _LORA
    | {"init_r": COUNT, "target_r": COUNT, "rank_pattern": KEPT}
    | {"tinit": INDEX, "tfinal": INDEX, "deltaT": COUNT, "total_step": _or_null(COUNT)}
    | {"beta1": SHARE, "beta2": SHARE, "orth_reg_weight": POSITIVE},
    "LOHA": _LYCORIS,
    "LOKR": _LYCORIS
    | {"decompose_both": FLAG, "decompose_factor": WHOLE, "rank_dropout_scale": FLAG},
    "VERA": _LAYERS
    | {"r": COUNT, "projection_prng_key": INDEX, "save_projection": FLAG, "init_weights": ANY}
    | {"vera_dropout": SHARE, "d_initial": NUMBER, "fan_in_fan_out": FLAG}
    | {"bias": BIAS("vera_only")},
    "GRALORA": _LAYERS
    | {"r": COUNT, "hybrid_r": INDEX, "alpha": NUMBER, "gralora_k": COUNT, "init_weights": ANY}
    | {"gralora_dropout": SHARE, "fan_in_fan_out": FLAG, "bias": BIAS("gralora_only")},
    "IA3": _TARGETS
    | {"exclude_modules": NAMES, "feedforward_modules": NAMES, "fan_in_fan_out": FLAG}
    | {"init_ia3_weights": ANY},
    "MISS": _LAYERS
    | {"exclude_modules": NAMES, "r": COUNT, "mini_r": COUNT, "miss_dropout": SHARE}
    | {"init_weights": _either("true, false or mini", FLAG, _one_of("mini"))}
    | {"bias": BIAS("MiSS_only")},
    "HIRA": _LAYERS
    | {"exclude_modules": NAMES, "fan_in_fan_out": FLAG, "r": COUNT, "rank_pattern": RANKS}
    | {"hira_dropout": SHARE, "init_weights": ANY},
    "SHIRA": _TARGETS
    | {"r": COUNT, "mask_type": TEXT, "random_seed": _or_null(INDEX), "fan_in_fan_out": FLAG}
    | {"init_weights": FLAG},
    "LN_TUNING": _TARGETS | {"exclude_modules": NAMES},
    "PREFIX_TUNING": _TOKENS
    | {"encoder_hidden_size": _or_null(COUNT), "prefix_projection": FLAG, "init_weights": ANY},
    "PROMPT_TUNING": _TOKENS
    | dict.fromkeys(("prompt_tuning_init", "prompt_tuning_init_text"), ANY)
    | dict.fromkeys(("tokenizer_name_or_path", "tokenizer_kwargs"), ANY),
    "OFT": _LAYERS
    | {"r": INDEX, "oft_block_size": INDEX, "module_dropout": SHARE, "init_weights": ANY}
    | {"coft": FLAG, "eps": NUMBER, "block_share": FLAG, "use_cayley_neumann": FLAG}
    | {"num_cayley_neumann_terms": TERMS, "exclude_modules": NAMES, "fan_in_fan_out": FLAG}
    | {"bias": BIAS("oft_only")},
    "FOURIERFT": _LAYERS
    | {"n_frequency": COUNT, "n_frequency_pattern": RANKS, "scaling": NUMBER}
    | {"random_loc_seed": INDEX, "init_weights": ANY, "exclude_modules": NAMES}
    | {"fan_in_fan_out": FLAG, "bias": BIAS("fourier_only")},
    "HRA": _LAYERS
    | {"r": COUNT, "apply_GS": FLAG, "init_weights": ANY, "exclude_modules": NAMES}
    | {"bias": BIAS("hra_only")},
    "RANDLORA": _LAYERS
    | {"r": COUNT, "randlora_alpha": NUMBER, "randlora_dropout": SHARE, "init_weights": ANY}
    | {"projection_prng_key": INDEX, "save_projection": FLAG, "sparse": FLAG}
    | {"very_sparse": FLAG, "fan_in_fan_out": FLAG, "bias": BIAS("randlora_only")},
    "ADAPTION_PROMPT": _EACH
    | {"target_modules": _or_null(TEXT), "adapter_len": COUNT, "adapter_layers": COUNT},
}


def read_config(file: pathlib.Path) -> dict[str, Any]:
    """The fields of an adapter of any kind, which is in `peft_type` ("LORA", "VERA"...).

    Raises FileNotFoundError, or ValueError that names file and field for a kind that can't be read,
    a value of the wrong type, and a field that changes the tensors' meaning in an unsupported way.
    Warns about fields that are set but unknown to PEFT.
    """
    if not file.exists():
        raise missing(file)
    config = read_json(file)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in FIELDS:
        given = "is missing" if kind is None else f"{kind!r} can't be read"
        raise ValueError(f"{file}: peft_type {given}; supported are {', '.join(FIELDS)}")
    fields = FIELDS[kind]
    for field, value in config.items():
        if field in fields and not fields[field].fits(value):
            words = fields[field].words
            raise ValueError(f"{file}: {field}: {_SHORT.repr(value)} given; it should be {words}")
    for field in _REFUSED.get(kind, ()):
        if config.get(field):
            given = _SHORT.repr(config[field])
            raise ValueError(f"{file}: {field}: {given} given; {kind} can only be read without it")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{file}: init_lora_weights: {init!r} given; the factors belong to a changed base. Save"
            " them with PEFT's path_initial_model_for_weight_conversion as plain LoRA first"
        )
    unknown = sorted(field for field in set(config) - set(fields) if config[field])
    if unknown:
        warnings.warn(
            f"{file}: {', '.join(unknown)}: no fields of {kind} in PEFT 0.21; ignored, as there",
            stacklevel=2,
        )
    return config


def missing(file: pathlib.Path) -> FileNotFoundError:
    """The error for a missing file of an adapter."""
    folder = file.parent
    pickled = [path for path in (folder, *sorted(folder.glob("*"))) if path.suffix in PICKLES]
    if pickled and (file.name == WEIGHTS or pickled[0] == folder):
        return FileNotFoundError(
            f"{pickled[0]}: a pickle can run code when opened, so it is not read; PEFT writes what "
            f"is in it as {WEIGHTS}: PeftModel.from_pretrained(base, folder).save_pretrained(new)"
        )
    return FileNotFoundError(f"{file}: no such file; a PEFT adapter is {CONFIG} and {WEIGHTS}")


def check_targets(config: dict[str, Any], modules: Collection[str], file: pathlib.Path) -> None:
    """Raises ValueError for a module that has tensors but is not adapted by the config: PEFT would
    ignore it. file: the config."""
    for module in modules:
        field = _left_out_by(config, module)
        if field:
            given = f"{_SHORT.repr(config[field])} leaves out {module}"
            raise ValueError(f"{file}: {field}: {given}, of which {WEIGHTS} has an update")


def _left_out_by(config: dict[str, Any], module: str) -> str:
    """The field because of which PEFT does not adapt a module, "" if it does."""
    ends = lambda names: any(f".{module}".endswith(f".{name}") for name in names)
    excluded = config.get("exclude_modules") or []
    if re.fullmatch(excluded, module) if isinstance(excluded, str) else ends(excluded):
        return "exclude_modules"
    if any(f".{name}." in f".{module}." for name in config.get("modules_to_save") or []):
        return "modules_to_save"
    targets = config.get("target_modules")
    if ends(x.removesuffix(".weight") for x in config.get("target_parameters") or ()):
        return ""  # a router, which is a parameter in transformers 5
    if targets is None or targets == "all-linear":  # PEFT chooses by the model
        return ""
    if isinstance(targets, str):
        return "" if re.fullmatch(targets, module) else "target_modules"
    if not ends(targets):
        tied = config.get("ensure_weight_tying") and module.split(".")[-1] in _TIED
        return "" if tied and any(x.split(".")[-1] in _TIED for x in targets) else "target_modules"
    layers = config.get("layers_to_transform")
    if module in targets or layers in (None, []):
        return ""
    patterns = config.get("layers_pattern") or []
    patterns = [rf"(?:^|.*?\.){x}" for x in ([patterns] if isinstance(patterns, str) else patterns)]
    matches = (re.match(rf"{x}\.(?P<i>\d+)\.", module) for x in patterns or [r".*?\.[^.]*"])
    match = next(filter(None, matches), None)
    layers = [layers] if isinstance(layers, int) else layers
    return "" if match and int(match["i"]) in layers else "layers_to_transform"


def scale_of(config: dict[str, Any], module: str, rank: int, file: pathlib.Path) -> float:
    """PEFT's rule: alpha / r, or alpha / sqrt(r), with values of the first matching pattern."""
    named = lambda field, default: from_patterns(
        config.get(field), module, from_patterns(config.get(field), f"{module}.weight", default)
    )  # a module, or a parameter of one
    r = named("rank_pattern", config.get("r", 8))
    alpha = named("alpha_pattern", config.get("lora_alpha", 8))
    if r != rank:
        raise ValueError(
            f"{file}: r or rank_pattern: {module} has rank {r} here and {rank} in {WEIGHTS}"
        )
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def scale_of_kind(
    config: Mapping[str, Any], module: str, rank: int | None, file: pathlib.Path
) -> float:
    """`scale_of` by the config of LoRA, LoHa or LoKr. rank: None for LoKr of two whole sides, which
    has the scale, too."""
    fields = dict(config)
    if "lora_alpha" not in fields and fields.get("peft_type") != "LORA":
        fields["lora_alpha"] = fields.get("alpha", 8)
    if rank is None:
        rank = from_patterns(fields.get("rank_pattern"), module, fields.get("r", 8))
    return float(scale_of(fields, module, rank, file))


def adalora_scale(config: Mapping[str, Any]) -> tuple[float, int, float]:
    """(s, init_r, alpha): s = alpha / init_r, whatever the rank is after pruning (PEFT,
    tuners/adalora/layer.py). An alpha of at most 0 is the rank."""
    r, alpha = config.get("init_r", 12), config.get("lora_alpha", 8)
    alpha = float(alpha if alpha > 0 else r)
    return alpha / (r + 1e-5), r, alpha


def from_patterns(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first of PEFT's patterns, regexes for a name's end, that matches."""
    for end, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({end})$", module):
            return value
    return default


def as_patterns(values: Mapping[str, float]) -> tuple[int | float, dict[str, int | float]]:
    """(the commonest of {module: value}, {module: value} of the modules that differ): a field of
    PEFT's and its patterns."""
    common = Counter(values.values()).most_common(1)[0][0]
    rest = {module: as_number(x) for module, x in values.items() if x != common}
    return as_number(common), rest


def as_number(x: float) -> int | float:
    """A number as PEFT writes it in JSON: 16, not 16.0."""
    return int(x) if float(x).is_integer() else float(x)
