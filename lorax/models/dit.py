"""Diffusion Transformer with adaLN-zero (DiT: Peebles & Xie 2022, arXiv:2212.09748, section 3.2) as
a plain Linen module, and its layout in diffusers (`DiTTransformer2DModel`).

Like diffusers', every block has its own embedding of timesteps and classes; the final layer reads
that of block 0. Labels are as given: `lorax.losses` drops some of them in training, for guidance
without a classifier (Ho & Salimans 2022, arXiv:2207.12598), and the last row of the embedding is
the class "none".

Axes: B batch, T patches (row by row).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from lorax import fields
from lorax.interop.hf import Source
from lorax.models.blocks import MLP, UnmaskedAttention
from lorax.models.layers import over_layers, sines_of

TIME_FEATURES = 256  # of a timestep's sines and cosines
#: Ours by diffusers' names, of those that DiT is published with.
_ACTIVATIONS = {"gelu-approximate": "gelu_new", "gelu": "gelu"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters by diffusers' names, and how to run the layers (see `gpt2.Config`).

    sample_size, patch_size: in pixels or latents, of squares. out_channels: None for in_channels;
    twice as many if the model also predicts variances. num_embeds_ada_norm: number of classes,
    without "none".
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    norm_eps: float = 1e-5
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an input."""
        return self.sample_size, self.sample_size, self.in_channels

    @property
    def condition(self) -> jax.ShapeDtypeStruct:
        """Of one row: its class."""
        return jax.ShapeDtypeStruct((), jnp.int32)

    @property
    def no_class(self) -> int:
        """The class "none"."""
        return self.num_embeds_ada_norm

    @property
    def hidden_size(self) -> int:
        """Features of a patch."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def positions(self) -> int:
        """T, the number of patches."""
        return (self.sample_size // self.patch_size) ** 2


class Condition(nn.Module):
    """Sines of timesteps (B, 256) and classes (B,) -> (B, hidden_size): the sum of their
    embeddings."""

    config: Config

    @nn.compact
    def __call__(self, sines, classes):
        c = self.config
        dense = functools.partial(nn.Dense, c.hidden_size, dtype=c.dtype, kernel_init=_normal)
        t = dense(name="time_2")(nn.silu(dense(name="time_1")(sines)))
        rows = c.num_embeds_ada_norm + 1
        classes = nn.Embed(
            rows, c.hidden_size, dtype=c.dtype, embedding_init=_normal, name="embed"
        )(classes)
        return t + classes


class Block(nn.Module):
    """One layer: x -> (x, condition (B, hidden_size)). Shifts, scales and gates of both halves are
    a linear function of the condition, at first zero, so that a block starts as the identity."""

    config: Config

    @nn.compact
    def __call__(self, x, sines, classes):
        c = self.config
        condition = Condition(c, name="condition")(sines, classes)
        modulation = nn.Dense(
            6 * c.hidden_size, dtype=c.dtype, kernel_init=nn.initializers.zeros, name="modulation"
        )(nn.silu(condition))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _per_row(modulation, 6)
        how = c.dtype, _xavier
        attend = UnmaskedAttention(c.num_attention_heads, c.attention_bias, *how, name="attn")
        y = _normalised(x, 1e-6) * (1 + scale) + shift
        x = x + gate * attend(y)
        mlp = MLP(4 * c.hidden_size, _ACTIVATIONS[c.activation_fn], *how, name="mlp")
        y = _normalised(x, c.norm_eps) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * mlp(y), condition


class DiT(nn.Module):
    """Noisy images x (B, height, width, channels) float32, timesteps t (B,), classes (B,) int32 ->
    the model's prediction (B, height, width, out_channels) float32: of the noise, say, and of what
    interpolates the variance, if it has twice the channels."""

    config: Config

    def setup(self):
        c = self.config
        patch = (c.patch_size, c.patch_size)
        self.patches = nn.Conv(
            c.hidden_size, patch, strides=patch, padding="VALID", dtype=c.dtype,
            kernel_init=_xavier_patches,
        )  # fmt: skip
        self.h = over_layers(Block, c, c.num_layers, c.hidden_size, nn.broadcast)
        zeros = functools.partial(nn.Dense, dtype=c.dtype, kernel_init=nn.initializers.zeros)
        self.modulation = zeros(2 * c.hidden_size)
        self.out = zeros(c.patch_size**2 * (c.out_channels or c.in_channels))

    def __call__(self, x, t, classes):
        c = self.config
        if x.shape[1:] != c.image_shape:
            raise ValueError(
                f"images of {x.shape[1:]}, but sample_size and in_channels say {c.image_shape} "
                "(positions are not interpolated)"
            )
        side = c.sample_size // c.patch_size
        x = rearrange(self.patches(x), "b h w d -> b (h w) d")
        x = x + positions(side, c.hidden_size).astype(x.dtype)
        sines = sines_of(t, TIME_FEATURES, shift=1.0).astype(x.dtype)
        x, conditions = self.h(x, sines, classes)
        shift, scale = _per_row(self.modulation(nn.silu(conditions[0])), 2)
        x = self.out(_normalised(x, 1e-6) * (1 + scale) + shift)
        shape = dict(h=side, w=side, p=c.patch_size, q=c.patch_size)
        return rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", **shape).astype(jnp.float32)


def _per_row(x, parts: int):
    """(B, parts * D) -> parts of (B, 1, D), the same for all positions of a row."""
    return jnp.split(x[:, None], parts, axis=-1)


def _normalised(x, eps: float):
    """Layer norm without parameters over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


