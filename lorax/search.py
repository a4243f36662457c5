"""The search for an intrinsic dimension: its members and its later rounds.

With `search.threshold` a run trains `sweep.dim`, full fine-tuning and LoRA (`members`). Each later
round reads the run directory and adds dimensions between those that failed and those that
succeeded (`next_round`). `lorax.analysis.intrinsic` estimates the dimension from the results.
"""

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from lorax import catalogue, config, halving, hosts
from lorax.config import Member
from lorax.ranges import FLOAT32_MAX

REFINED_LRS = 2  # learning rates at which refinement tries a dimension


def members(settings: ConfigDict) -> list[Member]:
    """The members of a run: those of its sweep, and in a search the baselines.

    The baselines are full fine-tuning at its learning rates, then LoRA, each with `search.seeds`.
    Methods, and conditions that differ only in a method's hyperparameter, share them. Raises
    ValueError as `lorax.config.members` does, and for a key of config.search or config.halving that
    is out of range or does not fit the sweep.
    """
    members = config.members(settings)
    _check(settings)
    halving.race(settings, members)  # raises for an axis that can't be tuned
    if settings.search.threshold:
        for point in _compared(settings, members):
            members.append(config.member(settings, len(members), point))
    return members


def _compared(settings, swept: list[Member]) -> list[dict]:
    """The points of the baselines, full fine-tuning and LoRA."""
    search, lrs = settings.search, settings.sweep.lr or (settings.train.lr,)
    points = [member.point for member in swept]
    conditions = config.conditions(points, config.shared_axes(points[0]))
    choices = [{"method": "full", "lr": float(lr)} for lr in search.baseline_lr or lrs]
    choices += [
        {"method": "lora", "rank": rank, "lr": float(lr)}
        for rank in search.lora_ranks
        for lr in lrs
    ]
    return [
        condition | choice | {"seed": seed}
        for choice, condition in itertools.product(choices, conditions)
        for seed in seeds(settings)
    ]


def seeds(settings: ConfigDict) -> tuple[int, ...]:
    """The seeds of the baselines and of the refinement."""
    return tuple(settings.search.seeds or settings.sweep.seed or (settings.seed,))


def rounds(settings: ConfigDict) -> int:
    """How many rounds a run trains: the sweep, then the rounds of refinement."""
    return 1 + settings.search.rounds * bool(settings.search.threshold)


def most_members(settings: ConfigDict, members: list[Member]) -> int:
    """The most members that a round of refinement can add, to estimate its time."""
    fixed = lambda p: {
        axis: value for axis, value in p.items() if axis not in ("dim", "lr", "seed")
    }
    conditions = {str(fixed(member.point)) for member in members if "dim" in member.point}
    each = (settings.search.points + 2) * REFINED_LRS * len(seeds(settings))  # + 2: both ends
    return each * len(conditions)


# ---------------------------------------------------------------------------------------- refining


def next_round(
    settings: ConfigDict, members: list[Member], directory: Path, say: Callable[[str], None]
) -> list[Member]:
    """The members of the next round, chosen from the results so far, whose estimate is printed."""
    asked = hosts.of_first(_asked, settings, directory, say)
    return more_members(settings, members, asked)


def _asked(settings: ConfigDict, directory: Path, say: Callable[[str], None]) -> list[dict]:
    """`refine` of the results so far."""
    from lorax.analysis import intrinsic  # imports pandas, which `members` can do without

    search, table = settings.search, points(directory)
    for _, row in intrinsic.estimate(table, search.threshold, search.metric).iterrows():
        condition = f"{row['condition']}: " if row["condition"] else ""
        say(f"search: {condition}{intrinsic.headline(row)}")
    return refine(table, search.threshold, search.metric, search.points, seeds(settings))


def estimate(settings: ConfigDict, directory: Path):
    """`intrinsic.estimate` of a run directory."""
    from lorax.analysis import intrinsic

    search = settings.search
    return intrinsic.estimate(points(directory), search.threshold, search.metric)


def points(directory: Path):
    """`intrinsic.points` of a run directory, also in the middle of a round."""
    from lorax.analysis import intrinsic, runs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an incomplete line of an interrupted round
        return intrinsic.points(runs.load(directory))


def refine(table, threshold: float, metric: str, inside: int, seeds: tuple[int, ...]) -> list[dict]:
    """What the next round should train: {"like": a member of the condition, "dim", "lr", "seed"}.

    A condition's bracket goes from the largest d up to which every seed fails to the smallest d
    from which on every seed succeeds. The round tries `inside` dimensions in it, evenly spaced in
    log(d), and both ends, so that these get all seeds too. If the smallest d already succeeds (or
    the largest fails), it tries one d beyond, spaced by the ratio of the two outermost, but at
    least 1 (at most the baseline's number of parameters). Each d is trained at the two best
    learning rates of the nearest d tried so far. This is a pure function of the table
    (`intrinsic.points`); some of the result may be trained already.
    """
    import numpy as np

    from lorax.analysis import intrinsic

    asked = []
    for _, condition in table[table["kind"] == "subspace"].groupby("condition", sort=False):
        reference = intrinsic.baseline(table, condition["shared"].iloc[0], metric)
        if not intrinsic.gain(reference, metric) > 0:
            continue
        level = intrinsic.needed(reference["start"], reference["baseline"], threshold, metric)
        best = intrinsic.tuned(condition, "dim", metric)
        succeeds = intrinsic.reaches(best["value"], level, metric).groupby(best["dim"])
        some, every = succeeds.agg("any"), succeeds.agg("all")
        for dim in _next_dims(some, every, inside, reference["full_params"]):
            nearest = min(best["dim"].unique(), key=lambda d: (abs(np.log(d / dim)), d))
            lrs = intrinsic.rates(condition[condition["dim"] == nearest], metric)[:REFINED_LRS]
            like = int(condition["member"].iloc[0])
            asked += [
                {"like": like, "dim": dim, "lr": lr, "seed": seed}
                for lr in sorted(lrs)
                for seed in seeds
            ]
    return asked


