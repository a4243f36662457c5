"""What is drawn of a sweep: which axis is x, which is colour, which makes panels, and which is at
its best. These functions choose rows of tables; the figures draw what they return."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorax.analysis import compare, runs
from lorax.analysis.figures import style

# How it was trained rather than what was trained: the first to be shown at their best.
NUISANCES = ("lr", "weight_decay", "dropout")
MOST_PANELS = 12  # of one figure; others are on further pages
MOST_POINTS = 6000  # of all learning curves of a figure
FEWEST_STEPS = 12  # of a learning curve
FULL = "full fine-tuning"


class Layout(NamedTuple):
    """How a figure of losses shows the axes of a sweep."""

    x: str
    colour: str | None = None
    panel: str | None = None
    best: tuple[str, ...] = ()  # axes that are at their best for each of the others

    @property
    def shown(self) -> tuple[str, ...]:
        """The axes that one can read off, x first."""
        return tuple(name for name in self[:3] if name is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """All axes of the sweep."""
        return (*self.shown, *self.best)


def has_order(values: Iterable) -> bool:
    """Whether the values of an axis are at least two different numbers; some may be missing."""
    present = {value for value in values if not runs.is_missing(value)}
    return len(present) > 1 and all(map(_is_number, present))


def distinct(values: Iterable) -> list:
    """The different values of an axis: numbers by size, then words in their order, then None."""
    found = dict.fromkeys(None if runs.is_missing(value) else value for value in values)
    numbers = sorted(value for value in found if _is_number(value))
    words = [value for value in found if not _is_number(value) and value is not None]
    return [*numbers, *words, *[None] * (None in found)]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------ which is what


def layout(table: pd.DataFrame, by: runs.Axes) -> Layout:
    """Which axis is drawn how.

    x is the first axis whose values are numbers, the learning rate and its like (`NUISANCES`) last;
    without such an axis it is the main one. Two more axes are shown; further ones and what was
    tuned are at their best. The learning rate and its like are the first to be at their best, then
    the last axes of the sweep. Of the two that are shown, the method has the colours, or else
    the axis with more numbers, or else the first; the other one makes panels.

    Args:
      table: rows of `runs.summary`.
      by: the sweep's axes, at least one.
    """
    late = lambda name: name in NUISANCES
    numbers = {name: table[name].nunique() if has_order(table[name]) else 0 for name in by.names}
    numeric = [name for name in by.names if numbers[name]]
    x = min(numeric, key=late) if numeric else by.main
    others = [name for name in by.names if name != x]
    shown = sorted(others, key=late)[:2]
    shown.sort(key=lambda name: (name != "method", -numbers[name]))
    colour, panel = [*shown, None, None][:2]
    best = [name for name in others if name not in shown]
    return Layout(x, colour, panel, (*best, *by.tuned))


def map_layout(table: pd.DataFrame, by: runs.Axes, y: str, x: str) -> Layout:
    """A map of two axes. Of the others, the first without an order makes panels, or else the first
    that is not like the learning rate; the rest is at its best. (`colour` is the axis of rows.)"""
    others = [name for name in by.fields if name not in (y, x)]
    late = lambda name: (name in NUISANCES, has_order(table[name]))
    panel = min(others, key=late, default=None)
    panel = None if panel in NUISANCES else panel
    return Layout(x, y, panel, tuple(name for name in others if name != panel))


def pairs(table: pd.DataFrame, by: runs.Axes) -> list[tuple[str, str]]:
    """Every two numeric axes as (rows, columns) of a map: the learning rate and its like are the
    columns, the maps of the main axis come first."""
    numeric = [name for name in by.fields if has_order(table[name])]
    numeric.sort(key=lambda name: name in NUISANCES)
    return [(y, x) for n, y in enumerate(numeric) for x in numeric[n + 1 :]]


# ------------------------------------------------------------------------------------ which members


def at_best(table: pd.DataFrame, shown: Sequence[str], best: Sequence[str]) -> pd.DataFrame:
    """The members with the best values of the axes `best`, for each combination of those `shown`:
    the values with the lowest mean loss over seeds on the validation rows.

    A setting of which a seed diverged or was stopped is taken only if there is no other.
    """
    if not best or table.empty:
        return table
    settings = table.assign(lost=table["status"].isin(runs.WITHOUT_RESULT)).groupby(
        [*shown, *best], dropna=False
    )
    # A mean over the seeds that are left would flatter a setting.
    order = pd.DataFrame(
        {
            "lost": settings["lost"].transform("any"),
            "mean": settings["final_loss"].transform("mean").fillna(np.inf),
            "setting": settings.ngroup(),
        }
    )
    first = order.sort_values(["lost", "mean", "setting"], kind="stable")
    if shown:
        of = [table.loc[first.index, name] for name in shown]
        chosen = set(first.groupby(of, dropna=False, sort=False)["setting"].first())
    else:
        chosen = {first["setting"].iloc[0]}
    return table[order["setting"].isin(chosen)]


def curve_members(table: pd.DataFrame, layout: Layout) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The members of curves, and those of the lines across, each at the best of its other axes:
    those without a number on an axis of numbers, and full fine-tuning beside other methods."""
    full = table["method"] == "full"
    across = full & (layout.x != "method") & ~full.all()
    if has_order(table[layout.x]):
        across |= table[layout.x].isna()
    rest = [name for name in layout.names if name != "method"]
    others = at_best(table[across], ("method",), rest)
    return at_best(table[~across], layout.shown, layout.best), others


