"""Attention of GPT-2 small's shape in blocks, against all queries and keys at once."""

import functools

import jax
import jax.numpy as jnp

from lorax.bench import timing
from lorax.models import masks
from lorax.models.layers import causal_attention

HEADS, FEATURES = 12, 64
SIZES = ((16, 128), (8, 256), (4, 512), (2, 1024), (1, 2048))  # 2,048 tokens each


def bench_attention(shapes: list[str], rounds: int) -> list[timing.Row]:
    """Forward and backward pass of the causal attention of one layer: in blocks, which
    `masks.SHORT` chooses for long sequences, against at once, in milliseconds and in bytes beside
    the arguments and results."""
    rows = []
    for batch, tokens in SIZES:
        qkv = [
            jax.random.normal(jax.random.key(i), (batch, tokens, HEADS, FEATURES)) for i in range(3)
        ]
        at = jnp.arange(tokens)[None]
        places = masks.Places(at, jnp.ones_like(at), at)
        mask = masks.Mask(places, places, jnp.int32(masks.LAST), span=masks.LAST)
        sides = {"in blocks": mask, "at once": masks.dense(mask)}
        programs = {name: _program(mask).lower(*qkv).compile() for name, mask in sides.items()}
        runs = {name: functools.partial(run, *qkv) for name, run in programs.items()}
        seconds = timing.measure({name: timing.timed(run) for name, run in runs.items()}, rounds)
        label = f"attention in blocks, {batch} x {tokens}"
        rows.append(timing.row(label, seconds["in blocks"], seconds["at once"], "at once"))
        ours, theirs = (p.memory_analysis().temp_size_in_bytes / 1e6 for p in programs.values())
        ratio = theirs / ours
        rows.append(rows[-1]._replace(
            name=f"{label}, memory", value=ours, unit="MB", baseline=theirs, ratio=ratio,
            low=ratio, high=ratio,
        ))  # fmt: skip
    return rows


def _program(mask):
    def loss(q, k, v):
        return jnp.sum(causal_attention(q, k, v, mask, FEATURES**-0.5))

    return jax.jit(jax.grad(loss, (0, 1, 2)))
