"""Draws effective_rank.png from ranks.csv.

python -m experiments.effective_rank.figure
"""

from pathlib import Path

import pandas as pd
from matplotlib.ticker import FuncFormatter

from experiments.plotting import COLOURS, GREY, MARKERS, drawn, legend, ticks
from experiments.verdicts import numbers
from lorax.analysis import compare

HERE = Path(__file__).parent
LABELS = {"effective": "effective rank of ΔW", "energy90": "singular values for 90% of ‖ΔW‖²"}


def way(row) -> str:
    """Which line a member is on."""
    if row.method == "full":
        return "full fine-tuning"
    return "LoRA, α = 8" if row.alpha == 8 else "LoRA, α = 2r"


def main() -> None:
    ranks = numbers(HERE, "ranks.csv")
    ranks["way"] = [way(row) for row in ranks.itertuples()]
    bases = list(ranks.groupby("base", sort=False))
    with drawn(HERE / "effective_rank.png", 2, len(bases), sharex="row") as grid:
        for panels, (base, own) in zip(grid, bases, strict=True):
            for panel, name in zip(panels, LABELS, strict=True):
                draw(panel, own, name)
                panel.set_title(base)
        legend(grid)


def draw(panel, own: pd.DataFrame, name: str) -> None:
    """Means over matrices and seeds with 95% intervals over seeds; full fine-tuning beside the
    largest rank."""
    r = sorted(set(own.loc[own["method"] == "lora", "rank"]))
    panel.plot(r, r, color=GREY, linestyle=(0, (6, 3)), linewidth=1, label="r itself")
    for n, (line, points) in enumerate(own.groupby("way")):
        for factor, at in points.groupby("factor"):
            seeds = at.groupby(["rank", "seed"])[name].mean().groupby("rank")
            x = [2 * r[-1]] if line == "full fine-tuning" else seeds.mean().index
            style = {"color": COLOURS[n], "marker": MARKERS[n], "capsize": 3}
            style |= {"fillstyle": "full" if factor == 1 else "none"}
            style |= {"linestyle": "-" if factor == 1 else (0, (3, 1.5))}
            style |= {"label": line if factor == 1 else f"{line}, 3 x lr"}
            panel.errorbar(x, seeds.mean(), compare.half_width(seeds.sem(), seeds.count()), **style)
    ticks(panel, [*r, 2 * r[-1]])
    panel.set_xticklabels([*r, "full"])
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panel.set_xlabel("rank r of the adapter")
    panel.set_ylabel(LABELS[name])


if __name__ == "__main__":
    main()
