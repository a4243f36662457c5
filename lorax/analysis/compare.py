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
Cochran and Cox (1957, Experimental Designs) weigh their quantiles. By simulation with 3, 5 and 10
seeds, 100 and 500 rows and all kinds of shares, 95% intervals made so cover 94.9% to 96.5%.
Satterthwaite's degrees of freedom cover 92.2% to 95.5%, Cochran and Cox's mean of quantiles 95.0%
to 97.1%, a plain bootstrap with 1.96 standard errors 75% for three seeds.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # scipy.stats takes a second to import

LEVEL = 0.95  # of intervals
ALPHA = 0.05  # how often a decision may err
SHARE = 0.01  # of the improvement over the base: what "as good as the best" may lose
SEEDS = 3  # with fewer, nothing is decided
RARE = 0.01  # a rate that is the best in fewer draws is not among those that may be the best
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
        share, error = by_seeds / (by_seeds + by_rows), float(np.sqrt(by_both))
        half = float(quantile((1 - level) / 2, share, self.seeds, self.rows) * error)
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
    # The smallest alpha with which the setting is shown to be good; NaN: not eligible
    p: np.ndarray
    bound: np.ndarray  # its loss above the best's, at most (one-sided, for this setting alone)
    lacks: np.ndarray  # the share of the best's improvement that it lacks, at most; NaN: not known
    margin: float  # how much may be lost, in the unit of the loss
    seed_sd: np.ndarray  # of its difference to the best: standard deviation over seeds
    row_se: np.ndarray  # and standard error from the rows; both for `power`
    why: str  # why nothing was decided, or ""


