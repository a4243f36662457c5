"""Intervals of losses and of their differences, over seeds and rows, by the package's model."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # scipy.stats takes a second to import

LEVEL = 0.95  # of intervals
SEEDS = 3  # with fewer, nothing is decided
DRAWS = 4000


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float  # NaN if there is no interval
    high: float
    over: str  # what would vary if the study were repeated: "seeds and rows", "seeds", "rows" or ""
    p: float = np.nan  # two-sided, of the hypothesis that the true value is 0


# ---------------------------------------------------------------------------------- over seeds only


def interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Mean of values (n,), one a seed, with Student's t interval: mean +- t s / sqrt(n), with
    n - 1 degrees of freedom. No interval (NaN) for one value. Raises ValueError for none, and for
    values that are not finite."""
    values = np.asarray(values, float)
    n = values.size
    if values.ndim != 1 or not n or not np.isfinite(values).all():
        raise ValueError(f"values {values}: must be (n,), at least one, all finite")
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, np.nan, np.nan, "")
    error = float(values.std(ddof=1) / np.sqrt(n))
    half = float(half_width(error, n, level))
    p = float(2 * special.stdtr(n - 1, -abs(mean) / error)) if error > 0 else float(mean == 0)
    return Interval(mean, mean - half, mean + half, "seeds", p)


def half_width(error: ArrayLike, n: ArrayLike, level: float = LEVEL) -> np.ndarray:
    """Half the width of Student's t interval of a mean of n values with this standard error."""
    return special.stdtrit(np.maximum(np.subtract(n, 1), 1), (1 + level) / 2) * error