def positions(side: int, features: int):
    """(1, side * side, features) float32: sines and cosines of each patch's column, then those of
    its row. Traced, as a constant would be as large as a config says."""
    quarter = features // 4
    frequencies = jnp.exp(-math.log(1e4) / quarter * jnp.arange(quarter, dtype=jnp.float32))
    angles = jnp.arange(side, dtype=jnp.float32)[:, None] * frequencies[None, :]
    axis = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)  # (side, features / 2)
    square = (side, side, features // 2)
    columns = jnp.broadcast_to(axis[None], square)
    rows = jnp.broadcast_to(axis[:, None], square)
    return jnp.concatenate([columns, rows], axis=2).reshape(1, side * side, features)


_normal, _xavier = nn.initializers.normal(0.02), nn.initializers.xavier_uniform()


def _xavier_patches(key, shape, dtype=jnp.float32):
    """The convolution's kernel as that of the linear layer on flattened patches that it is."""
    return _xavier(key, (np.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


# -------------------------------------------------------------------------------- diffusers' layout

_DIFFUSERS_FIELDS = [
    f.name for f in dataclasses.fields(Config) if f.name not in ("dtype", "remat", "unroll")
]
_ONLY_ADA_NORM_ZERO = fields.only("ada_norm_zero")
#: Fields read from a config.json.
FIELDS = {
    **dict.fromkeys(("num_attention_heads", "attention_head_dim", "in_channels"), fields.SIZE),
    **dict.fromkeys(("num_layers", "sample_size", "patch_size"), fields.SIZE),
    "out_channels": fields.optional(fields.SIZE),
    "num_embeds_ada_norm": fields.SIZE,
    "attention_bias": fields.FLAG,
    "activation_fn": fields.one_of(_ACTIVATIONS),
    "norm_eps": fields.POSITIVE,
    "norm_type": _ONLY_ADA_NORM_ZERO,
    "norm_elementwise_affine": fields.only(False),
    "attention_type": fields.only("default"),
    "dropout": fields.only(0),
    "norm_num_groups": fields.SIZE,  # of a layer that this norm_type has not
    "upcast_attention": fields.FLAG,  # the softmax is always in float32
}


def config_from_hf(hf: dict, **run) -> Config:
    """Config from the fields of a `config.json`; run: `dtype`, `remat`, `unroll`.

    Raises ValueError for options that this module does not compute, unknown ones included unless
    they are null or false, and as `fields.read` does.
    """
    read = fields.read(hf, FIELDS)
    fields.refuse_others(hf, FIELDS)
    if hf.get("_class_name") == "Transformer2DModel" and "norm_type" not in read:
        raise ValueError(f"norm_type: none given, must be {_ONLY_ADA_NORM_ZERO.right}")
    config = Config(**{name: read[name] for name in _DIFFUSERS_FIELDS if name in read} | run)
    if config.out_channels not in (None, config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"out_channels: {config.out_channels} given, must be in_channels {config.in_channels}, "
            "or twice as many if the model also predicts variances"
        )
    if config.sample_size % config.patch_size:
        raise ValueError(
            f"sample_size {config.sample_size} is not a multiple of patch_size {config.patch_size}"
        )
    if config.hidden_size % 4:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} x attention_head_dim "
            f"{config.attention_head_dim} is not a multiple of 4, which positions need"
        )
    return config


def hf_config(config: Config) -> dict:
    """The fields of a `config.json` from which diffusers builds the same model."""
    described = {name: getattr(config, name) for name in _DIFFUSERS_FIELDS}
    described |= {"norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "dropout": 0.0}
    return described | {"_class_name": "DiTTransformer2DModel"}


def hf_tensors(config: Config) -> dict[str, Source]:
    """{parameter path: its place in diffusers' tensors}. Kernels are stored (out, in), the
    convolution's (out, in, height, width)."""
    names = {
        "patches/kernel": Source("pos_embed.proj.weight", (2, 3, 1, 0)),
        "patches/bias": Source("pos_embed.proj.bias"),
    }
    block = "transformer_blocks.{}"
    condition = f"{block}.norm1.emb"
    names["h/condition/embed/embedding"] = Source(
        f"{condition}.class_embedder.embedding_table.weight"
    )
    qkv = {f"h/attn/{name}": f"{block}.attn1.to_{name}" for name in "qkv"}
    linears = qkv | {
        "h/condition/time_1": f"{condition}.timestep_embedder.linear_1",
        "h/condition/time_2": f"{condition}.timestep_embedder.linear_2",
        "h/modulation": f"{block}.norm1.linear",
        "h/attn/o": f"{block}.attn1.to_out.0",
        "h/mlp/up": f"{block}.ff.net.0.proj",
        "h/mlp/down": f"{block}.ff.net.2",
        "modulation": "proj_out_1",
        "out": "proj_out_2",
    }
    for ours, theirs in linears.items():
        names[f"{ours}/kernel"] = Source(f"{theirs}.weight", axes=(1, 0))
        if config.attention_bias or ours not in qkv:
            names[f"{ours}/bias"] = Source(f"{theirs}.bias")
    return names
