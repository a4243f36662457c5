"""Verdicts, and the rules that claims share. Statistics come from `lorax.analysis.compare`.

A rule names a quantity and the side of a margin on which the claim puts it. The 95% interval
decides: all of it on that side, *reproduced*; on the other side, *contradicted*; else *undecided*.
"No difference" is a margin to both sides, and the 90% interval decides (two one-sided tests at 5%:
Schuirmann 1987). A number is *withdrawn* where the rule can't be applied to it, as for a best
learning rate at the edge of its grid, and a claim is *not run* where there are no numbers.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from lorax.analysis import compare
from lorax.analysis.compare import LEVEL, Interval
from lorax.errors import nearest

HERE = Path(__file__).parent
REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "contradicted", "undecided"
WITHDRAWN, NOT_RUN = "withdrawn", "not run"
WORDS = (REPRODUCED, CONTRADICTED, UNDECIDED, WITHDRAWN, NOT_RUN)
#: The ladder, smallest first, and the argument of the configs for each (`lorax.scales`). A base may
#: have a further word: "MiniLM CoLA" is another task, "MiniLM random" has random weights.
LADDER = {
    "gpt2-nano": None,
    "stories-llama-260k": "stories",
    "MiniLM": "minilm",
    "SmolLM2-135M": "smollm2",
}


class Verdict(NamedTuple):
    """What became of one part of a claim on one base."""

    part: str  # what is claimed, in a few words; the same for every base
    base: str  # "gpt2-nano", "MiniLM CoLA", "SmolLM2-135M random"
    verdict: str  # one of WORDS
    number: str  # that decides, with its interval; why, if it is withdrawn
    interval: Interval | None = None  # the same number, for comparison with another run's


# ------------------------------------------------------------------------------------------- rules


def by_interval(interval: Interval, side: str, margin: float = 0.0) -> str:
    """The verdict on "the value is above (below) the margin". interval: of 95%. side: "above" or
    "below". Undecided without an interval, as of one seed."""
    if side not in ("above", "below"):
        raise ValueError(f"side {side!r}: choose above or below")
    low, high = interval.low - margin, interval.high - margin
    if side == "below":
        low, high = -high, -low
    return REPRODUCED if low > 0 else CONTRADICTED if high < 0 else UNDECIDED


def by_equivalence(interval: Interval, low: float, high: float) -> str:
    """The verdict on "the value lies between low and high": reproduced if the whole interval does,
    contradicted if none of it. interval: of 90%."""
    if interval.low > low and interval.high < high:
        return REPRODUCED
    return CONTRADICTED if interval.low > high or interval.high < low else UNDECIDED


def by_signs(values: ArrayLike, side: str) -> str:
    """The verdict on "the value lies above (below) 0" by a two-sided sign test at 5% of values, one
    a seed: of ten seeds nine must agree (p = 0.02), five are too few. side: "above" or "below"."""
    above, below = (int((sign * np.asarray(values) > 0).sum()) for sign in (1, -1))
    right, wrong = (above, below) if side == "above" else (below, above)
    if stats.binomtest(max(right, wrong), len(values)).pvalue >= 1 - LEVEL:
        return UNDECIDED
    return REPRODUCED if right > wrong else CONTRADICTED


def all_of(verdicts: Iterable[str]) -> str:
    """The verdict on a claim that says several things: reproduced if all are, contradicted if one
    is, else undecided."""
    found = set(verdicts)
    if CONTRADICTED in found:
        return CONTRADICTED
    return REPRODUCED if found == {REPRODUCED} else UNDECIDED


def mapped(interval: Interval, function: Callable[[float], float]) -> Interval:
    """An interval of an increasing function of the value: of a ratio, by `np.exp`, from one of its
    logarithm."""
    value, low, high = map(function, interval[:3])
    return interval._replace(value=value, low=low, high=high)


def shown(interval: Interval, digits: int = 3) -> str:
    """An interval as text: "0.204 (0.182 to 0.226)"; only the value without an interval."""
    value = f"{interval.value:.{digits}f}"
    if not np.isfinite(interval.low):
        return value
    return f"{value} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


# ------------------------------------------------------------------------------------------- rates


class Tuned(NamedTuple):
    """The members of every setting at its best learning rate."""

    members: pd.DataFrame  # with their setting's `label` in a column "setting"
    doubts: dict[str, str]  # settings whose best rate is not known, and why

    def doubt(self, *settings: str) -> str:
        """Why the best rate of one of these settings, by default of any, is not known; "" if all
        are."""
        asked = settings or self.doubts
        return next((self.doubts[name] for name in asked if name in self.doubts), "")


ONE_RATE, AT_EDGE = "one learning rate", "at the edge of its grid"


def in_short(doubts: Iterable[str]) -> list[str]:
    """The kinds of `Tuned.doubts`, each once, as titles of figures say them."""
    kinds = {ONE_RATE: ONE_RATE, AT_EDGE: "a rate at the edge"}
    return [short for kind, short in kinds.items() if any(kind in doubt for doubt in doubts)]


def label(setting: Iterable) -> str:
    """A setting in words: ("q v", 8) is "q v, 8"."""
    return ", ".join(map(str, setting))


def tuned(table: pd.DataFrame, by: list[str], loss: str = "final_loss", rate: str = "lr") -> Tuned:
    """Every setting's members at its best rate: the lowest mean loss over seeds of the rates of
    which every seed has a loss. A rate with a seed that diverged is not eligible; nor is one that
    was stopped in favour of others (`sweep.tune`), but it counts as tried.

    table: a row a member, of all rates. by: columns that tell the settings apart. Raises ValueError
    that names a setting without an eligible rate.
    """
    best, doubts = [], {}
    for setting, members in table.groupby(by, dropna=False, sort=False):
        losses = members.groupby(rate)[loss].agg(lambda values: values.mean(skipna=False)).dropna()
        words = label(setting)
        if losses.empty:
            raise ValueError(f"{words}: no {rate} of which every seed has a {loss}")
        chosen = losses.idxmin()
        best.append(members[members[rate] == chosen].assign(setting=words))
        tried = sorted(set(members[rate]))
        if len(tried) == 1:
            doubts[words] = f"{ONE_RATE}, {chosen:g}"
        elif chosen in (tried[0], tried[-1]):
            doubts[words] = f"best rate of {words} {AT_EDGE}, {chosen:g}"
    return Tuned(pd.concat(best, ignore_index=True), doubts)


def crossed(values: pd.DataFrame, level: float = LEVEL) -> Interval:
    """The interval of the mean of values (K, L), a row a seed and a column a layer, over both: the
    layers of a seed are no samples of their own.

    The widest of three: of the crossed model (`lorax.analysis.compare`), over the seeds' means, and
    over the layers'. With so few of both, the crossed model's estimate of a part of the variance is
    often 0 by chance. A table of one row has the interval over its layers.
    """
    values = values.to_numpy(float)
    drawn = compare.bootstrap(values[None], np.ones(values.shape[1]))
    both = drawn.interval(lambda losses: losses[..., 0], level)
    each = [compare.interval(values.mean(axis), level) for axis in (0, 1)]
    known = [interval for interval in (both, *each) if np.isfinite(interval.low)]
    return max(known, key=lambda interval: interval.high - interval.low)


# ------------------------------------------------------------------------------------------ claims


def commands(config: str, *bases: str, flags: str = "") -> dict[str, tuple[str]]:
    """COMMANDS of a claim that one run of configs/`config`.py decides on each base."""
    return {
        base: (f"python -m lorax.run --config=configs/{config}.py{argument(base)} {flags}".strip(),)
        for base in bases
    }


def argument(base: str) -> str:
    """A base as an argument of the configs: "" for gpt2-nano, ":minilm-cola" for "MiniLM CoLA"."""
    model, *further = base.split(" ")
    words = [word for word in (LADDER[model], *further) if word]
    return f":{'-'.join(words).lower()}" if words else ""


def claims() -> list[str]:
    """Names of the folders that have a rule."""
    return sorted(file.parent.name for file in HERE.glob("*/rule.py"))


def rule(claim: str) -> ModuleType:
    """The rule of a claim's folder. Raises ValueError for a name that there is not."""
    if claim not in claims():
        known = ", ".join(claims())
        raise ValueError(f"no claim {claim!r}: choose {known}{nearest(claim, claims())}")
    return importlib.import_module(f"experiments.{claim}.rule")


