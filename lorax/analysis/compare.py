"""Paired statistics: which settings differ, by how much, and how sure that is.

Settings are trained with the same seeds and measured on the same test rows, so they are compared
within a seed and within a row. Shapes: S settings, K seeds, N rows, R rates. Losses: lower is
better; give the negative of a score. docs/statistics.md states every rule in words.

The model behind all of it: a loss is a mean over two crossed samples, seeds and rows,

    x_kn = mean + seed_k + row_n + rest_kn

(no seed has rows of its own). Its variance is estimated by the mean squares of the two-way layout,
(MS_seed + MS_row - MS_rest) / (K N) (Searle, Casella and McCulloch 1992, Variance Components,
chapter 4; Clark 1973, Journal of Verbal Learning and Verbal Behavior 12, 335 for why both samples
count). Resampling seeds and rows as they are would not do: 3 seeds have 10 different samples, with
(K - 1) / K of the right variance, and the rest counts three times (Owen 2007, The pigeonhole
bootstrap, arXiv:0712.1111). The draws of `bootstrap` have the right variance instead.

How many degrees of freedom? MS_seed has K - 1 = 2 for three seeds, MS_row N - 1, and their shares
of the variance are unknown. `tail` weighs the two t distributions by the estimated shares, as
Cochran and Cox (1957, Experimental Designs, section 4.14) weigh their quantiles. By simulation with
3, 5 and 10 seeds, 100 and 500 rows and all kinds of shares, 95% intervals made so cover 94.9% to
96.5%. Satterthwaite's degrees of freedom cover 92.2% to 95.5%, Cochran and Cox's mean of quantiles
95.0% to 97.1%, a plain bootstrap with 1.96 standard errors 75% for three seeds.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

LEVEL = 0.95  # of intervals
ALPHA = 0.05  # how often a decision may err
SHARE = 0.01  # of the improvement over the base: what "as good as the best" may lose
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
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return Interval(mean, mean - half, mean + half, "seeds", p)


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


def quantile(alpha: float, share: float, seeds: int, rows: int) -> float:
    """The x with `tail` = alpha, for alpha < 0.5."""
    ends = [-special.stdtrit(max(n - 1, 1), alpha) for n in (seeds, rows)]
    if share in (0, 1) or ends[0] == ends[1]:
        return float(ends[0] if share == 1 else ends[1])
    excess = lambda x: float(tail(x, share, seeds, rows)) - alpha
    return float(optimize.brentq(excess, min(ends), max(ends)))


class Bootstrap(NamedTuple):
    """Draws of the settings' losses, from `bootstrap`.

    losses: (S,), the estimates: means over seeds and (by weight) over rows; NaN if a setting is not
    eligible. over_seeds, over_rows: (D, S), draws in which only the seeds or only the rows vary;
    over_both: (D, S). seeds, rows: how many of them there are. chosen: (S,) int, which rate each
    setting has (0 if there was nothing to choose, -1 if no rate is eligible).
    """

    losses: np.ndarray
    over_seeds: np.ndarray
    over_rows: np.ndarray
    over_both: np.ndarray
    seeds: int
    rows: int
    chosen: np.ndarray

    @property
    def over(self) -> str:
        """What varies in the intervals: "seeds and rows", "seeds", "rows", or "" for neither."""
        names = ["seeds"] * (self.seeds >= SEEDS) + ["rows"] * (self.rows > 1)
        return " and ".join(names)

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
        if by_both == 0:
            return Interval(value, value, value, self.over, float(value == 0))
        share, error = by_seeds / (by_seeds + by_rows), np.sqrt(by_both)
        half = quantile((1 - level) / 2, share, self.seeds, self.rows) * error
        p = 2 * float(tail(abs(value) / error, share, self.seeds, self.rows))
        return Interval(value, value - half, value + half, self.over, p)


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
    rows give (module docstring), and their sample has exactly that covariance. So intervals of
    linear functions don't depend on `seed`, and functions with a choice in them (the best of the
    rates) are drawn with it.

    Args:
      sums: each row's summed loss, (S, K, N); with `validation`, (S, R, K, N). NaN in a seed
        (diverged, stopped) makes the setting, or that rate of it, not eligible. The base without
        adapters can be one of the settings: the same rows for every seed.
      weights: each row's tokens, (N,). A setting's loss is sum(sums) / sum(weights), and rows with
        more tokens count more in its variance too (ratio estimate, by linearisation: Cochran 1977,
        Sampling Techniques, section 6.3). N = 1: rows are not known, only seeds vary.
      validation: losses (S, R, K) on other rows. The rate with the lowest mean is each setting's,
        and this choice is made anew in every draw.
      draws: how many, more than the cells S R + K.

    Raises ValueError for shapes that don't fit.
    """
    sums, weights = np.asarray(sums, float), np.asarray(weights, float)
    cells, chooses = sums if validation is not None else sums[:, None], validation is not None
    if cells.ndim != 4 or weights.shape != cells.shape[-1:] or not (weights > 0).all():
        need = "(S, R, K, N)" if chooses else "(S, K, N)"
        raise ValueError(f"sums {sums.shape} and weights {weights.shape}: need {need}, (N,) > 0")
    settings, rates, seeds, rows = cells.shape
    judged = np.asarray(validation, float) if chooses else np.zeros(cells.shape[:3])
    if judged.shape != cells.shape[:3]:
        raise ValueError(f"validation {judged.shape}: need {cells.shape[:3]} (S, R, K)")
    eligible = np.isfinite(cells).all((-2, -1)) & np.isfinite(judged).all(-1)
    cells = np.where(eligible[..., None, None], cells, 0.0).reshape(-1, seeds, rows)
    judged = np.where(eligible[..., None], judged, np.inf)

    losses = cells.sum(-1) / weights.sum()  # (cells, K)
    of_seeds, of_rows = _deviations(losses), _row_factor(cells, losses, weights)
    noise = _standard(draws, seeds + of_rows.shape[1], seed)
    by_seed = noise[:, :seeds] @ of_seeds.T * (seeds >= SEEDS)
    by_row = noise[:, seeds:] @ of_rows.T
    shape = -1, settings, rates
    mean, by_seed, by_row = (x.reshape(shape) for x in (losses.mean(-1), by_seed, by_row))

    safe = np.where(eligible[..., None], judged, 0.0)
    moved = noise[:, :seeds] @ _deviations(safe.reshape(-1, seeds)).T * (seeds >= SEEDS)
    drawn = (judged.mean(-1) + moved.reshape(shape)).argmin(-1)  # (D, S), the rate in every draw
    chosen = judged.mean(-1).argmin(-1)
    fixed = np.broadcast_to(chosen, drawn.shape)
    none = ~eligible.any(-1)

    def take(values, which):
        values = np.broadcast_to(values, (len(which), settings, rates))
        found = np.take_along_axis(values, which[..., None], -1)[..., 0]
        return np.where(none, np.nan, found)

    return Bootstrap(
        take(mean, chosen[None])[0],
        take(mean + by_seed, drawn),
        take(mean + by_row, fixed),
        take(mean + by_seed + by_row, drawn),
        seeds,
        rows,
        np.where(none, -1, chosen),
    )


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


