"""Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929) for image classification as a
plain Linen module, and its Hugging Face layout.

Axes: B batch, T positions (the class token, then the patches row by row), H heads, D features of
one head.
"""

import dataclasses
import functools

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from lorax import fields
from lorax.interop.hf import Source
from lorax.models.blocks import MLP, UnmaskedAttention
from lorax.models.layers import ACTIVATION, LayerNorm, over_layers


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters by Hugging Face's names, and how to run the layers (see `gpt2.Config`).

    image_size, patch_size: pixels, one number for squares or (height, width). labels: number of
    scores.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    labels: int = 2
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return (*_pair(self.image_size), self.num_channels)

    @property
    def positions(self) -> int:
        """T: the class token and one per patch; pixels beyond the last whole patch are cut off."""
        (height, width), (rows, columns) = _pair(self.image_size), _pair(self.patch_size)
        return 1 + (height // rows) * (width // columns)


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


class Block(nn.Module):
    """One layer: x -> (x, None)."""

    config: Config

    @nn.compact
    def __call__(self, x, _):
        c = self.config
        norm = functools.partial(LayerNorm, c.layer_norm_eps)
        how = c.dtype, _normal
        attend = UnmaskedAttention(c.num_attention_heads, c.qkv_bias, *how, name="attn")
        x = x + attend(norm(name="norm_1")(x))
        mlp = MLP(c.intermediate_size, c.hidden_act, *how, name="mlp")
        return x + mlp(norm(name="norm_2")(x)), None


class ViT(nn.Module):
    """Images (B, height, width, channels) float32 -> scores (B, labels) float32."""

    config: Config

    def setup(self):
        c = self.config
        d, patch = c.hidden_size, _pair(c.patch_size)
        self.patches = nn.Conv(
            d, patch, strides=patch, padding="VALID", dtype=c.dtype, kernel_init=_normal
        )
        self.cls = self.param("cls", _normal, (1, 1, d), jnp.float32)
        self.positions = self.param("positions", _normal, (1, c.positions, d), jnp.float32)
        self.h = over_layers(Block, c, c.num_hidden_layers, d)
        self.norm = LayerNorm(c.layer_norm_eps)
        self.head = nn.Dense(c.labels, dtype=c.dtype, kernel_init=_normal)

    def __call__(self, images):
        return self.scores(self.hidden(images))

    def hidden(self, images):
        """Final hidden states (B, T, hidden_size), after the last layer norm; position 0 is
        the class token."""
        if images.shape[1:] != self.config.image_shape:
            raise ValueError(
                f"images of {images.shape[1:]}, but image_size and num_channels say "
                f"{self.config.image_shape} (positions are not interpolated)"
            )
        x = rearrange(self.patches(images), "b h w d -> b (h w) d")
        cls = jnp.broadcast_to(self.cls.astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.positions.astype(x.dtype)
        x, _ = self.h(x, None)
        return self.norm(x)

    def scores(self, hidden):
        """Hidden states (B, T, hidden_size) -> scores (B, labels) float32."""
        return self.head(hidden[:, 0]).astype(jnp.float32)


_normal = nn.initializers.normal(0.02)


def example(config: Config):
    """One black image (1, height, width, channels) float32, to trace the module with."""
    return jnp.zeros((1, *config.image_shape), jnp.float32)


# ----------------------------------------------------------------------------- Hugging Face layout

_HF_FIELDS = [
    f.name
    for f in dataclasses.fields(Config)
    if f.name not in ("labels", "dtype", "remat", "unroll")
]
_PIXELS = fields.either(fields.SIZE, fields.each(fields.SIZE, 2, 2))
#: Fields read from a config.json.
FIELDS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_channels"), fields.SIZE),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), fields.SIZE),
    "hidden_act": ACTIVATION,
    "layer_norm_eps": fields.POSITIVE,
    **dict.fromkeys(("image_size", "patch_size"), _PIXELS),
    "qkv_bias": fields.FLAG,
    **dict.fromkeys(("num_labels", "head_dim"), fields.optional(fields.SIZE)),
    "id2label": fields.optional(fields.OBJECT),
}


def config_from_hf(hf: dict, **run) -> Config:
    """Config from the fields of a `config.json`; run: `dtype`, `remat`, `unroll`, and `labels`,
    which by default follow "num_labels" or "id2label".

    Raises ValueError for options that this module does not compute, and as `fields.read` does.
    """
    hf = fields.read(hf, FIELDS)
    arguments = {name: hf[name] for name in _HF_FIELDS if name in hf}
    arguments["labels"] = hf.get("num_labels") or len(hf.get("id2label") or ()) or Config.labels
    config = Config(**arguments | run)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    features = config.hidden_size // config.num_attention_heads
    if hf.get("head_dim") not in (None, features):
        raise ValueError(
            f"head_dim {hf['head_dim']} is not supported for ViT, only hidden_size / "
            f"num_attention_heads, {features}"
        )
    if config.positions < 2:
        raise ValueError(
            f"patch_size {config.patch_size} is larger than image_size {config.image_size}"
        )
    if config.labels < 1:
        raise ValueError(f"labels {config.labels} is less than 1")
    return config


def hf_tensors(config: Config) -> dict[str, Source]:
    """{parameter path: its place in Hugging Face's tensors}. Kernels are stored (out, in), the
    convolution's (out, in, height, width)."""
    names = {
        "cls": Source("vit.embeddings.cls_token"),
        "positions": Source("vit.embeddings.position_embeddings"),
        "patches/kernel": Source(
            "vit.embeddings.patch_embeddings.projection.weight",
            (2, 3, 1, 0),
            window=_pair(config.patch_size),
        ),
        "patches/bias": Source("vit.embeddings.patch_embeddings.projection.bias"),
    }
    layer = "vit.encoder.layer.{}"
    norms = {
        "norm": "vit.layernorm",
        "h/norm_1": f"{layer}.layernorm_before",
        "h/norm_2": f"{layer}.layernorm_after",
    }
    qkv = {
        "h/attn/q": f"{layer}.attention.attention.query",
        "h/attn/k": f"{layer}.attention.attention.key",
        "h/attn/v": f"{layer}.attention.attention.value",
    }
    linears = qkv | {
        "h/attn/o": f"{layer}.attention.output.dense",
        "h/mlp/up": f"{layer}.intermediate.dense",
        "h/mlp/down": f"{layer}.output.dense",
        "head": "classifier",
    }
    for ours, theirs in norms.items():
        names[f"{ours}/scale"] = Source(f"{theirs}.weight")
        names[f"{ours}/bias"] = Source(f"{theirs}.bias")
    for ours, theirs in linears.items():
        names[f"{ours}/kernel"] = Source(f"{theirs}.weight", axes=(1, 0))
        if config.qkv_bias or ours not in qkv:
            names[f"{ours}/bias"] = Source(f"{theirs}.bias")
    return names


def hf_config(config: Config) -> dict:
    """The fields of a `config.json` from which transformers builds the same model."""
    described = {name: getattr(config, name) for name in _HF_FIELDS}
    described["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.labels)}
    described["label2id"] = {f"LABEL_{i}": i for i in range(config.labels)}
    return described | {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
