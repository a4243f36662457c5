"""Tasks: arrays to train and evaluate on, and the order in which their rows are visited.

A text task has rows of tokens and is made with a base's vocabulary; an array task has rows of
pixels or other numbers that fit a base. `columns` tells their rows apart.

A task is two sets of rows, built once and kept in memory. The order of the rows is no state of a
loader but a pure function of (seed, step), so that a run resumes anywhere without replay, and a
member of a sweep sees the same batches alone and in company.
"""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lorax import config as configs
from lorax.errors import nearest
from lorax.models import Base
from lorax.tasks import e2e, glue, instruct, planted, restaurants, samsum, text, vision, wikisql
from lorax.tasks.rows import Prompt, Rows, Task, check_n_train, count
from lorax.vocabulary import Vocabulary

__all__ = ["ARRAYS", "TASKS", "Prompt", "Task", "build", "check_base", "columns", "lengths"]
__all__ += ["order", "orders", "outputs", "prompts", "size", "spread", "train_examples"]
__all__ += ["train_size", "widths"]

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
# name -> load(config, base) -> Task, with all its evaluation rows
ARRAYS = {
    "mnist": vision.mnist,
    "digits": vision.digits,
    "planted": planted.load,
}
STRETCH = 50  # batches in which rows are sorted by length
QUARTERS = 4  # widths of batches of rows that are grouped by length
# settings that only some tasks have a use for
ONLY = {
    "packing": ("restaurants", "e2e", "wikisql", "samsum", "instruct"),
    "group_by_length": ("restaurants", "e2e", "wikisql", "samsum", "instruct", "glue"),
    "template": ("instruct",),
    "subset": ("glue",),
    "shuffle": ("mnist", "digits"),
    **dict.fromkeys(("rank", "spectrum", "strength", "noise", "inputs", "examples"), ("planted",)),
}
_DEFAULTS = configs.default().task


def build(
    config: Mapping[str, Any],
    vocabulary: Vocabulary | None,
    seq_len: int,
    eval_examples: int | None = None,
    base: Base | None = None,
) -> Task:
    """Makes the rows of the task that `config` names.

    config: `name` (a key of `TASKS` or `ARRAYS`), and where there is something to say: `path` (the
        file or folder that the task reads), `n_train` (None: all; else the first n train examples,
        not counting those that are dropped), `seed` (int, of the data itself), `packing` (True:
        several train examples a row), `template` (of instruct: a chat template), `subset` (of
        glue), `group_by_length` (True: the task has `lengths`; not with packing, whose rows are all
        full), `shuffle` (of images: True puts their pixels in a random order).
    vocabulary: of a text task, for which it is needed.
    seq_len: tokens that a model reads at most; a row of a language model has one more. Longer
        examples are dropped, or cut for a classifier. Columns that no row needs are left out.
        Without meaning for an array task.
    eval_examples: evaluation rows to keep, evenly spaced over the set (None: all). The prompts
        stay as they are.
    base: what an array task's rows must fit; a text task needs none.

    Raises ValueError, or FileNotFoundError, naming the config field or the file and line at fault.
    """
    name = _known(config)
    at_least_one = {"train.seq_len": seq_len, "eval.examples": eval_examples}
    at_least_one["task.n_train"] = config.get("n_train")
    for field, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"{field}: {value} was given; it must be at least 1")
    for field, names in ONLY.items():
        if config.get(field) not in (None, _DEFAULTS[field]) and name not in names:
            raise ValueError(
                f"task.{field}: {config.get(field)!r} was given; task {name!r} has no use for it, "
                f"only {', '.join(names)}"
            )
    if config.get("group_by_length") and config.get("packing"):
        raise ValueError(
            "task.group_by_length: True was given with task.packing, whose rows are all full; it "
            "must be False there"
        )
    if name in ARRAYS:
        task = ARRAYS[name](config, base)
    else:
        task = TASKS[name](config, vocabulary, seq_len)
        task = task._replace(train=trim(task.train), eval=trim(task.eval))
    kept, note = spread(task.eval, eval_examples), task.note
    if size(kept) < size(task.eval):
        note += f"; evaluates on {count(size(kept))} of these, evenly spaced"
    task = task._replace(eval=kept, note=f"{name}: {note}")
    if config.get("group_by_length"):
        task = task._replace(lengths=lengths(task.train))
        share = task.lengths.mean() / task.train["tokens"].shape[1]
        task = task._replace(note=f"{task.note}; rows are {share:.0%} full, grouped by length")
    return task


def outputs(config: Mapping[str, Any]) -> int:
    """Outputs of the head that an encoder is given for the task; 0 where a base is taken as it is:
    for a task that needs a language model, and for array tasks."""
    return glue.outputs(config["subset"]) if config["name"] == "glue" else 0


def check_base(config: Mapping[str, Any], base: Base, seq_len: int) -> None:
    """Raises ValueError where a base is not of the kind that the task `config` names needs."""
    name, what = _known(config), f"base: {base.name} ({base.family})"
    if name in ARRAYS and base.input_shape is None:
        raise ValueError(
            f"{what} reads tokens, and task {name!r} has arrays: it needs a base like "
            "random:mnist-fc, random:mnist-lenet or random:mlp-64-32-10"
        )
    if name in ARRAYS:
        return
    if base.input_shape is not None:
        raise ValueError(f"{what} reads images, and task {name!r} has texts: it needs another base")
    if not outputs(config) and not base.causal:
        raise ValueError(f"{what} is no causal model: {name}")
    most = base.positions or seq_len
    if seq_len > most:
        raise ValueError(f"train.seq_len: {seq_len} given, {base.name} has {most} positions")


