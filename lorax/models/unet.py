"""The conditional U-Net of Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv:2112.10752, section
3.3) as a plain Linen module, and its layout in diffusers (`UNet2DConditionModel`).

Images are (batch, height, width, channels); diffusers' are (batch, channels, height, width). The
modules have diffusers' names, with "_" before a number in a list; below them the project's words:
q, k, v and o of an attention, up, gate and down of a feed-forward layer.

Axes: B batch, T positions of an image, S tokens of the condition.
"""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from lorax import fields, tree
from lorax.interop.hf import Source
from lorax.models.blocks import UnmaskedAttention
from lorax.models.layers import LayerNorm, recomputed, sines_of

#: Blocks on the way down and up: whether they have attention.
DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MIDDLE = {"UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True}
TOKENS = 77  # of the texts that CLIP reads


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters by diffusers' names, and how to run the blocks.

    sample_size: of the images that it was trained on, one number for squares or (height, width); it
    takes any other. block_out_channels: of each level; layers_per_block, attention_head_dim,
    transformer_layers_per_block: of all levels, or of each. attention_head_dim: the number of
    heads, as in diffusers, which named it so by mistake. remat: as for `layers.over_layers`, by
    resnets and transformers.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",))
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    dtype: str = "float32"
    remat: str = "none"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an input."""
        size = self.sample_size or 64
        return (*((size, size) if isinstance(size, int) else size), self.in_channels)

    @property
    def smallest_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the smallest images that have a pixel on the last level."""
        size = 2 ** (len(self.block_out_channels) - 1)
        return size, size, self.in_channels

    @property
    def positions(self) -> int:
        """Positions of the first level."""
        height, width, _ = self.image_shape
        return height * width

    @property
    def condition(self) -> jax.ShapeDtypeStruct:
        """Of one image: the hidden states of a text, of CLIP's length; it takes any other."""
        return jax.ShapeDtypeStruct((TOKENS, self.cross_attention_dim), jnp.float32)

    @property
    def levels(self) -> list["Level"]:
        """From the largest images to the smallest."""
        each = (self.layers_per_block, self.attention_head_dim, self.transformer_layers_per_block)
        n = len(self.block_out_channels)
        each = [(x,) * n if isinstance(x, int) else x for x in each]
        return [Level(*level) for level in zip(self.block_out_channels, *each, strict=True)]


class Level(NamedTuple):
    """Blocks of one resolution. layers: resnets on the way down, one more on the way up. heads,
    depth: of a transformer, if the block has any."""

    channels: int
    layers: int
    heads: int
    depth: int


class Resnet(nn.Module):
    """Two convolutions, and between them the time (B, 4 * first level's channels):
    x (B, height, width, C) -> (B, height, width, channels)."""

    config: Config
    channels: int

    @nn.compact
    def __call__(self, x, time):
        c, norm = self.config, _norm(self.config)
        h = _conv(c, self.channels, name="conv1")(nn.silu(norm(name="norm1")(x)))
        time = _dense(c, self.channels, name="time_emb_proj")(nn.silu(time))
        h = norm(name="norm2")(h + time[:, None, None])
        h = _conv(c, self.channels, name="conv2")(nn.silu(h))
        if x.shape[-1] != self.channels:
            x = _conv(c, self.channels, 1, name="conv_shortcut")(x)
        return x + h


class MLP(nn.Module):
    """Feed-forward: down(up(x) * GELU(gate(x))) (GEGLU: arXiv:2002.05202, equation 6)."""

    config: Config

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(_dense, self.config)
        up, gate = (dense(4 * x.shape[-1], name=name)(x) for name in ("up", "gate"))
        return dense(x.shape[-1], name="down")(up * nn.gelu(gate, approximate=False))


class Block(nn.Module):
    """One layer of a transformer: self-attention, attention to the condition, feed-forward."""

    config: Config
    heads: int

    @nn.compact
    def __call__(self, x, context):
        c = self.config
        attend = functools.partial(UnmaskedAttention, self.heads, False, c.dtype, _uniform)
        x = x + attend(name="attn1")(LayerNorm(name="norm1")(x))
        x = x + attend(name="attn2")(LayerNorm(name="norm2")(x), context)
        return x + MLP(c, name="ff")(LayerNorm(name="norm3")(x))


class Transformer(nn.Module):
    """x (B, height, width, C), context (B, S, cross_attention_dim) -> (B, height, width, C)."""

    config: Config
    level: Level

    @nn.compact
    def __call__(self, x, context):
        c, (_, height, width, channels) = self.config, x.shape
        project = _dense if c.use_linear_projection else functools.partial(_conv, size=1)
        y = project(c, channels, name="proj_in")(_norm(c)(epsilon=1e-6, name="norm")(x))
        y = rearrange(y, "b h w c -> b (h w) c")
        for i in range(self.level.depth):
            y = Block(c, self.level.heads, name=f"transformer_blocks_{i}")(y, context)
        y = rearrange(y, "b (h w) c -> b h w c", h=height, w=width)
        return x + project(c, channels, name="proj_out")(y)


class DownBlock(nn.Module):
    """x -> the outputs of its layers, and that of its downsampler unless it is the last block."""

    config: Config
    level: Level
    attends: bool
    last: bool

    @nn.compact
    def __call__(self, x, time, context):
        c, outputs = self.config, []
        for i in range(self.level.layers):
            x = _layer(c, self.level, self.attends, i)(x, time, context)
            outputs.append(x)
        if not self.last:
            # diffusers' padding of 0 is one pixel below and right of the image.
            pad = (c.downsample_padding,) * 2 if c.downsample_padding else (0, 1)
            down = Sampler(c, (pad, pad), 2, name="downsamplers_0")
            outputs.append(down(x))
        return outputs


class MidBlock(nn.Module):
    """x -> x; between two resnets a transformer, or one resnet alone."""

    config: Config
    level: Level
    attends: bool

    @nn.compact
    def __call__(self, x, time, context):
        c = self.config
        x = _layer(c, self.level, self.attends, 0)(x, time, context)
        return _layer(c, self.level, False, 1)(x, time, context) if self.attends else x


class UpBlock(nn.Module):
    """x -> x: each layer also reads one of `skips`, from the last to the first. size: (height,
    width) of what the block above reads, None in the last block."""

    config: Config
    level: Level
    attends: bool

    @nn.compact
    def __call__(self, x, skips, time, context, size=None):
        c = self.config
        for i, skip in enumerate(reversed(skips)):
            x = jnp.concatenate([x, skip], axis=-1)
            x = _layer(c, self.level, self.attends, i)(x, time, context)
        if size is not None:
            x = Sampler(c, 1, 1, name="upsamplers_0")(_nearest(_nearest(x, 1, size[0]), 2, size[1]))
        return x


class Sampler(nn.Module):
    """The convolution after an image has grown, or with which it shrinks by `stride`."""

    config: Config
    padding: int | tuple
    stride: int

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        return _conv(self.config, x.shape[-1], strides=strides, padding=self.padding, name="conv")(
            x
        )


class UNet(nn.Module):
    """Noisy images x (B, height, width, in_channels) float32, timesteps t (B,) and the hidden
    states of texts (B, S, cross_attention_dim) -> the prediction (B, height, width, out_channels)
    float32, of the noise in Stable Diffusion 1."""

    config: Config

    @nn.compact
    def __call__(self, x, t, encoder_hidden_states):
        c, levels = self.config, self.config.levels
        _check(c, x, encoder_hidden_states)
        context = encoder_hidden_states.astype(c.dtype)
        x = 2 * x - 1 if c.center_input_sample else x
        first = levels[0].channels
        time = sines_of(t, first, c.flip_sin_to_cos, c.freq_shift).astype(c.dtype)
        time = TimeEmbedding(c, 4 * first, name="time_embedding")(time)

        x = _conv(c, first, c.conv_in_kernel, name="conv_in")(x)
        skips = [x]
        for i, (level, kind) in enumerate(zip(levels, c.down_block_types, strict=True)):
            last = level is levels[-1]
            block = DownBlock(c, level, DOWN[kind], last, name=f"down_blocks_{i}")
            skips += block(skips[-1], time, context)
        x = skips[-1]
        if c.mid_block_type is not None:
            attends = MIDDLE[c.mid_block_type]
            x = MidBlock(c, levels[-1], attends, name="mid_block")(x, time, context)
        for i, (level, kind) in enumerate(zip(levels[::-1], c.up_block_types, strict=True)):
            own, skips = skips[-level.layers - 1 :], skips[: -level.layers - 1]
            size = skips[-1].shape[1:3] if skips else None
            block = UpBlock(c, level, UP[kind], name=f"up_blocks_{i}")
            x = block(x, own, time, context, size)

        x = nn.silu(_norm(c)(name="conv_norm_out")(x))
        return _conv(c, c.out_channels, c.conv_out_kernel, name="conv_out")(x).astype(jnp.float32)


class TimeEmbedding(nn.Module):
    """Sines of timesteps (B, C) -> (B, features)."""

    config: Config
    features: int

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(_dense, self.config, self.features)
        return dense(name="linear_2")(nn.silu(dense(name="linear_1")(x)))


def _layer(c: Config, level: Level, attends: bool, i: int):
    """A resnet, and a transformer after it: (x, time, context) -> x."""
    resnet = recomputed(Resnet, c.remat)(c, level.channels, name=f"resnets_{i}")
    if not attends:
        return lambda x, time, context: resnet(x, time)
    transformer = recomputed(Transformer, c.remat)(c, level, name=f"attentions_{i}")
    return lambda x, time, context: transformer(resnet(x, time), context)


def _nearest(x, axis: int, size: int):
    """The nearest of x's values along an axis of another size; the first of two."""
    if size == 2 * x.shape[axis]:  # the usual case, whose gradient is a sum
        return x.repeat(2, axis=axis)
    return jnp.take(x, np.arange(size) * x.shape[axis] // size, axis=axis)


def _check(c: Config, x, context) -> None:
    """Raises ValueError for inputs of other widths than the config's."""
    if x.ndim != 4 or x.shape[-1] != c.in_channels:
        raise ValueError(
            f"x: {x.shape} given, must be (batch, height, width, {c.in_channels}), as in_channels "
            "says"
        )
    if context.ndim != 3 or context.shape[-1] != c.cross_attention_dim:
        raise ValueError(
            f"encoder_hidden_states: {context.shape} given, must be (batch, tokens, "
            f"{c.cross_attention_dim}), as cross_attention_dim says"
        )


#: torch's own, as in diffusers, but for biases, which start at 0 here.
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _dense(c: Config, features: int, **more):
    return nn.Dense(features, dtype=c.dtype, kernel_init=_uniform, **more)


def _conv(c: Config, features: int, size: int = 3, padding=None, **more):
    """A convolution of size x size pixels; by default the image keeps its size."""
    padding = (size - 1) // 2 if padding is None else padding
    kernel = (size, size)
    return nn.Conv(features, kernel, padding=padding, dtype=c.dtype, kernel_init=_uniform, **more)


def _norm(c: Config):
    """GroupNorm (arXiv:1803.08494) with the config's groups; its arguments: name, epsilon."""
    norm = functools.partial(nn.GroupNorm, c.norm_num_groups, epsilon=c.norm_eps, dtype=c.dtype)
    return functools.partial(norm, use_fast_variance=False)


# -------------------------------------------------------------------------------- diffusers' layout

_OURS = [f.name for f in dataclasses.fields(Config) if f.name not in ("dtype", "remat")]


#: Layers are traced one by one, so their number is limited; SDXL has 10 in a transformer.
_LAYERS = fields.whole(1, 128)
_LEVELS = 1, 16
_each = lambda kind: fields.either(kind, fields.each(kind, *_LEVELS))
#: Fields read from a config.json.
FIELDS = {
    "sample_size": fields.optional(fields.either(fields.SIZE, fields.each(fields.SIZE, 2, 2))),
    **dict.fromkeys(("in_channels", "out_channels", "cross_attention_dim"), fields.SIZE),
    **dict.fromkeys(("center_input_sample", "flip_sin_to_cos"), fields.FLAG),
    "use_linear_projection": fields.FLAG,
    "freq_shift": fields.whole(0, 1),
    "down_block_types": fields.each(fields.one_of(DOWN), *_LEVELS),
    "mid_block_type": fields.optional(fields.one_of(MIDDLE)),
    "up_block_types": fields.each(fields.one_of(UP), *_LEVELS),
    "block_out_channels": fields.each(fields.SIZE, *_LEVELS),
    **dict.fromkeys(("layers_per_block", "transformer_layers_per_block"), _each(_LAYERS)),
    "attention_head_dim": _each(fields.SIZE),
    "downsample_padding": fields.whole(0, 1),
    "norm_num_groups": fields.SIZE,
    "norm_eps": fields.POSITIVE,
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), fields.only(1, 3, 5, 7)),
    "act_fn": fields.only("silu", "swish"),
    "dropout": fields.only(0),
    "resnet_time_scale_shift": fields.only("default"),
    "time_embedding_type": fields.only("positional"),
    "attention_type": fields.only("default"),
    **dict.fromkeys(("mid_block_scale_factor", "resnet_out_scale_factor"), fields.only(1)),
    "upcast_attention": fields.FLAG,  # the softmax is always in float32
    "addition_embed_type_num_heads": fields.SIZE,  # of an option that is off
}


