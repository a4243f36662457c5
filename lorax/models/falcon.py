"""Falcon (Almazrouei et al. 2023, arXiv:2311.16867) as a plain Linen module, and its Hugging Face
layout.

One file for its three designs: Falcon-7B (one norm, then attention with a single key head and the
feed-forward in parallel), Falcon-40B, 180B and 11B (`new_decoder_architecture`: groups of heads
share keys, one or two norms) and Falcon-RW (attention, then feed-forward; one key head per query
head, ALiBi instead of rotary positions). Axes as in `layers`, and V vocabulary.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from lorax import fields
from lorax.interop.hf import Source
from lorax.models.blocks import MLP
from lorax.models.layers import (
    ACTIVATION,
    Attend,
    Cache,
    LayerNorm,
    causal_context,
    empty_cache,
    over_layers,
    returned,
    through,
)
from lorax.models.rope import rope, rope_frequencies, rotate


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters by Hugging Face's names, and how to run the layers (see `gpt2.Config`).

    num_ln_in_parallel_attn: for the new architecture; None: 2. num_kv_heads: for the new
    architecture; None: one per query head. The old one has 1 (`multi_query`) or one per query head.
    """

    vocab_size: int = 65024
    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_ln_in_parallel_attn: int | None = None
    layer_norm_epsilon: float = 1e-5
    num_kv_heads: int | None = None
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    ffn_hidden_size: int | None = None
    activation: str = "gelu"
    tie_word_embeddings: bool = True
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 0

    @property
    def kv_heads(self) -> int:
        """K, the number of key and value heads."""
        if self.new_decoder_architecture:
            return self.num_kv_heads or self.num_attention_heads
        return 1 if self.multi_query else self.num_attention_heads

    @property
    def two_norms(self) -> bool:
        """Whether the feed-forward has a separate norm."""
        if self.new_decoder_architecture:
            return self.num_ln_in_parallel_attn != 1
        return not self.parallel_attn


class Attention(nn.Module):
    """Causal self-attention: x, mask, place, kv, column -> (o, kv); place: the result of
    `_place`; the rest as in `cached_attention`."""

    config: Config

    @nn.compact
    def __call__(self, x, mask, place, kv, column):
        c = self.config
        features = c.hidden_size // c.num_attention_heads

        def heads(name, n):
            y = _dense(c, n * features, name)(x)
            return rearrange(y, "b t (h d) -> b t h d", h=n)

        q, k, v = heads("q", c.num_attention_heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
        if c.alibi:
            q, k, v = _with_alibi(q, k, v, place)
        else:
            q, k = rotate(q, *place), rotate(k, *place)
        o, kv = Attend(name="attend")(q, k, v, mask, features**-0.5, kv, column)
        o = rearrange(o[..., :features], "b t h d -> b t (h d)")
        return _dense(c, c.hidden_size, "o")(o), kv


class Block(nn.Module):
    """One layer: (x, kv), mask, place, column -> ((x, kv), None). place: the result
    of `_place`; the rest as in `gpt2.Block`."""

    config: Config

    @nn.compact
    def __call__(self, carry, mask, place, column):
        x, kv = carry
        c = self.config
        norm = functools.partial(LayerNorm, c.layer_norm_epsilon)
        hidden = c.ffn_hidden_size or 4 * c.hidden_size
        mlp = MLP(hidden, c.activation, c.dtype, _normal, c.bias, name="mlp")
        seen = norm(name="norm_1")(x)
        read, kv = Attention(c, name="attn")(seen, mask, place, kv, column)
        if not (c.parallel_attn or c.new_decoder_architecture):
            x = x + read
            return (x + mlp(norm(name="norm_2")(x)), kv), None
        if c.two_norms:
            seen = norm(name="norm_2")(x)
        return (x + read + mlp(seen), kv), None


class Falcon(nn.Module):
    """Tokens (B, T) int32 -> logits (B, T, V) float32."""

    config: Config
    #: The parameters that `logits` reads.
    head: ClassVar[tuple[str, ...]] = ("embed", "lm_head")
    stack: ClassVar[str] = "h"

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, embedding_init=_normal)
        self.h = over_layers(Block, c, c.num_hidden_layers, c.hidden_size, (nn.broadcast,) * 3)
        self.norm = LayerNorm(c.layer_norm_epsilon)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(
                c.vocab_size, use_bias=False, dtype=c.dtype, kernel_init=_normal
            )

    def __call__(self, tokens, segments=None):
        return self.logits(self.hidden(tokens, segments))

    def hidden(self, tokens, segments=None, cache: Cache | None = None, first: int = 0):
        """Final hidden states (B, T, hidden_size), after the last layer norm; with a cache, the
        pair (hidden, cache with these tokens in it).

        segments: (B, T) int32 or None, first: see `layers.causal_context`.
        """
        c = self.config
        context = causal_context(tokens, segments, cache, first=first)
        shared = context.mask, _place(c, context.positions)
        x, kv, _ = through(self.h, Block, self.embed(tokens), cache, shared=shared)
        return returned(self.norm(x), context, kv)

    def logits(self, hidden):
        """Hidden states (..., hidden_size) -> logits (..., V) float32."""
        out = self.embed.attend(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)
        return out.astype(jnp.float32)

    @nn.nowrap
    def empty_cache(self, batch: int, room: int) -> Cache:
        """A `Cache` for `batch` rows of `room` tokens."""
        c = self.config
        features = c.hidden_size // c.num_attention_heads
        if c.alibi:
            features += c.num_attention_heads // c.kv_heads  # see `_with_alibi`
        return empty_cache(c.num_hidden_layers, batch, room, c.kv_heads, features, c.dtype)


