"""LLaMA 1, 2 and 3 (arXiv:2302.13971, 2307.09288, 2407.21783), Mistral (arXiv:2310.06825) and Qwen2
(arXiv:2407.10671) as one plain Linen module, and their Hugging Face layout.

The three differ in biases and in the attention window; RoPE and its extensions to longer texts are
the same. Layers run under `nn.scan`, as in GPT-2. Axes: B batch, T positions, H heads of
queries, K heads of keys and values, D features of one head, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from lorax import fields
from lorax.interop.hf import Source
from lorax.models.layers import (
    ACTIVATION,
    ACTIVATIONS,
    Attend,
    Cache,
    RMSNorm,
    causal_context,
    empty_cache,
    over_layers,
    rope,
    rope_frequencies,
    rotate,
)

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Rope:
    """Hugging Face's `rope_parameters`: the rotation frequencies (formulas: see `frequencies`).

    A field is None if the `rope_type` doesn't use it, or for its default.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters by Hugging Face's names, and how to run the layers (as `gpt2.Config`).

    model_type: "llama", "mistral" or "qwen2"; "qwen2" alone has biases on q, k and v but not on o.
    num_key_value_heads: None becomes num_attention_heads. head_dim: None becomes hidden_size /
    num_attention_heads. sliding_window: number of tokens that a token sees, itself included; None:
    all. layer_types: `FULL` or `SLIDING` for each layer; None: all use sliding_window, if it is
    set.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: Rope = Rope()
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 0

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)


