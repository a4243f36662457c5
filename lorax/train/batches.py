"""The batches that members train on at each step and are evaluated on."""

import jax
import numpy as np

from lorax import tasks
from lorax.config import seed_of
from lorax.tasks import kinds
from lorax.train.stacks import Stack


def axes(train, k: int) -> tuple[int, int, int]:
    """(K, A, B), the axes of one member's batches of k steps: steps, parts of a step, rows."""
    return k, train.accumulate, train.batch_size // train.accumulate


def train_batches(stacked: Stack, task: tasks.Task, first: int, k: int) -> dict:
    """The batches of steps first .. first + k - 1: leaves (M, K, A, B, ...), on the host.

    A member's rows depend only on the seed of its order and the step. Rows that are grouped by
    length are cut to the smallest of `tasks.widths` that holds the longest of them.
    """
    c, lengths, rows = stacked.config.train, task.lengths, []
    for member in stacked.members:
        n = tasks.train_size(member.config.task, task)
        steps, known = range(first, first + k), None if lengths is None else lengths[:n]
        order = tasks.orders(n, c.batch_size, seed_of(member.config, "order"), steps, known)
        rows.append(order.reshape(axes(c, k)))
    rows, width = np.stack(rows), tasks.widths(task)[-1]
    if lengths is not None:
        width = min(w for w in tasks.widths(task) if w >= lengths[rows].max())
    return {name: x[rows] for name, x in kinds.narrowed(task.kind, task.train, width).items()}


def batch_shapes(train, task: tasks.Task, k: int) -> dict:
    """Shapes of one member's batches of k steps at their widest: leaves (K, A, B, ...)."""
    lead = axes(train, k)
    return {
        name: jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype) for name, x in task.train.items()
    }


def eval_batches(task: tasks.Task, batch_size: int) -> dict:
    """The evaluation rows as leaves (N, B, ...); the last batch is filled up with rows of weight
    0."""
    rows = tasks.size(task.eval)
    size = min(batch_size, rows)
    fill = lambda x: np.pad(x, ((0, -rows % size), *((0, 0),) * (x.ndim - 1)))
    return {name: fill(x).reshape(-1, size, *x.shape[1:]) for name, x in task.eval.items()}
