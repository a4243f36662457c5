"""Draws start_a_or_b.png from losses.csv.

python -m experiments.start_a_or_b.figure
"""

from pathlib import Path

import pandas as pd

from experiments import losses
from experiments.losses import Losses
from experiments.optima import edges, optima
from experiments.plotting import Row, drawn, intervals
from experiments.start_a_or_b.rule import BY, CELLS
from experiments.verdicts import numbers
from lorax.analysis import compare

HERE = Path(__file__).parent
NAMES = {cell: f"r = {cell[0]}, s = {cell[1]:g}" for cell in CELLS}


def main() -> None:
    tables = dict(list(numbers(HERE, "losses.csv").groupby("base")))
    bases = losses.read(HERE, BY)
    file = HERE / "start_a_or_b.png"
    with drawn(file, 2, len(bases), size=(3.5, 3.2)) as grid:
        for (rates, behind), (base, of) in zip(grid, bases.items(), strict=True):
            intervals(rates, of_rates(tables[base]))
            intervals(behind, of_losses(of))
            rates.set_xlabel("log2(best rate, a random / b random)")
            behind.set_xlabel("loss, b random less a random (nats)")
            for axes in (rates, behind):
                axes.set_title(base)


def of_rates(table: pd.DataFrame) -> list[Row]:
    """By how much the best rate of a random a is the larger one, in every cell and in the mean."""
    best = optima(table, BY)
    log = best.pivot(index="seed", columns=BY, values="best")
    more = pd.DataFrame({cell: log["kaiming", *cell] - log["init-b", *cell] for cell in CELLS})
    found = []
    for cell, name in NAMES.items():
        at = best[(best["rank"] == cell[0]) & (best["alpha"] == cell[1])]
        found.append(Row(name, compare.interval(more[cell]), more[cell], (0,), edges(at)))
    mean = more.mean(axis=1)
    return [*found, Row("mean", compare.interval(mean), mean, (0,), edges(best))]


def of_losses(of: Losses) -> list[Row]:
    """What a random b lacks at the best rates."""
    found, all_cells = [], {}
    for (r, s), name in NAMES.items():
        weights = {f"init-b, {r}, {s}": 1, f"kaiming, {r}, {s}": -1}
        found.append(lost(of, name, weights))
        all_cells |= {setting: sign / len(CELLS) for setting, sign in weights.items()}
    return [*found, lost(of, "mean", all_cells)]


def lost(of: Losses, name: str, weights: dict) -> Row:
    return Row(name, of.contrast(weights), of.of_seeds(weights), (0,), of.doubt(*weights))


if __name__ == "__main__":
    main()
