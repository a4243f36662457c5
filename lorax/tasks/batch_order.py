"""The order in which rows are visited: a pure function of (seed, step), without loader state.

A run therefore resumes anywhere without replay, and a member of a sweep sees the same batches
whether it trains alone or with others.
"""

import functools
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
) -> np.ndarray:
    """`order` of several steps: (len(steps), batch_size) int64.

    lengths: (n,) of the rows, to batch rows of similar length, like `group_by_length` of
    transformers: the epoch's shuffled rows are cut into stretches of 50 batches (fewer if the rows
    make less than four stretches), each sorted by length, longest first, and the longest row of all
    is swapped with the very first, so that running out of memory shows at once. A batch that spans
    two epochs has the shortest rows of the first and the longest of the second.
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
    ordered = np.concatenate([part[np.argsort(-length[part], kind="stable")] for part in parts])
    longest = int(np.argmax(length[ordered]))
    ordered[[0, longest]] = ordered[[longest, 0]]
    ordered.flags.writeable = False
    return ordered
