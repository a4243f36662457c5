"""Charts are the specifications that altair makes of the same figure."""

import altair as alt
import numpy as np
import pandas as pd
import pytest
from drawn import marks

from lorax.analysis.figures import vega

TABLE = pd.DataFrame({"x": [1, 2], "y": [0.5, np.nan], "of": ["a", None], "all": [[1.5], [2.5]]})


def ours():
    chart = vega.Chart().filter("datum.x > 0").aggregate(["x", "of"], mean="mean(y)", n="count()")
    chart = chart.encode(x=vega.column("x:Q", title=None, scale={"zero": False}), y="mean:Q")
    line = chart.mark("line", style="thin").encode(y2="n:Q", opacity=vega.either("datum.n", 1, 0))
    dots = chart.window({"before": "lag(mean)"}, sort=[{"field": "x"}]).mark("point")
    chart = vega.layer(line, dots.calculate(a="1"), data=TABLE).parameter(name="hidden", value=[])
    chart = chart.facet(vega.column("of:N", sort=["a"]), columns=2)
    return chart.resolve("scale", y="independent").resolve("axis", x="independent")


def altairs():
    chart = alt.Chart().transform_filter("datum.x > 0")
    chart = chart.transform_aggregate(mean="mean(y)", n="count()", groupby=["x", "of"])
    chart = chart.encode(x=alt.X("x:Q", title=None, scale=alt.Scale(zero=False)), y="mean:Q")
    faint = alt.condition("datum.n", alt.value(1), alt.value(0))
    line = chart.mark_line(style="thin").encode(y2="n:Q", opacity=faint)
    before = alt.WindowFieldDef(op="lag", field="mean", **{"as": "before"})
    dots = chart.transform_window([before], sort=[alt.SortField("x")]).mark_point()
    chart = alt.layer(line, dots.transform_calculate(a="1"), data=TABLE)
    chart = chart.add_params(alt.param(name="hidden", value=[]))
    chart = chart.facet(alt.Facet("of:N", sort=["a"]), columns=2)
    return chart.resolve_scale(y="independent").resolve_axis(x="independent")


def plain(spec):
    """Without what a theme or a version adds, and the name of the table."""
    (rows,) = spec["datasets"].values()
    rest = {key: spec[key] for key in spec if key not in ("config", "$schema", "data", "datasets")}
    return rest, rows


def test_a_chart_is_that_of_altair():
    assert plain(ours().to_dict()) == plain(altairs().to_dict())


def test_parts_of_one_table_share_it_and_what_a_page_sets():
    part = vega.Chart(TABLE).parameter(name="hidden", value=[]).mark("point")
    over = part.parameter(name="hover", select={"type": "point"})
    spec = vega.layer(part, over).to_dict()
    assert spec["params"] == [{"name": "hidden", "value": []}] and len(spec["datasets"]) == 1
    assert [set(one) for one in spec["layer"]] == [{"mark"}, {"mark", "params"}]
    apart = vega.concat(part, vega.Chart(TABLE.head(1)).mark("line"), columns=2).to_dict()
    assert len(apart["datasets"]) == 2 and "data" not in apart


def test_a_notebook_shows_an_image():
    chart = vega.Chart(TABLE).mark("point").encode(x="x:Q", y="y:Q")
    assert chart._repr_mimebundle_()["image/png"].startswith(b"\x89PNG")
    assert len(marks(chart)) == 1  # a missing value has no mark


@pytest.mark.parametrize("value", [np.inf, np.nan, None, pd.NA])
def test_what_is_no_number_is_null(value):
    table = pd.DataFrame({"a": pd.Series([value, 1.5], dtype=object), "b": [[value], [2]]})
    (rows,) = vega.Chart(table).mark("point").to_dict()["datasets"].values()
    assert rows == [{"a": None, "b": [None]}, {"a": 1.5, "b": [2]}]
