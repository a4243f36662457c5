"""Maps of losses over two axes of the sweep."""

from collections.abc import Sequence

import pandas as pd

from lorax.analysis import runs
from lorax.analysis.figures import style, vega
from lorax.analysis.figures.encodings import (
    field,
    in_panels,
    of_members,
    titles_in_order,
    tooltips,
)
from lorax.analysis.figures.layout import (
    Layout,
    at_best,
    distinct,
    extent,
    of_panels,
)
from lorax.analysis.figures.loss_marks import of_mean

CELL = 34  # pixels, the height of a row
WIDE = 9  # cells in a row of panels


def setting_map(
    table: pd.DataFrame,
    layout: Layout,
    unit: str = "nats",
    panels: Sequence | None = None,
) -> vega.Chart:
    """Final loss by two axes: a cell for every setting, with its mean over seeds. The best cell of
    a row, among those of which all seeds reached the end, is framed; an arrow says that it is the
    first or the last of its row, so that a better one may lie beyond it.

    Args:
      table: rows of `runs.summary`.
      layout: from `layout.map_layout`: x has the columns, colour the rows.
      unit: of the loss.
      panels: which values of the panels' axis to draw; None: all.
    """
    found, (x, y) = runs.measured(table), layout[:2]
    kept = table[table[x].notna() & table[y].notna()]
    kept = of_panels(at_best(kept, layout.shown, layout.best), layout.panel, panels)
    data = of_members(kept, layout.names, found.loss, layout.panel)
    columns = distinct(kept[x])
    data["edge"] = data[field(x)].map({columns[0]: "◂", columns[-1]: "▸"}).fillna("")
    title = f"final {found.split} loss ({unit})"
    chart = vega.layer(
        *_cells(kept, layout, data, title, extent(kept[found.loss], runs.base_loss(table)))
    )
    shown = titles_in_order(kept, layout.panel) if layout.panel else []
    few = max(1, WIDE // len(columns))
    chart = in_panels(chart, data, shown, CELL * kept[y].nunique(), few)
    return style.themed(style.filtered(chart))


def _cells(
    kept: pd.DataFrame, layout: Layout, data: pd.DataFrame, title: str, ends: tuple[float, float]
) -> list[vega.Chart]:
    """Layers: the cells, the frames of the best, the numbers, and words for what is lost."""
    x, y = map(field, layout[:2])
    discrete = lambda name, **axis: vega.column(
        f"{field(name)}:O", title=style.label(name), axis=dict(format="~g", **axis)
    )
    place = {"x": discrete(layout.x, labelAngle=0), "y": discrete(layout.colour)}
    names = [*layout.names]
    groups = [*dict.fromkeys(map(field, names)), "panel", "lost", "edge"]
    mean = style.with_intervals(vega.Chart(), "loss", groups)
    scale = dict(domain=list(ends), clamp=True, reverse=True)
    colour = vega.column("mean:Q", title=title, scale=scale, legend=dict(gradientLength=200))
    said = tooltips(dict.fromkeys(names), kept, of_mean(kept, list(dict.fromkeys(names)), title))
    cells = mean.mark("rect").encode(**place, color=colour, tooltip=said)
    best = (
        mean.filter("datum.lost === 0")
        .join_aggregate(lowest="min(mean)", groupby=[y, "panel"])
        .filter("datum.mean === datum.lowest")
    )
    # Two frames, dark in light, are seen on every colour.
    frame = lambda colour, width: best.mark(
        "rect", filled=False, stroke=colour, strokeWidth=width, strokeJoin="round"
    ).encode(**place)
    middle = (ends[0] + ends[1]) / 2
    ink = vega.either(f"datum.mean < {middle:.6g}", "#111111", "#ffffff")
    text = mean.calculate(text="format(datum.mean, '.3f')")
    text = text.mark("text", fontSize=12).encode(**place, text="text:N", color=ink)
    edges = best.filter("datum.edge !== ''")
    at = lambda which, **where: (
        edges.filter(f"datum.edge === '{which}'")
        .mark("text", fontSize=14, **where)
        .encode(**place, text="edge:N", color=ink)
    )
    lost = vega.Chart().filter("datum.lost > 0")
    lost = lost.aggregate(
        n="valid(loss)", lost="max(lost)", members="count()", groupby=[*groups[:-2], "status"]
    )
    lost = lost.filter("datum.n === 0").mark("text", style="reference-text")
    lost = lost.encode(**place, text="status:N")
    return [cells, frame("#ffffff", 5), frame("#111111", 2), text, lost,
            at("◂", dx=-24), at("▸", dx=24)]  # fmt: skip
