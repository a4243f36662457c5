"""Random permutations as torch draws them, without torch."""

import numpy as np

#: A permutation of so many numbers or more is drawn by torch in another way.
TOO_MANY = (2**32 - 1) // 20


def first(size: int, n: int, seed: int) -> np.ndarray:
    """(n,) int64: the first n numbers of `torch.randperm(size, generator=g)` with the CPU's
    generator g = `torch.Generator().manual_seed(seed)`, size < `TOO_MANY`, 0 <= seed < 2^32.

    A Fisher-Yates shuffle by the Mersenne Twister, of which only n swaps are made.
    """
    drawn = np.random.RandomState(seed).randint(0, 2**32, n, dtype=np.uint32).astype(np.int64)
    places = np.arange(n)
    numbers: dict[int, int] = {}  # place -> number there, where another one was at first
    order = []
    for i, j in enumerate((places + drawn % (size - places)).tolist()):
        order.append(numbers.get(j, j))
        numbers[j] = numbers.get(i, i)
    return np.array(order)


def entries(n_in: int, n_out: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns), (n,) int64 each, of n entries of a matrix (in, out): as PEFT's FourierFT
    draws them, by `first` from the entries of the transposed matrix in rows."""
    columns, rows = np.divmod(first(n_in * n_out, n, seed), n_in)
    return rows, columns
