"""Paired statistics: which settings differ, by how much, and how sure that is.

Settings are trained with the same seeds and measured on the same test rows, so they are compared
within a seed and within a row. Shapes: S settings, K seeds, N rows, R rates. Losses: lower is
better; give the negative of a score. docs/statistics.md states every rule in words.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95  # of intervals
ALPHA = 0.05  # how often a decision may err
SHARE = 0.01  # of the improvement over the base: what "as good as the best" may lose
SEEDS = 3  # with fewer, nothing is decided


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float  # NaN if there is no interval
    high: float
    over: str  # what would vary if the study were repeated: "seeds and rows", "seeds", "rows" or ""
    p: float = np.nan  # two-sided, of the hypothesis that the true value is 0


class Bootstrap(NamedTuple):
    """Draws of the settings' losses, from `bootstrap`.

    losses: (S,), the estimates: means over seeds and (by weight) over rows; NaN if a seed of the
    setting has no loss. seeds, rows: (D, S), draws in which only the seeds or only the rows vary;
    both: (D, S), draws in which both do. K, N: how many of them there are. chosen: (S,) int, which
    rate each setting has (zeros if there was nothing to choose).
    """

    losses: np.ndarray
    seeds: np.ndarray
    rows: np.ndarray
    both: np.ndarray
    K: int
    N: int
    chosen: np.ndarray

    def interval(self, of: Callable[[np.ndarray], np.ndarray], level: float = LEVEL) -> Interval:
        """The interval of any function of the settings' losses: (..., S) -> (...).

        For example `lambda loss: loss[..., 0] - loss[..., 1]`, a difference.
        """
        raise NotImplementedError


class NonInferiority(NamedTuple):
    """Which settings are as good as the best, from `noninferior`. All arrays are (S,)."""

    decision: str  # "decided" or "undecided"
    choice: int | None  # the cheapest setting that is shown to be as good as the best
    best: int | None  # the lowest loss
    good: np.ndarray  # bool: shown to be as good as the best
    worse: np.ndarray  # bool: shown to be worse than that
    bound: np.ndarray  # how much more than the margin it may lose to the best, at most; good if < 0
    share: np.ndarray  # the largest share of the best's improvement that it may lack
    p: np.ndarray  # of the hypothesis that it loses more than the margin
    why: str  # "" or why nothing was decided


def interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Mean of values (n,), one a seed, with Student's t interval: mean +- t s / sqrt(n), with
    n - 1 degrees of freedom. No interval (NaN) for one value. Raises ValueError for none, and for
    values that are not finite."""
    values = np.asarray(values, float)
    n = len(values)
    if not n or not np.isfinite(values).all():
        raise ValueError(f"values {values}: at least one is needed, and all must be finite")
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, np.nan, np.nan, "")
    error = values.std(ddof=1) / np.sqrt(n)
    half = stats.t.ppf((1 + level) / 2, n - 1) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return Interval(mean, mean - half, mean + half, "seeds", p)


def paired(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Interval:
    """a - b, paired by seed: `interval` of the differences. a, b: (K,), the same seeds in the same
    order. Raises ValueError if the shapes differ."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"a {a.shape} and b {b.shape}: need one value a seed, of the same seeds")
    return interval(a - b, level)


def holm(p: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values, (m,): rejecting those below alpha errs at most at alpha over the
    whole family, whatever the dependence (Holm 1979, Scandinavian Journal of Statistics 6, 65).
    NaN (no test) stays NaN and doesn't count."""
    p = np.asarray(p, float)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def bootstrap(
    sums: ArrayLike,
    weights: ArrayLike,
    validation: ArrayLike | None = None,
    *,
    draws: int = 4000,
    seed: int = 0,
) -> Bootstrap:
    """Hierarchical bootstrap over seeds and rows, the same seeds and rows for all settings.

    Args:
      sums: each row's summed loss, (S, K, N); with `validation`, (S, R, K, N). NaN in a seed
        (diverged, stopped) makes the setting, or that rate of it, not eligible. The base without
        adapters may be one of the settings: its rows broadcast over the seeds.
      weights: each row's tokens, (N,). A setting's loss is sum(sums) / sum(weights). N = 1: rows
        are not known, only seeds vary.
      validation: losses (S, R, K) on other rows, by which each setting's rate is chosen anew in
        every draw.

    Raises ValueError for shapes that don't fit.
    """
    raise NotImplementedError


def noninferior(
    sums: ArrayLike,
    weights: ArrayLike,
    costs: ArrayLike,
    start: ArrayLike | None = None,
    validation: ArrayLike | None = None,
    *,
    share: float = SHARE,
    margin: float | None = None,
    alpha: float = ALPHA,
    seed: int = 0,
) -> NonInferiority:
    """The cheapest setting that is as good as the best within a margin.

    Args:
      sums, weights, validation: as for `bootstrap`.
      costs: (S,), e.g. trainable parameters.
      start: each row's summed loss before training, (N,) or (K, N). Needed for `share`.
      share: the margin as a share of the best's improvement over the base.
      margin: the margin in the unit of the loss, in place of `share`.
      alpha: the probability that the choice is not as good as the best, at most.

    With fewer than three seeds nothing is decided.
    """
    raise NotImplementedError


def power(
    seed_sd: float,
    row_se: float,
    margin: float,
    seeds: int,
    rows: int = 0,
    alpha: float = ALPHA,
) -> float:
    """The probability that a setting which is exactly as good as the best is found to be so.

    Args:
      seed_sd: standard deviation of the paired difference over seeds.
      row_se: its standard error from the rows (0: not known).
      margin: how much worse still counts as good.
      seeds, rows: how many.
    """
    raise NotImplementedError


def needed_seeds(
    seed_sd: float,
    row_se: float,
    margin: float,
    rows: int = 0,
    alpha: float = ALPHA,
    target: float = 0.8,
) -> int | None:
    """The fewest seeds (3 to 1000) with which `power` reaches `target`. None if none does: the rows
    are too few."""
    raise NotImplementedError
