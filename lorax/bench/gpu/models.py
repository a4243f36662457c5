"""Training steps, a mixed batch and generation, by lorax."""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from lorax import decode
from lorax.bench import bases, mixed, timing, training
from lorax.bench.gpu.rows import repeated, row
from lorax.bench.gpu.sizes import Sizes
from lorax.models import Base, decoder, gpt2

LORAX = "lorax"
NF4, BF16 = "nf4", "bf16"
RANK_4BIT = 64  # QLoRA (arXiv:2305.14314), section 4
DTYPES = ("float32", "bfloat16")
ADAPTERS = 8  # of a mixed batch, and rows of one that generates


def sweep(sizes: Sizes, members: int) -> Iterator[dict]:
    """Training time per member and step of LoRA members together, and of one alone."""
    shape, case = sizes.gpt2, sweep_case(sizes, members)
    for path, n in ((f"{members} together", members), ("one by one", 1)):
        seconds = repeated(training.gpt2_stepping(shape, n, "bfloat16"), sizes.seconds)
        yield _step_row(case, path, seconds, shape.config, shape[1:3])


def sweep_case(sizes: Sizes, members: int) -> str:
    return f"sweep of {members}, {gpt2_name(sizes)}, bfloat16, per member and step"


def step(sizes: Sizes, dtype: str) -> Iterator[dict]:
    """A LoRA step of a GPT-2."""
    run, shape = training.gpt2_stepping(sizes.gpt2, 1, dtype), sizes.gpt2
    seconds = repeated(run, sizes.seconds)
    made = _step_row(step_case(sizes, dtype), LORAX, seconds, shape.config, shape[1:3])
    yield made | {"dtype": dtype}


def step_case(sizes: Sizes, dtype: str) -> str:
    return f"LoRA step, {gpt2_name(sizes)}, {dtype}"


def gpt2_name(sizes: Sizes) -> str:
    config, batch, seq, _ = sizes.gpt2
    return f"GPT-2 of d {config.n_embd}, {config.n_layer} layers, {batch} x {seq}"


def llama_step(sizes: Sizes, path: str) -> Iterator[dict]:
    """A step of LoRA on every linear layer of a LLaMA in bfloat16, or in NF4: QLoRA."""
    base = llama(sizes, path == NF4)
    method = {"rank": RANK_4BIT, "targets": ("all-linear",)}
    run = training.stepping(base, sizes.batch, 1, "bfloat16", **method)
    seconds = repeated(run, sizes.seconds)
    yield _step_row(llama_case(sizes), f"{LORAX}, {path}", seconds, sizes.llama, sizes.batch[:2])


def llama_case(sizes: Sizes) -> str:
    c, (batch, seq, _) = sizes.llama, sizes.batch
    name = f"LLaMA of d {c.hidden_size}, {c.num_hidden_layers} layers"
    return f"LoRA step, r {RANK_4BIT} on all layers, {name}, {batch} x {seq}"


@functools.lru_cache(1)  # of a size of which a device may not hold two
def llama(sizes: Sizes, four_bits: bool) -> Base:
    return bases.drawn(sizes.llama, four_bits)


def _step_row(case: str, path: str, seconds, config, rows: tuple[int, int]) -> dict:
    """FLOPs are those of the model's products: forward, and backward for activations; what remat
    repeats, attention and adapters don't count."""
    tokens = rows[0] * rows[1]
    per_second = {"tokens_per_second": float(tokens / np.median(seconds))}
    return row(case, path, seconds, [(0, 4 * weights(config) * tokens)], **per_second)


def weights(c: gpt2.Config | decoder.Config) -> int:
    """Numbers in the matrices that multiply each token: layers and head."""
    if isinstance(c, gpt2.Config):
        return 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
    layer = 4 * c.hidden_size + 3 * c.intermediate_size
    return (c.num_hidden_layers * layer + c.vocab_size) * c.hidden_size


def mixed_batch(sizes: Sizes, tokens: int) -> Iterator[dict]:
    """A forward pass whose rows use different adapters."""
    run = mixed.reading(sizes.gpt2, tokens, ADAPTERS)
    yield row(mixed_case(sizes, tokens), LORAX, repeated(run, sizes.seconds))


def mixed_case(sizes: Sizes, tokens: int) -> str:
    reads = "the next token" if tokens == 1 else f"prompts of {tokens} tokens"
    return f"{ADAPTERS} rows with {ADAPTERS} adapters, d {sizes.gpt2.config.n_embd}, {reads}"


def generation(sizes: Sizes) -> Iterator[dict]:
    """Greedy texts of a GPT-2, per token of all rows."""
    base = bases.random(sizes.gpt2, "bfloat16")
    yield _generation_row(generation_case(sizes), LORAX, sizes, base, ADAPTERS)


def generation_case(sizes: Sizes) -> str:
    name = f"d {sizes.gpt2.config.n_embd}, {sizes.prompt} + {sizes.new} tokens"
    return f"generation, {ADAPTERS} rows, {name}, per position"


def llama_generation(sizes: Sizes) -> Iterator[dict]:
    """Greedy text of a LLaMA in NF4."""
    base = llama(sizes, True)
    yield _generation_row(llama_generation_case(sizes), f"{LORAX}, {NF4}", sizes, base, 1)


def llama_generation_case(sizes: Sizes) -> str:
    name = f"LLaMA of d {sizes.llama.hidden_size}, {sizes.prompt} + {sizes.new} tokens"
    return f"generation, 1 row, {name}, per position"


def _generation_row(case: str, path: str, sizes: Sizes, base: Base, rows: int) -> dict:
    vocabulary = base.config.vocab_size
    tokens = jax.random.randint(jax.random.key(0), (rows, sizes.prompt), 0, vocabulary)
    segments, key = np.ones(tokens.shape, np.int32), jax.random.key(1)
    options = decode.DecodingOptions(max_new_tokens=sizes.new)
    run = lambda: decode.generate(base.module, base.params, tokens, segments, key, options)
    seconds = repeated(timing.once(run), sizes.seconds) / sizes.new
    return row(case, path, seconds, tokens_per_second=float(rows / np.median(seconds)))
