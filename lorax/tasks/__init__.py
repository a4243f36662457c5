"""Tasks: token arrays to train and evaluate on, and the order in which they are visited.

A task is two sets of rows, built once and kept in memory. The order of the rows is no state of a
loader but a pure function of (seed, step), so that a run resumes anywhere without replay, and a
member of a sweep sees the same batches alone and in company.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lorax.errors import nearest
from lorax.tasks import e2e, glue, instruct, restaurants, samsum, text, wikisql
from lorax.tasks.rows import Prompt, Rows, Task, count
from lorax.vocabulary import Vocabulary

__all__ = ["TASKS", "Prompt", "Task", "build", "order", "orders", "spread"]

# name -> load(config, vocabulary, seq_len) -> Task, with all its evaluation rows
TASKS = {
    "restaurants": restaurants.load,
    "e2e": e2e.load,
    "wikisql": wikisql.load,
    "samsum": samsum.load,
    "instruct": instruct.load,
    "text": text.load,
    "glue": glue.load,
}
# settings that only some tasks have a use for
ONLY = {
    "packing": ("restaurants", "e2e", "wikisql", "samsum", "instruct"),
    "template": ("instruct",),
    "subset": ("glue",),
}


def build(
    config: Mapping[str, Any],
    vocabulary: Vocabulary,
    seq_len: int,
    eval_examples: int | None = None,
) -> Task:
    """Tokenises the task that `config` names.

    config: `name` (a key of `TASKS`), and where there is something to say: `path` (the file or
        folder that the task reads), `n_train` (None: all; else the first n train examples),
        `seed` (int, of the data itself), `packing` (True: several train examples a row),
        `template` (of instruct: a chat template), `subset` (of glue).
    seq_len: tokens that a model reads at most; a row of a language model has one more. Longer
        examples are dropped, or cut for a classifier. Columns that no row needs are left out.
    eval_examples: evaluation rows to keep, evenly spaced over the set (None: all). The prompts
        stay as they are.

    Raises ValueError, or FileNotFoundError, naming the config field or the file and line at fault.
    """
    name = config["name"]
    if name not in TASKS:
        hint = nearest(str(name), TASKS)
        raise ValueError(f"task.name: {name!r} is no task; there is {', '.join(TASKS)}{hint}")
    for field, value in (("train.seq_len", seq_len), ("eval.examples", eval_examples)):
        if value is not None and value < 1:
            raise ValueError(f"{field}: {value} was given; it must be at least 1")
    for field, names in ONLY.items():
        if config.get(field) and name not in names:
            raise ValueError(
                f"task.{field}: {config.get(field)!r} was given; task {name!r} has no use for it, "
                f"only {', '.join(names)}"
            )
    task = TASKS[name](config, vocabulary, seq_len)
    kept, note = spread(trim(task.eval), eval_examples), task.note
    if len(kept["tokens"]) < len(task.eval["tokens"]):
        note += f"; evaluates on {count(len(kept['tokens']))} of these, evenly spaced"
    return task._replace(train=trim(task.train), eval=kept, note=f"{name}: {note}")


def outputs(config: Mapping[str, Any]) -> int:
    """Outputs of the classifier that the task needs, 0 where it needs a language model."""
    return glue.outputs(config["subset"]) if config["name"] == "glue" else 0


def spread(rows: Rows, n: int | None) -> Rows:
    """At most n rows, evenly spaced from the first on: the same rows whatever the seed."""
    total = len(rows["tokens"])
    if n is None or n >= total:
        return rows
    index = np.arange(n) * total // n
    return {key: value[index] for key, value in rows.items()}


def trim(rows: Rows) -> Rows:
    """Rows without the columns at their end that count in none of them: padding, which a model
    would read for nothing. A model then reads a multiple of 8 tokens, or as many as before."""
    counts = (rows["segments"] if "segments" in rows else rows["mask"]) > 0
    ahead = int("mask" in rows)  # a language model does not read the last column
    last = int(np.flatnonzero(counts.any(axis=0)).max(initial=0))
    width = -(-(last + 1 - ahead) // 8) * 8 + ahead
    return {name: x[:, :width] if x.ndim == 2 else x for name, x in rows.items()}


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
