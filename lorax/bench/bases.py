"""GPT-2s with random weights that the benchmarks train and run."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from lorax import intercept
from lorax.models import Base, gpt2


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
