"""Models with random weights that the benchmarks train and run."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import intercept, quant, tree
from lorax.models import Base, decoder, gpt2


class Shape(NamedTuple):
    """A GPT-2 and the batch of one member: `batch` sequences of `seq` tokens."""

    config: gpt2.Config
    batch: int
    seq: int
    steps: int  # in one timed call


def _gpt2(d, layers, heads, vocab):
    return gpt2.Config(vocab_size=vocab, n_positions=128, n_embd=d, n_layer=layers, n_head=heads)


SHAPES = {
    "d64": Shape(_gpt2(64, 2, 4, 1024), 2, 128, 10),
    "nano": Shape(_gpt2(128, 4, 4, 1024), 16, 128, 10),
    "small": Shape(_gpt2(768, 12, 12, 50257), 1, 128, 2),
}
STEP = Shape(dataclasses.replace(SHAPES["small"].config, n_positions=256), 4, 256, 3)
RANK = 8


def random(shape: Shape, param_dtype: str = "float32") -> Base:
    """A GPT-2 of this shape."""
    config = shape.config
    module = gpt2.GPT2(config)
    example = np.zeros((1, 1), np.int32)
    params = jax.jit(module.init)(jax.random.key(0), example)["params"]
    params = jax.tree.map(lambda x: x.astype(param_dtype), params)
    return Base(module, params, config, None, intercept.sites(module, params, example), "gpt2", "")


def drawn(config: decoder.Config, four_bits: bool) -> Base:
    """A LLaMA in bfloat16, its linear kernels in NF4 with `four_bits`. Each array is drawn on the
    device in its final dtype, so that a model is never larger than itself; kernels are placed as
    `lorax.quant.placed` does."""
    module, example = decoder.Decoder(config), np.zeros((1, 1), np.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    sites = intercept.sites(module, shapes, example)
    stored = shapes
    if four_bits:
        stored = jax.eval_shape(lambda params: quant.quantize(params, sites=sites), shapes)
    params, keys = {}, jax.random.split(jax.random.key(0), len(tree.flatten(stored)))
    for key, (path, leaf) in zip(keys, tree.flatten(stored).items(), strict=True):
        draw = lambda x, key=key, norm=path not in sites: _draw(key, x.shape, x.dtype, norm)
        params[path] = jax.tree.map(draw, leaf)
    params = tree.unflatten(params)
    if four_bits:
        params = quant.placed(params, jax.local_devices()[0], jnp.bfloat16)
    return Base(module, params, config, None, sites, "llama", "")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key, shape, dtype, norm: bool):
    """Codes: any; scales of codes: such that weights are about as large as a model's; norms: 1."""
    if dtype == jnp.uint8:
        return jax.random.bits(key, shape, jnp.uint8)
    if dtype == jnp.float32:
        return jax.random.uniform(key, shape, jnp.float32, 0.02, 0.06)
    if norm:
        return jnp.ones(shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)
