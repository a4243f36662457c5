"""CLIP's text encoder (Radford et al. 2021, arXiv:2103.00020, section 2.4), from whose hidden
states Stable Diffusion makes images, as a plain Linen module, and its Hugging Face layout.

Axes: B batch, T positions.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from lorax import fields
from lorax.interop.hf import Source
from lorax.models.blocks import MLP, SelfAttention
from lorax.models.layers import ACTIVATION, LayerNorm, causal_context, over_layers

OLDEST_END = 2  # eos_token_id of files from before transformers had the right one


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters by Hugging Face's names, and how to run the layers (see `gpt2.Config`).

    eos_token_id: the token that ends a text, at which it is pooled.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 0

    @property
    def head(self) -> str:
        """There is none: the outputs are hidden states."""
        return "none"


class Block(nn.Module):
    """One layer: x (B, T, hidden_size) -> (x, None)."""

    config: Config

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        norm = functools.partial(LayerNorm, c.layer_norm_eps)
        how = c.dtype, _normal
        attend = SelfAttention(c.num_attention_heads, True, *how, name="attn")
        x = x + attend(norm(name="norm_1")(x), mask)
        mlp = MLP(c.intermediate_size, c.hidden_act, *how, name="mlp")
        return x + mlp(norm(name="norm_2")(x)), None


class TextEncoder(nn.Module):
    """Tokens (B, T) int32 -> hidden states (B, T, hidden_size) float32, after the last layer norm;
    T at most `config.max_position_embeddings`."""

    config: Config
    head: ClassVar[tuple[str, ...]] = ()

    def setup(self):
        c = self.config
        embed = functools.partial(
            nn.Embed, features=c.hidden_size, dtype=c.dtype, embedding_init=_normal
        )
        self.embed = embed(c.vocab_size)
        self.positions = embed(c.max_position_embeddings)
        self.h = over_layers(Block, c, c.num_hidden_layers, c.hidden_size, nn.broadcast)
        self.norm = LayerNorm(c.layer_norm_eps)

    def __call__(self, tokens, segments=None):
        """segments: (B, T) int32 or None; see `layers.causal_context`."""
        t, longest = tokens.shape[-1], self.config.max_position_embeddings
        if t > longest:
            raise ValueError(f"{t} tokens, but max_position_embeddings is {longest}")
        context = causal_context(tokens, segments)
        x = self.embed(tokens) + self.positions(context.positions)
        x, _ = self.h(x, context.mask)
        return self.norm(x).astype(jnp.float32)

    def pooled(self, tokens):
        """(B, hidden_size) float32: the hidden states at the first token that ends each text."""
        end = self.config.eos_token_id
        # In the files with the wrong end, the right one has the largest of all ids.
        at = jnp.argmax(tokens if end == OLDEST_END else tokens == end, axis=-1)
        return jnp.take_along_axis(self(tokens), at[:, None, None], axis=1)[:, 0]


_normal = nn.initializers.normal(0.02)

# ----------------------------------------------------------------------------- Hugging Face layout

_HF_FIELDS = [
    f.name for f in dataclasses.fields(Config) if f.name not in ("dtype", "remat", "unroll")
]
_ARCHITECTURE = "CLIPTextModel"
#: Fields read from a config.json.
FIELDS = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), fields.ROWS),
    **dict.fromkeys(("hidden_size", "intermediate_size"), fields.SIZE),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), fields.SIZE),
    "hidden_act": ACTIVATION,
    "layer_norm_eps": fields.POSITIVE,
    "eos_token_id": fields.ID,
}


def config_from_hf(hf: dict, **run) -> Config:
    """Config from the fields of a `config.json`; run: `dtype`, `remat`, `unroll`.

    Raises ValueError for another model than the bare text encoder, and as `fields.read` does.
    """
    architectures = hf.get("architectures") or [_ARCHITECTURE]
    if architectures != [_ARCHITECTURE]:
        raise ValueError(
            f"architectures: {fields.shown(architectures)} given, must be {_ARCHITECTURE} alone"
        )
    given = fields.read(hf, FIELDS)
    config = Config(**{name: given[name] for name in _HF_FIELDS if name in given} | run)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    return config


def hf_config(config: Config) -> dict:
    """The fields of a `config.json` from which transformers builds the same model."""
    described = {name: getattr(config, name) for name in _HF_FIELDS}
    return described | {"model_type": "clip_text_model", "architectures": [_ARCHITECTURE]}


def hf_tensors(config: Config) -> dict[str, Source]:
    """{parameter path: its place in Hugging Face's tensors}. Kernels are stored (out, in).
    transformers 5 leaves out the first word of each name, with which pipelines have them."""
    names = {
        "embed/embedding": ("embeddings.token_embedding.weight", None),
        "positions/embedding": ("embeddings.position_embedding.weight", None),
    }
    layer = "encoder.layers.{}"
    norms = {
        "norm": "final_layer_norm",
        "h/norm_1": f"{layer}.layer_norm1",
        "h/norm_2": f"{layer}.layer_norm2",
    }
    linears = {f"h/attn/{x}": f"{layer}.self_attn.{x}_proj" for x in "qkv"}
    linears |= {
        "h/attn/o": f"{layer}.self_attn.out_proj",
        "h/mlp/up": f"{layer}.mlp.fc1",
        "h/mlp/down": f"{layer}.mlp.fc2",
    }
    for ours, theirs in norms.items():
        names[f"{ours}/scale"] = f"{theirs}.weight", None
        names[f"{ours}/bias"] = f"{theirs}.bias", None
    for ours, theirs in linears.items():
        names[f"{ours}/kernel"] = f"{theirs}.weight", (1, 0)
        names[f"{ours}/bias"] = f"{theirs}.bias", None
    return {
        path: Source(f"text_model.{name}", axes, other=Source(name, axes))
        for path, (name, axes) in names.items()
    }