class Attention(nn.Module):
    """Causal self-attention: x, mask, turn, kv, at -> (o, kv); turn: (cos, sin) of
    `rope`; the rest as in `cached_attention`."""

    config: Config

    @nn.compact
    def __call__(self, x, mask, turn, kv, at):
        c = self.config
        dense = functools.partial(nn.Dense, dtype=c.dtype, kernel_init=_normal)
        bias = c.attention_bias or c.model_type == "qwen2"

        def heads(name, count):
            y = dense(count * c.head_dim, use_bias=bias, name=name)(x)
            return rearrange(y, "b t (h d) -> b t h d", h=count)

        q = rotate(heads("q", c.num_attention_heads), *turn)
        k = rotate(heads("k", c.num_key_value_heads), *turn)
        v = heads("v", c.num_key_value_heads)
        o, kv = Attend(name="attend")(q, k, v, mask, c.head_dim**-0.5, kv, at)
        o = rearrange(o, "b t h d -> b t (h d)")
        return dense(c.hidden_size, use_bias=c.attention_bias, name="o")(o), kv


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202, section 2): down(act(gate x) * up x)."""

    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = functools.partial(nn.Dense, use_bias=c.mlp_bias, dtype=c.dtype, kernel_init=_normal)
        gate = dense(c.intermediate_size, name="gate")(x)
        up = dense(c.intermediate_size, name="up")(x)
        product = lambda gate, up: ACTIVATIONS[c.hidden_act](gate) * up
        # Recomputed in the backward pass, so that only gate and up are stored.
        product = jax.checkpoint(product, prevent_cse=False)
        return dense(c.hidden_size, name="down")(product(gate, up))


class Block(nn.Module):
    """One layer: (x, kv), layer number and type, masks (as in `Llama.hidden`), (cos, sin), column
    -> ((x, kv), None); see `cached_attention`."""

    config: Config

    @nn.compact
    def __call__(self, carry, layer, kind, masks, turn, column):
        x, kv = carry
        epsilon = self.config.rms_norm_eps
        mask = masks if kind is None else masks[kind]
        read, kv = Attention(self.config, name="attn")(
            RMSNorm(epsilon, name="norm_1")(x), mask, turn, kv, (layer, column)
        )
        x = x + read
        x = x + MLP(self.config, name="mlp")(RMSNorm(epsilon, name="norm_2")(x))
        return (x, kv), None


class Llama(nn.Module):
    """Tokens (B, T) int32 -> logits (B, T, V) float32, for any T: `max_position_embeddings` is the
    length that the model was trained for, and only "dynamic" RoPE computes with it.

    With "dynamic" and "longrope" RoPE the frequencies of a token depend on the length of its own
    text, not on padding or on other texts of the batch. transformers uses the longest row, and for
    "dynamic" the longest batch so far: the two agree only on a single text.
    """

    config: Config
    #: The parameters that `logits` reads.
    head: ClassVar[tuple[str, ...]] = ("embed", "lm_head")

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, embedding_init=_normal)
        self.h = over_layers(
            Block, c, c.num_hidden_layers, c.hidden_size, (0, 0, *[nn.broadcast] * 3)
        )
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(
                c.vocab_size, use_bias=False, dtype=c.dtype, kernel_init=_normal
            )

    def __call__(self, tokens, segments=None):
        return self.logits(self.hidden(tokens, segments))

    def hidden(self, tokens, segments=None, cache: Cache | None = None, first: int = 0):
        """Final hidden states (B, T, hidden_size), after the last norm; with a cache, the pair
        (hidden, cache with these tokens in it).

        segments: (B, T) int32 or None, first: see `layers.causal_context`. With "dynamic" and
        "longrope" RoPE, raises ValueError for a cache with more room than `_limit`: beyond it the
        keys of a text change as it grows.
        """
        c = self.config
        context = causal_context(tokens, segments, cache, first=first)
        masks, kinds = context.mask, None
        if c.sliding_window is not None:
            near = causal_context(tokens, segments, cache, c.sliding_window).mask
            if c.layer_types is None:
                masks = near
            else:
                masks = jnp.stack([masks, near])  # (2, B or 1, T, S)
                kinds = jnp.array([kind == SLIDING for kind in c.layer_types], jnp.int32)

        lengths, limit = None, _limit(c)
        room = first + (tokens.shape[1] if cache is None else cache.k.shape[2])
        if limit is not None and room > limit:
            if cache is not None:
                raise ValueError(
                    f"a cache of {room} tokens: {c.rope_parameters.rope_type!r} RoPE changes all "
                    f"keys of a text that grows beyond {limit} tokens; give it room for {limit}"
                )
            # The last token that sees a given token is the last of its text.
            last = jnp.max(jnp.where(context.mask, context.positions[:, :, None], 0), axis=1)
            lengths = last + 1
        turn = rope(context.positions, *frequencies(c, lengths))

        layers = None if cache is None else jnp.arange(c.num_hidden_layers)
        kv = None if cache is None else (cache.k, cache.v)
        column = None if cache is None else cache.length
        (x, kv), _ = self.h((self.embed(tokens), kv), layers, kinds, masks, turn, column)
        hidden = self.norm(x)
        if cache is None:
            return hidden
        return hidden, context.cache._replace(k=kv[0], v=kv[1])

    def logits(self, hidden):
        """Hidden states (..., hidden_size) -> logits (..., V) float32."""
        tied = self.config.tie_word_embeddings
        out = self.embed.attend(hidden) if tied else self.lm_head(hidden)
        return out.astype(jnp.float32)

    @nn.nowrap
    def empty_cache(self, batch: int, room: int) -> Cache:
        """A `Cache` for `batch` rows of `room` tokens."""
        c = self.config
        size = c.num_hidden_layers, batch, room, c.num_key_value_heads, c.head_dim
        return empty_cache(*size, c.dtype)


_normal = nn.initializers.normal(0.02)

# --------------------------------------------------------------------------------------- positions


def _limit(config: Config) -> int | None:
    """The text length up to which RoPE frequencies are constant; None: for any length."""
    limits = {
        "dynamic": config.max_position_embeddings,
        "longrope": config.rope_parameters.original_max_position_embeddings,
    }
    return limits.get(config.rope_parameters.rope_type)


def frequencies(config: Config, lengths=None):
    """(radians by which each pair of features rotates per position, scale of cos and sin).

    lengths: (B, T) int32, the length of each token's text, or None if none is beyond `_limit`.
    Returns radians (D / 2,), or (B, T, D / 2) if lengths are given and matter, and a float. With
    w_i = theta^(-2i / D), s the `factor` and n = `original_max_position_embeddings`:

    default: w_i (arXiv:2104.09864). linear: w_i / s (arXiv:2306.15595). dynamic: theta grows with
    a text of l > m = `max_position_embeddings` tokens to theta (s l / m - s + 1)^(D / (D - 2))
    (arXiv:2309.00071, sections 3.1 and 3.3). yarn: between w_i and w_i / s, depending on how many
    rotations a pair makes in n tokens (its sections 3.2 and 3.4). llama3: the same idea with
    another ramp (LLaMA 3.1's reference code). longrope: w_i divided by a factor for each pair, one
    set of factors for texts up to n tokens and another for longer ones (arXiv:2402.13753).
    """
    r, d = config.rope_parameters, config.head_dim
    w = rope_frequencies(d, r.rope_theta)
    n = r.original_max_position_embeddings
    if r.rope_type == "linear":
        return w / r.factor, 1.0
    if r.rope_type == "dynamic" and lengths is not None:
        m = config.max_position_embeddings
        stretch = r.factor * jnp.maximum(lengths, m).astype(jnp.float32) / m - (r.factor - 1)
        powers = jnp.asarray(-np.arange(0, d, 2) / (d - 2), jnp.float32)[None, None]
        return jnp.asarray(w, jnp.float32)[None, None] * stretch[..., None] ** powers, 1.0
    if r.rope_type == "llama3":
        turns = n * w / (2 * math.pi)
        ramp = (turns - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor)
        return _between(w / r.factor, w, ramp), 1.0
    if r.rope_type == "yarn":
        # The (fractional) index of the pair that makes so many rotations in n tokens.
        pair = lambda turns: d * math.log(n / (2 * math.pi * turns)) / (2 * math.log(r.rope_theta))
        low, high = pair(r.beta_fast or 32), pair(r.beta_slow or 1)
        if r.truncate is not False:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        ramp = (np.arange(d // 2) - low) / (high - low or 0.001)
        return _between(w, w / r.factor, ramp), _yarn_scale(r)
    if r.rope_type == "longrope":
        scale = r.attention_factor
        if scale is None:
            scale = math.sqrt(1 + math.log(max(r.factor, 1)) / math.log(n))
        short, long = (w / np.asarray(f) for f in (r.short_factor, r.long_factor))
        if lengths is None:
            return short, scale
        short, long = (jnp.asarray(f, jnp.float32)[None, None] for f in (short, long))
        return jnp.where((lengths > n)[..., None], long, short), scale
    return w, 1.0


def _between(a, b, ramp):
    """a where ramp <= 0, b where ramp >= 1, linear interpolation between."""
    ramp = np.clip(ramp, 0, 1)
    return (1 - ramp) * a + ramp * b


def _yarn_scale(r: Rope) -> float:
    """YaRN's attention temperature, as a factor of cos and sin (arXiv:2309.00071, 3.4)."""
    if r.attention_factor is not None:
        return r.attention_factor
    scale = lambda m: 0.1 * m * math.log(max(r.factor, 1)) + 1
    return scale(r.mscale) / scale(r.mscale_all_dim) if r.mscale and r.mscale_all_dim else scale(1)


# ----------------------------------------------------------------------------- Hugging Face layout

_SPECIAL = ("rope_parameters", "layer_types", "dtype", "remat", "unroll")
_HF_FIELDS = [f.name for f in dataclasses.fields(Config) if f.name not in _SPECIAL]

# Defaults of fields that a config.json leaves out, where they differ from those of `Config`.
_DEFAULTS = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
}
# Fields of `Config` that a family does not have.
_FOREIGN = {
    "llama": ("sliding_window",),
    "mistral": ("attention_bias", "mlp_bias"),
    "qwen2": ("attention_bias", "mlp_bias"),
}

