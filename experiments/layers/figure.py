"""Attention or feed-forward, at as many parameters? Reads runs of configs/mlp_vs_attention.py.

    python -m experiments.layers.figure runs/mlp_vs_attention runs/mlp_vs_attention-stories

Writes layers.csv and layers.png beside itself and prints the tables of the README.
"""

import pathlib

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from experiments import sweeps
from experiments.plotting import STYLE
from lorax.analysis import runs

HERE = pathlib.Path(__file__).parent

found = sweeps.read("mlp_vs_attention", __doc__)
drawn = []
with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(4.0 * len(found), 3.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, sweep in zip(panels, found, strict=True):
        means = runs.settings(sweep.table, runs.Axes("lr", ("targets", "rank")))
        best = sweeps.best_rates(sweep.table, ["targets"]).set_index("seed")
        attention = best.loc[best["targets"] == "attention", "final_loss"]
        rows = []
        for n, (targets, own) in enumerate(means.groupby("targets")):
            rank, size = own["rank"].iloc[0], own["trainable_params"].iloc[0]
            label = f"{targets}, r = {rank}"
            sweeps.line(axes, n, own["lr"], own["mean"], own["se"], label)
            at_best = best[best["targets"] == targets]
            rows.append({"targets": targets, "r": rank, "parameters": f"{size:,}"})
            for row in own.itertuples():
                rows[-1][f"at {row.lr:.2g}"] = f"{row.mean:.3f} ± {row.se:.3f}"
            rows[-1]["best rate"] = f"{at_best['lr'].iloc[0]:.2g}"
            if targets != "attention":
                less = at_best["final_loss"] - attention
                rows[-1]["at its best, less attention"] = sweeps.words(less)
        axes.set_xscale("log")
        rates = sorted(means["lr"].unique())
        axes.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
        axes.minorticks_off()
        axes.set_title(sweep.size)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("final eval loss (nats)")
        axes.margins(x=0.2)
        axes.legend()
        drawn.append(means.assign(base=sweep.size))
        print(f"{sweep.size}: final eval loss; {sweep.table['base_loss'].iloc[0]:.3f} before\n")
        sweeps.markdown(rows)
        both = best.pivot(columns="targets", values="final_loss")
        less = sweeps.words(both["all-linear"] - both["mlp"])
        print(f"all-linear less mlp, each at its best: {less}\n")
    figure.savefig(HERE / "layers.png", dpi=150)
columns = ["base", "targets", "rank", "trainable_params", "lr", "mean", "se", "n", "diverged"]
pd.concat(drawn)[columns].to_csv(HERE / "layers.csv", index=False, float_format="%.5g")