def config_from_hf(hf: dict, **run) -> Config:
    """Config from the fields of a `config.json`; run: `dtype`, `remat`.

    Raises ValueError that names the field for options that this module does not compute, unknown
    ones included unless they are null or false, and as `fields.read` does.
    """
    given = fields.read(hf, FIELDS)
    fields.refuse_others(hf, FIELDS)
    config = Config(**{name: given[name] for name in _OURS if name in given} | run)
    n = len(config.block_out_channels)
    lists = ("down_block_types", "up_block_types", "layers_per_block", "attention_head_dim")
    for name in (*lists, "transformer_layers_per_block"):
        value = getattr(config, name)
        if isinstance(value, tuple) and len(value) != n:
            raise ValueError(f"{name}: {len(value)} values given, and block_out_channels has {n}")
    for level in config.levels:
        divisors = {"norm_num_groups": config.norm_num_groups, "attention_head_dim": level.heads}
        for name, parts in divisors.items():
            if level.channels % parts:
                raise ValueError(
                    f"block_out_channels: {level.channels} is not a multiple of {name} {parts}"
                )
    if config.block_out_channels[0] % 2 or config.block_out_channels[0] // 2 <= config.freq_shift:
        raise ValueError(
            f"block_out_channels: {config.block_out_channels[0]} given first, must be even, and "
            f"half of it above freq_shift {config.freq_shift}"
        )
    return config