#: Fields read from a config.json.
FIELDS = {
    "model_type": fields.TEXT,
    "vocab_size": fields.ROWS,
    "max_position_embeddings": fields.ROWS,
    **dict.fromkeys(("hidden_size", "intermediate_size"), fields.SIZE),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), fields.SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), fields.optional(fields.SIZE)),
    "hidden_act": ACTIVATION,
    "rms_norm_eps": fields.POSITIVE,
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), fields.FLAG),
    "sliding_window": fields.optional(fields.ROWS),
    "use_sliding_window": fields.optional(fields.FLAG),
    "max_window_layers": fields.COUNT,
    "layer_types": fields.optional(fields.each(fields.one_of((FULL, SLIDING)))),
    "rope_theta": fields.optional(fields.above(1)),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), fields.optional(fields.OBJECT)),
    "original_max_position_embeddings": fields.optional(fields.whole(2)),
    "partial_rotary_factor": fields.optional(fields.POSITIVE),
}
#: Fields read from its "rope_parameters" or "rope_scaling".
ROPE_FIELDS = {
    "rope_type": fields.TEXT,
    "type": fields.TEXT,
    **{
        name: FIELDS[name]
        for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    },
    **dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "mscale")
        + ("mscale_all_dim", "beta_fast", "beta_slow"),
        fields.optional(fields.POSITIVE),
    ),
    "truncate": fields.optional(fields.FLAG),
    "short_factor": fields.optional(fields.each(fields.POSITIVE)),
    "long_factor": fields.optional(fields.each(fields.POSITIVE)),
}