def _known(config: Mapping[str, Any]) -> str:
    """The name of the task. Raises ValueError for one that there is not."""
    name, names = config["name"], [*TASKS, *ARRAYS]
    if name not in names:
        hint = nearest(str(name), names)
        raise ValueError(f"task.name: {name!r} is no task; there is {', '.join(names)}{hint}")
    return name


def size(rows: Rows) -> int:
    """How many rows there are."""
    return len(next(iter(rows.values())))


def columns(rows: Rows) -> int | None:
    """Columns of rows, or of batches, of tokens: all that has any has as many, and can be cut to
    fewer. None for those of an array task, which have none."""
    return rows["tokens"].shape[-1] if "tokens" in rows else None


def spread(rows: Rows, n: int | None) -> Rows:
    """At most n rows, evenly spaced from the first on: the same rows whatever the seed."""
    index = _spaced(size(rows), n)
    return {key: value[index] for key, value in rows.items()}


def prompts(task: Task, n: int) -> tuple[Prompt, ...]:
    """At most n of a task's prompts, evenly spaced as `spread` spaces rows: E2E's are sorted by
    restaurant, and the first 64 of its 630 are about 5 of its 18."""
    return tuple(task.prompts[i] for i in _spaced(len(task.prompts), n))


def _spaced(total: int, n: int | None) -> np.ndarray:
    n = total if n is None else min(n, total)
    return np.arange(n) * total // max(n, 1)


def train_size(settings: Mapping[str, Any], task: Task) -> int:
    """How many train rows, from the first on, a member with `settings` as its config.task visits.

    A task may hold more: the members of a sweep over n_train share it. Rows that are packed hold
    the examples that n_train counts already. Raises ValueError where the task has fewer.
    """
    total = size(task.train)
    return total if settings["packing"] else check_n_train(settings["n_train"], total)


def train_examples(settings: Mapping[str, Any], task: Task) -> int:
    """How many examples are in the rows of `train_size`: as many, but for rows that are packed."""
    if "segments" in task.train and settings["packing"]:
        return int(task.train["segments"].max(axis=1).sum())
    return train_size(settings, task)


def trim(rows: Rows) -> Rows:
    """Rows without the columns at their end that count in none of them: padding, which a model
    would read for nothing. A model then reads a multiple of 8 tokens, or as many as before."""
    ahead = int("mask" in rows)  # a language model does not read the last column
    width = _eights(lengths(rows).max() - ahead) + ahead
    return {name: x[:, :width] if x.ndim == 2 else x for name, x in rows.items()}


def lengths(rows: Rows) -> np.ndarray:
    """Columns of each row up to its last that counts, at least one: (N,) int64."""
    counts = (rows["segments"] if "segments" in rows else rows["mask"]) > 0
    last = counts.shape[1] - np.argmax(counts[:, ::-1], axis=1)
    return np.where(counts.any(axis=1), last, 1)


def widths(task: Task) -> tuple[int | None, ...]:
    """Columns that a batch of train rows may be cut to, ascending: all of them, and where rows are
    grouped by length about three, two and one quarter, as far as any row is so short. A program is
    compiled for each. (None,) for an array task."""
    whole, ahead = columns(task.train), int("mask" in task.train)
    if task.lengths is None:
        return (whole,)
    quarters = {_eights((whole - ahead) * i / QUARTERS) + ahead for i in range(1, QUARTERS)}
    shortest = task.lengths.min()
    return (*sorted(width for width in quarters if shortest <= width < whole), whole)


def _eights(n: float) -> int:
    return 8 * math.ceil(n / 8)


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


def orders(
    n: int,
    batch_size: int,
    seed: int,
    steps: Sequence[int],
    lengths: np.ndarray | None = None,
) -> np.ndarray:
    """`order` of several steps: (len(steps), batch_size) int64.

    lengths: (n,) of the rows, to have rows of like length in one batch, as the `group_by_length`
    of transformers has: the epoch's shuffled rows are cut into stretches of 50 batches (fewer where
    the rows are less than four stretches), each sorted by length, the longest first, and the
    longest row of all changes places with the very first, so that what does not fit shows at once.
    A batch of two epochs has the first one's shortest and the second one's longest.
    """
    if lengths is None:
        rows = [order(n, batch_size, seed, step) for step in steps]
        return np.array(rows, np.int64).reshape(len(rows), batch_size)
    at = np.array(steps, np.int64)[:, None] * batch_size + np.arange(batch_size)
    key = n, batch_size, seed, np.asarray(lengths, np.int64).tobytes()
    rows = np.empty(at.shape, np.int64)
    for epoch in np.unique(at // n):
        here = at // n == epoch
        rows[here] = _grouped(*key, int(epoch))[at[here] % n]
    return rows


@functools.lru_cache(maxsize=64)
def _grouped(n: int, batch_size: int, seed: int, lengths: bytes, epoch: int) -> np.ndarray:
    """An epoch's rows in the order of `orders`: (n,) int64."""
    rows, length = order(n, n, seed, epoch), np.frombuffer(lengths, np.int64)
    size = batch_size * max(1, min(STRETCH, n // (4 * batch_size)))
    parts = (rows[start : start + size] for start in range(0, n, size))
    found = np.concatenate([part[np.argsort(-length[part], kind="stable")] for part in parts])
    longest = int(np.argmax(length[found]))
    found[[0, longest]] = found[[longest, 0]]
    found.flags.writeable = False
    return found