def hf_config(config: Config) -> dict:
    """The fields of a `config.json` from which diffusers builds the same model."""
    return {name: getattr(config, name) for name in _OURS} | {"_class_name": "UNet2DConditionModel"}


#: diffusers' modules, of those that have other names here.
_THEIRS = {**{x: f"to_{x}" for x in "qkv"}, "o": "to_out.0", "down": "net.2"}
_THEIRS |= dict.fromkeys(("up", "gate"), "net.0.proj")
_LISTS = re.compile(r"(blocks|resnets|attentions|samplers)_(\d+)")


@functools.lru_cache(maxsize=8)
def hf_tensors(config: Config) -> dict[str, Source]:
    """{parameter path: its place in diffusers' tensors}. Kernels are stored (out, in), those of
    convolutions (out, in, height, width); a feed-forward layer's up and gate are one tensor."""
    shapes = lambda *inputs: UNet(config).init(jax.random.key(0), *inputs)["params"]
    size = jax.ShapeDtypeStruct
    x, context = (
        size((1, *shape), jnp.float32)
        for shape in (config.smallest_shape, (1, config.cross_attention_dim))
    )
    flat = tree.flatten(jax.eval_shape(shapes, x, size((1,), jnp.int32), context))
    return {path: _source(path, leaf.shape) for path, leaf in flat.items()}


def _source(path: str, shape: tuple[int, ...]) -> Source:
    *modules, layer, last = _LISTS.sub(r"\1.\2", path).split("/")
    name = ".".join((*modules, _THEIRS.get(layer, layer), "bias" if last == "bias" else "weight"))
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(len(shape))
    window = tuple(shape[:2]) if len(shape) == 4 else None
    part = {"up": slice(0, shape[-1]), "gate": slice(shape[-1], 2 * shape[-1])}.get(layer)
    return Source(name, axes, part, window=window)