# rope_type -> the fields of `Rope` that it needs.
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("factor", "short_factor", "long_factor"),
}


def config_from_hf(hf: dict, **run) -> Config:
    """Config from the fields of a `config.json`; run: `dtype`, `remat`, `unroll`.

    Reads RoPE from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before).
    Raises ValueError for options that this module does not compute, and as `fields.read` does.
    """
    hf = fields.read(hf, FIELDS)
    family = hf.get("model_type", "llama")
    if family not in _DEFAULTS:
        raise ValueError(f"model_type {family!r} is not one of {[*_DEFAULTS]}")
    for option in ("attention_bias", "mlp_bias"):
        if option in _FOREIGN[family] and hf.get(option):
            raise ValueError(f"{option}=true is not supported for {family}")
    names = [field for field in _HF_FIELDS if field not in _FOREIGN[family]]
    arguments = _DEFAULTS[family] | {name: hf[name] for name in names if name in hf}
    if family == "qwen2" and not hf.get("use_sliding_window"):
        arguments["sliding_window"] = None
    config = Config(**arguments, **run)
    heads = config.num_attention_heads
    if hf.get("head_dim") is None and config.hidden_size % heads:
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
    config = dataclasses.replace(config, rope_parameters=_rope_from_hf(hf, config))
    return _with_layer_types(hf, config)


def _rope_from_hf(hf: dict, config: Config) -> Rope:
    place = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    parameters = hf.get(place) or {}
    nested = [
        key for key, x in parameters.items() if isinstance(x, dict) and key not in ROPE_FIELDS
    ]
    if nested:
        raise ValueError(f"{place} by layer type are not supported: {fields.shown(nested)}")
    parameters = fields.read(parameters, ROPE_FIELDS, place)
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.setdefault("rope_theta", hf.get("rope_theta", Rope.rope_theta))
    kind = parameters["rope_type"]
    if kind not in _ROPE_NEEDS:
        raise ValueError(f"rope_type {kind!r} is not one of {[*_ROPE_NEEDS]}")
    share = parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor={share} is not supported; RoPE rotates whole heads"
        )
    if kind in ("llama3", "yarn", "longrope"):
        name, longest = "original_max_position_embeddings", config.max_position_embeddings
        parameters[name] = hf.get(name) or parameters.get(name) or longest
        if parameters[name] < 2:
            raise ValueError(f"{place}: {name}, or max_position_embeddings, is {parameters[name]}")
        if kind != "llama3" and parameters.get("factor") is None:
            parameters["factor"] = longest / parameters[name]
    for name in _ROPE_NEEDS[kind]:
        if parameters.get(name) is None:
            raise ValueError(f"{place}: {kind!r} needs {name}; given are {sorted(parameters)}")
    if kind == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise ValueError(
            f"{place}: high_freq_factor {parameters['high_freq_factor']} is not above "
            f"low_freq_factor {parameters['low_freq_factor']}"
        )
    if kind == "dynamic" and config.head_dim < 4:
        raise ValueError(f"{place}: 'dynamic' needs a head_dim of 4 or more, not {config.head_dim}")
    for name in ("short_factor", "long_factor"):
        if parameters.get(name) is not None:
            if len(parameters[name]) != config.head_dim // 2:
                raise ValueError(
                    f"{place}: {name} has {len(parameters[name])} numbers, should have "
                    f"{config.head_dim // 2}, half of head_dim or "
                    "hidden_size / num_attention_heads"
                )
    known = [field.name for field in dataclasses.fields(Rope)]
    return Rope(**{name: parameters[name] for name in known if parameters.get(name) is not None})


