"""The batches that members train on at each step and are evaluated on."""

from typing import NamedTuple

import jax
import numpy as np

from lorax import tasks
from lorax.config import seed_of
from lorax.tasks import kinds
from lorax.train.stacks import Stack


def axes(train, k: int) -> tuple[int, int, int]:
    """(K, A, B), the axes of one member's batches of k steps: steps, parts of a step, rows."""
    return k, train.accumulate, train.batch_size // train.accumulate


def train_batches(
    stacked: Stack, task: tasks.Task, first: int, k: int, needed: tuple[slice, ...] | None = None
) -> dict:
    """The batches of steps first .. first + k - 1: leaves (M, K, A, B, ...), on the host.

    A member's rows, and what is drawn for them (`Kind.drawn`), depend only on the seed of its order
    and the step. Rows that are grouped by length are cut to the smallest of `tasks.widths` that
    holds the longest of them. Rows of zeros fill up a short batch (`train.last_batch`). needed: the
    part of (M, K, A, B) that is read; the rest is left zeros, which take no memory. None: all of
    it.
    """
    c, lengths, rows = stacked.config.train, task.lengths, []
    for member in stacked.members:
        n = tasks.train_size(member.config.task, task)
        steps, known = range(first, first + k), None if lengths is None else lengths[:n]
        seed = seed_of(member.config, "order")
        order = tasks.orders(n, c.batch_size, seed, steps, known, c.last_batch)
        rows.append(order.reshape(axes(c, k)))
    rows, width = np.stack(rows), tasks.widths(task)[-1]
    if lengths is not None:
        width = min(w for w in tasks.widths(task) if w >= lengths[rows[rows >= 0]].max())
    read = kinds.narrowed(task.kind, task.train, width)
    batches = {name: _taken(x, rows, needed) for name, x in read.items()}
    if task.kind.drawn:
        _draw(batches, stacked, task.kind, first)
    for x in batches.values():
        x[rows < 0] = 0
    return batches


def _draw(batches: dict, stacked: Stack, kind: kinds.Kind, first: int) -> None:
    """Write what is drawn at steps `first` and after into batches, leaves (M, K, A, B, ...)."""
    for m, member in enumerate(stacked.members):
        seed = seed_of(member.config, "order")
        for k in range(len(batches["weight"][m])):
            at = {name: x[m, k] for name, x in batches.items()}
            drawn = kind.drawn(at, np.random.default_rng((seed, first + k)))
            for name, x in drawn.items():
                batches[name][m, k] = x


def _taken(x: np.ndarray, rows: np.ndarray, needed: tuple[slice, ...] | None) -> np.ndarray:
    """x[rows] where it is needed."""
    if needed is None:
        return x[rows]
    taken = np.zeros((*rows.shape, *x.shape[1:]), x.dtype)
    taken[needed] = x[rows[needed]]
    return taken


def batch_shapes(train, task: tasks.Task, k: int) -> dict:
    """Shapes of one member's batches of k steps at their widest: leaves (K, A, B, ...)."""
    lead = axes(train, k)
    return {
        name: jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype) for name, x in task.train.items()
    }


class Evaluated(NamedTuple):
    """The rows of a split. batches: leaves (N, B, ...). n: how many of the N hold rows, the others
    being filled up with zeros. rows: their number."""

    batches: dict
    n: int
    rows: int


def eval_batches(task: tasks.Task, batch_size: int) -> dict:
    """The validation rows as leaves (N, B, ...); the last batch is filled up with rows of weight
    0."""
    return splits(task._replace(test=None), batch_size)["eval"].batches


def splits(task: tasks.Task, batch_size: int) -> dict[str, Evaluated]:
    """The validation rows, "eval", and the test rows, "test", if there are any, as batches of one
    shape, so that one program evaluates both."""
    counts = {split: tasks.size(rows) for split, rows in task.evaluated.items()}
    most = max(counts.values())
    size = min(batch_size, most)
    room = most + -most % size

    def batched(x):
        filled = np.pad(x, ((0, room - len(x)), *((0, 0),) * (x.ndim - 1)))
        return filled.reshape(-1, size, *x.shape[1:])

    return {
        split: Evaluated({name: batched(x) for name, x in rows.items()}, -(-n // size), n)
        for (split, rows), n in zip(task.evaluated.items(), counts.values(), strict=True)
    }