def numbers(folder: Path, name: str) -> pd.DataFrame:
    """A CSV of a claim; an empty table, with the column "base", if there is none yet."""
    file = folder / name
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["base"])


def texts(column: pd.Series) -> pd.Series:
    """A CSV's column of texts, "" where it has none: which pandas reads as NaN."""
    return column.astype(object).where(column.notna(), "")


def write(table: pd.DataFrame, folder: Path, name: str) -> None:
    """Write a claim's CSV, six digits a number. Rows of bases that the table does not have stay
    as they are: bases are run one at a time. table: with a column "base"."""
    kept = numbers(folder, name)
    kept = kept[~kept["base"].isin(set(table["base"]))]
    whole = pd.concat([kept, table]) if len(kept) else table
    order = [base for base in LADDER if base in set(whole["base"])]
    order += sorted(set(whole["base"]) - set(order))
    whole = whole.sort_values("base", key=lambda of: of.map(order.index), kind="stable")
    whole.to_csv(folder / name, index=False, float_format="%.6g")


def copied(runs: Mapping[str, list[Path]], folder: Path, *names: str) -> None:
    """`collect` of a claim whose own script writes the CSVs: each base's rows of those that its
    last command has written."""
    for name in names:
        tables = [pd.read_csv(directories[-1] / name) for directories in runs.values()]
        own = [of[of["base"] == base] for base, of in zip(runs, tables, strict=True)]
        write(pd.concat(own), folder, name)


def means_only(folder: Path, name: str, parts: Iterable[str], have: Iterable[str]) -> list[Verdict]:
    """Verdicts of the bases of a first run's CSV of which only means over the seeds were kept: its
    numbers are withdrawn until the base is run again. have: the bases that were."""
    bases = [base for base in dict.fromkeys(numbers(folder, name)["base"]) if base not in set(have)]
    why = "until it is run again: only means over seeds were kept"
    return [Verdict(part, base, WITHDRAWN, why) for base in bases for part in parts]


def complete(
    verdicts: Iterable[Verdict], parts: Iterable[str], bases: Iterable[str] = tuple(LADDER)
) -> list[Verdict]:
    """All verdicts on parts of a claim, part by part, in the order of the bases; "not run" for the
    bases that have none, and verdicts on other bases last. Raises ValueError for a part that is not
    in `parts`, and for a part and base that have two verdicts."""
    found, parts = {}, list(parts)
    for verdict in verdicts:
        place = (verdict.part, verdict.base)
        if verdict.part not in parts or place in found:
            raise ValueError(f"{place}: the verdict is of no part of {parts}, or a second one")
        found[place] = verdict
    others = [base for _, base in found if base not in set(bases)]
    pairs = [
        (part, base)
        for part in parts
        for base in (*bases, *dict.fromkeys(others))
        if base in bases or (part, base) in found
    ]
    return [found.get(pair, Verdict(*pair, NOT_RUN, "")) for pair in pairs]
