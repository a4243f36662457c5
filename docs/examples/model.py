"""A model of your own: a small decoder in plain Linen, its reader of weights, and a study of it.

    python -m lorax.run --config=docs/examples/model.py
    python -m lorax.run --config=docs/examples/model.py \\
        --config.base="docs/examples/model.py:tiny@1"

Claim: four lines that return a module are enough for a sweep of rank x seed over it in one compiled
group. `tiny` starts from random weights; `nano` is the same module with the weights of gpt2-nano,
read from its file, and learns what gpt2-nano does. Time: about a minute on two cores.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from safetensors.numpy import load_file

import lorax
from lorax import models
from lorax.config import default


class Block(nn.Module):
    """One layer, x (B, T, D) -> (x, None); the names of its layers are our own."""

    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x, _):
        width, length = x.shape[-1], x.shape[1]
        dense = lambda name, features: nn.Dense(features, dtype=self.dtype, name=name)
        y = nn.LayerNorm(1e-5, dtype=self.dtype, name="norm1")(x)
        split = lambda z: z.reshape(*z.shape[:2], self.heads, -1)
        q, k, v = (split(dense(name, width)(y)) for name in ("query", "key", "value"))
        mask = nn.make_causal_mask(jnp.zeros((1, length)))
        y = nn.dot_product_attention(q, k, v, mask=mask, dtype=self.dtype)
        x = x + dense("merge", width)(y.reshape(x.shape))
        y = nn.LayerNorm(1e-5, dtype=self.dtype, name="norm2")(x)
        y = dense("contract", width)(nn.gelu(dense("expand", 4 * width)(y)))
        return x + y, None


class Decoder(nn.Module):
    """Tokens (B, T) int32 -> logits (B, T, V) float32."""

    vocab: int
    width: int
    layers: int
    heads: int
    positions: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens):
        words = nn.Embed(self.vocab, self.width, dtype=self.dtype, name="words")
        places = nn.Embed(self.positions, self.width, dtype=self.dtype, name="places")
        x = words(tokens) + places(jnp.arange(tokens.shape[1]))[None]
        scan = nn.scan(
            Block, {"params": 0}, split_rngs={"params": True}, length=self.layers
        )  # one stack of parameters, compiled once
        x, _ = scan(self.heads, self.dtype, name="blocks")(x, None)
        x = nn.LayerNorm(1e-5, dtype=self.dtype, name="norm")(x)
        return words.attend(x).astype(jnp.float32)


#: What the study's words "q", "v", "up"... mean here; `targets=("query",)` works without it.
TARGETS = {"q": "query", "k": "key", "v": "value", "o": "merge", "up": "expand", "down": "contract"}


def tiny(dtype="float32"):
    """Random weights, gpt2-nano's tokenizer."""
    module = Decoder(1024, 32, 2, 4, 256, dtype)
    return models.Model(module, vocabulary="gpt2-nano", positions=256, targets=TARGETS)


def nano(dtype="float32"):
    """gpt2-nano's weights under our own names."""
    module = Decoder(1024, 128, 4, 4, 256, dtype)
    return models.Model(module, None, "gpt2-nano", read_nano, positions=256, targets=TARGETS)


def read_nano():
    """{path: array} of gpt2-nano's file; a stack of our parameters is one tensor a layer there."""
    file = pathlib.Path(lorax.__file__).parent / "assets" / "gpt2-nano" / "model.safetensors"
    stored = load_file(file)
    both = lambda ours, theirs, last="scale": {
        f"{ours}/{last}": stored[f"transformer.{theirs}.weight"],
        f"{ours}/bias": stored[f"transformer.{theirs}.bias"],
    }
    params = both("norm", "ln_f")
    params["words/embedding"] = stored["transformer.wte.weight"]
    params["places/embedding"] = stored["transformer.wpe.weight"]
    layers = []
    for i in range(4):
        qkv = both("qkv", f"h.{i}.attn.c_attn", "kernel")
        layer = both("norm1", f"h.{i}.ln_1") | both("norm2", f"h.{i}.ln_2")
        for name, theirs in (("merge", "attn.c_proj"), ("expand", "mlp.c_fc")):
            layer |= both(name, f"h.{i}.{theirs}", "kernel")
        layer |= both("contract", f"h.{i}.mlp.c_proj", "kernel")
        for last in ("kernel", "bias"):  # one tensor for all three there
            parts = np.split(qkv[f"qkv/{last}"], 3, axis=-1)
            names = ("query", "key", "value")
            layer |= {f"{name}/{last}": x for name, x in zip(names, parts, strict=True)}
        layers.append(layer)
    return params | {f"blocks/{name}": np.stack([x[name] for x in layers]) for name in layers[0]}


def get_config(arg=None):
    config = default()
    config.base = nano
    config.method.targets = ("q", "v")
    config.train.batch_size = 8
    config.train.steps = 100
    config.eval.examples = 128
    config.sweep.rank = (1, 4)
    config.sweep.seed = (0, 1)
    return config
