"""Does LoRA fall behind as the batch grows? Reads runs of configs/batch_size.py.

    python -m experiments.batch_size.figure runs/batch_size runs/batch_size-stories

Writes batch_size.csv and batch_size.png beside itself and prints the tables of the README.
"""

import pathlib

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import sweeps
from experiments.plotting import GREY, STYLE

HERE = pathlib.Path(__file__).parent

found = sweeps.read("batch_size", __doc__)
drawn = []
with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(4.2 * len(found), 3.4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, sweep in zip(panels, found, strict=True):
        best = sweeps.best_rates(sweep.table, ["method", "rank", "batch_size"])
        losses = best.pivot(index=["batch_size", "seed"], columns="rank", values="final_loss")
        rates = best.groupby(["rank", "batch_size"])["lr"].first()
        batches = losses.index.unique("batch_size")
        doublings = np.log2(batches)
        rows, slopes = [], {}
        for n, rank in enumerate(losses.columns):
            rows.append({"": sweeps.name("lora" if rank else "full", rank)})
            for batch in batches:
                text = f"{sweeps.words(losses[rank].loc[batch])} at {rates[rank, batch]:.2g}"
                rows[-1][f"batch {batch}"] = text
            if not rank:
                continue
            gaps = (losses[rank] - losses[0]).unstack("seed")  # (batch, seed)
            points = gaps.agg(["mean", "sem"], axis=1)
            label = sweeps.name("lora", rank)
            sweeps.line(axes, n - 1, batches, points["mean"], points["sem"], label)
            drawn.append(points.reset_index().assign(base=sweep.size, rank=rank))
            # A line through the batch sizes for each seed: how much wider for each doubling?
            slopes[rank] = np.polyfit(doublings, gaps.to_numpy(), 1)[0]
            rows.append({"": f"{label}, gap"})
            rows[-1] |= {f"batch {batch}": sweeps.words(gaps.loc[batch]) for batch in batches}
            rows[-1]["a doubling"] = sweeps.words(slopes[rank])
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(batches), list(batches))
        axes.set_xlabel("batch size (examples)")
        axes.set_ylabel("loss less full fine-tuning's (nats)")
        axes.set_title(sweep.size)
        small, large = min(slopes), max(slopes)
        print(f"{sweep.size}: final eval loss, each at the best of its learning rates\n")
        sweeps.markdown(rows)
        print(
            f"A doubling's widening at r = {large} less that at r = {small}: "
            f"{sweeps.words(slopes[large] - slopes[small])}\n"
        )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncol=2)
    figure.savefig(HERE / "batch_size.png", dpi=150)
columns = ["base", "rank", "batch_size", "mean", "sem"]
pd.concat(drawn)[columns].to_csv(HERE / "batch_size.csv", index=False, float_format="%.5f")
