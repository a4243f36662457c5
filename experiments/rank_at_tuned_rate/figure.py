"""Draws rank_at_tuned_rate.png from losses.csv.

python -m experiments.rank_at_tuned_rate.figure
"""

from pathlib import Path

import pandas as pd

from experiments import losses
from experiments.losses import START, Losses
from experiments.plotting import Row, drawn, intervals, legend, line, ticks
from experiments.rank_at_tuned_rate.rule import BY, COMMON, PLAIN, SHARE, SQRT
from experiments.verdicts import numbers
from lorax.analysis import compare

HERE = Path(__file__).parent
SCALES = {"s = α / √r": SQRT, "s = α / r": PLAIN}


def main() -> None:
    tables = dict(list(numbers(HERE, "losses.csv").groupby("base")))
    bases = losses.read(HERE, BY)
    file = HERE / "rank_at_tuned_rate.png"
    with drawn(file, 3, len(bases), size=(2.5, 2.8)) as grid:
        for (one, best, falls), (base, of) in zip(grid, bases.items(), strict=True):
            at_one = at_one_rate(tables[base])
            by_rank(one, at_one, "validation")
            by_rank(best, of.members, of.split)
            one.set_title(f"{base}, rate {at_one['lr'].iloc[0]:g}")
            best.set_title("each at its best rate")
            intervals(falls, rows(tables[base], at_one, of))
            falls.set_xlabel("fall from r = 2 to 32 (nats)")
        legend(grid)


def at_one_rate(table: pd.DataFrame) -> pd.DataFrame:
    """The members at the rate that is best for r = 8."""
    means = table.groupby(["rank", "alpha", "lr"])["validation"].mean()
    return table[table["lr"] == means[COMMON].idxmin()]


def by_rank(axes, members: pd.DataFrame, split: str) -> None:
    for n, (name, scales) in enumerate(SCALES.items()):
        cells = members["rank"].map(scales | dict([COMMON])) == members["alpha"]
        line(axes, n, members[cells].pivot(index="rank", columns="seed", values=split), name)
    ticks(axes, sorted(set(members["rank"])))
    axes.set_xlabel("rank r of the adapter")
    axes.set_ylabel(f"{split} loss (nats a token)")


def rows(table: pd.DataFrame, at_one: pd.DataFrame, of: Losses) -> list[Row]:
    """The falls at one rate with 95% intervals, and by how much they differ at the best rates, with
    that of 90%."""
    at = at_one.set_index(["rank", "alpha", "seed"])["validation"].sort_index()
    means = table.groupby(["rank", "alpha", "lr"])["validation"].mean()
    margin = SHARE * (table["start"].iloc[0] - means.min())
    found = []
    for name, scales in SCALES.items():
        fall = at[2, scales[2]] - at[32, scales[32]]
        found.append(
            Row(f"{name.removeprefix('s = ')},\none rate", compare.interval(fall), fall, (margin,))
        )
    cells = [f"kaiming, {r}, {scales[r]}" for scales in (SQRT, PLAIN) for r in (2, 32)]
    weights = dict(zip(cells, (1, -1, -1, 1), strict=True))
    margin = SHARE * max(of.contrast({START: 1, cell: -1}).value for cell in cells)
    differ = of.contrast(weights, level=0.9)
    name, seeds = "difference,\nbest rates\n(90%)", of.of_seeds(weights)
    return [*found, Row(name, differ, seeds, (-margin, margin), of.doubt(*cells))]


if __name__ == "__main__":
    main()
