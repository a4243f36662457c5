"""The figure of a search for the intrinsic dimension."""

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from lorax.analysis import intrinsic as search
from lorax.analysis.figures.style import (
    DASHES,
    GREY,
    LOSS,
    STYLE,
    line_style,
    mean_line,
    named,
    panels,
    plain,
)


def intrinsic(table: pd.DataFrame, estimates: pd.DataFrame, loss: str = LOSS) -> Figure:
    """The metric against the dimension of the subspace, one panel per condition: means over seeds
    at each dimension's best learning rate with standard errors, single seeds as dots, and LoRA if
    it was run. Horizontal lines: full fine-tuning and the level to reach. Vertical line: the
    estimate with its 95% interval.

    Args:
      table: from `intrinsic.points`.
      estimates: from `intrinsic.estimate`.
    """
    metric = estimates["metric"].iloc[0]
    columns = 2 if len(estimates) == 4 else min(3, len(estimates))
    lora = (table["kind"] == "lora").any()
    with matplotlib.rc_context(STYLE):
        inches = {"size": (2.3, 0.9), "per_panel": (2.5, 2.4), "alone": (6.8, 3.4)}
        figure, grid = panels(len(estimates), columns, **inches, sharex=True, sharey=True)
        for axes in grid[-columns:]:  # panels with none below
            axes.tick_params(labelbottom=True)
        for axes, (_, row) in zip(grid, estimates.iterrows(), strict=True):
            subspaces, lora_points = search.points_of(table, row["condition"])
            _against_size(axes, search.tuned(subspaces, "dim", metric), "dim", 0, "random subspace")
            if len(lora_points):
                _against_size(
                    axes, search.tuned(lora_points, "params", metric), "params", 1, "LoRA"
                )
            called = search.name(row["threshold"])
            if row["verdict"] != "no baseline":
                style = {"color": "black", "linewidth": 1}
                axes.axhline(
                    row["baseline"], linestyle=DASHES[1], label="full fine-tuning", **style
                )
                axes.axhline(row["needed"], linestyle=DASHES[2], label="needed", **style)
            if row["d"] == row["d"]:
                axes.axvline(row["d"], color=GREY, linewidth=1.2)
                ring = {"fillstyle": "none", "markersize": 11, "linestyle": "none"}
                axes.plot([row["d"]], [row["needed"]], "o", color="black", label=called, **ring)
                if row["low"] == row["low"]:
                    style = {"color": GREY, "alpha": 0.25, "linewidth": 0}
                    axes.axvspan(row["low"], row["high"], label="95% interval", **style)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500, 1k, 2k
            axes.xaxis.set_minor_formatter(NullFormatter())
            words = [*row["condition"].split(", "), search.brief(row)]
            axes.set_title("\n".join(plain(word) for word in words if word))
        x_label = "dimension d of the subspace"
        figure.supxlabel(x_label + ("; trainable parameters of LoRA" if lora else ""), fontsize=9)
        unit = " (fraction)" * (metric == "accuracy")
        label = loss if metric == "loss" else f"eval {plain(named(metric))}{unit}"
        figure.supylabel("final " + label, fontsize=9)
        handles = {}
        for axes in grid:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")
        return figure


def _against_size(axes: Axes, best: pd.DataFrame, by: str, n: int, label: str) -> None:
    """A line through the means over seeds with standard errors, and the seeds as dots."""
    values = best.groupby(by)["value"]
    style = line_style(n)
    mean_line(axes, values, capsize=2, label=label, **style)
    axes.plot(best[by], best["value"], ".", color=style["color"], alpha=0.45, markersize=4)
