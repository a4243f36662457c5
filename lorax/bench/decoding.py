"""Texts: of the members of a sweep, and of one model against transformers."""

import functools
import time
from collections.abc import Callable

import jax
import numpy as np

from lorax import decode, methods
from lorax.bench import bases, peft_models, timing
from lorax.models import Base, gpt2

MEMBERS, PROMPTS, TOKENS, PROMPT = 8, 64, 32, 16


def bench_texts(shapes: list[str], rounds: int) -> list[timing.Row]:
    """CPU time of the texts of 8 LoRA members (r = 8 on q and v): 64 prompts of 16 tokens, 32 new
    ones, greedily and with 4 beams, in batches of 32 prompts, all members in a batch against one
    after another."""
    rows = []
    for name in shapes:
        base = bases.random(bases.SHAPES[name])
        bound = [_member(base, seed) for seed in range(MEMBERS)]
        for beams in (1, 4):
            sides = {
                "together": functools.partial(_written, base, [decode.Several.of(bound)], beams),
                "alone": functools.partial(_written, base, bound, beams),
            }
            seconds = timing.measure(sides, rounds)
            label = f"texts of {MEMBERS} members, {name}, {_searched(beams)}"
            rows.append(timing.row(label, seconds["together"], seconds["alone"], "one by one"))
    return rows


def bench_generate(shapes: list[str], rounds: int) -> list[timing.Row]:
    """CPU time of a token, of 32 after a prompt of 16, greedily and with 4 beams, against
    transformers in float32."""
    if not peft_models.found():
        raise SystemExit(
            "bench generate compares with transformers: pip install torch transformers"
        )
    rows = []
    for name in shapes:
        base = bases.random(bases.SHAPES[name])
        model = _of_transformers(base)
        for beams in (1, 4):
            sides = {
                "lorax": lambda base=base, beams=beams: _token(lambda: _ours(base, beams)),
                "theirs": lambda model=model, beams=beams: _token(lambda: _theirs(model, beams)),
            }
            seconds = timing.measure(sides, rounds)
            label = f"a token, {name}, {_searched(beams)}"
            rows.append(timing.row(label, seconds["lorax"], seconds["theirs"], "transformers"))
    return rows


def _searched(beams: int) -> str:
    return "greedy" if beams == 1 else f"{beams} beams"


def _member(base: Base, seed: int) -> dict:
    """A LoRA member's parameters, its b drawn as well."""
    method = methods.method("lora", rank=bases.RANK)
    state = method.init(jax.random.key(seed), base.params, base.sites)
    rng = np.random.default_rng(seed)
    draw = lambda x: 0.02 * rng.standard_normal(x.shape).astype(np.float32)
    learned = jax.tree.map(draw, state.trainable)
    return method.bind(learned, state.constants, base.params, sites=base.sites)


def _options(beams: int) -> decode.DecodingOptions:
    return decode.DecodingOptions(max_new_tokens=TOKENS, num_beams=beams)


def _ids(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, (rows, PROMPT)).astype(np.int32)


def _written(base: Base, members: list, beams: int, batch: int = 32) -> float:
    """CPU seconds of the texts of members, one after another."""
    ids, key, begin = _ids(PROMPTS), jax.random.key(0), time.process_time()
    for params in members:
        for start in range(0, PROMPTS, batch):
            tokens = ids[start : start + batch]
            given = tokens, np.ones_like(tokens), key, _options(beams)
            jax.block_until_ready(decode.generate(base.module, params, *given))
    return time.process_time() - begin


def _ours(base: Base, beams: int):
    tokens = _ids(1)
    given = tokens, np.ones_like(tokens), jax.random.key(0), _options(beams)
    jax.block_until_ready(decode.generate(base.module, base.params, *given))


def _of_transformers(base: Base):
    """The same GPT-2 with other random weights, in torch."""
    import transformers

    transformers.logging.set_verbosity_error()
    hf = gpt2.hf_config(base.config) | {"bos_token_id": 0, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf)).eval()


def _theirs(model, beams: int):
    import torch

    tokens = torch.tensor(_ids(1)).long()
    with torch.no_grad():
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=TOKENS,
            num_beams=beams, do_sample=False, pad_token_id=0,
        )  # fmt: skip


def _token(write: Callable) -> float:
    """CPU seconds of each of the tokens that write() writes."""
    begin = time.process_time()
    write()
    return (time.process_time() - begin) / TOKENS