def _standard(draws: int, dimensions: int, seed: int) -> np.ndarray:
    """(draws, dimensions) normal numbers whose sample has mean 0 and covariance 1 exactly."""
    noise = np.random.default_rng(seed).standard_normal((draws, dimensions))
    noise -= noise.mean(0)
    return np.linalg.qr(noise)[0] * np.sqrt(draws)


# ------------------------------------------------------------------------------ as good as the best


class NonInferiority(NamedTuple):
    """Which settings are as good as the best, from `noninferior`. Arrays are (S,)."""

    decision: str  # "decided" or "undecided"
    choice: int | None  # the cheapest setting that is shown to be as good as the best
    best: int | None  # the lowest loss
    good: np.ndarray  # bool: shown to be as good as the best
    worse: np.ndarray  # bool: shown to be worse than that
    p: (
        np.ndarray
    )  # the smallest alpha with which the setting is shown to be good; NaN: not eligible
    bound: np.ndarray  # its loss above the best's, at most (one-sided, for this setting alone)
    lacks: np.ndarray  # the share of the best's improvement that it lacks, at most; NaN: no base
    margin: float  # how much may be lost, in the unit of the loss
    seed_sd: np.ndarray  # of its difference to the best: standard deviation over seeds
    row_se: np.ndarray  # and standard error from the rows; both for `power`
    why: str  # why nothing was decided, or ""


