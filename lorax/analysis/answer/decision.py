"""Which setting is the answer: the cheapest that is as good as the best."""

from typing import Any, NamedTuple

import numpy as np

from lorax.analysis import compare
from lorax.analysis.answer.candidates import Field
from lorax.analysis.answer.words import in_words, listed


class Rule(NamedTuple):
    """What counts as good: a loss at most `margin` (in the metric's unit; None: `share` of the
    best's improvement on the base) above the best's. level: of intervals; 1 - level: how often an
    answer may err."""

    share: float
    margin: float | None
    level: float


BASE = -1  # the base's number among the draws


class Draws(NamedTuple):
    """Bootstraps of a field. points: of its P points and, last, the base; candidates: of its S
    candidates, each with its best point chosen in every draw, of full fine-tuning (if the field has
    it) and, last, the base."""

    points: compare.Bootstrap
    candidates: compare.Bootstrap
    level: float

    def difference(self, among: str, a: int, b: int) -> dict[str, Any] | None:
        """Loss of a minus loss of b, with its interval; None if one was not measured. among:
        "points" or "candidates"."""
        draws = getattr(self, among)
        if a == b or not np.isfinite(draws.losses[[a, b]]).all():
            return None
        return as_dict(draws.interval(lambda loss: loss[..., a] - loss[..., b], self.level))


class Choice(NamedTuple):
    """A decision. verdict: "decided", "undecided", "one setting" or "nothing beats the base"; why:
    of an undecided one. best, chosen: numbers of candidates, None if none is chosen. delta: its
    value, share and rule. tested: the tests; None if there are none."""

    verdict: str
    why: str
    best: int
    chosen: int | None
    delta: dict[str, Any]
    tested: compare.NonInferiority | None

    def shown(self, n: int) -> str:
        """What is shown of a candidate: "as good" as the best, "worse", or "undecided"."""
        if self.tested is None:
            return "undecided"
        if self.tested.good[n]:
            return "as good"
        return "worse" if self.tested.worse[n] else "undecided"


def as_dict(interval: compare.Interval) -> dict[str, Any]:
    """An interval for JSON: value, low and high (None if it is not known), over."""
    plain = lambda x: float(x) if np.isfinite(x) else None
    low, high = plain(interval.low), plain(interval.high)
    return {"value": plain(interval.value), "low": low, "high": high, "over": interval.over}


def bootstraps(field: Field, level: float) -> Draws:
    """The bootstraps of a field; see `Draws`."""
    base = np.broadcast_to(field.start, field.sums.shape[1:])
    points = compare.bootstrap(np.concatenate([field.sums, base[None]]), field.weights)
    sums, validation = field.by_candidate()
    beside = [] if field.full is None else [field.sums[field.full]]
    # These have nothing to choose: they fill the first of the R places.
    extra = np.full((len(beside) + 1, *sums.shape[1:]), np.nan)
    extra[:, 0] = [*beside, base]
    chosen = np.full((len(extra), *validation.shape[1:]), np.nan)
    chosen[:, 0] = 0.0
    sums, validation = np.concatenate([sums, extra]), np.concatenate([validation, chosen])
    return Draws(points, compare.bootstrap(sums, field.weights, validation), level)


def choose(field: Field, draws: Draws, rule: Rule) -> Choice:
    """The decision on a field of which at least one candidate is eligible."""
    count = len(field.candidates)
    losses = draws.candidates.losses[:count]
    best, gain = int(np.nanargmin(losses)), draws.candidates.losses[BASE] - np.nanmin(losses)
    margin = rule.share * gain if rule.margin is None else rule.margin
    known = rule.margin is not None or gain > 0
    delta = {
        "value": float(margin) if known else None,
        "share": rule.share if rule.margin is None else None,
        "rule": _in_words(field, rule),
    }
    found = Choice("undecided", "", best, None, delta, None)
    if gain <= 0:
        return found._replace(verdict="nothing beats the base")
    if not known:
        why = "the metric of the base, of whose improvement delta is a share, is not known"
        return found._replace(why=why)
    if field.candidates["eligible"].sum() == 1:
        return found._replace(verdict="one setting", chosen=best)
    sums, validation = field.by_candidate()
    options = {"share": rule.share, "margin": rule.margin, "alpha": 1 - rule.level}
    tested = compare.noninferior(
        sums, field.weights, _order(field), field.start, validation, **options
    )
    found = found._replace(best=int(tested.best), chosen=tested.choice, tested=tested)
    decided = tested.choice is not None and not _may_be_as_good(field, found)
    return found._replace(verdict="decided" if decided else "undecided", why=tested.why)


def _order(field: Field) -> np.ndarray:
    """(S,): the place of each candidate when they are ordered by their trainable parameters and,
    where these are equal, by their validation loss."""
    losses = [field.validation[point].mean() for point in field.candidates["point"]]
    order = np.lexsort([losses, field.candidates["trainable_params"]])
    return np.argsort(order)


def _may_be_as_good(field: Field, choice: Choice) -> list[int]:
    """The candidates that are cheaper than the chosen one (not dearer than the best, if none is
    chosen) and are shown neither to be as good as the best nor to be worse."""
    costs = field.candidates["trainable_params"].to_numpy()
    cheap = costs <= costs[choice.best]
    if choice.chosen is not None:
        cheap = costs < costs[choice.chosen]
    able = np.flatnonzero(field.candidates["eligible"].to_numpy() & cheap)
    return [int(n) for n in able if n != choice.best and choice.shown(n) == "undecided"]


def undecided(field: Field, choice: Choice, rule: Rule) -> list[dict[str, Any]]:
    """The cheaper candidates that may be as good as the best, with the seeds that would tell: with
    so many, a setting that is exactly as good is shown to be so in four of five cases. None: no
    number of seeds is enough, or it is not known."""
    tested = choice.tested
    if choice.verdict != "undecided" or tested is None:
        return []
    found = []
    for n in _may_be_as_good(field, choice):
        needed, known = None, np.isfinite([tested.seed_sd[n], tested.row_se[n]]).all()
        if known and len(field.seeds) >= compare.SEEDS:
            spread = float(tested.seed_sd[n]), float(tested.row_se[n])
            needed = compare.needed_seeds(
                *spread, tested.margin, len(field.weights), (1 - rule.level) / 2
            )
        setting = field.setting(n)
        names = {"words": in_words(setting), "name": in_words(field.sizes_of(n), " ")}
        found.append({"setting": setting, **names, "seeds": needed})
    return found


def _in_words(field: Field, rule: Rule) -> str:
    """What is decided, and how."""
    tuned = f", each at its own best {listed(field.tuned)} on the validation rows," * bool(
        field.tuned
    )
    within = f"{100 * rule.share:.3g}% of the best's improvement on the base"
    if rule.margin is not None:
        within = f"{rule.margin:g} {field.metric.unit}".strip()
    paired = "by seed" + " and by row" * (len(field.weights) > 1)
    return (
        f"the setting with the fewest trainable parameters{tuned} that is as good as the best: a "
        f"test at level {1 - rule.level:.2g}, paired {paired}, shows that its "
        f"{field.metric.called} is worse by less than {within}; at least {compare.SEEDS} seeds"
    )
