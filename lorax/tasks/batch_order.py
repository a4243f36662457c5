"""The order in which rows are visited: a pure function of (seed, step), without loader state.

A run therefore resumes anywhere without replay, and a member of a sweep sees the same batches
whether it trains alone or with others.
"""

import functools
import math
import operator
from collections.abc import Sequence

import grain
import numpy as np

STRETCH = 50  # number of batches within which rows are sorted by length


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
    indices.flags.writeable = False  # the cached array is shared by all callers
    return indices


def order(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Rows of batch `step`: (batch_size,) int64 in [0, n), read-only.

    A pure function of its arguments. Consecutive batches visit every row once per epoch, reshuffled
    in each epoch; a batch may span two epochs, nothing is dropped. Members with the same seed share
    the (cached) result.
    """
    # operator.index turns NumPy integers into Python's and lets no float through
    return _order(*(operator.index(x) for x in (n, batch_size, seed, step)))


def orders(
    n: int,
    batch_size: int,
    seed: int,
    steps: Sequence[int],
    lengths: np.ndarray | None = None,
    last: str = "full",
) -> np.ndarray:
    """`order` of several steps: (len(steps), batch_size) int64.

    last: `train.last_batch`. With "short" the last batch of an epoch has -1 for the rows that it
    lacks, with "drop" it is left out; then every epoch begins with a batch.
    lengths: (n,) of the rows, to batch rows of similar length, like `group_by_length` of
    transformers: the epoch's shuffled rows are cut into stretches of 50 batches (fewer if the rows
    make less than four stretches), each sorted by length, longest first, and the longest row of all
    is swapped with the very first, so that running out of memory shows at once. A batch that spans
    two epochs has the shortest rows of the first and the longest of the second.

    A batch of all n rows has them as they are stored: their order changes nothing, and shuffling a
    few rows is slow (60 ms an epoch of 64 rows or fewer).
    """
    if batch_size == n and lengths is None:
        return np.tile(np.arange(n), (len(steps), 1))
    if lengths is None and last == "full":
        rows = [order(n, batch_size, seed, step) for step in steps]
        return np.array(rows, np.int64).reshape(len(rows), batch_size)
    epochs, at = _positions(n, batch_size, np.array(steps, np.int64), last)
    known = None if lengths is None else np.asarray(lengths, np.int64).tobytes()
    rows = np.full(at.shape, -1, np.int64)
    for epoch in np.unique(epochs):
        here = (epochs == epoch) & (at < n)
        ordered = _epoch(n, batch_size, seed, known, int(epoch))
        rows[here] = ordered[at[here]]
    return rows


def _positions(n: int, batch_size: int, steps: np.ndarray, last: str) -> tuple:
    """(epoch, place in its order) of every row of some steps: two arrays (len(steps), batch_size)
    int64. A place beyond n - 1 is that of a row that a short batch lacks."""
    inside = np.arange(batch_size)
    if last == "full":
        return np.divmod(steps[:, None] * batch_size + inside, n)
    epochs, steps = np.divmod(steps[:, None], batches_of_epoch(n, batch_size, last))
    return np.broadcast_to(epochs, (len(steps), batch_size)), steps * batch_size + inside


def batches_of_epoch(n: int, batch_size: int, last: str) -> int:
    """Batches of an epoch whose last one is "short" or dropped ("drop"). Raises ValueError where
    none is left."""
    count = n // batch_size if last == "drop" else math.ceil(n / batch_size)
    if not count:
        raise ValueError(
            f"train.last_batch: 'drop' given, but {n:,} training rows don't fill a batch of "
            f"{batch_size:,}"
        )
    return count


def steps_of(epochs: float, n: int, batch_size: int, last: str) -> int:
    """The steps of so many passes over n rows, rounded up. last: `train.last_batch`."""
    each = n / batch_size if last == "full" else batches_of_epoch(n, batch_size, last)
    return max(1, math.ceil(round(epochs * each, 6)))  # 1.1 times 10 is above 11


@functools.lru_cache(maxsize=64)
def _epoch(n: int, batch_size: int, seed: int, lengths: bytes | None, epoch: int) -> np.ndarray:
    """An epoch's rows in the order of `orders`: (n,) int64."""
    rows = order(n, n, seed, epoch)
    if lengths is None:
        return rows
    length = np.frombuffer(lengths, np.int64)
    size = batch_size * max(1, min(STRETCH, n // (4 * batch_size)))
    parts = (rows[start : start + size] for start in range(0, n, size))
    ordered = np.concatenate([part[np.argsort(-length[part], kind="stable")] for part in parts])
    longest = int(np.argmax(length[ordered]))
    ordered[[0, longest]] = ordered[[longest, 0]]
    ordered.flags.writeable = False
    return ordered
