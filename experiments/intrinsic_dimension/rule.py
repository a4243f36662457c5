"""Is d90 as published?"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.dimensions import difference
from experiments.verdicts import (
    UNDECIDED,
    WITHDRAWN,
    Verdict,
    all_of,
    by_equivalence,
    by_interval,
    complete,
    mapped,
    numbers,
    shown,
    texts,
)
from lorax.analysis import intrinsic, runs
from lorax.analysis.compare import Interval

CLAIM = "d90 of MNIST is about 750; SAID needs fewer dimensions than DID; pretraining lowers d90"
SOURCE = "Li et al. (arXiv:1804.08838); Aghajanyan et al. (arXiv:2012.13255)"
SEEDS, STEEP = 3, 0.02
RULE = """\
d90 is where a seed's curve, each dimension at its best rate, crosses 90% of full training's
accuracy (of a loss: of its fall); its 95% interval is over seeds, the baseline's error included.
MNIST is as published if the interval lies within a factor of two of the published number, which is
the smallest of a coarse grid. LeNet needs less than the fully connected network if the interval of
the ratio lies below 1; shuffled pixels raise LeNet's if it lies above 1, and not that of the other
if it lies within a factor of 1.5. SAID needs less than DID, and the longest pretraining less than
the shortest, if the ratio's lies below 1. Fewer than three seeds that cross leave it undecided. A
best rate at the edge of its grid beside the crossing withdraws the number where the next rate loses
more than 2% of the gain: the optimum may lie beyond."""
MNIST, NANO, OLDER = "MNIST networks", "gpt2-nano", "gpt2-nano pretraining"
FILES = {MNIST: "mnist", NANO: "gpt2_nano", OLDER: "pretraining"}
STUDY = "python -m lorax.run --config=configs/intrinsic_dimension_"
PRETRAIN = "python -m experiments.gpt2_nano.pretrain"
COMMANDS = {
    MNIST: (f"{STUDY}mnist.py",),
    NANO: (f"{STUDY}gpt2_nano.py",),
    OLDER: (PRETRAIN, f"{STUDY}gpt2_nano.py:{{1}}"),
}
MINUTES = {MNIST: 36, NANO: 10, OLDER: 32}
FC, FC_SHUFFLED, LENET, LENET_SHUFFLED = (
    f"base=random:mnist-{net}, shuffle={shuffle}"
    for net in ("fc", "lenet")
    for shuffle in (False, True)
)
PUBLISHED = {FC: 750, FC_SHUFFLED: 750, LENET: 290, LENET_SHUFFLED: 1400}
PARTS = (
    "d90 is 750, 290 (LeNet), 1,400 (LeNet, shuffled) within a factor of two",
    "LeNet needs less",
    "shuffled pixels raise LeNet's alone",
    "SAID needs less than DID",
    "a longer pretraining needs less",
)


def collect(of: dict[str, list[Path]], folder: Path) -> None:
    """Writes a table of points (`lorax.analysis.intrinsic`) a search."""
    for base, directories in of.items():
        points = intrinsic.points(runs.load(directories[-1]))
        points.to_csv(folder / f"{FILES[base]}_points.csv", index=False)


def verdicts(folder: Path) -> list[Verdict]:
    tables = {base: numbers(folder, f"{name}_points.csv") for base, name in FILES.items()}
    d90s = {
        base: D90s(points, "accuracy" if base == MNIST else "loss")
        for base, points in tables.items()
        if len(points)
    }
    pairs = {NANO: ("method=said", "method=subspace"), OLDER: ("base=gpt2-nano", "base=step200")}
    mnist = of_mnist(d90s[MNIST]) if MNIST in d90s else []
    said, older = (
        [d90s[base].ratio(part, base, *pairs[base], "below")] if base in d90s else []
        for part, base in zip(PARTS[3:], pairs, strict=True)
    )
    return [
        *complete(mnist, PARTS[:3], (MNIST,)),
        *complete(said, PARTS[3:4]),
        *complete(older, PARTS[4:], (OLDER,)),
    ]


class D90s:
    """d90 of every condition of a table of points."""

    def __init__(self, points: pd.DataFrame, metric: str):
        points = points.assign(**{x: texts(points[x]) for x in ("condition", "shared")})
        self.points, self.metric = points, metric
        self.rows = intrinsic.estimate(points, 0.9, metric).set_index("condition")

    def doubt(self, *conditions: str) -> tuple[str, str] | None:
        """What is wrong with the d90 of one of these: a verdict's word and its reason."""
        for condition in conditions:
            row = self.rows.loc[condition]
            if row["seeds"] < SEEDS or row["n"] < row["seeds"]:
                words = f"{row['n']} of {row['seeds']} seeds cross ({condition})"
                return UNDECIDED, f"{intrinsic.brief(row)}: {words}"
            if words := self.at_edge(condition):
                return WITHDRAWN, f"{intrinsic.brief(row)}: {words}"
        return None

    def at_edge(self, condition: str) -> str:
        """Whether the best rate is at the edge of a steep grid, at a dimension beside the
        crossing."""
        row = self.rows.loc[condition]
        points, _ = intrinsic.points_of(self.points, condition)
        dims = np.array(sorted(set(points["dim"])))
        beside = [dims[dims <= row["d"]].max(), dims[dims >= row["d"]].min()]
        sign = 1 if self.metric == "loss" else -1
        for dim in beside:
            at = sign * points[points["dim"] == dim].groupby("lr")["value"].mean()
            best, steep = at.idxmin(), STEEP * abs(row["start"] - row["baseline"])
            others = at.drop(best)
            if best in (at.index[0], at.index[-1]) and others.min() - at[best] > steep:
                return f"best rate at d = {dim:,.0f} at the edge of its grid, {best:g}"
        return ""

    def interval(self, condition: str) -> Interval:
        row = self.rows.loc[condition]
        return Interval(row["d"], row["low"], row["high"], "seeds")

    def over(self, a: str, b: str) -> Interval:
        """d90 of a over that of b; their intervals are independent in the logarithm."""
        logs = (mapped(self.interval(condition), np.log) for condition in (a, b))
        return mapped(difference(*logs), np.exp)

    def ratio(self, part: str, base: str, a: str, b: str, side: str) -> Verdict:
        """Whether d90 of a over that of b lies on that side of 1."""
        if doubt := self.doubt(a, b):
            return Verdict(part, base, *doubt)
        x = self.over(a, b)
        return Verdict(part, base, by_interval(x, side, 1.0), f"{shown(x, 2)} times", x)


def of_mnist(of: D90s) -> list[Verdict]:
    found = []
    if doubt := of.doubt(*PUBLISHED):
        return [Verdict(part, MNIST, *doubt) for part in PARTS[:3]]
    intervals = {condition: of.interval(condition) for condition in PUBLISHED}
    near = all_of(
        by_equivalence(x, PUBLISHED[name] / 2, 2 * PUBLISHED[name]) for name, x in intervals.items()
    )
    number = "; ".join(shown(intervals[c], 0) for c in (FC, LENET, LENET_SHUFFLED))
    found.append(Verdict(PARTS[0], MNIST, near, number, intervals[FC]))
    found.append(of.ratio(PARTS[1], MNIST, LENET, FC, "below"))
    raised, same = of.over(LENET_SHUFFLED, LENET), of.over(FC_SHUFFLED, FC)
    verdict = all_of([by_interval(raised, "above", 1.0), by_equivalence(same, 1 / 1.5, 1.5)])
    number = f"{shown(raised, 2)} times; the other {shown(same, 2)}"
    return [*found, Verdict(PARTS[2], MNIST, verdict, number, raised)]
