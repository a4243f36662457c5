"""Draws ranks.png from maps.csv and seeds.png from curves.csv.

python -m experiments.subspaces.figure
"""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.plotting import GREY, drawn, legend, line_style
from experiments.verdicts import numbers
from lorax.analysis import chance_similarity, tables

HERE = Path(__file__).parent
TITLES = {"A": "A", "B": "B", "dW in": "ΔW, input side", "dW out": "ΔW, output side"}


def main() -> None:
    two_ranks(numbers(HERE, "maps.csv"))
    two_seeds(numbers(HERE, "curves.csv"))


def two_ranks(maps: pd.DataFrame) -> None:
    """Figure 3 of the paper: phi(i, j) between the ranks, a line a base and kind of directions."""
    lines = list(maps.groupby(["base", "directions"], sort=False)) if len(maps) else []
    with drawn(HERE / "ranks.png", 3, len(lines), size=(2.4, 1.675)) as grid:
        for panels, ((base, kind), own) in zip(grid, lines, strict=True):
            of = {
                t: x.pivot(index="i", columns="j", values="phi") for t, x in own.groupby("target")
            }
            n = own.loc[own["target"] == "q", "n"].iloc[0]
            values = {t: phi.to_numpy() for t, phi in of.items()}
            values[f"chance (n = {n:g})"] = chance_similarity(int(n), *of["q"].shape).mean
            for panel, (title, value) in zip(panels, values.items(), strict=True):
                r1, r2 = value.shape
                style = {"vmin": 0, "vmax": 1, "cmap": "cividis", "interpolation": "nearest"}
                extent = (0.5, r2 + 0.5, r1 + 0.5, 0.5)
                image = panel.imshow(value, aspect="auto", extent=extent, **style)
                panel.spines[:].set_visible(True)
                panel.set_xticks([1, *range(r2 // 4, r2 + 1, r2 // 4)])
                panel.set_yticks([1, 4, 8])
                panel.set_title(title)
            panels[0].set_ylabel(f"{base}\n{TITLES[kind]}\ni, of r = 8")
            panels[1].set_xlabel(f"j, of r = {r2}")
        label = "φ(i, j), mean over layers and seeds"
        grid[0, 0].figure.colorbar(image, ax=grid, shrink=0.5).set_label(label)


def two_seeds(curves: pd.DataFrame) -> None:
    """Figure 4 of the paper: phi(i, i) of two seeds, a line a base, a column a kind."""
    bases = list(dict.fromkeys(curves["base"]))
    file, share = HERE / "seeds.png", {"sharex": "row", "sharey": True}
    with drawn(file, len(tables.KINDS), len(bases), size=(1.85, 2.4), **share) as grid:
        figure = grid[0, 0].figure
        for (row, base), (column, kind) in itertools.product(
            enumerate(bases), enumerate(tables.KINDS)
        ):
            panel = grid[row, column]
            own = curves[(curves["base"] == base) & (curves["directions"] == kind)]
            powers = np.arange(int(own["i"].max()).bit_length())
            for n, (target, line) in enumerate(own.groupby("target")):
                style = line_style(n) | {"markersize": 4, "label": target}
                style |= {"markevery": (2**powers - 1).tolist()}  # line has every i from 1 on
                panel.plot(line["i"], line["phi"], **style)
                style = {"color": style["color"], "alpha": 0.25, "linewidth": 0}
                panel.fill_between(line["i"], line["phi_low"], line["phi_high"], **style)
                style = {"color": GREY, "alpha": 0.35, "linewidth": 0}
                label = "two random subspaces, 5 to 95%"
                panel.fill_between(line["i"], line["low"], line["high"], label=label, **style)
            panel.set_xscale("log", base=2)
            panel.set_xticks(2 ** powers[::2], 2 ** powers[::2])
            panel.set_title(TITLES[kind])
            panel.set_ylim(0, 1.02)
            grid[row, 0].set_ylabel(f"{base}\nφ(i, i), two seeds")
        figure.supxlabel("i: leading directions", fontsize=9)
        legend(grid)


if __name__ == "__main__":
    main()
