"""How many dimensions does fine-tuning a pretrained encoder take? See `experiments`."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.verdicts import WITHDRAWN, Verdict, by_interval, complete, numbers, shown, write
from lorax.analysis import intrinsic, runs
from lorax.analysis.compare import Interval

CLAIM = "a pretrained encoder has few intrinsic dimensions, fewer with a scale per layer"
SOURCE = "Aghajanyan et al. 2020 (arXiv:2012.13255), table 1 and figure 2"
RULE = (
    "d90 is the dimension at which the score reaches 90% of full fine-tuning's, with the interval "
    "of `lorax.analysis.intrinsic` (over seeds of the subspace and of the baseline). Few: the 95% "
    "interval lies below a thousandth of all parameters. Fewer with a scale per layer (SAID): the "
    "95% interval of log2(d90 of SAID / d90 of DID), of the two as independent, lies below 0. "
    "Pretraining lowers it: the same of pretrained against random weights, both measured against "
    "the pretrained model's goal; random weights whose full fine-tuning misses that goal need more "
    "dimensions than there are, and that is reproduced. A crossing outside the tested dimensions "
    "withdraws the number."
)
STUDY = "intrinsic_dimension_encoder"
COMMANDS = {
    "MiniLM": (f"python -m lorax.run --config=configs/{STUDY}.py",),
    "MiniLM CoLA": (f"python -m lorax.run --config=configs/{STUDY}.py:cola",),
}
FEW, SCALES, PRETRAINED = (
    "DID needs less than 0.1% of the parameters",
    "SAID needs fewer than DID",
    "pretraining lowers DID's d90",
)
PARTS = (FEW, SCALES, PRETRAINED)
SHARE, THRESHOLD = 1e-3, 0.9
METRIC = {"MiniLM": "accuracy", "MiniLM CoLA": "matthews"}


def collect(runs_of: dict[str, list[Path]], folder: Path) -> None:
    """points.csv: a row a member, of `lorax.analysis.intrinsic.points`, and whether the base is
    pretrained."""
    tables = []
    for base, (directory,) in runs_of.items():
        table = intrinsic.points(runs.load(directory))
        drawn = table["condition"].str.contains("random:") | table["shared"].str.contains("random:")
        table["weights"] = np.where(drawn, "random", "pretrained")
        table.insert(0, "base", base)
        columns = ["base", "weights", "kind", "method", "dim", "lr", "seed", "params", "status"]
        tables.append(table[[*columns, "start", "value"]])
    write(pd.concat(tables), folder, "points.csv")


def verdicts(folder: Path) -> list[Verdict]:
    table = numbers(folder, "points.csv")
    found = [v for base, of in table.groupby("base", sort=False) for v in of_base(base, of)]
    return complete(found, PARTS)


def of_base(base: str, table: pd.DataFrame) -> list[Verdict]:
    """The three verdicts on one task. table: of points.csv."""
    pretrained, drawn = (table[table["weights"] == name] for name in ("pretrained", "random"))
    total = int(pretrained.loc[pretrained["kind"] == "full", "params"].iloc[0])
    did, said = (log_d90(pretrained, name, METRIC[base]) for name in ("subspace", "said"))
    if not np.isfinite(did.value):
        why = "d90 of DID lies outside the tested dimensions"
        return [Verdict(part, base, WITHDRAWN, why) for part in PARTS]
    few = by_interval(did, "below", np.log2(SHARE * total))
    found = [Verdict(FEW, base, few, f"d90 {as_dimension(did)} of {total:,}", did)]
    found.append(compared(SCALES, base, said, did, "SAID's d90"))
    best = lambda of: best_of(of[of["kind"] == "full"])["value"].mean()
    if best(drawn) < THRESHOLD * best(pretrained):
        number = f"full fine-tuning of random weights reaches {best(drawn):.3f}, "
        number += f"the goal is {THRESHOLD * best(pretrained):.3f}"
        return [*found, Verdict(PRETRAINED, base, "reproduced", number)]
    goal = pd.concat([drawn[drawn["kind"] != "full"], pretrained[pretrained["kind"] == "full"]])
    control = log_d90(goal, "subspace", METRIC[base])
    return [*found, compared(PRETRAINED, base, did, control, "pretrained d90")]


def log_d90(table: pd.DataFrame, method: str, metric: str) -> Interval:
    """log2 of d90 with its interval; NaN if a curve does not cross what is needed."""
    own = table[(table["kind"] == "full") | (table["method"] == method)]
    own = own.assign(condition="", shared="", member=np.arange(len(own)))
    row = intrinsic.estimate(own, THRESHOLD, metric).iloc[0]
    return Interval(*np.log2([row["d"], row["low"], row["high"]]), over="seeds")


def best_of(table: pd.DataFrame) -> pd.DataFrame:
    """The members at the best rate of those that every seed has."""
    return table[table["lr"] == table.groupby("lr")["value"].mean().idxmax()]


def compared(part: str, base: str, a: Interval, b: Interval, what: str) -> Verdict:
    """The verdict on log2 of a smaller than b, two independent intervals."""
    if not np.isfinite([a.value, b.value]).all():
        return Verdict(part, base, WITHDRAWN, f"{what}: outside the tested dimensions")
    half = np.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)
    value = a.value - b.value
    ratio = Interval(value, value - half, value + half, over="seeds")
    number = f"{what} {as_dimension(a)} against {as_dimension(b)}, log2 of the ratio {shown(ratio)}"
    return Verdict(part, base, by_interval(ratio, "below"), number, ratio)


def as_dimension(log: Interval) -> str:
    """log2 of a dimension as the dimension with its interval."""
    return f"{2**log.value:,.0f} ({2**log.low:,.0f} to {2**log.high:,.0f})"
