"""What does an update amplify? Reads runs of configs/lora_table6_rank.py, and the base's kernels.

    python -m experiments.amplification.figure runs/lora_table6_rank runs/lora_table6_rank-stories

Takes the members on q and v of rank 4 and of the largest rank; the base is the one that the run's
config names. Writes matrices.csv and amplification.png beside itself and prints the table of the
README.
"""

import pathlib

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import lorax
from experiments import sweeps
from experiments.plotting import STYLE
from lorax.analysis import amplification, tables

HERE = pathlib.Path(__file__).parent
SMALL = 4
COLUMNS = {
    "delta_norm": "‖ΔW‖",
    "w_in_delta": "‖UᵀWV‖ of ΔW",
    "w_in_w": "of W",
    "w_in_random": "of a random matrix",
    "chance": "its identity",
    "factor": "amplification",
    "over_chance": "of ΔW / identity",
}


def matrices(sweep: sweeps.Sweep) -> pd.DataFrame:
    """A row a member, matrix and number of directions k: the columns of table 7, ||W||, what the
    random column is on average (`chance` = k ||W|| / sqrt(in out)), and ||U^T W V|| over that."""
    kernels = lorax.models.kernels(lorax.load(sweep.run.config["config"]["base"]))
    table = sweep.table[sweep.table["targets"] == "q v"]
    large = table["rank"].max()
    rows = []
    for member in table[table["rank"].isin((SMALL, large))].itertuples():
        for path, (a, b, s, *_) in sweep.run.adapter(member.member).items():
            w, (layer, target) = kernels[path], tables.layer_and_target(path)
            for k in dict.fromkeys((member.rank, SMALL)):
                # A seed of its own for each, or all random columns would be one draw.
                rng = np.random.default_rng([member.member, layer, ord(target), k])
                row = {"base": sweep.size, "target": target, "layer": layer, "rank": member.rank}
                row |= {"k": k, "seed": member.seed, "w_norm": np.linalg.norm(w)}
                row |= amplification(w, (a, b, s), k, rng=rng)._asdict()
                row["chance"] = k * row["w_norm"] / np.sqrt(w.size)
                rows.append(row | {"over_chance": row["w_in_delta"] / row["chance"]})
    return pd.DataFrame(rows)


found = sweeps.read("lora_table6_rank", __doc__)
measured = [matrices(sweep) for sweep in found]
for sweep, table in zip(found, measured, strict=True):
    print(f"{sweep.size}: mean over layers and seeds\n")
    rows = []
    for (target, rank, k), own in table.groupby(["target", "rank", "k"]):
        row = {"target": target, "r": rank, "directions": k, "‖W‖": sweeps.words(own["w_norm"], 2)}
        row |= {label: sweeps.words(own[name], 2) for name, label in COLUMNS.items()}
        # E ||U^T W V||^2 = k^2 ||W||^2 / (in out) for random U and V: exact of the squares.
        squares = (own["w_in_random"] / own["chance"]) ** 2
        rows.append(row | {"random / identity, rms": f"{np.sqrt(squares.mean()):.2f}"})
    sweeps.markdown(rows)
table = pd.concat(measured)
table.to_csv(HERE / "matrices.csv", index=False, float_format="%.5g")

with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(1.4 + 3.1 * len(found), 5.2), layout="constrained")
    grid = figure.subplots(2, len(found), sharex="col", squeeze=False)
    names = {"factor": "amplification ‖ΔW‖ / ‖UᵀWV‖", "over_chance": "‖UᵀWV‖ / random directions'"}
    for column, own in enumerate(measured):
        own = own[own["k"] == own["rank"]]
        for panel, (name, label) in zip(grid[:, column], names.items(), strict=True):
            for n, ((target, rank), line) in enumerate(own.groupby(["target", "rank"])):
                layers = line.groupby("layer")[name]
                label_line = f"{target}, r = {rank}"
                sweeps.line(panel, n, layers.mean().index, layers.mean(), layers.sem(), label_line)
            panel.set_xticks(sorted(set(own["layer"])))
            panel.set_ylabel(label)
        grid[0, column].set_yscale("log")
        grid[0, column].legend(title=found[column].size, ncols=2)
        grid[1, column].set_ylim(bottom=0)
        grid[1, column].axhline(1, color="0.45", linewidth=1)
        grid[1, column].set_xlabel("layer")
    figure.savefig(HERE / "amplification.png", dpi=150)
