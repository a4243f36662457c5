"""A batch whose rows use different adapters."""

import time
from collections.abc import Callable

import jax
import numpy as np

from lorax import decode, leaves, methods, tree
from lorax.bench import bases, peft_models, timing


def bench_mixed(shapes: list[str], rounds: int) -> list[timing.Row]:
    """Forward pass of a batch whose 8 rows use 8 adapters (r = 8 on q, k, v, o, up, down) against
    PEFT's mixed batch: reading a prompt, then one more token with a cache."""
    if not peft_models.found():
        raise SystemExit("bench mixed compares with PEFT: pip install torch peft transformers")
    rows = []
    for name, shape in (("nano", bases.SHAPES["nano"]), ("small", bases.SHAPES["small"])):
        for reads, tokens in (("prompts of 32 tokens", 32), ("the next token", 1)):
            sides = {"lorax": reading(shape, tokens), "peft": peft_models.mixed(shape, tokens)}
            seconds = timing.measure(sides, rounds)
            label = f"8 rows with 8 adapters, {name}, {reads}"
            rows.append(timing.row(label, seconds["lorax"], seconds["peft"], "PEFT, mixed batch"))
    return rows


def reading(shape: bases.Shape, tokens: int, adapters: int = 8) -> Callable[[], float]:
    """Seconds of one pass over (8, tokens), row i with adapter i, after a cache of 32 tokens."""
    base, rng = bases.random(shape), np.random.default_rng(0)
    flat, n = tree.flatten(base.params), adapters
    for path, site in methods.resolve(("attention", "mlp"), base.sites).items():
        (layers,), n_in, n_out = site.matrix_shape(flat[path].shape)
        draw = lambda *shape: jax.numpy.asarray(0.02 * rng.standard_normal(shape), "float32")
        a, b = draw(layers, n, n_in, bases.RANK), draw(layers, n, bases.RANK, n_out)
        s, rows = (
            np.ones((layers, n), np.float32),
            np.tile(np.arange(n, dtype=np.int32), (layers, 1)),
        )
        flat[path] = leaves.Mixed(flat[path], a, b, jax.numpy.asarray(s), jax.numpy.asarray(rows))
    params = tree.unflatten(flat)
    ids = rng.integers(0, shape.config.vocab_size, (n, 64)).astype(np.int32)
    read = jax.jit(lambda params, ids, cache: decode.read(base.module, params, ids, None, cache))
    cache = base.module.empty_cache(n, 64)
    if tokens == 1:
        _, cache = read(params, ids[:, :32], cache)
    part = ids[:, -tokens:]

    def run(times=4) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            jax.block_until_ready(read(params, part, cache)[0])
        return (time.perf_counter() - begin) / times

    return run
