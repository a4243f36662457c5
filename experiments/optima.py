"""The best learning rate between the rates that were tried, seed by seed, and its slopes."""

import numpy as np
import pandas as pd

LOWEST, HIGHEST = "lowest tried", "highest tried"


def vertex(rates: np.ndarray, losses: np.ndarray) -> tuple[float, str]:
    """(log2 of the best rate, "" or LOWEST or HIGHEST).

    The vertex of the parabola in log2 of the rate through the lowest loss and its two neighbours.
    rates ascending, losses of one seed, NaN where it diverged. A lowest loss that lacks a neighbour
    on one side is at the edge of the grid, and the rate is no optimum.
    """
    x = np.log2(rates)
    lowest = int(np.nanargmin(losses))
    if lowest == 0:
        return x[0], LOWEST
    if lowest == len(x) - 1 or np.isnan(losses[lowest + 1]):
        return x[lowest], HIGHEST
    three = slice(lowest - 1, lowest + 2)
    a, b, _ = np.polyfit(x[three] - x[lowest], losses[three], 2)
    return x[lowest] - b / (2 * a), ""


def optima(
    table: pd.DataFrame, by: list[str], rate: str = "lr", loss: str = "validation"
) -> pd.DataFrame:
    """A row a setting (`by`) and seed: `best`, log2 of its best rate, and `edge`; see `vertex`.

    table: a row a member. rate: the column that is tuned. Settings that were trained with fewer
    than three rates have no row.
    """
    rows = []
    for (*setting, seed), members in table.groupby([*by, "seed"], sort=False):
        members = members.sort_values(rate)
        if len(members) < 3 or members[loss].isna().all():
            continue
        best, edge = vertex(members[rate].to_numpy(float), members[loss].to_numpy(float))
        rows.append(
            dict(zip(by, setting, strict=True)) | {"seed": seed, "best": best, "edge": edge}
        )
    return pd.DataFrame(rows, columns=[*by, "seed", "best", "edge"])


def slopes(best: pd.DataFrame, over: str = "rank") -> np.ndarray:
    """One a seed: the slope of `best` on log2 of the column `over`, by least squares."""
    return np.array(
        [np.polyfit(np.log2(of[over]), of["best"], 1)[0] for _, of in best.groupby("seed")]
    )


def edges(best: pd.DataFrame) -> str:
    """What is wrong with the optima: "2 of 12 at the edge of the grid"; "" for nothing."""
    count = int((best["edge"] != "").sum())
    return f"{count} of {len(best)} best values at the edge of the grid" if count else ""
