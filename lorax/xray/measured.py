"""The singular values of every update in a file, one matrix after the other."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from lorax import spectrum
from lorax.devices import cores
from lorax.interop.adapter import Factors, Unread, shape_of
from lorax.interop.formats.contract import Update
from lorax.interop.formats.heads import is_unordered

WORKERS = min(8, cores())  # each holds one matrix


class Measured(NamedTuple):
    """The numbers of one update.

    update: as it is in its file.
    shape: (in, out, r) if it has low-rank factors, (in, out) if it is dense.
    sigma: (k,) float64, the singular values of dW, descending; NaN if a number in it is not finite.
        k = min(r, in, out) with factors, min(in, out) without.
    bad: how many of its stored numbers are NaN or infinite.
    idle: why dW = 0 ("B is 0"), "" if it is not.
    marks: a few numbers of dW and of A, as bytes: equal for equal arrays, so that only updates with
        equal marks must be compared to find duplicates.
    """

    update: Update
    shape: tuple[int, ...]
    sigma: np.ndarray
    bad: int
    idle: str
    marks: tuple[bytes, bytes]

    @property
    def factored(self) -> bool:
        """Whether it has low-rank factors."""
        return len(self.shape) == 3

    @property
    def norm(self) -> float:
        """||dW||_F."""
        return float(np.linalg.norm(self.sigma))

    @property
    def parameters(self) -> int:
        """Numbers in its factors, or in dW."""
        n_in, n_out, *rank = self.shape
        return rank[0] * (n_in + n_out) if rank else n_in * n_out


def unread(measured: Sequence[Measured]) -> Unread:
    """The updates by layer, without those that have numbers that are not finite. A layer whose rows
    are in another order than Hugging Face's has a name that says so, and is no other file's."""
    finite = {_named(one.update): one for one in measured if not one.bad}
    readers = {layer: one.update.read for layer, one in finite.items()}
    return Unread(readers, {layer: one.shape for layer, one in finite.items()})


def _named(update: Update) -> str:
    return f"{update.layer} (rows in another order)" if is_unordered(update) else update.layer


def measure(updates: Sequence[Update]) -> Iterator[Measured]:
    """Read and measure the updates on all cores, in their order. Raises ValueError for a damaged
    file."""
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(measure_one, updates)


def measure_one(update: Update) -> Measured:
    """Read one update and measure it."""
    given = update.read()
    shape = shape_of(given)
    arrays = (given.a, given.b) if isinstance(given, Factors) else (given,)
    marks = _mark(*arrays), _mark(given.a) if isinstance(given, Factors) else b""
    if isinstance(given, Factors):
        sigma = spectrum.factor_sigma(given.a, given.b, given.s)
    else:
        sigma = spectrum.dense_sigma(given)
    if np.isnan(sigma).any():  # which only numbers that are not finite give
        bad = sum(x.size - int(np.count_nonzero(np.isfinite(x))) for x in arrays)
        return Measured(update, shape, sigma, bad, "", marks)
    return Measured(update, shape, sigma, 0, "" if sigma.any() else _idle(given), marks)


def _idle(given: Factors | np.ndarray) -> str:
    """Why an update is 0."""
    if not isinstance(given, Factors):
        return "dW is 0"
    if given.s == 0:
        return "its scale is 0"
    if not given.b.any():
        return "B is 0, as before the first training step"
    return "A is 0" if not given.a.any() else "A B is 0"


def _mark(*arrays: np.ndarray) -> bytes:
    """The shapes and the first and last rows of some matrices."""
    rows = (row.tobytes() for x in arrays for row in (x[0], x[-1]))
    return b"".join((repr([x.shape for x in arrays]).encode(), *rows))
