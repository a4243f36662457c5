"""How far updates can be shrunk: the error that is made by keeping fewer directions.

The leading directions of dW are the best approximation of their number (Eckart & Young 1936). The
error is ||dW - dW_k||_F / ||dW||_F of all matrices together.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

ERRORS = (0.01, 0.05, 0.1, 0.2, 0.5)


class Kept(NamedTuple):
    """A smaller adapter.

    words: how it is chosen. ranks: {layer: its directions}. error: relative, of all together.
    parameters: numbers in its factors, ranks times (in + out).
    """

    words: str
    ranks: dict[str, int]
    error: float
    parameters: int


def kept(sigmas: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, int]]) -> list[Kept]:
    """The smaller adapters to choose from: one rank for all matrices, halved until 1, and for each
    of `ERRORS` as few directions of all matrices as make at most this error. [] if nothing changes.

    sigmas: {layer: singular values, descending}.
    """
    if not any(sigma.any() for sigma in sigmas.values()):
        return []
    choices = []
    rank = max(len(sigma) for sigma in sigmas.values())
    while rank > 1:
        rank = 1 << ((rank - 1).bit_length() - 1)  # the next smaller power of two
        ranks = {layer: min(rank, len(sigma)) for layer, sigma in sigmas.items()}
        choices.append(_kept(f"rank {rank}", ranks, sigmas, shapes))
    for error in ERRORS:
        ranks = within(sigmas, error)
        choices.append(_kept(f"error {error:g}", ranks, sigmas, shapes))
    return choices


def within(sigmas: Mapping[str, np.ndarray], error: float) -> dict[str, int]:
    """{layer: how many directions} of the fewest directions, the largest of all matrices, whose
    relative error is at most `error`, from 0 to 1."""
    squares = np.sort(np.concatenate(list(sigmas.values())))[::-1] ** 2
    left = np.append(np.cumsum(squares[::-1])[::-1], 0.0)  # after the first 0, 1, 2...
    return largest(sigmas, int(np.argmax(left <= error**2 * left[0] * (1 + 1e-12))))


def largest(sigmas: Mapping[str, np.ndarray], n: int) -> dict[str, int]:
    """{layer: how many of its singular values are among the n largest of all}: for n directions
    the smallest error of all layers together."""
    every = np.concatenate(list(sigmas.values()))
    layer = np.repeat(np.arange(len(sigmas)), [len(sigma) for sigma in sigmas.values()])
    chosen = layer[np.argsort(-every, kind="stable")[:n]]
    return dict(zip(sigmas, np.bincount(chosen, minlength=len(sigmas)).tolist(), strict=True))


def error_of(sigmas: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> float:
    """The relative error of all matrices together with so many directions of each; 0 if nothing
    changes."""
    whole = sum(float(np.sum(sigma**2)) for sigma in sigmas.values())
    left = sum(float(np.sum(sigma[ranks[layer] :] ** 2)) for layer, sigma in sigmas.items())
    return float(np.sqrt(left / whole)) if whole else 0.0


def _kept(words, ranks, sigmas, shapes) -> Kept:
    parameters = sum(rank * sum(shapes[layer]) for layer, rank in ranks.items())
    return Kept(words, ranks, error_of(sigmas, ranks), parameters)
