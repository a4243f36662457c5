"""Which rows of a task are used, for evaluation, as prompts or by a member, and their widths."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax.tasks import kinds
from lorax.tasks.rows import Prompt, Rows, Task, check_n_train, count

QUARTERS = 4  # number of widths of batches that are grouped by length


def size(rows: Rows) -> int:
    """How many rows there are."""
    return len(next(iter(rows.values())))


def spread(rows: Rows, n: int | None) -> Rows:
    """At most n rows, evenly spaced from the first on: the same rows whatever the seed."""
    index = _spaced(size(rows), n)
    return {key: value[index] for key, value in rows.items()}


def check_memorised(task: Task, n: int | None) -> None:
    """Raises ValueError for n train rows of a task whose train rows are all measured."""
    if task.memorised and n is not None:
        raise ValueError(
            f"task.n_train: {n} was given; task {task.name} is measured on all the rows that it "
            "trains on: leave it out, and set their number with task.examples"
        )


def drawn(task: Task, n: int, seed: int) -> Task:
    """The task with n of its train rows, drawn without replacement by `seeds.data`. With a larger n
    the same rows come first. Raises ValueError unless n is less than the number of rows, and for a
    task that trains all."""
    total = size(task.train)
    check_memorised(task, n)
    if check_n_train(n, total) == total:
        raise ValueError(
            f"seeds.data: {seed} given, but task.n_train takes all {count(total)} training rows; "
            "give fewer to draw from them"
        )
    index = np.random.default_rng(seed).permutation(total)[:n]
    train = {name: x[index] for name, x in task.train.items()}
    note = f"{task.note}; {count(n)} train rows drawn with seed {seed}"
    return task._replace(train=train, note=note)


def prompts(task: Task, n: int) -> tuple[Prompt, ...]:
    """At most n of a task's prompts, evenly spaced as `spread` spaces rows: E2E's are sorted by
    restaurant, and the first 64 of its 630 are about 5 of its 18."""
    return tuple(task.prompts[i] for i in _spaced(len(task.prompts), n))


def _spaced(total: int, n: int | None) -> np.ndarray:
    n = total if n is None else min(n, total)
    return np.arange(n) * total // max(n, 1)


def train_size(settings: Mapping[str, Any], task: Task) -> int:
    """How many train rows, from the first on, a member with `settings` as its config.task visits.

    A task may hold more, as members of a sweep over n_train share it. Packed rows already hold only
    the examples that n_train counts. Raises ValueError if the task has fewer, or trains all.
    """
    total = size(task.train)
    check_memorised(task, settings["n_train"])
    return total if settings["packing"] else check_n_train(settings["n_train"], total)


def train_examples(settings: Mapping[str, Any], task: Task) -> int:
    """How many examples are in the rows of `train_size`: as many as rows, unless they are
    packed."""
    if "segments" in task.train and settings["packing"]:
        return int(task.train["segments"].max(axis=1).sum())
    return train_size(settings, task)


def widths(task: Task) -> tuple[int | None, ...]:
    """The numbers of columns that batches of train rows may be cut to, ascending: all columns, and,
    if rows are grouped by length, about three, two and one quarter of them, as far as there are
    rows so short. A program is compiled for each. (None,) for an array task."""
    kind, whole = task.kind, kinds.columns(task.kind, task.train)
    if task.lengths is None:
        return (whole,)
    cut = lambda part: kinds.eights((whole - kind.ahead) * part / QUARTERS) + kind.ahead
    quarters = {cut(part) for part in range(1, QUARTERS)}
    shortest = task.lengths.min()
    return (*sorted(width for width in quarters if shortest <= width < whole), whole)
