"""How many directions does dW use? Reads runs of configs/intruders.py.

    python -m experiments.effective_rank.figure runs/intruders runs/intruders-stories

Writes ranks.csv (a row a member and matrix) and effective_rank.png beside itself and prints the
tables of the README. Matrices are the linear layers; the embedding, which only full fine-tuning
changes, is left out.
"""

import pathlib

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments import sweeps
from experiments.plotting import COLOURS, MARKERS, STYLE
from lorax.analysis import tables

HERE = pathlib.Path(__file__).parent
RANKS = ["effective", "energy90", "stable"]


def way(row) -> str:
    """Which line a member is on."""
    if row["method"] == "full":
        return "full fine-tuning"
    return "LoRA, α = 8" if row["alpha"] == 8 else "LoRA, α = 2r"


def seeds_of(table, value) -> np.ndarray:
    return table.groupby("seed")[value].mean().to_numpy()


found = sweeps.read("intruders", __doc__)
everything = []
for sweep in found:
    table = sweep.table[sweep.table["status"] == "finished"].copy()
    table["way"] = [way(row) for _, row in table.iterrows()]
    # r = 4 would be on both lines; there is none. The lower of two rates is "1", the other "3".
    lowest = table.groupby(["way", "rank"])["lr"].transform("min")
    table["factor"] = (table["lr"] / lowest).round().astype(int)
    lora = table.index[table["method"] == "lora"]
    full = table.index[table["method"] == "full"]
    _, ranks = tables.spectra({member: sweep.run.update(member) for member in [*lora, *full]})
    ranks = ranks[ranks["layer"] >= 0].rename(columns={"rank": "width"})  # full: min(in, out)
    fields = ["method", "way", "rank", "alpha", "lr", "factor", "seed", "final_loss"]
    ranks = ranks.merge(table[fields], left_on="member", right_index=True)
    everything.append(ranks.assign(base=sweep.size))

    print(f"{sweep.size}: dW, mean over {ranks['path'].nunique()} matrices\n")
    rows = []
    for (line, r, lr), own in ranks.groupby(["way", "rank", "lr"]):
        row = {"": line, "r": r or "-", "lr": f"{lr:.2g}"}
        row["eval loss"] = sweeps.words(seeds_of(own, "final_loss"))
        rows.append(row | {name: sweeps.words(seeds_of(own, name), 1) for name in RANKS})
    rng, one = np.random.default_rng(0), sweep.run.delta(full[0])
    noise = {path: rng.standard_normal(one[path].shape) for path in ranks["path"].unique()}
    noise = tables.spectra({0: noise})[1][RANKS].mean()
    row = {"": "Gaussian noise of these shapes", "r": "-", "lr": "-", "eval loss": "-"}
    sweeps.markdown([*rows, row | {name: f"{noise[name]:.1f}" for name in RANKS}])

    # The claim: at a high r, alpha = 2 r has a higher effective rank than alpha = 8; paired seeds.
    print(f"{sweep.size}: α = 2r minus α = 8, seed by seed\n")
    mean = ranks.groupby(["factor", "rank", "way", "seed"])[RANKS].mean()
    rows = []
    for (factor, r), own in mean.drop("full fine-tuning", level="way").groupby(["factor", "rank"]):
        by = own.droplevel(["factor", "rank"])
        gap = by.loc["LoRA, α = 2r"] - by.loc["LoRA, α = 8"]
        rows.append({"lr": f"x {factor}", "r": r} | {n: sweeps.words(gap[n], 2) for n in RANKS})
    sweeps.markdown(rows)

everything = pd.concat(everything)
columns = ["base", "member", "method", "rank", "alpha", "lr", "factor", "seed", "path", "width"]
columns += ["norm", *RANKS]
everything[columns].to_csv(HERE / "ranks.csv", index=False, float_format="%.6g")

with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(7.2, 1 + 2.6 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False, sharex="row")
    for panels, sweep in zip(grid, found, strict=True):
        own = everything[everything["base"] == sweep.size]
        adapted = own[own["method"] == "lora"]
        r = sorted(set(adapted["rank"]))
        for panel, name in zip(panels, ("effective", "energy90"), strict=True):
            panel.plot(r, r, color="0.45", linestyle=(0, (6, 3)), linewidth=1, label="r itself")
            for n, (line, points) in enumerate(own.groupby("way")):
                for factor, at in points.groupby("factor"):
                    per_seed = at.groupby(["rank", "seed"])[name].mean().groupby(level=0)
                    mean, error = per_seed.mean(), per_seed.sem()
                    x = mean.index
                    if line == "full fine-tuning":
                        x = [2 * r[-1]]
                    fill = "full" if factor == 1 else "none"
                    label = line if factor == 1 else f"{line}, 3 x lr"
                    style = {"color": COLOURS[n], "marker": MARKERS[n], "fillstyle": fill}
                    dash = "-" if factor == 1 else (0, (3, 1.5))
                    panel.errorbar(x, mean, error, capsize=3, linestyle=dash, label=label, **style)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.set_xticks([*r, 2 * r[-1]], [*r, "full"])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            panel.set_xlabel("rank r of the adapter")
            panel.set_title(sweep.size)
        panels[0].set_ylabel("effective rank of ΔW")
        panels[1].set_ylabel("singular values for 90% of ‖ΔW‖²")
    grid[0, 0].legend(fontsize=7)
    figure.savefig(HERE / "effective_rank.png", dpi=150)
