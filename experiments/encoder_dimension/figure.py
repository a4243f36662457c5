"""Draws encoder_dimension.png from points.csv.

python -m experiments.encoder_dimension.figure
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.dimensions import THRESHOLD, difference, log_d90
from experiments.encoder_dimension.rule import METRIC, SHARE, full_score
from experiments.plotting import COLOURS, THIN, Row, drawn, intervals, legend, line
from experiments.verdicts import numbers
from lorax.analysis import intrinsic
from lorax.analysis.compare import Interval

HERE = Path(__file__).parent
#: line: (method, weights)
LINES = {
    "DID": ("subspace", "pretrained"),
    "SAID": ("said", "pretrained"),
    "DID, random weights": ("subspace", "random"),
    "SAID, random weights": ("said", "random"),
}


def main() -> None:
    bases = list(numbers(HERE, "points.csv").groupby("base", sort=False))
    file, heights = HERE / "encoder_dimension.png", (5, 2)
    with drawn(file, len(bases), 2, size=(3.5, 2.3), height_ratios=heights) as grid:
        for (curves, ratios), (base, table) in zip(grid.T, bases, strict=True):
            d90 = draw(curves, table, METRIC[base])
            curves.set_title(base)
            intervals(ratios, rows(d90))
            ratios.set_xlabel("log2 of the ratio of d90")
        legend(grid, 2)


def draw(axes, table: pd.DataFrame, metric: str) -> dict[str, Interval]:
    """Scores by dimension at the best rates, 90% of the pretrained model's full fine-tuning with
    d90 on it, a thick bar, and a thousandth of all parameters. Returns each line's log2 of d90."""
    full = table[(table["kind"] == "full") & (table["weights"] == "pretrained")]
    goal, found = THRESHOLD * full_score(full, metric), {}
    for n, (name, (method, weights)) in enumerate(LINES.items()):
        own = table[(table["method"] == method) & (table["weights"] == weights)]
        if own.empty:
            continue
        best = intrinsic.tuned(own, "dim", metric)
        line(axes, n, best.pivot(index="dim", columns="seed", values="value"), name)
        found[name] = log_d90(pd.concat([own, full]), method, metric)
        d90, low, high = 2 ** np.array(found[name][:3])
        style = {"color": COLOURS[n], "fmt": "|", "capsize": 3, "elinewidth": 3}
        axes.errorbar([d90], [goal], xerr=[[d90 - low], [high - d90]], **style)
    axes.axhline(goal, **THIN)
    axes.axvline(SHARE * full["params"].iloc[0], **THIN)
    axes.set_xscale("log")
    axes.set_xlabel("dimensions of the subspace")
    axes.set_ylabel({"accuracy": "accuracy", "matthews": "Matthews correlation"}[metric])
    return found


def rows(d90: dict[str, Interval]) -> list[Row]:
    """SAID against DID, and pretrained against random weights: no marker where a d90 lies outside
    the tested dimensions."""
    pairs = {
        "SAID / DID": ("SAID", "DID"),
        "pretrained /\nrandom, DID": ("DID", "DID, random weights"),
    }
    return [
        Row(words, difference(d90[a], d90[b]), margins=(0,))
        for words, (a, b) in pairs.items()
        if a in d90 and b in d90
    ]


if __name__ == "__main__":
    main()
