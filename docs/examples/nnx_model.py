"""A Flax NNX model of your own: a small decoder, a study of it, and the merged module again.

    python -m lorax.run --config=docs/examples/nnx_model.py
    python -m lorax.run --config=docs/examples/nnx_model.py \\
        --config.base="docs/examples/nnx_model.py:tiny@1"

`tiny` is all that lorax needs: it returns the module. `merged` gives the module back with an
adapter of the study in its weights. Time: about a minute on two cores.
"""

import jax.numpy as jnp
from flax import nnx

import lorax
from lorax import adapters, models
from lorax.config import default


class Block(nnx.Module):
    """One layer, x (B, T, D) -> (B, T, D)."""

    def __init__(self, width, heads, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)  # off in lorax: see docs/models.md

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.dropout(self.attention(self.norm1(x), mask=mask))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))


class Decoder(nnx.Module):
    """Tokens (B, T) int32 -> logits (B, T, V) float32."""

    def __init__(self, vocab, width, layers, heads, positions, *, rngs):
        self.words = nnx.Embed(vocab, width, rngs=rngs)
        self.places = nnx.Embed(positions, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens):
        x = self.words(tokens) + self.places(jnp.arange(tokens.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.words.attend(self.norm(x))


#: What the words "q", "k", "v" and "o" mean here; "up" and "down" are called so.
TARGETS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def tiny(rngs):
    """Random weights, gpt2-nano's tokenizer. `rngs` is nnx.Rngs(0), or nnx.Rngs(1) for tiny@1."""
    module = Decoder(1024, 32, 2, 4, 256, rngs=rngs)
    return models.Model(module, vocabulary="gpt2-nano", positions=256, targets=TARGETS)


def merged(adapter):
    """A `Decoder` with an adapter, such as "runs/nnx_model/adapters/0", merged into its weights."""
    from lorax.models.nnx import to_nnx

    base = lorax.load(tiny)
    return to_nnx(base, adapters.load(adapter, base).merge().params)


def get_config(arg=None):
    config = default()
    config.base = tiny
    config.method.targets = ("q", "v", "up", "down", "words")
    config.train.batch_size = 8
    config.train.steps = 100
    config.eval.examples = 128
    config.sweep.rank = (1, 4)
    config.sweep.seed = (0, 1)
    return config
