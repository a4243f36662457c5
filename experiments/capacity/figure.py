"""When does a rank fall behind full fine-tuning? Reads runs of configs/capacity.py.

    python -m experiments.capacity.figure runs/capacity runs/capacity-stories

Writes capacity.csv and capacity.png beside itself and prints the table of the README.
"""

import pathlib

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from experiments import sweeps
from experiments.plotting import GREY, STYLE

HERE = pathlib.Path(__file__).parent
LARGE = 0.02  # of the loss compared with: less is not called behind


def after(sweep: sweeps.Sweep, split: str) -> pd.Series:
    """Losses after step 0 by (rank, seed, step): of evaluations, or means over calls of training,
    which are more often."""
    rows = sweeps.evals(sweep, split)
    return rows[rows["step"] > 0].set_index(["rank", "seed", "step"])["loss"].sort_index()


def behind(losses: pd.DataFrame, of: int, than: int) -> pd.DataFrame:
    """By how much rank `of` is worse than rank `than` (0: full fine-tuning) at each evaluation,
    in pairs of the same seed, which see the same batches.

    losses: index (rank, seed, step). Returns, by step: mean and sem of the difference (nats),
    `loss`, the mean of rank `than`, and `so`, whether the difference exceeds two standard errors
    and LARGE of that loss.
    """
    pairs = losses.loc[of] - losses.loc[than]
    table = pairs.groupby("step").agg(["mean", "sem"])
    table["loss"] = losses.loc[than].groupby("step").mean()
    table["so"] = (table["mean"] > 2 * table["sem"]) & (table["mean"] > LARGE * table["loss"])
    return table


def leaves(so: pd.Series) -> str:
    """The first step from which on `so` is true of every evaluation, "never" where it is not of the
    last."""
    lasting = so[::-1].cummin()[::-1]
    return str(lasting.idxmax()) if lasting.any() else "never"


found = sweeps.read("capacity", __doc__)
drawn = []
with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(7.2, 3.2 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False)
    for (curves, apart), sweep in zip(panels, found, strict=True):
        losses, trained = after(sweep, "eval"), after(sweep, "train")
        ranks = [rank for rank in losses.index.unique("rank") if rank]
        last, largest = losses.index.get_level_values("step").max(), max(ranks)
        rows = []
        for n, rank in enumerate([*ranks, 0]):
            label = sweeps.name("lora" if rank else "full", rank)
            points = losses.loc[rank].groupby("step").agg(["mean", "sem"])
            sweeps.line(curves, n, points.index, points["mean"], points["sem"], label)
            row = {"": label} | {
                f"loss at {step}": sweeps.words(losses.loc[rank, :, step])
                for step in (points.index[0], last)
            }
            if rank:
                full = behind(losses, rank, 0)
                sweeps.line(apart, n, full.index, full["mean"], full["sem"], label)
                points = points.assign(behind=full["mean"], behind_sem=full["sem"], so=full["so"])
                gaps = (losses.loc[rank] - losses.loc[0]).unstack("step")
                row["behind full at the end"] = sweeps.words(gaps[last])
                row[f"more than at {gaps.columns[0]}"] = sweeps.words(gaps[last] - gaps.iloc[:, 0])
                row["leaves full at step"] = leaves(full["so"])
                row["by training loss"] = leaves(behind(trained, rank, 0)["so"])
            if rank and rank != largest:
                row[f"leaves r = {largest} at"] = leaves(behind(losses, rank, largest)["so"])
                row["so by training loss"] = leaves(behind(trained, rank, largest)["so"])
            rows.append(row)
            drawn.append(points.reset_index().assign(base=sweep.size, rank=rank))
        apart.axhline(0, color=GREY, linewidth=1)
        curves.set_ylabel("eval loss (nats)")
        apart.set_ylabel("loss less full fine-tuning's (nats)")
        curves.legend()
        for axes in (curves, apart):
            axes.set_xlabel("step")
            axes.set_title(sweep.size)
        print(f"{sweep.size}: {sweep.table['base_loss'].iloc[0]:.3f} before training\n")
        sweeps.markdown(rows)
    figure.savefig(HERE / "capacity.png", dpi=150)
first = ["base", "rank", "step"]
table = pd.concat(drawn)
table[first + [name for name in table if name not in first]].to_csv(
    HERE / "capacity.csv", index=False, float_format="%.5f"
)
