"""Where is the best learning rate, at each rank? Reads runs of configs/lr_vs_rank.py.

    python -m experiments.learning_rate.figure runs/lr_vs_rank runs/lr_vs_rank-alpha4 \\
        runs/lr_vs_rank-stories

Writes curves.csv, optima.csv and learning_rate.png beside itself and prints the tables of the
README.
"""

import pathlib

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import sweeps
from experiments.plotting import STYLE
from lorax.analysis import runs

HERE = pathlib.Path(__file__).parent


def optimum(rates: np.ndarray, losses: np.ndarray) -> tuple[float, str]:
    """(log10 of the best learning rate, "" or what is wrong with it).

    The vertex of the parabola in log10 of the rate through the lowest loss and its two neighbours.
    rates ascending, losses of one seed, NaN where it diverged. A lowest loss that has no neighbour
    on one side is the best of the grid and no more: "lowest tried", "highest tried" say which.
    """
    x = np.log10(rates)
    lowest = int(np.nanargmin(losses))
    if lowest == 0:
        return x[0], "lowest tried"
    if lowest == len(x) - 1 or np.isnan(losses[lowest + 1]):
        return x[lowest], "highest tried"
    three = slice(lowest - 1, lowest + 2)
    a, b, _ = np.polyfit(x[three], losses[three], 2)
    return -b / (2 * a), ""


def optima(table: pd.DataFrame) -> pd.DataFrame:
    """A row a method, rank and seed: log10 of its best learning rate (`best`) and `edge`."""
    rows = []
    for (method, rank, seed), own in table.groupby(["method", "rank", "seed"]):
        own = own.sort_values("lr")
        best, edge = optimum(own["lr"].to_numpy(), own["final_loss"].to_numpy())
        rows.append({"method": method, "rank": rank, "seed": seed, "best": best, "edge": edge})
    return pd.DataFrame(rows).sort_values(["method", "rank"], ascending=[False, True])


def factor(logs) -> str:
    """Geometric mean and the factor of its standard error, of log10s: "9.8 (×/÷ 1.1)"."""
    return f"{10 ** np.mean(logs):.2g} (×/÷ {10 ** sweeps.standard_error(logs):.2f})"


found = sweeps.read("lr_vs_rank", __doc__)
curves, bests = [], []
with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(3.6 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, sweep in zip(panels, found, strict=True):
        means = runs.settings(sweep.table, runs.Axes("lr", ("method", "rank")))
        means = means.sort_values(["method", "rank", "lr"], ascending=[False, True, True])
        lines = list(means.groupby(["method", "rank"], sort=False))
        for n, ((method, rank), own) in enumerate(lines):
            sweeps.line(axes, n, own["lr"], own["mean"], own["se"], sweeps.name(method, rank))
        axes.set_xscale("log")
        alpha = sweep.table["alpha"].max()  # full fine-tuning has none
        axes.set_title(f"{sweep.size}, α = {alpha:g}")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("final eval loss (nats)")
        axes.legend()
        curves.append(means.assign(base=sweep.size, alpha=alpha))

        before = sweep.table["base_loss"].iloc[0]
        print(f"{sweep.size}, α = {alpha:g}: final eval loss; {before:.3f} before\n")
        rates = [f"{rate:.2g}" for rate in lines[0][1]["lr"]]  # LoRA's
        rows = []
        for (method, rank), own in lines:
            losses = [f"{row.mean:.3f} ± {row.se:.3f}" for row in own.itertuples()]
            rows.append({"": sweeps.name(method, rank)} | dict(zip(rates, losses, strict=True)))
        sweeps.markdown(rows)  # full fine-tuning's rates are a tenth of the heads

        best = optima(sweep.table).set_index("seed")
        full = best.loc[best["method"] == "full", "best"]
        rows = []
        for (method, rank), own in best.groupby(["method", "rank"], sort=False):
            edges = own.loc[own["edge"] != "", "edge"].value_counts()
            rows.append(
                {
                    "": sweeps.name(method, rank),
                    "best rate": factor(own["best"]),
                    "times full fine-tuning's": factor(own["best"] - full),
                    "seeds at the grid's edge": ", ".join(f"{n} {e}" for e, n in edges.items()),
                }
            )
        sweeps.markdown(rows)
        lora = best[best["method"] == "lora"].groupby("seed")["best"]
        print(f"LoRA's largest over its smallest, per seed: {factor(lora.max() - lora.min())}\n")
        bests.append(best.reset_index().assign(base=sweep.size, alpha=alpha))
    figure.savefig(HERE / "learning_rate.png", dpi=150)
columns = ["base", "alpha", "method", "rank", "lr", "mean", "se", "n", "diverged"]
pd.concat(curves)[columns].to_csv(HERE / "curves.csv", index=False, float_format="%.5g")
table = pd.concat(bests)
table["best"] = 10 ** table["best"]
columns = ["base", "alpha", "method", "rank", "seed", "best", "edge"]
table[columns].to_csv(HERE / "optima.csv", index=False, float_format="%.4g")