_normal = nn.initializers.normal(0.02)


def _dense(config, features, name):
    return nn.Dense(
        features, use_bias=config.bias, dtype=config.dtype, kernel_init=_normal, name=name
    )


# --------------------------------------------------------------------------------------- positions


def _place(config: Config, positions):
    """Positions (B, T) as attention uses them: ALiBi's (B, T, K, G), or a `rope` pair."""
    if config.alibi:
        return alibi(positions, config.num_attention_heads, config.kv_heads)
    features = config.hidden_size // config.num_attention_heads
    return rope(positions, rope_frequencies(features, config.rope_theta))


def slopes(heads: int) -> np.ndarray:
    """ALiBi's slope of each head, (heads,) float32: 2^(-8i / n) for i = 1..n where n is a power of
    two; otherwise the slopes of the next lower power, then every other slope of the next higher one
    (arXiv:2108.12409, section 3 and the authors' code)."""
    n = 2 ** int(math.log2(heads))
    values = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    values += [2 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)]
    return np.asarray(values, np.float32)


def alibi(positions, heads: int, kv_heads: int):
    """Slope times key position, (B, T, K, G) bfloat16, to add to the scores before they are scaled.
    Rounded to bfloat16 as in Falcon's training. The query's position cancels in the softmax, which
    depends only on differences between keys.
    """
    each = jnp.asarray(slopes(heads), jnp.bfloat16).reshape(1, 1, kv_heads, -1)
    return each * positions[..., None, None].astype(jnp.bfloat16)


def _with_alibi(q, k, v, bias):
    """q, k and v with G more features, whose products add the bias: keys hold a bias for each of
    their G query heads, queries hold a one for theirs, values hold zeros."""
    groups = bias.shape[-1]
    one_hot = jnp.tile(jnp.eye(groups, dtype=q.dtype), (k.shape[2], 1))  # (H, G)
    one_hot = jnp.broadcast_to(one_hot, (*q.shape[:3], groups))
    bias = jnp.broadcast_to(bias.astype(k.dtype), (*k.shape[:3], groups))
    extended = ((q, one_hot), (k, bias), (v, jnp.zeros_like(bias)))
    return tuple(jnp.concatenate(pair, axis=-1) for pair in extended)


# ----------------------------------------------------------------------------- Hugging Face layout

_HF_FIELDS = [
    f.name for f in dataclasses.fields(Config) if f.name not in ("dtype", "remat", "unroll")
]
#: Fields read from a config.json.
FIELDS = {
    "vocab_size": fields.ROWS,
    "max_position_embeddings": fields.ROWS,
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), fields.SIZE),
    **dict.fromkeys(("num_kv_heads", "ffn_hidden_size", "n_embed"), fields.optional(fields.SIZE)),
    "num_ln_in_parallel_attn": fields.optional(fields.SIZE),
    "layer_norm_epsilon": fields.POSITIVE,
    **dict.fromkeys(("alibi", "bias", "multi_query", "parallel_attn"), fields.FLAG),
    **dict.fromkeys(("new_decoder_architecture", "tie_word_embeddings"), fields.FLAG),
    "activation": ACTIVATION,
    "rope_theta": fields.above(1),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), fields.optional(fields.OBJECT)),
}
#: Fields read from its "rope_parameters" or "rope_scaling".
ROPE_FIELDS = {"rope_type": fields.TEXT, "type": fields.TEXT, "rope_theta": fields.above(1)}


