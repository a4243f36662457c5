"""How does memory grow with the rank and fall with the length? See `experiments`."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import optimize

from experiments import sweeps
from experiments.verdicts import (
    WITHDRAWN,
    Verdict,
    by_interval,
    commands,
    complete,
    numbers,
    shown,
    tuned,
    write,
)
from lorax.analysis import compare

CLAIM = "what LoRA takes off the loss of random strings goes as C r^a l^-b + c"
SOURCE = "arXiv:2605.30260"
FITS, MARGIN = 0.95, 0.02
RULE = (
    "The reduction is the loss before training less that after, a token, the mean over seeds at "
    "the best rate, in cells of rank r and length l. Every law is fitted to two thirds of the "
    "cells, and R^2 is that of the others, over 200 draws of the third. It holds if the 95% range "
    "of its R^2 lies above 0.95, not if below; it beats a rival if the range of the difference of "
    "R^2 lies above 0.02, not if below. Rivals: C r^a l^-b without c; a log r + b log l + c; a "
    "capacity of C r that fills the strings up, min(L, C r / l). A best rate at the edge of its "
    "grid withdraws the numbers."
)
STUDY = "memory_law"
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
#: law: (function of the rank r, the length n and its constants, where the fit begins)
LAWS = {
    "the law": (lambda r, n, c, a, b, d: c * r**a * n**-b + d, (1.0, 0.5, 0.5, 0.0)),
    "no constant": (lambda r, n, c, a, b: c * r**a * n**-b, (1.0, 0.5, 0.5)),
    "logarithms": (lambda r, n, a, b, c: a * np.log(r) + b * np.log(n) + c, (1.0, -1.0, 1.0)),
    "a capacity": (lambda r, n, most, c: np.minimum(most, c * r / n), (7.0, 50.0)),
}
HOLDS = "R^2 of held-out cells above 0.95"
PARTS = (HOLDS, *(f"beats {name}" for name in list(LAWS)[1:]))
DRAWS = 200


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    """reductions.csv: a row a member that was trained to the end, or stopped."""
    found = []
    for base, sweep in sweeps.each(runs, STUDY):
        columns = ["rank", "lr", "seed", "status", "base_loss", "final_loss"]
        table = sweep.table[columns].copy()
        table.insert(0, "base", base)
        table.insert(1, "length", sweep.table["train.seq_len"])
        found.append(table)
    write(pd.concat(found), folder, "reductions.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, table in numbers(folder, "reductions.csv").groupby("base", sort=False):
        of = tuned(table, ["rank", "length"])
        if of.doubts:
            cells = of.members.groupby(["rank", "length"]).ngroups
            why = f"{len(of.doubts)} of {cells} best rates at the edge of the grid"
            found += [Verdict(part, base, WITHDRAWN, why) for part in PARTS]
            continue
        best = of.members.assign(reduction=of.members["base_loss"] - of.members["final_loss"])
        cells = best.groupby(["rank", "length"])["reduction"].mean().reset_index()
        held_out = scores(cells)
        holds = over_draws(held_out["the law"])
        number = f"R^2 {shown(holds)}"
        found.append(Verdict(HOLDS, base, by_interval(holds, "above", FITS), number, holds))
        for name in list(LAWS)[1:]:
            better = over_draws(held_out["the law"] - held_out[name])
            verdict = by_interval(better, "above", MARGIN)
            number = f"R^2 higher by {shown(better)}"
            found.append(Verdict(f"beats {name}", base, verdict, number, better))
    return complete(found, PARTS)


def scores(cells: pd.DataFrame) -> pd.DataFrame:
    """A row a draw of held-out cells, a column a law: R^2 of these cells."""
    rng, rows = np.random.default_rng(0), []
    r, n, y = (cells[name].to_numpy(float) for name in ("rank", "length", "reduction"))
    for _ in range(DRAWS):
        out = np.zeros(len(cells), bool)
        out[rng.permutation(len(cells))[: len(cells) // 3]] = True
        rows.append(
            {name: r_squared(law, start, r, n, y, out) for name, (law, start) in LAWS.items()}
        )
    return pd.DataFrame(rows)


def r_squared(law, start, r, n, y, out) -> float:
    """Of the cells in `out`, after a least-squares fit to the others."""
    residual = lambda constants: law(r[~out], n[~out], *constants) - y[~out]
    fit = optimize.least_squares(residual, start, x_scale="jac", max_nfev=500)
    left = law(r[out], n[out], *fit.x) - y[out]
    return 1 - (left**2).sum() / ((y[out] - y[out].mean()) ** 2).sum()


def over_draws(values: pd.Series) -> compare.Interval:
    """The median and the central 95%."""
    low, middle, high = np.quantile(values, (0.025, 0.5, 0.975))
    return compare.Interval(float(middle), float(low), float(high), "cells")
