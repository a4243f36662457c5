"""Which method does best with little data? Reads runs of configs/n_train.py.

    python -m experiments.little_data.figure runs/n_train runs/n_train-stories

Writes little_data.csv and little_data.png beside itself and prints the tables of the README.
"""

import pathlib

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from experiments import sweeps
from experiments.plotting import STYLE

HERE = pathlib.Path(__file__).parent
POINTS = {"best_loss": "best evaluation", "final_loss": "last evaluation"}
METHODS = ("lora", "full", "prefix")

found = sweeps.read("n_train", __doc__)
drawn = []
with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(7.2, 3.0 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False, sharey="row")
    for pair, sweep in zip(panels, found, strict=True):
        table = sweep.table
        # None, all there are, sorts last.
        sizes = table["n_train"].astype("Int64").astype("string").fillna("all")
        order = [*sorted(set(sizes) - {"all"}, key=int), "all"]
        table = table.assign(n_train=pd.Categorical(sizes, order, ordered=True))
        names = {
            method: sweeps.name(method, own["rank"].iloc[0])
            for method, own in table.groupby("method")
        }
        rows = []
        for axes, (column, title) in zip(pair, POINTS.items(), strict=True):
            losses = table.pivot(index=["n_train", "seed"], columns="method", values=column)
            for n, method in enumerate(METHODS):
                points = losses[method].groupby("n_train", observed=True).agg(["mean", "sem"])
                x = range(len(points))
                sweeps.line(axes, n, x, points["mean"], points["sem"], names[method])
                rows.append({"loss at": title, "": names[method]})
                by_size = losses[method].unstack("n_train")
                less = losses[method] - losses["full"]
                for size in order:
                    rows[-1][f"{size} examples"] = sweeps.words(by_size[size])
                rows[-1][f"{order[0]} less all"] = sweeps.words(by_size[order[0]] - by_size["all"])
                for size in order if method != "full" else ():
                    rows[-1][f"less full, {size}"] = sweeps.words(less.loc[size])
                drawn.append(
                    points.reset_index().assign(base=sweep.size, method=method, point=title)
                )
            axes.set_xticks(range(len(order)), order)
            axes.set_xlabel("training examples")
            axes.set_title(f"{sweep.size}, {title}")
        pair[0].set_ylabel("eval loss (nats)")
        print(f"{sweep.size}: {table['base_loss'].iloc[0]:.3f} before training\n")
        sweeps.markdown(rows)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=3)
    figure.savefig(HERE / "little_data.png", dpi=150)
columns = ["base", "point", "method", "n_train", "mean", "sem"]
pd.concat(drawn)[columns].to_csv(HERE / "little_data.csv", index=False, float_format="%.5f")
