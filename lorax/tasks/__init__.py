"""Tasks: token arrays to train and evaluate on, and the order in which they are visited.

A task is two sets of rows, built once and kept in memory. The order of the rows is no state of a
loader but a pure function of (seed, step), so that a run resumes anywhere without replay, and a
member of a sweep sees the same batches alone and in company.
"""

import difflib
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from tokenizers import Tokenizer

from lorax.tasks import e2e, restaurants, text
from lorax.tasks.rows import Rows, count


class Task(NamedTuple):
    """Rows for next-token prediction: read `tokens[:, :-1]`, predict `tokens[:, 1:]`, weighted
    by `mask[:, 1:]`.

    train, eval: {"tokens": (N, seq_len + 1) int32, "mask": (N, seq_len + 1) float32}; the mask is
        1 where a token is a target (a completion and its end-of-text token), 0 on prompts, on
        padding (end-of-text tokens) and on column 0.
    note: one line for the terminal: counts, and what was dropped and why.
    """

    name: str
    train: dict[str, np.ndarray]
    eval: dict[str, np.ndarray]
    note: str


# name -> load(config, tokenizer, seq_len) -> (train rows, eval rows, note)
TASKS = {"e2e": e2e.load, "restaurants": restaurants.load, "text": text.load}


def build(
    config: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int, eval_examples: int | None = None
) -> Task:
    """Tokenises the task that `config` names.

    config: `name` (a key of `TASKS`), `path` (None, or the file or folder that the task reads),
        `n_train` (None: all; else the first n train examples), `seed` (int, of the data itself).
    seq_len: tokens that a model reads; a row has one more. Longer examples are dropped.
    eval_examples: evaluation rows to keep, evenly spaced over the set (None: all).

    Raises ValueError, or FileNotFoundError, naming the config field or the file and line at fault.
    """
    name = config["name"]
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"task.name: {name!r} is no task; there is {', '.join(TASKS)} (nearest: {near})"
        )
    for field, value in (("train.seq_len", seq_len), ("eval.examples", eval_examples)):
        if value is not None and value < 1:
            raise ValueError(f"{field}: {value} was given; it must be at least 1")
    train, evaluation, note = TASKS[name](config, tokenizer, seq_len)
    kept = spread(evaluation, eval_examples)
    if len(kept["tokens"]) < len(evaluation["tokens"]):
        note += f"; evaluates on {count(len(kept['tokens']))} of these, evenly spaced"
    return Task(name, train, kept, f"{name}: {note}")


def spread(rows: Rows, n: int | None) -> Rows:
    """At most n rows, evenly spaced from the first on: the same rows whatever the seed."""
    total = len(rows["tokens"])
    if n is None or n >= total:
        return rows
    index = np.arange(n) * total // n
    return {key: value[index] for key, value in rows.items()}


@functools.lru_cache(maxsize=256)
def _batches(n: int, batch_size: int, seed: int) -> grain.MapDataset:
    # `seed()` hashes the seed before `shuffle` adds the epoch to it. `shuffle(seed=seed)` would
    # not, and seed 1 would replay seed 0 one epoch late.
    return grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(batch_size)


@functools.lru_cache(maxsize=8192)
def _order(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    for field, value, least in (
        ("n", n, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("step", step, 0),
    ):
        if value < least:
            raise ValueError(f"order: {field} is {value}; it must be at least {least}")
    indices = np.asarray(_batches(n, batch_size, seed)[step], np.int64)
    indices.flags.writeable = False  # shared by all who ask again
    return indices


def order(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Rows of batch `step`: (batch_size,) int64 in [0, n), read-only.

    A pure function of its arguments. Batches, laid end to end, visit every row once an epoch and
    reshuffle each epoch; a batch may span two epochs, nothing is dropped. Members that share a
    seed share the (cached) answer.
    """
    # operator.index turns NumPy integers into Python's and lets no float through
    return _order(*(operator.index(x) for x in (n, batch_size, seed, step)))


def orders(n: int, batch_size: int, seed: int, steps: Sequence[int]) -> np.ndarray:
    """`order` of several steps: (len(steps), batch_size) int64."""
    rows = [order(n, batch_size, seed, step) for step in steps]
    return np.array(rows, np.int64).reshape(len(rows), batch_size)
