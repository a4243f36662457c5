"""GPT-2 (Radford et al. 2019) as a plain Linen module, and its Hugging Face layout.

q, k and v are separate layers: Hugging Face's fused `c_attn` is split at load. The layers run
under `nn.scan`, so every parameter below "h/" has a leading layer axis and compile time does not
grow with depth. Axes: B batch, T positions, H heads, D features of one head, V vocabulary.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
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


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters by Hugging Face's names, and how to run the layers.

    remat: which activations the backward pass recomputes, "none", "full" or "dots" (see
    `layers.over_layers`). unroll: layers per iteration of the loop over layers; 0: 4 for small
    layers (where the loop's copies cost more than compiling a few layers), otherwise 1.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    tie_word_embeddings: bool = True
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 0


def _size(n_layer, n_embd, n_head, n_positions):
    return dict(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=n_positions)


#: Published sizes as fields of `Config`: GPT-2, and GPT-3 by Brown et al. 2020 (arXiv:2005.14165,
#: table 2.1) with GPT-2's vocabulary. Departures: attention is dense in every layer, while GPT-3
#: alternates with banded sparse attention (the parameters are the same); XL has 16 heads, because
#: the table's 24 heads of 128 features do not add up to its 2048; 13B has 5120 features, 40 heads
#: of 128, where the table says 5140.
SIZES = {
    "gpt2": _size(12, 768, 12, 1024),  # 124,439,808 parameters
    "gpt2-medium": _size(24, 1024, 16, 1024),  # 354,823,168
    "gpt2-large": _size(36, 1280, 20, 1024),  # 774,030,080
    "gpt2-xl": _size(48, 1600, 25, 1024),  # 1,557,611,200
    "gpt3-small": _size(12, 768, 12, 2048),  # 125,226,240 (125M)
    "gpt3-medium": _size(24, 1024, 16, 2048),  # 355,871,744 (350M)
    "gpt3-large": _size(24, 1536, 16, 2048),  # 760,300,032 (760M)
    "gpt3-xl": _size(24, 2048, 16, 2048),  # 1,315,723,264 (1.3B)
    "gpt3-2.7b": _size(32, 2560, 32, 2048),  # 2,651,553,280
    "gpt3-6.7b": _size(32, 4096, 32, 2048),  # 6,658,404,352
    "gpt3-13b": _size(40, 5120, 40, 2048),  # 12,853,386,240
    "gpt3-175b": _size(96, 12288, 96, 2048),  # 174,604,259,328
}


class Attention(nn.Module):
    """Causal self-attention: x, mask, kv, column -> (o, kv); see `cached_attention`."""

    config: Config

    @nn.compact
    def __call__(self, x, mask, kv, column):
        c = self.config
        dense = functools.partial(nn.Dense, c.n_embd, dtype=c.dtype, kernel_init=_normal)
        heads = lambda x: rearrange(x, "b t (h d) -> b t h d", h=c.n_head)
        q, k, v = (heads(dense(name=name)(x)) for name in "qkv")
        scale = q.shape[-1] ** -0.5 if c.scale_attn_weights else 1.0
        o, kv = Attend(name="attend")(q, k, v, mask, scale, kv, column)
        return dense(name="o")(rearrange(o, "b t h d -> b t (h d)")), kv


class Block(nn.Module):
    """One layer: (x, kv), mask, column -> ((x, kv), None); see `cached_attention`."""

    config: Config

    @nn.compact
    def __call__(self, carry, mask, column):
        (x, kv), c = carry, self.config
        norm = functools.partial(LayerNorm, c.layer_norm_epsilon)
        read, kv = Attention(c, name="attn")(norm(name="ln_1")(x), mask, kv, column)
        x = x + read
        hidden = c.n_inner or 4 * c.n_embd
        mlp = MLP(hidden, c.activation_function, c.dtype, _normal, name="mlp")
        return (x + mlp(norm(name="ln_2")(x)), kv), None


class GPT2(nn.Module):
    """Tokens (B, T) int32 -> logits (B, T, V) float32; T at most `config.n_positions`."""

    config: Config
    #: The parameters that `logits` reads.
    head: ClassVar[tuple[str, ...]] = ("wte", "lm_head")
    #: The parameters of the layers, with a leading layer axis, that `through` reads.
    stack: ClassVar[str] = "h"

    def setup(self):
        c = self.config
        embed = functools.partial(
            nn.Embed, features=c.n_embd, dtype=c.dtype, embedding_init=_normal
        )
        self.wte = embed(c.vocab_size)
        self.wpe = embed(c.n_positions)
        self.h = over_layers(Block, c, c.n_layer, c.n_embd, (nn.broadcast, nn.broadcast))
        self.ln_f = LayerNorm(c.layer_norm_epsilon)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(
                c.vocab_size, use_bias=False, dtype=c.dtype, kernel_init=_normal
            )

    def __call__(self, tokens, segments=None):
        return self.logits(self.hidden(tokens, segments))

    def hidden(self, tokens, segments=None, cache: Cache | None = None, first: int = 0):
        """Final hidden states (B, T, n_embd), after the last layer norm; with a cache, the pair
        (hidden, cache with these tokens in it).

        segments: (B, T) int32 or None, first: see `layers.causal_context`.
        """
        t, c = tokens.shape[-1], self.config
        if first + t > c.n_positions:
            after = f" after {first} more" * bool(first)
            raise ValueError(f"{t} tokens{after}, but n_positions is {c.n_positions}")
        context = causal_context(tokens, segments, cache, first=first)
        x = self.wte(tokens) + self.wpe(context.positions)
        x, kv, _ = through(self.h, Block, x, cache, shared=(context.mask,))
        return returned(self.ln_f(x), context, kv)

    def logits(self, hidden):
        """Hidden states (..., n_embd) -> logits (..., V) float32."""
        out = self.wte.attend(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)
        return out.astype(jnp.float32)

    @nn.nowrap
    def empty_cache(self, batch: int, room: int) -> Cache:
        """A `Cache` for `batch` rows of `room` tokens."""
        c = self.config
        return empty_cache(c.n_layer, batch, room, c.n_head, c.n_embd // c.n_head, c.dtype)


_normal = nn.initializers.normal(0.02)

# ----------------------------------------------------------------------------- Hugging Face layout

_HF_FIELDS = [
    f.name for f in dataclasses.fields(Config) if f.name not in ("dtype", "remat", "unroll")
]
#: Fields read from a config.json.
FIELDS = {
    "vocab_size": fields.ROWS,
    "n_positions": fields.ROWS,
    **dict.fromkeys(("n_embd", "n_layer", "n_head"), fields.SIZE),
    "n_inner": fields.optional(fields.SIZE),
    "activation_function": ACTIVATION,
    "layer_norm_epsilon": fields.POSITIVE,
    "scale_attn_weights": fields.FLAG,
    "scale_attn_by_inverse_layer_idx": fields.FLAG,
    "add_cross_attention": fields.FLAG,
    "tie_word_embeddings": fields.FLAG,
}


def config_from_hf(hf: dict, **run) -> Config:
    """Config from the fields of a `config.json`; run: `dtype`, `remat`, `unroll`.

    Raises ValueError for options that this module does not compute, and as `fields.read` does.
    """
    hf = fields.read(hf, FIELDS)
    if hf.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError("scale_attn_by_inverse_layer_idx=true is not supported for GPT-2")
    if hf.get("add_cross_attention"):
        raise ValueError("add_cross_attention=true is not supported for GPT-2")
    config = Config(**{name: hf[name] for name in _HF_FIELDS if name in hf}, **run)
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    return config


def hf_tensors(config: Config) -> dict[str, Source]:
    """{parameter path: its place in Hugging Face's tensors}. GPT-2's `Conv1D` stores kernels (in,
    out), as lorax does; only the head is a `Linear`, stored (out, in)."""
    d = config.n_embd
    head = "lm_head.weight" if config.tie_word_embeddings else None
    names = {
        "wte/embedding": Source("transformer.wte.weight", tied=head),
        "wpe/embedding": Source("transformer.wpe.weight"),
        "ln_f/scale": Source("transformer.ln_f.weight"),
        "ln_f/bias": Source("transformer.ln_f.bias"),
    }
    if not config.tie_word_embeddings:
        names["lm_head/kernel"] = Source("lm_head.weight", axes=(1, 0))
    layer = "transformer.h.{}"
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        for ln in ("ln_1", "ln_2"):
            names[f"h/{ln}/{ours}"] = Source(f"{layer}.{ln}.{theirs}")
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        for i, part in enumerate("qkv"):
            columns = slice(i * d, (i + 1) * d)
            names[f"h/attn/{part}/{ours}"] = Source(f"{layer}.attn.c_attn.{theirs}", part=columns)
        names[f"h/attn/o/{ours}"] = Source(f"{layer}.attn.c_proj.{theirs}")
        names[f"h/mlp/up/{ours}"] = Source(f"{layer}.mlp.c_fc.{theirs}")
        names[f"h/mlp/down/{ours}"] = Source(f"{layer}.mlp.c_proj.{theirs}")
    return names


def hf_config(config: Config) -> dict:
    """The fields of a `config.json` from which transformers builds the same model."""
    described = {name: getattr(config, name) for name in _HF_FIELDS}
    return described | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