def paired(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Interval:
    """a - b, paired by seed: `interval` of the differences. a, b: (K,), the same seeds in the same
    order. Raises ValueError if the shapes differ."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"a {a.shape} and b {b.shape}: need one value a seed, of the same seeds")
    return interval(a - b, level)


def holm(p: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values, (m,): to reject those up to alpha errs at most at alpha over the
    whole family, whatever the dependence (Holm 1979, Scandinavian Journal of Statistics 6, 65).
    NaN (no test) stays NaN and doesn't count."""
    p = np.asarray(p, float)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


# ------------------------------------------------------------------------------ over seeds and rows


def tail(x: ArrayLike, share: ArrayLike, seeds: int, rows: int) -> np.ndarray:
    """P(T > x) of an estimate over its standard error, if `share` of its variance is from the seeds
    and the others from the rows: share P(t_{seeds-1} > x) + (1 - share) P(t_{rows-1} > x)."""
    of = lambda n: special.stdtr(max(n - 1, 1), -np.asarray(x, float))
    return share * of(seeds) + (1 - np.asarray(share, float)) * of(rows)


def quantile(alpha: float, share: ArrayLike, seeds: int, rows: int) -> np.ndarray:
    """The x with `tail` = alpha, for alpha < 0.5; by bisection."""
    ends = [-special.stdtrit(max(n - 1, 1), alpha) for n in (seeds, rows)]
    low, high = (np.full(np.shape(share), end(ends)) for end in (min, max))
    for _ in range(30):
        middle = (low + high) / 2
        above = tail(middle, share, seeds, rows) > alpha
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2


class Bootstrap(NamedTuple):
    """Draws of the settings' losses, from `bootstrap`.

    losses: (S,), the estimates: means over seeds and (by weight) over rows; NaN if a setting is not
    eligible. over_seeds, over_rows: (D, S), draws in which only the seeds or only the rows vary;
    over_both: (D, S). seeds, rows: how many of them there are. chosen: (S,) int, which rate each
    setting has (0 if there was nothing to choose, -1 if no rate is eligible). how_often: (S, R),
    the share of draws in which each rate is chosen.
    """

    losses: np.ndarray
    over_seeds: np.ndarray
    over_rows: np.ndarray
    over_both: np.ndarray
    seeds: int
    rows: int
    chosen: np.ndarray
    how_often: np.ndarray

    @property
    def over(self) -> str:
        """What varies in the intervals: "seeds and rows", "seeds", "rows", or "" for neither."""
        return _over(self.seeds, self.rows)

    def interval(self, of: Callable[[np.ndarray], np.ndarray], level: float = LEVEL) -> Interval:
        """The interval of any function of the settings' losses: (..., S) -> (...).

        For example `lambda loss: loss[..., 0] - loss[..., 1]`, a difference. It is the estimate +-
        `quantile` times the standard deviation of the draws. With fewer than three seeds it is over
        the rows alone (for these very seeds), and `over` says so.
        """
        value = float(of(self.losses))
        if not self.over or not np.isfinite(value):
            return Interval(value, np.nan, np.nan, "")
        by_seeds, by_rows, by_both = (
            float(np.var(of(draws))) for draws in (self.over_seeds, self.over_rows, self.over_both)
        )
        return _interval(value, by_seeds, by_rows, by_both, self.seeds, self.rows, level)


def of_variances(
    value: float, by_seeds: float, by_rows: float, seeds: int, rows: int, level: float = LEVEL
) -> Interval:
    """The interval of an estimate with these variances from the seeds and from the rows, as
    `Bootstrap.interval` has it for a linear function. rows: 1 if they are not known, with by_rows
    0. With fewer than three seeds it is over the rows alone."""
    by_seeds = by_seeds if seeds >= SEEDS else 0.0
    over = _over(seeds, rows)
    if not over:
        return Interval(value, np.nan, np.nan, "")
    return _interval(value, by_seeds, by_rows, by_seeds + by_rows, seeds, rows, level)


def _over(seeds: int, rows: int) -> str:
    names = ["seeds"] * (seeds >= SEEDS) + ["rows"] * (rows > 1)
    return " and ".join(names)


def _interval(
    value: float, by_seeds: float, by_rows: float, both: float, seeds: int, rows: int, level: float
) -> Interval:
    over = _over(seeds, rows)
    if both == 0:
        return Interval(value, value, value, over, float(value == 0))
    share, error = by_seeds / (by_seeds + by_rows), float(np.sqrt(both))
    half = float(quantile((1 - level) / 2, share, seeds, rows) * error)
    p = 2 * float(tail(abs(value) / error, share, seeds, rows))
    return Interval(value, value - half, value + half, over, p)


def bootstrap(
    sums: ArrayLike,
    weights: ArrayLike,
    validation: ArrayLike | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Bootstrap:
    """Hierarchical bootstrap over seeds and rows, the same seeds and rows for all settings.

    The draws are normal, around the losses, with the covariance that the mean squares of seeds and
    rows give (the package's docstring), and their sample has exactly that covariance. So intervals
    of linear functions don't depend on `seed`, and functions with a choice in them (the best of the
    rates) are drawn with it.

    Args:
      sums: each row's summed loss, (S, K, N), or (S, R, K, N) if each setting has rates to choose
        from. NaN in a seed (diverged, stopped) makes the setting, or that rate of it, not eligible.
        The base without adapters can be one of the settings: the same rows for every seed.
      weights: each row's tokens, (N,). A setting's loss is sum(sums) / sum(weights), and rows with
        more tokens count more in its variance too (ratio estimate, by linearisation: Cochran 1977,
        Sampling Techniques, section 6.3). N = 1: rows are not known, only seeds vary.
      validation: losses (S, R, K) on other rows. The rate with the lowest mean is each setting's,
        and this choice is made anew in every draw. Without it rates are chosen on the same rows.
      draws: how many; at least twice as many as are needed for the exact covariance.

    Raises ValueError for shapes that don't fit.
    """
    cells, weights, losses, judged = _checked(sums, weights, validation)
    settings, rates, seeds, rows = cells.shape
    eligible = np.isfinite(losses).all(-1) & np.isfinite(judged).all(-1)
    filled = lambda values: np.where(eligible[..., None], values, 0.0).reshape(-1, seeds)
    cells = np.where(eligible[..., None, None], cells, 0.0).reshape(-1, seeds, rows)
    of_rows = _row_factor(cells, filled(losses), weights)
    draws = max(draws, 2 * (seeds + of_rows.shape[1]))
    noise = _standard(draws, seeds + of_rows.shape[1], seed)
    shaped = lambda values: values.reshape(-1, settings, rates)
    by_seed, judged_by_seed = (
        shaped(noise[:, :seeds] @ _deviations(filled(x)).T) * (seeds >= SEEDS)
        for x in (losses, judged)
    )
    by_row = shaped(noise[:, seeds:] @ of_rows.T)
    mean, scores = (np.where(eligible, x.mean(-1), np.inf) for x in (losses, judged))

    best = lambda scores: np.broadcast_to(scores.argmin(-1), (draws, settings))
    judged_by_row = by_row if validation is None else 0.0
    drawn = best(scores + judged_by_seed + judged_by_row)
    take = lambda values, which: _take(np.where(eligible, values, np.nan), which)
    return Bootstrap(
        take(mean, best(scores)[:1])[0],
        take(mean + by_seed, best(scores + judged_by_seed)),
        take(mean + by_row, best(scores + judged_by_row)),
        take(mean + by_seed + by_row, drawn),
        seeds,
        rows,
        np.where(eligible.any(-1), scores.argmin(-1), -1),
        (drawn[..., None] == np.arange(rates)).mean(0) * eligible,
    )


def _checked(sums, weights, validation) -> tuple[np.ndarray, ...]:
    """(sums (S, R, K, N), weights (N,), losses (S, R, K), the losses that choose (S, R, K)) from
    arguments of `bootstrap`. Raises ValueError for shapes that don't fit."""
    sums, weights = np.asarray(sums, float), np.asarray(weights, float)
    cells = sums[:, None] if sums.ndim == 3 else sums
    if cells.ndim != 4 or weights.shape != cells.shape[-1:]:
        given = f"sums {sums.shape} and weights {weights.shape}"
        raise ValueError(f"{given}: need (S, K, N) or (S, R, K, N), and (N,)")
    if not ((weights >= 0).all() and weights.sum() > 0):
        raise ValueError(f"weights {weights}: must be 0 or more, and not all 0")
    losses = cells.sum(-1) / weights.sum()
    judged = losses if validation is None else np.asarray(validation, float)
    if judged.shape != losses.shape:
        raise ValueError(f"validation {judged.shape}: need {losses.shape}, (S, R, K)")
    return cells, weights, losses, judged


def _take(values: np.ndarray, which: np.ndarray) -> np.ndarray:
    """The value (D, S) of each setting's rate `which` (D, S), of values (S, R) or (D, S, R)."""
    values = np.broadcast_to(values, (*which.shape, values.shape[-1]))
    return np.take_along_axis(values, which[..., None], -1)[..., 0]


def _deviations(losses: np.ndarray) -> np.ndarray:
    """(cells, K) whose product with its transpose is the covariance of the means over seeds, of
    losses (cells, K)."""
    seeds = losses.shape[1]
    return (losses - losses.mean(-1, keepdims=True)) / np.sqrt(max(seeds * (seeds - 1), 1))


def _row_factor(cells: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(cells, m) whose product with its transpose is the covariance of the means that comes from
    the rows: (MS_row - MS_rest) / (K N), or MS_row / (K N) if the seeds are too few to vary.

    MS_rest is in MS_seed already. A difference of two estimates can have negative eigenvalues:
    they become 0.
    """
    _, seeds, rows = cells.shape
    if rows == 1:
        return np.zeros((len(cells), 0))
    # sum(x) / sum(w) moves by (x_n - loss w_n) / sum(w) with row n.
    moves = (cells - losses[..., None] * weights) / weights.sum()
    of_rows = moves.mean(1)  # (cells, N)
    covariance = of_rows @ of_rows.T * rows / (rows - 1)
    if seeds >= SEEDS:
        rest = (moves - of_rows[:, None]).reshape(len(cells), -1)
        covariance -= rest @ rest.T * rows / (rows - 1) / (seeds - 1) / seeds
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0.0))


@functools.lru_cache(4)  # several bootstraps of a field draw the same
def _standard(draws: int, dimensions: int, seed: int) -> np.ndarray:
    """(draws, dimensions) normal numbers whose sample has mean 0 and covariance 1 exactly."""
    noise = np.random.default_rng(seed).standard_normal((draws, dimensions))
    noise -= noise.mean(0)
    return np.linalg.qr(noise)[0] * np.sqrt(draws)