def config_from_hf(hf: dict, **run) -> Config:
    """Config from the fields of a `config.json`; run: `dtype`, `remat`, `unroll`.

    Raises ValueError for options that this module does not compute, and as `fields.read` does.
    """
    hf = fields.read(hf, FIELDS)
    if hf.get("n_embed") is not None:
        raise ValueError(f"n_embed={hf['n_embed']} is not supported for Falcon; use hidden_size")
    place = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rotary = fields.read(hf.get(place) or {}, ROPE_FIELDS, place)
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type {kind!r} is not supported for Falcon, only 'default'")
    theta = {"rope_theta": rotary["rope_theta"]} if "rope_theta" in rotary else {}
    config = Config(**{name: hf[name] for name in _HF_FIELDS if name in hf} | theta, **run)
    _check(config)
    return config


def _check(c: Config) -> None:
    heads = c.num_attention_heads
    if c.hidden_size % heads:
        raise ValueError(
            f"hidden_size {c.hidden_size} is not a multiple of num_attention_heads {heads}"
        )
    if not c.alibi and c.hidden_size // heads % 2:
        raise ValueError(
            f"hidden_size {c.hidden_size} gives each of num_attention_heads {heads} "
            f"{c.hidden_size // heads} features: rotary positions need an even number"
        )
    if heads % c.kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} is not a multiple of {c.kv_heads} key heads, num_kv_heads"
        )
    norms, new = c.num_ln_in_parallel_attn, c.new_decoder_architecture
    if not (new or c.multi_query) and c.num_kv_heads not in (None, heads):
        raise ValueError(
            f"num_kv_heads {c.num_kv_heads} needs new_decoder_architecture=true; without it and "
            f"without multi_query it is num_attention_heads, {heads}"
        )
    if norms not in ((None, 1, 2) if new else (None, 1)):
        raise ValueError(
            f"num_ln_in_parallel_attn {norms} is not supported: 1, or 2 with "
            f"new_decoder_architecture=true"
        )
    if new and not c.parallel_attn:
        raise ValueError("parallel_attn=false is not supported with new_decoder_architecture=true")


def hf_tensors(config: Config) -> dict[str, Source]:
    """{parameter path: its place in Hugging Face's tensors}. All kernels are `Linear`s, stored
    (out, in).

    The rows of the fused `query_key_value` are ordered by key head: its G query heads, the key
    head, its value head. With one key head (multi-query) that is all of q, then k, then v; with one
    per query head it is q, k, v of the first head, then of the second and so on.
    """
    c = config
    d, k = c.hidden_size // c.num_attention_heads, c.kv_heads
    rows = np.arange((c.num_attention_heads + 2 * k) * d).reshape(k, -1, d)  # (K, G + 2, D)
    parts = {"q": rows[:, :-2].ravel(), "k": rows[:, -2].ravel(), "v": rows[:, -1].ravel()}
    head = "lm_head.weight" if c.tie_word_embeddings else None
    names = {"embed/embedding": Source("transformer.word_embeddings.weight", tied=head)}
    if not c.tie_word_embeddings:
        names["lm_head/kernel"] = Source("lm_head.weight", axes=(1, 0))
    layer = "transformer.h.{}"
    norms = {"norm_1": "input_layernorm"}
    if c.two_norms and c.new_decoder_architecture:
        norms = {"norm_1": "ln_attn", "norm_2": "ln_mlp"}
    elif c.two_norms:
        norms["norm_2"] = "post_attention_layernorm"
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        names[f"norm/{ours}"] = Source(f"transformer.ln_f.{theirs}")
        for name, source in norms.items():
            names[f"h/{name}/{ours}"] = Source(f"{layer}.{source}.{theirs}")
    linear = [("kernel", "weight", (1, 0))] + [("bias", "bias", None)] * c.bias
    for ours, theirs, axes in linear:
        fused = f"{layer}.self_attention.query_key_value.{theirs}"
        for name, part in parts.items():
            names[f"h/attn/{name}/{ours}"] = Source(fused, axes, part)
        names[f"h/attn/o/{ours}"] = Source(f"{layer}.self_attention.dense.{theirs}", axes)
        names[f"h/mlp/up/{ours}"] = Source(f"{layer}.mlp.dense_h_to_4h.{theirs}", axes)
        names[f"h/mlp/down/{ours}"] = Source(f"{layer}.mlp.dense_4h_to_h.{theirs}", axes)
    return names


def hf_config(config: Config) -> dict:
    """The fields of a `config.json` from which transformers builds the same model."""
    described = {name: getattr(config, name) for name in _HF_FIELDS}
    described["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return described | {"model_type": "falcon", "architectures": ["FalconForCausalLM"]}
