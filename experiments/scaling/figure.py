"""Do the first steps coincide over ranks? Reads runs of configs/rslora_vs_lora.py.

    python -m experiments.scaling.figure runs/rslora_vs_lora runs/rslora_vs_lora-stories

Writes scaling.csv and scaling.png beside itself and prints the tables of the README.
"""

import pathlib

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from experiments import sweeps
from experiments.plotting import STYLE

HERE = pathlib.Path(__file__).parent
FIRST = 20  # steps, a third of the run: what "the first steps" means here
SCALINGS = {"lora": "α / r", "rslora": "α / √r"}


def spreads(losses: pd.DataFrame) -> pd.DataFrame:
    """A row a scaling, step and seed: the highest less the lowest loss over ranks (`spread`, nats),
    that over how far the ranks' mean has fallen from the base's (`share`), and the largest rank's
    loss less the smallest's (`signed`). All ranks of a seed have seen the same batches."""
    after = losses[losses["step"] > 0]
    wide = after.pivot_table(
        index=["scaling", "step", "seed", "base_loss"], columns="rank", values="loss"
    )
    table = pd.DataFrame({"spread": wide.max(axis=1) - wide.min(axis=1)})
    fall = wide.index.get_level_values("base_loss") - wide.mean(axis=1)
    table["share"] = table["spread"] / fall
    table["signed"] = wide[wide.columns.max()] - wide[wide.columns.min()]
    return table.droplevel("base_loss")


def by_rank(losses: pd.DataFrame) -> list[dict]:
    """A row a scaling and step: the loss of each rank, and their spread."""
    rows, apart = [], spreads(losses)
    for scaling, title in SCALINGS.items():
        for step in (5, 10, FIRST, losses["step"].max()):
            at = losses[(losses["scaling"] == scaling) & (losses["step"] == step)]
            means = {f"r = {r}": sweeps.words(own["loss"]) for r, own in at.groupby("rank")}
            share = sweeps.words(100 * apart.loc[scaling, step]["share"], 1) + " %"
            rows.append({"s": title, "step": step} | means | {"spread, of the fall": share})
    return rows


found = sweeps.read("rslora_vs_lora", __doc__)
drawn = []
with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(7.2, 2.9 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False, sharex=True, sharey="row")
    for row, sweep in zip(panels, found, strict=True):
        losses = sweeps.evals(sweep)
        for axes, (scaling, title) in zip(row, SCALINGS.items(), strict=True):
            own = losses[losses["scaling"] == scaling]
            points = own.groupby(["rank", "step"])["loss"].agg(["mean", "sem"]).reset_index()
            for n, (rank, curve) in enumerate(points.groupby("rank")):
                sweeps.line(axes, n, curve["step"], curve["mean"], curve["sem"], f"r = {rank}")
            axes.axvspan(0, FIRST, color="0.93", zorder=0)
            axes.set_title(f"{sweep.size}, s = {title}")
            axes.set_xlabel("step")
            drawn.append(points.assign(base=sweep.size, scaling=scaling))
        row[0].set_ylabel("eval loss (nats)")
        row[0].legend(title="first steps shaded")

        print(f"{sweep.size}: eval loss; {losses['base_loss'].iloc[0]:.3f} before training\n")
        sweeps.markdown(by_rank(losses))
        rows = []
        for split in ("eval", "train"):
            table = spreads(sweeps.evals(sweep, split)).sort_index()
            table = table.loc[:, :FIRST, :].groupby(["scaling", "seed"]).mean()
            for scaling, title in SCALINGS.items():
                own = table.loc[scaling]
                times = table.loc["rslora", "spread"] / table.loc["lora", "spread"]
                rows.append(
                    {
                        f"steps up to {FIRST}": f"{split} loss, {title}",
                        "spread over ranks": sweeps.words(own["spread"]),
                        "of the fall so far": sweeps.words(100 * own["share"], 1) + " %",
                        "largest r less smallest": sweeps.words(own["signed"]),
                        "times that of α / r": sweeps.words(times, 1) if scaling != "lora" else "",
                    }
                )
        sweeps.markdown(rows)
    figure.savefig(HERE / "scaling.png", dpi=150)
columns = ["base", "scaling", "rank", "step", "mean", "sem"]
pd.concat(drawn)[columns].to_csv(HERE / "scaling.csv", index=False, float_format="%.5f")