def _with_layer_types(hf: dict, config: Config) -> Config:
    """The config with `layer_types` as in hf; `sliding_window` is None if no layer uses it."""
    family, window, count = config.model_type, config.sliding_window, config.num_hidden_layers
    first = hf.get("max_window_layers", 28) if family == "qwen2" else 0
    implied = [SLIDING if window is not None and i >= first else FULL for i in range(count)]
    types = list(hf.get("layer_types") or implied)
    if len(types) != count:
        raise ValueError(f"layer_types: {len(types)} given for num_hidden_layers {count}")
    if types != implied and (family != "qwen2" or window is None):
        raise ValueError(
            f"layer_types {fields.shown(types)} are not supported for {family} with "
            f"sliding_window={window}, where they are {fields.shown(implied)}"
        )
    if SLIDING not in types:
        return dataclasses.replace(config, sliding_window=None)
    return dataclasses.replace(config, layer_types=tuple(types) if FULL in types else None)


def hf_tensors(config: Config) -> dict[str, Source]:
    """{parameter path: its place in Hugging Face's tensors}. torch's `Linear` stores kernels (out,
    in)."""
    head = "lm_head.weight" if config.tie_word_embeddings else None
    names = {
        "embed/embedding": Source("model.embed_tokens.weight", tied=head),
        "norm/scale": Source("model.norm.weight"),
    }
    if not config.tie_word_embeddings:
        names["lm_head/kernel"] = Source("lm_head.weight", axes=(1, 0))
    layer = "model.layers.{}"
    names["h/norm_1/scale"] = Source(f"{layer}.input_layernorm.weight")
    names["h/norm_2/scale"] = Source(f"{layer}.post_attention_layernorm.weight")
    qkv_bias = config.attention_bias or config.model_type == "qwen2"
    linears = {f"attn/{name}": (f"self_attn.{name}_proj", qkv_bias) for name in "qkv"}
    linears["attn/o"] = ("self_attn.o_proj", config.attention_bias)
    for name in ("gate", "up", "down"):
        linears[f"mlp/{name}"] = (f"mlp.{name}_proj", config.mlp_bias)
    for ours, (theirs, bias) in linears.items():
        names[f"h/{ours}/kernel"] = Source(f"{layer}.{theirs}.weight", axes=(1, 0))
        if bias:
            names[f"h/{ours}/bias"] = Source(f"{layer}.{theirs}.bias")
    return names


def hf_config(config: Config) -> dict:
    """The fields of a `config.json` from which transformers 4 and 5 build the same model."""
    family, window = config.model_type, config.sliding_window
    described = {f: getattr(config, f) for f in _HF_FIELDS if f not in _FOREIGN[family]}
    turning = {k: v for k, v in dataclasses.asdict(config.rope_parameters).items() if v is not None}
    stretch = {k: v for k, v in turning.items() if k != "rope_theta"}
    described |= {"rope_parameters": turning, "rope_theta": turning["rope_theta"]}
    described["rope_scaling"] = None if stretch == {"rope_type": "default"} else stretch
    if turning["rope_type"] == "longrope":  # transformers 4 reads it only there
        name = "original_max_position_embeddings"
        described[name] = turning[name]
    if family == "qwen2":
        usual_type = FULL if window is None else SLIDING
        types = config.layer_types or (usual_type,) * config.num_hidden_layers
        described |= {"use_sliding_window": window is not None, "layer_types": list(types)}
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[family]
    return described | {"architectures": [f"{name}ForCausalLM"]}
