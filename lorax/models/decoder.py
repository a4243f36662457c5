"""The causal decoder that most model families of today share, as one plain Linen module.

LLaMA (arXiv:2302.13971, 2307.09288, 2407.21783), Mistral (arXiv:2310.06825), Qwen
(arXiv:2407.10671) and others differ in the fields of `Config` alone; which family has what is in
`decoder_families`. Layers run under `nn.scan`, as in GPT-2. Axes: B batch, T positions, H heads of
queries, K heads of keys and values, D features of one head, V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from lorax.losses import ROUTED
from lorax.models.experts import Experts, routed
from lorax.models.layers import (
    ACTIVATIONS,
    Attend,
    Cache,
    RMSNorm,
    causal_context,
    empty_cache,
    over_layers,
    returned,
    soft_cap,
    through,
)
from lorax.models.masks import dense as dense_mask
from lorax.models.masks import stacked as stacked_masks
from lorax.models.rope import Rope, frequencies, query_growth, rope, rotate

FULL, SLIDING = "full_attention", "sliding_attention"
NOPE = "no_rope"


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters by Hugging Face's names, and how to run the layers (as `gpt2.Config`).

    model_type: a key of `decoder_families.FAMILIES`; the module itself doesn't read it.
    num_key_value_heads: None becomes num_attention_heads. head_dim: None becomes hidden_size /
    num_attention_heads.

    Positions. rope_parameters: of all layers; sliding_rope: of the `SLIDING` ones, None for the
    same. no_rope_layers: for each layer 1 if it rotates queries and keys, 0 if it has no positions
    (NoPE, arXiv:2305.19466); None: all rotate. sliding_window: number of tokens that a token sees,
    itself included; None: all. layer_types: `FULL` or `SLIDING` for each layer; None: all use
    sliding_window, if it is set.

    Biases. attention_bias: of q, k, v and o; qkv_bias: of q, k and v; mlp_bias: of gate, up, down.

    Norms. norms: "pre" (before attention and feed-forward), "post" (of what they return, before it
    is added) or "both". norm_offset: added to the scale of every norm (Gemma stores scale - 1).
    qk_norm: RMSNorm of queries and keys before the rotation: "none", "head" (of each head, one
    scale (D,) for all) or "whole" (of all heads together, scales (H D,) and (K D,)).

    Multipliers. embedding_multiplier, residual_multiplier (of what attention and feed-forward add):
    factors. scale_embeddings: embeddings times sqrt(hidden_size), too. attention_multiplier: factor
    of q k^T; None: query_pre_attn_scalar^-0.5, or D^-0.5 if that is None. logits_scaling: divides
    the logits. attn_logit_softcapping, final_logit_softcapping: `soft_cap` of the scaled scores and
    of the logits; None: no cap.

    Attention. attention_sinks: a trained score per head, (H,), that takes part in the softmax and
    has no value (arXiv:2309.17453, section 3.3). clip_qkv: queries, keys and values are clipped to
    [-clip_qkv, clip_qkv]; None: not.

    Experts (`experts.Experts`). num_experts: E, in place of each feed-forward layer; 0: there is
    one, without a router. num_experts_per_tok: k of them read a token. moe_intermediate_size:
    features inside an expert; None: intermediate_size. norm_topk_prob: whether the k weights sum to
    1. expert_bias: of the router and of gate, up and down of each expert. swiglu_limit,
    swiglu_alpha: of gpt-oss' activation (`experts.gated`); None: SwiGLU. output_router_logits:
    whether router_aux_loss_coef times the load-balancing loss (`losses.balance`) is added to the
    training loss, as in transformers.
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
    sliding_rope: Rope | None = None
    no_rope_layers: tuple[int, ...] | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    norms: str = "pre"
    norm_offset: float = 0.0
    qk_norm: str = "none"
    embedding_multiplier: float = 1.0
    scale_embeddings: bool = False
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    query_pre_attn_scalar: float | None = None
    logits_scaling: float = 1.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    attention_sinks: bool = False
    clip_qkv: float | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    expert_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 0

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def expert_size(self) -> int:
        """Features inside an expert."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def types(self) -> tuple[str, ...]:
        """`FULL` or `SLIDING`, for each layer."""
        usual = FULL if self.sliding_window is None else SLIDING
        return self.layer_types or (usual,) * self.num_hidden_layers

    @property
    def ropes(self) -> dict[str, Rope | None]:
        """The rotation of each kind of layers; None: they have no positions."""
        return {FULL: self.rope_parameters, SLIDING: self.sliding_rope, NOPE: None}

    @property
    def rope_kinds(self) -> tuple[str, ...]:
        """A key of `ropes` for each layer."""
        kinds = self.types if self.sliding_rope is not None else (FULL,) * self.num_hidden_layers
        if self.no_rope_layers is None:
            return kinds
        return tuple(k if on else NOPE for k, on in zip(kinds, self.no_rope_layers, strict=True))

    @property
    def attention_scale(self) -> float:
        """The factor of q k^T."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5


class Attention(nn.Module):
    """Causal self-attention: x, mask, turn, kv, column -> (o, kv); turn: (cos, sin) of `rope`, and
    `query_growth` if queries grow; the rest as in `cached_attention`."""

    config: Config

    @nn.compact
    def __call__(self, x, mask, turn, kv, column):
        c = self.config
        dense = functools.partial(nn.Dense, dtype=c.dtype, kernel_init=_normal)
        bias = c.attention_bias or c.qkv_bias

        def heads(name, count, norm="none"):
            y = dense(count * c.head_dim, use_bias=bias, name=name)(x)
            if norm == "whole":
                y = _norm(c, f"{name}_norm")(y)
            if c.clip_qkv is not None:
                y = jnp.clip(y, -c.clip_qkv, c.clip_qkv)
            y = rearrange(y, "b t (h d) -> b t h d", h=count)
            return _norm(c, f"{name}_norm")(y) if norm == "head" else y

        cos, sin, *growth = turn
        q = rotate(heads("q", c.num_attention_heads, c.qk_norm), cos, sin)
        for factor in growth:
            q = q * factor.astype(q.dtype)
        k = rotate(heads("k", c.num_key_value_heads, c.qk_norm), cos, sin)
        v = heads("v", c.num_key_value_heads)
        attend = Attend(cap=c.attn_logit_softcapping, name="attend")
        sinks = None
        if c.attention_sinks:
            sinks = self.param("sinks", _normal, (c.num_attention_heads,), jnp.float32)
        o, kv = attend(q, k, v, mask, c.attention_scale, kv, column, sinks)
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
    """One layer: (x, kv), the number of its mask and of its turn (None: there is one
    for all layers), masks and turns (as in `Decoder.hidden`), column -> ((x, kv), logits of the
    router or None); see `cached_attention`."""

    config: Config

    @nn.compact
    def __call__(self, carry, mask_of, turn_of, masks, turns, column):
        x, kv = carry
        c = self.config
        before = lambda name, x: x if c.norms == "post" else _norm(c, name)(x)
        after = lambda name, x: x if c.norms == "pre" else _norm(c, f"post_{name}")(x)
        mask = masks if mask_of is None else jax.tree.map(lambda x: x[mask_of], masks)
        turn = turns if turn_of is None else tuple(x[turn_of] for x in turns)
        read, kv = Attention(c, name="attn")(before("norm_1", x), mask, turn, kv, column)
        x = x + _times(after("norm_1", read), c.residual_multiplier)
        if c.num_experts:
            fed, router = Experts(c, name="experts")(before("norm_2", x))
        else:
            fed, router = MLP(c, name="mlp")(before("norm_2", x)), None
        x = x + _times(after("norm_2", fed), c.residual_multiplier)
        return (x, kv), router


class Decoder(nn.Module):
    """Tokens (B, T) int32 -> logits (B, T, V) float32, for any T: `max_position_embeddings` is the
    length that the model was trained for, and only "dynamic" RoPE computes with it.

    With "dynamic" and "longrope" RoPE the frequencies of a token depend on the length of its own
    text, not on padding or on other texts of the batch. transformers uses the longest row, and for
    "dynamic" the longest batch so far: the two agree only on a single text.
    """

    config: Config
    #: The parameters that `logits` reads.
    head: ClassVar[tuple[str, ...]] = ("embed", "lm_head")
    stack: ClassVar[str] = "h"

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, embedding_init=_normal)
        self.h = over_layers(
            Block, c, c.num_hidden_layers, c.hidden_size, (0, 0, *[nn.broadcast] * 3)
        )
        self.norm = _norm(c)
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
        "longrope" RoPE, raises ValueError for a cache with more room than `Rope.limit`: beyond it
        the keys of a text change as it grows.
        """
        c = self.config
        context = causal_context(tokens, segments, cache, first=first)
        room = first + (tokens.shape[1] if cache is None else cache.room)
        near = lambda: causal_context(tokens, segments, cache, c.sliding_window).mask
        kinds, mask_of = _distinct(c.types)
        masks = [context.mask if kind == FULL else near() for kind in kinds]
        masks = masks[0] if mask_of is None else stacked_masks(masks)
        kinds, turn_of = _distinct(c.rope_kinds)
        turns = [_turn(c, c.ropes[kind], context, room, cache is not None) for kind in kinds]
        turns = turns[0] if turn_of is None else tuple(map(jnp.stack, zip(*turns, strict=True)))

        x = _times(self.embed(tokens), c.embedding_multiplier)
        if c.scale_embeddings:  # rounded as Gemma rounds it
            x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
        each, shared = (mask_of, turn_of), (masks, turns)
        x, kv, router = through(self.h, Block, x, cache, each, shared)
        if c.num_experts and c.output_router_logits:
            how = routed(router, c.num_experts_per_tok, c.router_aux_loss_coef)
            self.sow(ROUTED, "router", how)  # only in training
        return returned(self.norm(x), context, kv)

    def logits(self, hidden):
        """Hidden states (..., hidden_size) -> logits (..., V) float32."""
        c = self.config
        out = self.embed.attend(hidden) if c.tie_word_embeddings else self.lm_head(hidden)
        out = _times(out.astype(jnp.float32), 1 / c.logits_scaling)
        cap = c.final_logit_softcapping
        return out if cap is None else soft_cap(out, cap)

    @nn.nowrap
    def empty_cache(self, batch: int, room: int) -> Cache:
        """A `Cache` for `batch` rows of `room` tokens."""
        c = self.config
        size = c.num_hidden_layers, batch, room, c.num_key_value_heads, c.head_dim
        return empty_cache(*size, c.dtype)


