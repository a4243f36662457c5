"""How much rank does adaptation need? Reads runs of configs/lora_table6_rank.py.

    python -m experiments.rank.figure runs/lora_table6_rank runs/lora_table6_rank-stories

Writes losses.csv, updates.csv and rank.png beside itself and prints the tables of the README.
"""

import pathlib

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter, NullLocator

from experiments import sweeps
from experiments.plotting import COLOURS, STYLE
from lorax.analysis import calibration, runs, tables

HERE = pathlib.Path(__file__).parent
TARGETS = ["q", "q v", "q k v o"]
UPDATE = ["norm", "effective", "energy90"]  # of dW


def losses(sweep: sweeps.Sweep) -> pd.DataFrame:
    """Final eval losses: a row a seed, a column a (targets, rank). Members of a seed have the same
    batches, so that their differences are taken seed by seed."""
    return sweep.table.pivot(index="seed", columns=["targets", "rank"], values="final_loss")


def within_one_se(means: pd.DataFrame) -> int:
    """The smallest rank whose mean is at most the best mean plus its standard error. means: from
    `runs.settings`, one row a rank."""
    best = means.loc[means["mean"].idxmin()]
    return int(means.loc[means["mean"] <= best["mean"] + best["se"], "rank"].min())


found = sweeps.read("lora_table6_rank", __doc__)
curves, of_updates = [], []
for sweep in found:
    table, by_seed = sweep.table, losses(sweep)
    ranks = sorted(set(table["rank"]))
    means = runs.settings(table, runs.Axes("rank", ("targets",)))
    base = table["base_loss"].mean()
    print(f"{sweep.size}: eval loss ({base:.3f} before training)\n")
    rows = []
    for targets in TARGETS:
        own = means[means["targets"] == targets]
        row = {"targets": targets} | {f"r = {r}": sweeps.words(by_seed[targets, r]) for r in ranks}
        row["within one se"] = within_one_se(own)
        rows.append(row | {"99% of the improvement": calibration.knee(own, base)})
    sweeps.markdown(rows)

    print(f"{sweep.size}: differences of losses, seed by seed\n")
    pairs = [("q", "q v"), ("q v", "q k v o")]
    rows = []
    for r in ranks:
        row = {"r": r}
        for targets in TARGETS:
            lost = by_seed[targets, r] - by_seed[targets, ranks[-1]]
            row[f"{targets}: r minus {ranks[-1]}"] = sweeps.words(lost)
        for a, b in pairs:
            row[f"{a} minus {b}"] = sweeps.words(by_seed[a, r] - by_seed[b, r])
        rows.append(row)
    sweeps.markdown(rows)

    print(f"{sweep.size}: dW of the q, v members, mean over layers and seeds\n")
    pair = table[table["targets"] == "q v"]
    _, ranked = tables.spectra({member: sweep.run.update(member) for member in pair.index})
    ranked["seed"] = ranked["member"].map(pair["seed"])
    rows = []
    for r, own in ranked.groupby("rank"):
        of_target = own.groupby("target")[UPDATE].mean()
        row = {f"{name} ({t})": f"{of_target[name][t]:.1f}" for name in UPDATE for t in ("q", "v")}
        rows.append({"r": r} | row)
    sweeps.markdown(rows)

    each = by_seed.T.rename(columns=lambda seed: f"seed{seed}").reset_index()
    curves.append(means.merge(each).assign(base=sweep.size))
    of_updates.append(ranked.assign(base=sweep.size))

curves, of_updates = pd.concat(curves), pd.concat(of_updates)
seeds = [name for name in curves if name.startswith("seed")]
columns = ["base", "targets", "rank", "trainable_params", "scale", "mean", "se", *seeds]
curves[columns].to_csv(HERE / "losses.csv", index=False, float_format="%.6g")
columns = ["base", "rank", "seed", "layer", "target", *UPDATE, "stable"]
of_updates[columns].to_csv(HERE / "updates.csv", index=False, float_format="%.6g")

with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(1.2 + 3.1 * len(found), 5.6), layout="constrained")
    grid = figure.subplots(2, len(found), sharey="col", squeeze=False)
    for column, sweep in enumerate(found):
        of_base = curves[curves["base"] == sweep.size]
        for panel, x in zip(grid[:, column], ("rank", "trainable_params"), strict=True):
            for n, targets in enumerate(TARGETS):
                own = of_base[of_base["targets"] == targets]
                label = ", ".join(targets.split())
                sweeps.line(panel, n, own[x], own["mean"], own["se"], label)
                panel.plot(own[x], own[seeds], ".", color=COLOURS[n], alpha=0.4, markersize=4)
            panel.set_ylabel("final eval loss (nats a token)")
        grid[0, column].set_title(sweep.size)
        grid[0, column].set_xscale("log", base=2)
        ranks = sorted(set(of_base["rank"]))
        grid[0, column].set_xticks(ranks, ranks)
        grid[0, column].xaxis.set_minor_locator(NullLocator())
        grid[0, column].set_xlabel("rank r of the adapter")
        grid[1, column].set_xscale("log")
        grid[1, column].xaxis.set_major_formatter(EngFormatter(sep=""))
        grid[1, column].xaxis.set_minor_formatter(NullFormatter())
        grid[1, column].set_xlabel("trainable parameters")
    grid[0, 0].legend()
    figure.savefig(HERE / "rank.png", dpi=150)
