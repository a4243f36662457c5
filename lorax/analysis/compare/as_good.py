"""Which settings are as good as the best, and how many seeds it takes to tell."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from lorax.analysis.compare.intervals import (
    DRAWS,
    SEEDS,
    Bootstrap,
    bootstrap,
    holm,
    quantile,
    tail,
)

ALPHA = 0.05  # how often a decision may err
SHARE = 0.01  # of the improvement over the base: what "as good as the best" may lose
RARE = 0.01  # a rate that is the best in fewer draws is not among those that may be the best


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
    behind = pairs.highest(1 - pairs.p(0.0, 0.0))
    result.worse[order] = _worse(pairs.highest(1 - p), behind) <= alpha
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


def _worse(opposite: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """(S,): the smallest alpha with which each setting is shown not to be as good as the best.

    The question is split by the best setting b, as in `noninferior`. At alpha / 2 another setting
    is shown to be better than b, so that b is not the best after all; and at alpha / 2, with Holm's
    correction, settings are shown to lack more than the margin of b. A setting counts as worse if
    one of the two holds under every b.

    opposite: (S, S), p of the hypothesis that s is as good as b. behind: (S, S), p of the
    hypothesis that s has no higher loss than b.
    """
    count = len(opposite)
    smallest = np.zeros(count)
    for b in range(count):
        others = np.arange(count) != b
        not_best = 2 * (count - 1) * behind[b, others].min() if count > 1 else 1.0
        smallest[b] = max(smallest[b], not_best)
        lacking = np.minimum(2 * holm(opposite[others, b]), not_best)
        smallest[others] = np.maximum(smallest[others], lacking)
    return smallest


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