class _Pairs(NamedTuple):
    """Differences of settings s and b: loss_s - loss_b - share (base - loss_b) - margin.

    A setting has a cell for every rate that may be its best, and a result is the highest over the
    cells of both. losses: (C + 1,), of the cells, the base last. of_seeds, of_rows: (C + 1, C + 1),
    the parts of their covariance. setting: (C,), whose cell it is, from 0, ascending. Results
    are (C, C), [s, b], or by `highest` (S, S).
    """

    losses: np.ndarray
    of_seeds: np.ndarray
    of_rows: np.ndarray
    seeds: int
    rows: int
    setting: np.ndarray

    def standardised(self, share: ArrayLike, margin: float) -> tuple[np.ndarray, ...]:
        """(value, standard error, share of the variance that is from the seeds), of all pairs of
        cells, (C, C). share: a number, or (S,), of the settings s."""
        lost = np.broadcast_to(share, self.setting[-1] + 1)[self.setting][:, None]
        kept, losses = 1 - lost, self.losses[:-1]

        def variance(of):
            own, with_base, base = np.diag(of)[:-1], of[:-1, -1], of[-1, -1]
            apart = own[:, None] + kept**2 * own - 2 * kept * of[:-1, :-1]
            from_base = lost**2 * base - 2 * lost * with_base[:, None] + 2 * lost * kept * with_base
            return np.maximum(apart + from_base, 0.0)

        by_seeds, total = variance(self.of_seeds), variance(self.of_seeds + self.of_rows)
        from_seeds = by_seeds / np.where(total > 0, total, 1.0)
        value = losses[:, None] - kept * losses - lost * self.losses[-1] - margin
        return value, np.sqrt(total), np.minimum(from_seeds, 1.0)

    def p(self, share: ArrayLike, margin: float) -> np.ndarray:
        """Of the hypothesis that the difference is 0 or more, of all pairs of cells."""
        value, error, from_seeds = self.standardised(share, margin)
        p = tail(-value / np.where(error > 0, error, 1.0), from_seeds, self.seeds, self.rows)
        return np.where(error > 0, p, value >= 0)

    def bound(self, alpha: float) -> np.ndarray:
        """loss_s - loss_b, at most, of all pairs of cells."""
        value, error, from_seeds = self.standardised(0.0, 0.0)
        return value + error * quantile(alpha, from_seeds, self.seeds, self.rows)

    def parts(self, share: float, margin: float, b: int) -> np.ndarray:
        """(2, S): of the differences to setting b, standard deviation over seeds and standard error
        from the rows."""
        _, error, from_seeds = self.standardised(share, margin)
        by_seeds = self.highest(error * np.sqrt(from_seeds * self.seeds))
        return np.stack([by_seeds, self.highest(error * np.sqrt(1 - from_seeds))])[..., b]

    def highest(self, values: np.ndarray) -> np.ndarray:
        """(S, S) from (C, C)."""
        first = np.flatnonzero(np.diff(self.setting, prepend=-1))
        return np.maximum.reduceat(np.maximum.reduceat(values, first, 0), first, 1)


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
    draws: int = DRAWS,
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

    If settings have rates to choose from, one lucky rate is not enough: s is as good as b only if
    it is with each rate that may be its best, against each that may be the best of b. Those are the
    rates that at least 1% of the draws choose.

    Args:
      sums, weights, validation: as for `bootstrap`.
      costs: (S,), e.g. trainable parameters. Of equal ones the first counts as cheaper.
      start: each row's summed loss before training, (N,) or (K, N). Needed for `share`.
      share: the margin as a share of the best's improvement over the base.
      margin: the margin in the unit of the loss, in place of `share`.
      alpha: the probability that the choice is not as good as the best, at most.

    With fewer than three seeds nothing is decided.
    """
    sums, weights, costs = (np.asarray(x, float) for x in (sums, weights, costs))
    if margin is None and start is None:
        raise ValueError("start: needed, because the margin is a share of the improvement over it")
    if costs.shape != sums.shape[:1]:
        raise ValueError(f"costs {costs.shape}: need one for each of {len(sums)} settings")
    base = np.zeros(weights.shape) if start is None else np.asarray(start, float)
    sums = sums[:, None] if sums.ndim == 3 else sums
    found = bootstrap(sums, weights, validation, draws=draws, seed=seed)
    result = _undecided(found.losses, np.nan if margin is None else margin)
    if result.best is None:
        return result._replace(why="no setting has a loss for every seed")
    share, shift = (share, 0.0) if margin is None else (0.0, margin)
    lost = share * (base.sum() / base[..., 0].size / weights.sum() - found.losses[result.best])
    result = result._replace(margin=float(lost + shift))
    order = np.argsort(costs, kind="stable")
    order = order[np.isfinite(found.losses[order])]
    pairs = _pairs(sums, weights, base, found, order, draws, seed)
    to_best = list(order).index(result.best)
    result.seed_sd[order], result.row_se[order] = pairs.parts(share, shift, to_best)
    if found.seeds < SEEDS:
        result.seed_sd[:] = np.nan
        count = f"{found.seeds} seed{'s' * (found.seeds > 1)}"
        return result._replace(why=f"{count}: at least {SEEDS} are needed to decide")
    return _tested(result, pairs, order, share, shift, alpha)


def _tested(result: NonInferiority, pairs: _Pairs, order, share, shift, alpha) -> NonInferiority:
    """The result with its tests. order: the eligible settings, cheapest first."""
    p = pairs.p(share, shift)
    result.p[order] = adjusted(pairs.highest(p))
    result.worse[order] = _worse(pairs.highest(1 - p)) <= alpha
    result.bound[order] = pairs.highest(pairs.bound(alpha)).max(1)
    if share > 0:
        result.lacks[order] = _smallest_share(pairs, alpha)
    result.good[order] = result.p[order] <= alpha
    good = order[result.good[order]]
    if not len(good):
        return result._replace(why="no setting is shown to be as good as the best")
    return result._replace(decision="decided", choice=int(good[0]))


def _pairs(sums, weights, base, found: Bootstrap, order, draws: int, seed: int) -> _Pairs:
    """The pairs of the settings in `order`, each with the rates that may be its best."""
    likely = found.how_often >= RARE
    likely[order, found.chosen[order]] = True
    cells = [(n, sums[s, r]) for n, s in enumerate(order) for r in np.flatnonzero(likely[s])]
    setting = np.array([n for n, _ in cells])
    stacked = np.stack([*(cell for _, cell in cells), np.broadcast_to(base, sums.shape[-2:])])
    drawn = bootstrap(stacked, weights, draws=draws, seed=seed)
    parts = (np.cov(of.T, bias=True) for of in (drawn.over_seeds, drawn.over_rows))
    return _Pairs(drawn.losses, *parts, found.seeds, found.rows, setting)


def _undecided(losses: np.ndarray, margin: float) -> NonInferiority:
    best = int(np.nanargmin(losses)) if np.isfinite(losses).any() else None
    no, unknown = np.zeros(losses.shape, bool), np.full(losses.shape, np.nan)
    good, worse, p, bound, lacks, sd, se = (x.copy() for x in (no, no, *[unknown] * 5))
    return NonInferiority("undecided", None, best, good, worse, p, bound, lacks, margin, sd, se, "")


def adjusted(against: np.ndarray) -> np.ndarray:
    """(S,): the smallest alpha with which each setting passes under every assumption on the best,
    by the rules of `noninferior`.

    against: (S, S), cheapest first: p of the hypothesis that s is not as good as b.
    """
    smallest = np.zeros(len(against))
    for b in range(len(against)):
        down, up = np.arange(b)[::-1], np.arange(b + 1, len(against))
        cheaper, dearer = np.maximum.accumulate(against[down, b]), holm(against[up, b])
        for which, p, others in ((down, cheaper, dearer), (up, dearer, cheaper)):
            # alpha / 2 is enough, or alpha if all others pass at alpha / 2.
            needs = np.minimum(2 * p, np.maximum(2 * others.max(initial=0.0), p))
            smallest[which] = np.maximum(smallest[which], needs)
    return np.minimum(smallest, 1.0)


def _worse(opposite: np.ndarray) -> np.ndarray:
    """(S,): p of the hypothesis that a setting is as good as the best, with Holm's correction for
    all pairs. opposite: (S, S), p of the hypothesis that s is as good as b."""
    others = ~np.eye(len(opposite), dtype=bool)
    corrected = np.ones(opposite.shape)
    corrected[others] = holm(opposite[others])
    return corrected.min(1)


def _smallest_share(pairs: _Pairs, alpha: float) -> np.ndarray:
    """(S,): the share of the improvement that each setting lacks at most, by bisection. 0 if it is
    better than all others, NaN if it may lack all."""
    same = np.eye(pairs.setting[-1] + 1, dtype=bool)
    passes = lambda share: ((pairs.highest(pairs.p(share, 0.0)) <= alpha) | same).all(1)
    low, high = np.zeros(len(same)), np.ones(len(same))
    none, known = passes(low), passes(high)
    for _ in range(20):
        middle = (low + high) / 2
        enough = passes(middle)
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(none, 0.0, np.where(known, high, np.nan))


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

    The difference is normal, the variance from the seeds has a chi-square distribution with
    seeds - 1 degrees of freedom (averaged over it, this is the power of a noncentral t test:
    Julious 2004, Statistics in Medicine 23, 1921), that from the rows counts as known.

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
    middles = (np.arange(200) + 0.5) / 200
    chi2 = 2 * special.gammaincinv((seeds - 1) / 2, middles)  # its quantiles
    estimated = by_seeds * chi2 / (seeds - 1) + by_rows
    critical = quantile(alpha, 1 - by_rows / estimated, seeds, rows)
    excess = (margin - critical * np.sqrt(estimated)) / np.sqrt(total)
    return float(special.ndtr(excess).mean())


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