class _Pairs(NamedTuple):
    """The differences of settings, less a share of each other's improvement over the base.

    losses: (S + 1,), the base last. of_seeds, of_rows: (S + 1, S + 1), the parts of their
    covariance.
    """

    losses: np.ndarray
    of_seeds: np.ndarray
    of_rows: np.ndarray
    seeds: int
    rows: int

    def standardised(self, s: int, b: int, share: float, margin: float):
        """loss_s - loss_b - share (base - loss_b) - margin: (value, standard error, share of the
        variance from the seeds)."""
        weights = np.zeros(len(self.losses))
        np.add.at(weights, [s, b, -1], [1.0, share - 1.0, -share])
        by_seeds, by_rows = (max(weights @ x @ weights, 0.0) for x in (self.of_seeds, self.of_rows))
        total = by_seeds + by_rows
        value = float(weights @ self.losses) - margin
        return value, np.sqrt(total), by_seeds / total if total > 0 else 0.0

    def p(self, s: int, b: int, share: float, margin: float) -> float:
        """Of the hypothesis that the difference is 0 or more."""
        value, error, of_seeds = self.standardised(s, b, share, margin)
        if error == 0:
            return float(value >= 0)
        return float(tail(-value / error, of_seeds, self.seeds, self.rows))

    def bound(self, s: int, b: int, share: float, margin: float, alpha: float) -> float:
        """The difference, at most."""
        value, error, of_seeds = self.standardised(s, b, share, margin)
        return value + error * quantile(alpha, of_seeds, self.seeds, self.rows)


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

    Setting s is as good if loss_s - loss_b < margin for every setting b, so also for the best one.
    With the margin as a share f of the best's improvement that is loss_s - (1 - f) loss_b - f base
    < 0, linear in the losses: the margin's own error is in the test (Pigeot et al. 2003, Statistics
    in Medicine 22, 883, for three arms).

    Which setting is the best is not known, and which are tested depends on the data. So the
    question is split by the setting b that is in truth the best (partitioning: Stefansson, Kim and
    Hsu 1988, in Statistical Decision Theory and Related Topics IV; Finner and Strassburger 2002,
    Annals of Statistics 30, 1194). If b is the best:

    - cheaper settings are tested against b one after another, the next cheaper one first, until one
      fails, at alpha / 2 (a fixed sequence: Maurer, Hothorn and Lehmacher 1995);
    - dearer settings are tested against b with Holm's correction at alpha / 2;
    - if all of one side pass, the other side is tested at alpha (Bretz et al. 2009, Statistics in
      Medicine 28, 586).

    Under each b this errs at most at alpha. A setting counts as good if it passes under every b.
    One b is the truth, so the choice errs at most at alpha, however many settings there are.

    Args:
      sums, weights, validation: as for `bootstrap`.
      costs: (S,), e.g. trainable parameters. Of equal ones the first counts as cheaper.
      start: each row's summed loss before training, (N,) or (K, N). Needed for `share`.
      share: the margin as a share of the best's improvement over the base.
      margin: the margin in the unit of the loss, in place of `share`.
      alpha: the probability that the choice is not as good as the best, at most.

    With fewer than three seeds nothing is decided.
    """
    sums, weights = np.asarray(sums, float), np.asarray(weights, float)
    if margin is None and start is None:
        raise ValueError("start: needed, because the margin is a share of the improvement over it")
    if len(costs) != len(sums):
        raise ValueError(f"costs {np.shape(costs)}: need one for each of {len(sums)} settings")
    based = np.zeros(len(weights)) if start is None else np.asarray(start, float)
    found = bootstrap(*_with_base(sums, weights, based, validation), seed=seed)
    share = share if margin is None else 0.0
    covariances = [np.cov(x.T, bias=True) for x in (found.over_seeds, found.over_rows)]
    pairs = _Pairs(found.losses, *covariances, found.seeds, found.rows)
    losses = found.losses[:-1]
    eligible = np.flatnonzero(np.isfinite(losses))
    order = eligible[np.argsort(np.asarray(costs)[eligible], kind="stable")]
    best = int(eligible[losses[eligible].argmin()]) if len(eligible) else None
    shift = margin or 0.0
    if best is not None and margin is None:
        margin = share * float(found.losses[-1] - losses[best])
    result = _undecided(len(losses), best, np.nan if margin is None else float(margin))
    if best is None:
        return result._replace(why="no setting has a loss for every seed")
    for s in eligible:
        value, error, of_seeds = pairs.standardised(s, best, share, shift)
        if found.seeds >= SEEDS:
            result.seed_sd[s] = error * np.sqrt(of_seeds * found.seeds)
        result.row_se[s] = error * np.sqrt(1 - of_seeds)
    if found.seeds < SEEDS:
        count = f"{found.seeds} seed{'s' * (found.seeds > 1)}"
        return result._replace(why=f"{count}: at least {SEEDS} are needed to decide")
    return _decided(result, pairs, order, share, shift, alpha, start is not None)


def _with_base(sums, weights, start, validation) -> tuple:
    """Arguments of `bootstrap`, with the base as the last setting."""
    seeds, rows = sums.shape[-2:]
    base = np.broadcast_to(start, (seeds, rows))
    if validation is None:
        return np.concatenate([sums, base[None]]), weights
    base = np.broadcast_to(base, (1, *sums.shape[1:]))
    validation = np.asarray(validation, float)
    flat = np.zeros((1, *validation.shape[1:]))
    return np.concatenate([sums, base]), weights, np.concatenate([validation, flat])


def _undecided(settings: int, best: int | None, margin: float) -> NonInferiority:
    no, nan = np.zeros(settings, bool), np.full(settings, np.nan)
    copies = nan.copy(), nan.copy(), nan.copy()
    return NonInferiority(
        "undecided", None, best, no, no.copy(), *copies, margin, nan.copy(), nan.copy(), ""
    )


def _decided(result, pairs, order, share, shift, alpha, has_base) -> NonInferiority:
    """The result with its tests. order: the eligible settings, cheapest first."""
    worse_than = np.array([[1 - pairs.p(s, b, share, shift) for b in order] for s in order])
    against = 1 - worse_than  # [s, b]: p of "s loses the margin or more to b"
    np.fill_diagonal(worse_than, np.nan)
    passes = lambda level: passed(against, level)
    result.good[order] = passes(alpha)
    adjusted = holm(worse_than.ravel()).reshape(worse_than.shape)
    result.worse[order] = (adjusted <= alpha).any(1)
    result.p[order] = _smallest_levels(passes, len(order))
    for s in order:
        others = [b for b in order if b != s]
        highest = lambda f: max((pairs.bound(s, b, f, 0.0, alpha) for b in others), default=0.0)  # noqa: B023
        result.bound[s] = highest(0.0)
        if has_base:
            result.lacks[s] = _smallest_share(highest)
    good = [int(s) for s in order if result.good[s]]
    if not good:
        return result._replace(why="no setting is shown to be as good as the best")
    return result._replace(decision="decided", choice=good[0])


def passed(against: np.ndarray, alpha: float) -> np.ndarray:
    """Which settings pass under every assumption on the best (`noninferior`): (S,) bool.

    against: (S, S), cheapest first: p of the hypothesis that s is not as good as b.
    """
    settings = len(against)
    good = np.ones(settings, bool)
    for b in range(settings):
        p, up = against[:, b], np.arange(b + 1, settings)
        down = np.arange(b)[::-1]
        sides = 2 if len(up) and len(down) else 1
        dearer = holm(p[up]) <= alpha / sides
        cheaper = np.logical_and.accumulate(p[down] <= (alpha if dearer.all() else alpha / sides))
        if cheaper.all():
            dearer = holm(p[up]) <= alpha
        good[up] &= dearer
        good[down] &= cheaper
    return good


def _smallest_levels(passes: Callable[[float], np.ndarray], settings: int) -> np.ndarray:
    """(S,): the smallest level with which each setting passes, by bisection of its logarithm."""
    low, high = np.full(settings, np.log(1e-6)), np.zeros(settings)
    for s in range(settings):
        for _ in range(20):
            middle = (low[s] + high[s]) / 2
            if passes(np.exp(middle))[s]:
                high[s] = middle
            else:
                low[s] = middle
    return np.exp(high)


def _smallest_share(highest: Callable[[float], float]) -> float:
    """The smallest share f of the improvement with highest(f) <= 0; 0 if none is lacking, NaN if it
    may be all."""
    if highest(0.0) <= 0:
        return 0.0
    if highest(1.0) > 0:
        return np.nan
    return float(optimize.brentq(highest, 0.0, 1.0))


# -------------------------------------------------------------------------------------------- power


def power(
    seed_sd: float,
    row_se: float,
    margin: float,
    seeds: int,
    rows: int,
    alpha: float = ALPHA / 2,
) -> float:
    """The probability that a setting which is exactly as good as the best is found to be so, in one
    comparison with it (by default at half of ALPHA, the level of `noninferior`'s first step). NaN
    for fewer than three seeds.

    The statistic has a noncentral t distribution (Julious 2004, Statistics in Medicine 23, 1921,
    section 6), here with Satterthwaite's degrees of freedom for its two parts.

    Args:
      seed_sd: standard deviation of the paired difference over seeds.
      row_se: its standard error from the rows (0: not known).
      margin: how much worse still counts as good.
      seeds, rows: how many.
    """
    if seeds < SEEDS:
        return np.nan
    by_seeds, by_rows = seed_sd**2 / seeds, row_se**2
    total = by_seeds + by_rows
    if total == 0 or margin <= 0:
        return float(margin > 0)
    share = by_seeds / total
    degrees = 1 / (share**2 / (seeds - 1) + (1 - share) ** 2 / max(rows - 1, 1))
    critical = quantile(alpha, share, seeds, rows)
    return float(stats.nct.sf(critical, degrees, margin / np.sqrt(total)))


def needed_seeds(
    seed_sd: float,
    row_se: float,
    margin: float,
    rows: int,
    alpha: float = ALPHA / 2,
    target: float = 0.8,
    most: int = 1000,
) -> int | None:
    """The fewest seeds (from 3 to `most`) with which `power` reaches `target`. None if none does:
    then it is the rows that are too few."""
    enough = lambda seeds: power(seed_sd, row_se, margin, seeds, rows, alpha) >= target
    if not enough(most):
        return None
    low, high = SEEDS - 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