def line_names(others: pd.DataFrame, points: pd.DataFrame, x: str) -> list[str]:
    """What the lines across are called: by the method, or if it also has points, by what x is."""
    return [
        FULL if method == "full" else f"{x} = {runs.in_words(None, x)}"
        if method in set(points["method"]) else str(method)
        for method in others["method"]
    ]  # fmt: skip


def of_panels(table: pd.DataFrame, name: str | None, values: Sequence | None) -> pd.DataFrame:
    """The rows whose axis `name` has one of the values; all if either is None."""
    if name is None or values is None:
        return table
    wanted = {runs.in_words(value, name) for value in values}
    return table[[runs.in_words(value, name) in wanted for value in table[name]]]


def panel_of(points: pd.DataFrame, by: runs.Axes) -> list[str]:
    """The title of each member's panel of learning curves: its values on the other axes, and
    whether it is full fine-tuning, if that is none of them."""
    full = (points["method"] == "full") & ("method" not in by.names)
    others = [runs.fields(row, by.others).replace("=", " = ") for _, row in points.iterrows()]
    named = [FULL * bool(is_full) for is_full in full]
    titles = [", ".join(filter(None, pair)) for pair in zip(named, others, strict=True)]
    return [title or "adapters" * bool(full.any()) for title in titles]


def is_setting(table: pd.DataFrame, setting: pd.Series | None, names: Iterable[str]) -> pd.Series:
    """Which members have the setting's values on these axes; none if it is None."""
    if setting is None:
        return pd.Series(False, table.index)
    return runs.alike(table, setting, [name for name in names if name in setting])


def lost(table: pd.DataFrame, names: Sequence[str]) -> pd.Series:
    """How many seeds of each member's setting diverged or were stopped."""
    by = [table[name] for name in names] or [pd.Series(0, table.index)]
    return (
        table["status"]
        .isin(runs.WITHOUT_RESULT)
        .groupby(by, dropna=False)
        .transform("sum")
        .astype(int)
    )


def thinned(curves: pd.DataFrame) -> pd.DataFrame:
    """Learning curves with fewer steps, if there are more than `MOST_POINTS` points: the same steps
    for all members, evenly spaced, and each member's last.

    curves: member, step, loss, by step.
    """
    steps = sorted(set(curves["step"]))
    count = max(FEWEST_STEPS, MOST_POINTS // max(1, curves["member"].nunique()))
    places = np.linspace(0, len(steps) - 1, min(count, len(steps)))
    kept = {steps[round(place)] for place in places}
    last = ~curves["member"].duplicated(keep="last")
    return curves[curves["step"].isin(kept) | last]


# ---------------------------------------------------------------------------------------- how large


def extent(losses: pd.Series, base: float | None) -> tuple[float, float]:
    """The ends of the axis of losses. It reaches to the base's loss if this is near; losses above
    the base's don't stretch it."""
    losses = losses[np.isfinite(losses)]
    if losses.empty:
        return 0.0, 1.0
    low, high = losses.min(), losses.max()
    if base is not None:
        high = max(low, min(high, base))
        if base <= high + 1.5 * (high - low):
            low, high = min(low, base), max(high, base)
    pad = 0.08 * (high - low) or 0.01
    return float(low - pad), float(high + pad)


def widened(
    ends: tuple[float, float], table: pd.DataFrame, names: Sequence[str], loss: str
) -> tuple[float, float]:
    """The ends of the axis, moved so that the 95% intervals of the settings' means fit; each by at
    most half of the axis, as two seeds have very wide ones.

    Args:
      ends: from `extent`.
      table, names: the members, and the axes whose values make a setting.
      loss: the column.
    """
    reached = table[~table["status"].isin(runs.WITHOUT_RESULT)]
    of = reached.groupby(list(names), dropna=False)[loss]
    half = compare.half_width(of.sem(), of.count(), style.LEVEL)
    most = 0.5 * (ends[1] - ends[0])
    inside = of.mean() <= ends[1]
    low, high = (of.mean() - half)[inside].min(), (of.mean() + half)[inside].max()
    low = ends[0] if np.isnan(low) else max(min(ends[0], low), ends[0] - most)
    high = ends[1] if np.isnan(high) else min(max(ends[1], high), ends[1] + most)
    return float(low), float(high)


def frontier(params: Sequence[float], losses: Sequence[float]) -> list[bool]:
    """Which settings no other beats with the same number of parameters or fewer."""
    order = sorted(range(len(params)), key=lambda n: (params[n], losses[n]))
    kept, best = [False] * len(params), np.inf
    for n in order:
        if losses[n] < best:
            kept[n], best = True, losses[n]
    return kept