def _next_dims(some, every, inside: int, most: float) -> list[int]:
    """Dimensions in the bracket with its ends, ascending, or one beyond the tested ones.

    some, every: pandas Series over the tested d: whether any seed and whether every seed succeeds.
    """
    import numpy as np

    dims = some.index.to_numpy(int)
    fails = np.cumsum(some.to_numpy()) == 0  # here and at every smaller d
    holds = np.cumprod(every.to_numpy()[::-1])[::-1] == 1  # here and at every larger d
    if not fails.any():
        down = round(dims[0] * dims[0] / dims[1]) if len(dims) > 1 else dims[0] // 2
        return [max(1, down), int(dims[0])] if dims[0] > 1 else []
    if not holds.any():
        up = round(dims[-1] * dims[-1] / dims[-2]) if len(dims) > 1 else 2 * dims[-1]
        return [int(dims[-1]), up] if up <= most else []
    low, high = dims[fails].max(), dims[holds].min()
    return sorted({round(d) for d in np.geomspace(low, high, inside + 2).tolist()})


def more_members(settings: ConfigDict, members: list[Member], asked: list[dict]) -> list[Member]:
    """The members that `refine` asks for, numbered after the existing ones, without duplicates.

    asked: dicts {"like": number of a member, axis: value where the new member differs from it}.
    """
    key = lambda member: json.dumps(member.config.to_dict(), sort_keys=True)
    known, added = {key(member) for member in members}, []
    for wanted in asked:
        changes = {axis: value for axis, value in wanted.items() if axis != "like"}
        point = members[wanted["like"]].point | changes
        member = config.member(settings, len(members) + len(added), point)
        if key(member) not in known:
            known.add(key(member))
            added.append(member)
    return added


# ---------------------------------------------------------------------------------------- checking


def _check(settings: ConfigDict) -> None:
    """Raises ValueError for a key of config.search that is out of range or does not fit."""
    search = settings.search

    def need(field, fits, right):
        if not fits:
            raise ValueError(f"search.{field}: {search[field]!r} given, {right}")

    def all_are(field, kind, fits, right):
        number = lambda v: isinstance(v, kind) and not isinstance(v, bool)
        need(field, all(number(v) and fits(v) for v in search[field]), right)

    rate, seed = lambda v: 0 <= v <= FLOAT32_MAX, lambda v: 0 <= v < 2**31
    need("threshold", 0 <= search.threshold <= 1, "must be in [0, 1]: 0.9 for d90, 0 for no search")
    need("points", 1 <= search.points < 2**31, "must be at least 1, and less than 2**31")
    need("rounds", 0 <= search.rounds < 2**31, "must not be negative, and less than 2**31")
    all_are("baseline_lr", int | float, rate, "must be a tuple of learning rates")
    all_are("seeds", int, seed, "must be a tuple of integers in [0, 2**31)")
    all_are("lora_ranks", int, lambda v: v >= 1, "must be a tuple of integers of at least 1")
    for field in ("baseline_lr", "seeds", "lora_ranks"):
        need(field, len(set(search[field])) == len(search[field]), "a value occurs twice")
    if search.threshold and settings.analysis.also:
        raise ValueError("analysis.also: a search's report shows no updates; leave it ()")
    if search.threshold:
        _check_sweep(settings, need)


def _check_sweep(settings: ConfigDict, need: Callable) -> None:
    """Raises ValueError if a search can't use its sweep. need: (field, whether it fits, what is
    right)."""
    swept = config.swept(settings.sweep)
    dims = tuple(swept.get("dim", ()))
    need("threshold", len(dims) > 1, f"needs a sweep.dim of at least two values, not {dims}")
    need("threshold", None not in dims, f"needs a sweep.dim of numbers alone, not {dims}")
    tied = {config.axis_of(name) for tie in settings.sweep.zip for name in tie}
    for axis in ("dim", "seed"):
        if axis in tied:
            raise ValueError(
                f"sweep.zip: {axis} is tied, but a search (search.threshold) varies it"
            )
    for name in swept.get("method", (settings.method.name,)):
        rows = catalogue.ROWS
        right = ", ".join(other for other, row in rows.items() if "dim" in row.varies)
        without = name in rows and "dim" not in rows[name].varies
        need("threshold", not without, f"but method {name!r} has no dim; {right} have one")
    values = tuple(swept.get("seed", (settings.seed,)))
    if settings.search.seeds:
        of_search = set(settings.search.seeds)
        need("seeds", set(values) <= of_search, f"must hold those of the sweep, {values}")
