"""GPT-2 (Radford et al. 2019) as a plain Linen module, and its Hugging Face layout.

q, k and v are layers of their own: Hugging Face's fused `c_attn` is split at load. The layers run
under `nn.scan`, so every parameter below "h/" has a leading layer axis and compile time does not
grow with depth. Axes: B batch, T positions, H heads, D features of one head, V vocabulary.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from lorax.models.layers import ACTIVATIONS, LayerNorm, causal_attention


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters by Hugging Face's names, and how to run the layers.

    remat: make the layers' activations again in the backward pass. unroll: layers in one step of
    the loop over layers, 0 for 4 where layers are small (the loop's copies then cost more than a
    few layers' compilation) and 1 where they are not.
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
    remat: bool = False
    unroll: int = 0


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = functools.partial(nn.Dense, c.n_embd, dtype=c.dtype, kernel_init=_normal)
        heads = (*x.shape[:-1], c.n_head, c.n_embd // c.n_head)
        q, k, v = (dense(name=name)(x).reshape(heads) for name in "qkv")  # (B, T, H, D)
        scale = heads[-1] ** -0.5 if c.scale_attn_weights else 1.0
        return dense(name="o")(causal_attention(q, k, v, scale).reshape(x.shape))


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = functools.partial(nn.Dense, dtype=c.dtype, kernel_init=_normal)
        x = dense(c.n_inner or 4 * c.n_embd, name="up")(x)
        return dense(c.n_embd, name="down")(ACTIVATIONS[c.activation_function](x))


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        epsilon = self.config.layer_norm_epsilon
        x = x + Attention(self.config, name="attn")(LayerNorm(epsilon, name="ln_1")(x))
        x = x + MLP(self.config, name="mlp")(LayerNorm(epsilon, name="ln_2")(x))
        return x, None


class GPT2(nn.Module):
    """Tokens (B, T) int32 -> logits (B, T, V) float32; T at most `config.n_positions`."""

    config: Config
    #: What `logits` reads of the parameters.
    head: ClassVar[tuple[str, ...]] = ("wte", "lm_head")

    def setup(self):
        c = self.config
        embed = functools.partial(
            nn.Embed, features=c.n_embd, dtype=c.dtype, embedding_init=_normal
        )
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        self.wte = embed(c.vocab_size)
        self.wpe = embed(c.n_positions)
        self.h = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.n_layer,
            unroll=c.unroll or (min(4, c.n_layer) if c.n_embd <= 256 else 1),
        )(c)
        self.ln_f = LayerNorm(c.layer_norm_epsilon)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(
                c.vocab_size, use_bias=False, dtype=c.dtype, kernel_init=_normal
            )

    def __call__(self, tokens):
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens):
        """Final hidden states (B, T, n_embd), after the last layer norm."""
        t = tokens.shape[-1]
        if t > self.config.n_positions:
            raise ValueError(f"{t} tokens, but n_positions is {self.config.n_positions}")
        x = self.wte(tokens) + self.wpe(jnp.arange(t))[None]
        x, _ = self.h(x)
        return self.ln_f(x)

    def logits(self, hidden):
        """Hidden states (..., n_embd) -> logits (..., V) float32."""
        out = self.wte.attend(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)
        return out.astype(jnp.float32)


_normal = nn.initializers.normal(0.02)

# ----------------------------------------------------------------------------- Hugging Face layout

_HF_FIELDS = [
    f.name for f in dataclasses.fields(Config) if f.name not in ("dtype", "remat", "unroll")
]


def config_from_hf(hf: dict, **run) -> Config:
    """Config from the fields of a `config.json`; run: `dtype`, `remat`, `unroll`.

    Raises ValueError for options that this module does not compute.
    """
    if hf.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError("scale_attn_by_inverse_layer_idx=true is not supported for GPT-2")
    if hf.get("add_cross_attention"):
        raise ValueError("add_cross_attention=true is not supported for GPT-2")
    config = Config(**{name: hf[name] for name in _HF_FIELDS if name in hf}, **run)
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"activation_function {config.activation_function!r} is not one of {[*ACTIVATIONS]}"
        )
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    return config


def hf_tensors(config: Config) -> dict[str, tuple[str, slice | None, bool]]:
    """{parameter path: (Hugging Face name, columns, transpose)}.

    "{}" in a name is the layer, and the parameter stacks all of them. columns: the part of a fused
    tensor's last axis. GPT-2's `Conv1D` stores kernels (in, out), as we do; only the head is a
    `Linear`, stored (out, in).
    """
    d = config.n_embd
    names = {
        "wte/embedding": ("transformer.wte.weight", None, False),
        "wpe/embedding": ("transformer.wpe.weight", None, False),
        "ln_f/scale": ("transformer.ln_f.weight", None, False),
        "ln_f/bias": ("transformer.ln_f.bias", None, False),
    }
    if not config.tie_word_embeddings:
        names["lm_head/kernel"] = ("lm_head.weight", None, True)
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        for ln in ("ln_1", "ln_2"):
            names[f"h/{ln}/{ours}"] = (f"transformer.h.{{}}.{ln}.{theirs}", None, False)
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        for i, part in enumerate("qkv"):
            columns = slice(i * d, (i + 1) * d)
            fused = f"transformer.h.{{}}.attn.c_attn.{theirs}"
            names[f"h/attn/{part}/{ours}"] = (fused, columns, False)
        for layer, module in (
            ("attn/o", "attn.c_proj"),
            ("mlp/up", "mlp.c_fc"),
            ("mlp/down", "mlp.c_proj"),
        ):
            names[f"h/{layer}/{ours}"] = (f"transformer.h.{{}}.{module}.{theirs}", None, False)
    return names


def hf_config(config: Config) -> dict:
    """The fields of a `config.json` that transformers reads as the same model."""
    fields = {name: getattr(config, name) for name in _HF_FIELDS}
    return fields | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
