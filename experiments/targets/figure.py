"""Which matrices should a fixed budget go to? Reads runs of configs/lora_table5_targets.py.

    python -m experiments.targets.figure runs/lora_table5_targets runs/lora_table5_targets-stories

Writes losses.csv and targets.png beside itself and prints the tables of the README.
"""

import pathlib

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from experiments import sweeps
from experiments.plotting import COLOURS, MARKERS, STYLE
from lorax.analysis import runs

HERE = pathlib.Path(__file__).parent
ONE = ["q", "k", "v", "o"]  # matrices that get the whole budget

found = sweeps.read("lora_table5_targets", __doc__)
tables = []
for sweep in found:
    # A row a seed. Members of a seed have the same batches: differences are taken seed by seed.
    losses = sweep.table.pivot(index="seed", columns="targets", values="final_loss")
    best = losses[ONE].mean().idxmin()
    means = runs.settings(sweep.table, runs.Axes("rank", ("targets",))).sort_values("mean")
    print(f"{sweep.size}: eval loss ({sweep.table['base_loss'].mean():.3f} before training)\n")
    rows = []
    for own in means.itertuples():
        of_targets = losses[own.targets]
        row = {"targets": own.targets, "r": own.rank, "parameters": f"{own.trainable_params:,}"}
        row["eval loss"] = sweeps.words(of_targets)
        for other in (best, "q v"):
            row[f"minus {other}, seed by seed"] = sweeps.words(of_targets - losses[other])
        rows.append(row | {f"seed {seed}": f"{loss:.3f}" for seed, loss in of_targets.items()})
    sweeps.markdown(rows)

    each = losses.T.rename(columns=lambda seed: f"seed{seed}").reset_index()
    tables.append(means.merge(each).assign(base=sweep.size))

table = pd.concat(tables)
seeds = [name for name in table if name.startswith("seed")]
columns = ["base", "targets", "rank", "trainable_params", "scale", "mean", "se", *seeds]
table[columns].to_csv(HERE / "losses.csv", index=False, float_format="%.6g")

with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(1.2 + 3.1 * len(found), 2.9), layout="constrained")
    grid = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, sweep in zip(grid, found, strict=True):
        rows = table[table["base"] == sweep.size].reset_index(drop=True)
        alone = rows["targets"].isin(ONE)
        for n, own in enumerate((rows[alone], rows[~alone])):
            style = {"color": COLOURS[n], "fmt": MARKERS[n], "capsize": 3}
            label = ("one matrix", "several")[n]
            panel.errorbar(own["mean"], own.index, xerr=own["se"], label=label, **style)
            panel.plot(own[seeds], own.index, "|", color=COLOURS[n], alpha=0.6, markersize=7)
        panel.set_yticks(rows.index, rows["targets"] + ", r = " + rows["rank"].astype(str))
        panel.invert_yaxis()
        panel.set_title(sweep.size)
        panel.set_xlabel("final eval loss (nats a token)")
    grid[0].legend()
    figure.savefig(HERE / "targets.png", dpi=150)