_normal = nn.initializers.normal(0.02)


def _norm(config: Config, name: str | None = None) -> RMSNorm:
    return RMSNorm(config.rms_norm_eps, config.norm_offset, name=name)


def _times(x, factor: float):
    """x times a factor, which for most families is 1."""
    return x if factor == 1 else x * factor


def _distinct(kinds: Sequence[str]):
    """(the distinct kinds of layers, (L,) int32: the number of each layer's, or None if
    there is one)."""
    distinct = list(dict.fromkeys(kinds))
    if len(distinct) == 1:
        return distinct, None
    return distinct, jnp.array([distinct.index(kind) for kind in kinds], jnp.int32)


def _turn(config: Config, r: Rope | None, context, room: int, cached: bool):
    """The turn (see `Attention`) of the layers with a rotation; r: None turns nothing. room: tokens
    that a row can have."""
    if r is None:
        width = config.rope_parameters.rotated(config.head_dim) // 2
        return rope(context.positions, np.zeros(width))
    lengths, limit = None, r.limit(config.max_position_embeddings)
    if limit is not None and room > limit:
        if cached:
            raise ValueError(
                f"a cache of {room} tokens: {r.rope_type!r} RoPE changes all "
                f"keys of a text that grows beyond {limit} tokens; give it room for {limit}"
            )
        # The last token that sees a given token is the last of its text.
        last = jnp.max(
            jnp.where(dense_mask(context.mask), context.positions[:, :, None], 0), axis=1
        )
        lengths = last + 1
    turning = frequencies(r, config.head_dim, config.max_position_embeddings, lengths)
    turn = rope(context.positions, *turning)
    if r.llama_4_scaling_beta is None:
        return turn
    return *turn, query_growth(r, context.positions)
