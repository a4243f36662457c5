"""Maps: subspace similarity, and one number for every matrix.

Colours are cividis, whose lightness increases uniformly. Small maps have a rectangle for every cell
and show its number; a larger map is an image, with cells under the pointer for some (i, j). Figure
numbers are those of the LoRA paper (arXiv 2106.09685).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorax.analysis.figures import vega
from lorax.analysis.figures.panels import digits, wrapped
from lorax.analysis.figures.style import (
    AXIS,
    HEADER,
    WIDTH,
    distinct,
    panel_title,
    themed,
    tooltips,
)

PHI = "φ(i, j)"
FEW = 8  # rows and columns; maps up to this size show their numbers in the cells
CELLS = 32  # rows and columns that are drawn of larger maps
SMALL = 12  # the same where there are many maps
HEIGHT, LOW = 150, 100  # pixels, of a panel; where there are many
CONTROL = "chance"


def similarity_maps(
    phi: Mapping[tuple[int, str], np.ndarray], control: np.ndarray, y_label: str, x_label: str
) -> vega.Chart:
    """Subspace similarity phi(i, j), one panel per matrix, then the level of chance. Of more than
    `SMALL` directions, as many are drawn, evenly spaced.

    Args:
      phi: (r1, r2) by (layer, target), from `basis_similarity`.
      control: (r1, r2), the mean over random subspaces of the same space.
      y_label, x_label: what i and j count ("i: top directions, r = 8").
    """
    maps = {panel_title(*place): values for place, values in phi.items()}
    return _maps(maps | {CONTROL: control}, x_label, y_label, SMALL, columns=4)


def figure3(
    phi: Mapping[tuple[int, str], np.ndarray], control: np.ndarray | None = None
) -> vega.Chart:
    """The paper's figure 3, two panels per matrix: phi(i, j) of a small rank (i, downwards) against
    a large one (j, to the right), and next to it a zoom on j <= r1.

    The zoom shows the lower-left triangle, j <= i, where phi says how much of the large rank's top
    j directions the small rank's top i contain.

    Args:
      phi: (r1, r2) by (layer, target), r1 <= r2.
      control: (r1, r2), the mean over random subspaces; its panels are the last.
    """
    r1, r2 = next(iter(phi.values())).shape
    whole = {panel_title(*place): values for place, values in phi.items()}
    whole |= {CONTROL: control} if control is not None else {}
    maps = {}
    for title, values in whole.items():
        corner = np.array(values[:, :r1], float)
        corner[np.triu_indices(r1, 1, corner.shape[1])] = np.nan
        maps |= {title: values, f"{title}: j ≤ i": corner}
    return _maps(maps, f"j: top directions, r = {r2}", f"i: top directions, r = {r1}", columns=4)


def figure4(phi: Mapping[str | tuple[int, str], np.ndarray], gaussian: np.ndarray) -> vega.Chart:
    """The paper's figure 4: phi(i, j) between two seeds, one panel per matrix, then the level of
    chance.

    Args:
      phi: (r, r) by target or (layer, target).
      gaussian: (r, r), for two random matrices or the mean of many.
    """
    maps = {
        name if isinstance(name, str) else panel_title(*name): values
        for name, values in phi.items()
    }
    r1, r2 = gaussian.shape
    labels = f"j: of the other seed, r = {r2}", f"i: of one seed, r = {r1}"
    return _maps(maps | {CONTROL: gaussian}, *labels)


def against_base(
    phi: Mapping[str, np.ndarray], chance: np.ndarray | None = None, top: float = 0.1
) -> vega.Chart:
    """The paper's figure 8: how much of dW's directions (j, to the right) W's leading ones (i,
    downwards) contain; one panel per title ("r = 8"), then chance. The dashed line is at W's top
    share.

    Args:
      phi: (r, n) by title, dW's directions first, from `tables.against_base`.
      chance: (r, n), for random directions.
      top: the share of W's directions above the line; the paper discusses the first 10%.
    """
    maps = {title: np.transpose(values) for title, values in phi.items()}
    maps |= {"random directions": np.transpose(chance)} if chance is not None else {}
    return _maps(maps, "j: directions of ΔW", "i: directions of W", top=top)


def between_layers(
    maps: Mapping[tuple[str, str], tuple[list[int], np.ndarray]],
) -> vega.Chart:
    """How much the directions of different layers' updates agree, one panel per target and side.

    Args:
      maps: by (target, side): the layers and phi (layers, layers) between them.
    """
    rows = [
        {"panel": f"{target}, {side}", "i": layers[i], "j": layers[j], "phi": phi[i, j]}
        for (target, side), (layers, phi) in maps.items()
        for i, j in np.ndindex(phi.shape)
    ]
    table = pd.DataFrame(rows)  # a layer may have several matrices of one target
    table = table.groupby(["panel", "i", "j"], sort=False)["phi"].mean().reset_index()
    table["phi"] = digits(table["phi"], 3)
    layers = sorted(set(table["i"]))
    step = -(-len(layers) // 8)
    axis = dict(values=layers[::step], labelAngle=0)
    cells = vega.Chart(table).encode(
        x=vega.column("j:O", title="layer", axis=axis),
        y=vega.column("i:O", title="layer", axis=axis),
        color=_colour("φ(r, r)"),
        tooltip=tooltips(
            {"panel": "target and side", "i": "layer", "j": "and layer"}
            | {"phi": ("φ(r, r)", ".3f")}
        ),
    )
    chart = vega.layer(cells.mark("rect", aria=False)).properties(height=HEIGHT)
    return themed(wrapped(chart, distinct(table["panel"])))


def overlap(pairs: pd.DataFrame, names: Sequence[str]) -> vega.Chart:
    """phi of all directions between every two adapters, one panel per side of dW.

    Args:
      pairs: first, second (names), side, phi and by_chance, one row per pair and side.
      names: of all adapters, in their order.
    """
    turned = pairs.rename(columns={"first": "second", "second": "first"})
    table = pd.concat([pairs, turned])[["first", "second", "side", "phi", "by_chance"]]
    for name in ("phi", "by_chance"):
        table[name] = digits(table[name], 3)
    table["ground"] = np.where(table["phi"] > 0.55, "light", "dark")
    cells = vega.Chart().encode(
        x=vega.column("second:N", title=None, sort=list(names), axis=dict(labelAngle=-35)),
        y=vega.column("first:N", title=None, sort=list(names), axis=dict(labelLimit=110)),
        tooltip=tooltips(
            {"first": "between", "second": "and", "phi": ("φ", ".3f")}
            | {"by_chance": ("by chance", ".3f")}
        ),
    )
    parts = [cells.mark("rect").encode(color=_colour("φ of all directions"))]
    if len(names) <= FEW:
        text = vega.column("phi:Q", format=".2f")
        parts.append(cells.mark("text", fontSize=11).encode(text=text, color=_ON_GROUND))
    panel = vega.layer(*parts, data=table)
    panel = panel.properties(height=28 * len(names), width=WIDTH - AXIS - HEADER)
    sides = vega.column("side:N", title=None, sort=distinct(table["side"]))
    chart = panel.facet({"row": sides}).resolve("scale", x="independent")
    return themed(chart.properties(usermeta={"columns": 1}))  # for the page's script


def layer_grid(values: pd.DataFrame, label: str, *, log: bool = False) -> vega.Chart:
    """One number for every matrix: one row per target, one column per layer, the numbers in the
    cells.

    Args:
      values: columns layer, target, value; several values of one matrix are averaged.
      label: the name and unit of the number.
      log: colour by the logarithm, for numbers that span decades; only for positive numbers.
    """
    table = values.groupby(["target", "layer"], sort=False)["value"].mean().reset_index()
    return _grid(table.assign(words=table["value"].map(_short)), label, log=log)


def sensitivity(ranking: pd.DataFrame) -> vega.Chart:
    """Score of every matrix as a share of the sum, with the rank chosen for it. ranking: rows of
    `tables.sensitivity` for one member."""
    table = ranking.assign(
        value=ranking["score"] / ranking["score"].sum(), words=ranking["rank"].map("{:g}".format)
    )
    return _grid(table, "share of the score")


def _short(value: float) -> str:
    return f"{value:,.0f}" if 100 <= abs(value) < np.inf else f"{value:.2g}"


def _grid(table: pd.DataFrame, label: str, *, log: bool = False) -> vega.Chart:
    """One cell per matrix, coloured by `value`, with the text in `words`: targets x layers."""
    shown = np.isfinite(table["value"]) & ((table["value"] > 0) | (not log))
    table = table.assign(shown=digits(table["value"].where(shown)))
    low, high = table["shown"].min(), table["shown"].max()
    low, high = (low, high) if shown.any() else (0.1, 1.0)
    low = low if log else min(low, 0.0)
    place = np.log(table["shown"] / low) / np.log(high / low or 1) if log else None
    place = table["shown"] / (high or 1.0) if place is None else place
    table["ground"] = np.where(shown, np.where(place > 0.55, "light", "dark"), "none")
    table["number"] = table["value"].map(_short)
    columns = ["target", "layer", "shown", "ground", "words", "number"]
    grid = vega.Chart(table[columns]).encode(
        x=vega.column("layer:O", title="layer", axis=dict(labelAngle=0)),
        y=vega.column("target:N", title=None, sort=distinct(table["target"])),
        tooltip=tooltips({"target": "target", "layer": "layer", "number": label}),
    )
    scale = dict(type="log" if log else "linear", domain=[low, high], scheme="cividis")
    colour = vega.column("shown:Q", title=label, scale=scale, legend=_LEGEND)
    text = grid.mark("text", fontSize=11).encode(text="words:N", color=_ON_GROUND)
    chart = vega.layer(grid.mark("rect").encode(color=colour), text)
    return themed(chart.properties(width={"step": 40}, height={"step": 26}))


# ------------------------------------------------------------------------------------ maps of phi

_LEGEND = dict(orient="top", gradientLength=160, gradientThickness=10, gradientOpacity=1)
# Text on cividis, whose colours are the same on a light and on a dark page.
_ON_GROUND = {
    "condition": [
        {"test": "datum.ground === 'dark'", "value": "white"},
        {"test": "datum.ground === 'light'", "value": "black"},
    ]
}


def _colour(title: str) -> dict[str, Any]:
    scale = dict(domain=[0, 1], scheme="cividis")
    return vega.column("phi:Q", title=title, scale=scale, legend=_LEGEND)


def _maps(
    maps: Mapping[str, np.ndarray],
    x_label: str,
    y_label: str,
    most: int = CELLS,
    top: float | None = None,
    columns: int = 3,
) -> vega.Chart:
    """phi of every title, from 0 to 1, with (1, 1) at the upper left.

    Args:
      most: rows and columns of cells in a panel; of more, evenly spaced ones are drawn.
      top: a dashed line below this share of the rows.
      columns: how many panels a row has at most.
    """
    rows = [_panel(title, values, most, top) for title, values in maps.items()]
    chart = (
        vega.Chart(pd.DataFrame(rows))
        .flatten("phi")
        .window({"k": "row_number()"}, groupby=["panel"])
        .filter("isValid(datum.phi)")
        .calculate(
            row="floor((datum.k - 1) / (length(datum.right) - 1))",
            column="(datum.k - 1) % (length(datum.right) - 1)",
        )
        .calculate(i="datum.down[datum.row + 1]", j="datum.right[datum.column + 1]")
        .calculate(
            above="datum.down[datum.row] + 0.5",
            below="datum.i + 0.5",
            before="datum.right[datum.column] + 0.5",
            after="datum.j + 0.5",
            number="datum.few ? replace(format(datum.phi, '.2f'), '0.', '.') : ''",
            ground="datum.phi > 0.55 ? 'light' : 'dark'",
            line="datum.k === 1 ? datum.top : null",
        )
    )
    x, y = _counted("j", maps, 1), _counted("i", maps, 0)
    # A stroke of the cell's own colour leaves no seams.
    stroke = {"expr": "scale('color', datum.phi)"}
    cells = chart.mark("rect", stroke=stroke, strokeWidth=0.7, aria=False).encode(
        x=vega.column("before:Q", **x),
        x2="after:Q",
        y=vega.column("above:Q", **y),
        y2="below:Q",
        color=_colour(PHI),
        tooltip=tooltips({"panel": "between", "i": "i", "j": "j", "phi": (PHI, ".3f")}),
    )  # fmt: skip
    numbers = chart.mark("text", fontSize=9, aria=False).encode(
        x=vega.column("j:Q", **x), y=vega.column("i:Q", **y), text="number:N", color=_ON_GROUND
    )
    height = HEIGHT if most == CELLS else LOW
    parts = [cells, numbers] if any(row["few"] for row in rows) else [cells]
    if top is not None:
        parts.append(chart.mark("rule", color="white", strokeDash=[4, 3]).encode(y="line:Q"))
    faceted = wrapped(vega.layer(*parts).properties(height=height), list(maps), columns=columns)
    if len({values.shape for values in maps.values()}) > 1:
        faceted = faceted.resolve("scale", x="independent", y="independent")
    heading = {"text": f"{y_label}; {x_label}", "anchor": "start", "offset": 12}
    return themed(faceted.properties(title=heading))


def _panel(title: str, values: np.ndarray, most: int, top: float | None) -> dict:
    """A panel's row of the chart's table: phi at the ends of the cells, row by row, and these ends,
    which begin with 0."""
    down, right = (
        sorted({round(x) for x in np.linspace(0, size, min(size, most) + 1)})
        for size in values.shape
    )
    few = values[np.ix_(np.array(down[1:]) - 1, np.array(right[1:]) - 1)]
    phi = [None if np.isnan(value) else round(float(value), 3) for value in few.ravel()]
    row = {"panel": title, "down": down, "right": right, "phi": phi}
    row["few"] = max(values.shape) <= FEW
    return row | ({} if top is None else {"top": max(1, round(top * len(values))) + 0.5})


def _counted(title: str, maps: Mapping[str, np.ndarray], side: int) -> dict:
    """Options of an encoding for the directions on one side of the maps, from 1."""
    sizes = {values.shape[side] for values in maps.values()}
    scale = dict(nice=False, zero=False, reverse=side == 0)
    whole = "datum.value % 1 ? '' : datum.label"
    axis = dict(grid=False, format="d", tickCount=5, labelExpr=whole)
    if len(sizes) == 1:
        (size,) = sizes
        ticks = {1, *(round(size * share) for share in (0.25, 0.5, 0.75)), size} - {0}
        axis["values"] = sorted(ticks)
    return {"title": title, "scale": scale, "axis": axis}
