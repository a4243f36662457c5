"""Figures of updates say what the tables say."""

import inspect
import json

import drawn
import numpy as np
import pandas as pd
import pytest
from drawn import specification
from scipy import stats
from synthetic import kernels, make_run

from lorax.analysis import chance_similarity, expected_similarity, figures, runs, tables
from lorax.analysis.figures import maps, panels, rank_lines
from lorax.report import charts


def data(chart) -> pd.DataFrame:
    """The only table of a chart."""
    (rows,) = specification(chart)["datasets"].values()
    return pd.DataFrame(rows)


def numbers(marks, *columns):
    return [tuple(drawn.number(mark[column]) for column in columns) for mark in marks]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """(sigmas, ranks) of members of two ranks and two seeds."""
    run = runs.load(make_run(tmp_path_factory.mktemp("run") / "run", ranks=(1, 2)))
    found, _ = tables.updates(run, run.members.index)
    sigmas, ranks = tables.spectra(found)
    return sigmas.assign(rank=sigmas["member"].map(run.members["rank"])), ranks


def test_spectra_are_means_that_follow_the_members(learned):
    sigmas, _ = learned
    second = sigmas[(sigmas["target"] == "v") & (sigmas["index"] == 2)]
    chart = figures.spectra(sigmas)
    points = [m for m in drawn.marks(chart, "symbol") if m["matrix"] == "v" and m["index"] == "2"]
    assert numbers(points, "mean over layers and members", "of how many") == [
        (pytest.approx(second["sigma"].mean(), rel=1e-3), 6)
    ]
    hidden = [m for m in drawn.marks(chart, "symbol", [2]) if m["index"] == "2"]
    one = second[second["member"] == 3]["sigma"].mean()
    assert numbers(hidden[1:], "mean over layers and members")[0][0] == pytest.approx(one, rel=1e-3)
    each = figures.spectra(sigmas, each=True)
    titles = [text for text in drawn.texts(each) if "layer" in text]
    assert titles == [f"{target}, layer {layer}" for layer in range(3) for target in "qv"]


def test_a_long_curve_keeps_both_ends():
    row = {"member": 0, "path": "h/0/q", "layer": 0, "target": "q", "rank": 512}
    sigmas = pd.DataFrame([{**row, "index": i, "sigma": 1 / i} for i in range(1, 513)])
    (index,) = data(figures.spectra(sigmas))["index"]
    assert index[0] == 1 and index[-1] == 512 and len(index) <= rank_lines.POINTS


def test_ranks_have_intervals_over_layers(learned):
    _, ranks = learned
    chart = figures.update_ranks(ranks)
    means = [m for m in drawn.marks(chart, "symbol") if "layers" in m and m["target"] == "q"]
    of = ranks[(ranks["target"] == "q") & (ranks["rank"] == 2)].groupby("layer")["effective"].mean()
    half = stats.t.ppf(0.975, 2) * of.std() / np.sqrt(3)
    found = numbers(means, "rank", "mean over layers", "95% interval from", "to", "layers")
    wanted = (2, of.mean(), of.mean() - half, of.mean() + half, 3)
    assert any(np.allclose(row, wanted, rtol=2e-3) for row in found)
    by_method = figures.update_ranks(ranks.assign(method="lora"), "method")
    assert not drawn.marks(by_method, "line") and "lora" in drawn.texts(by_method)


def test_maps_have_phi_with_the_first_directions_at_the_upper_left():
    rng = np.random.default_rng(0)
    phi = {(layer, target): rng.uniform(0, 1, (3, 6)) for layer in (0, 5) for target in "qv"}
    del phi[5, "v"]
    chart = figures.similarity_maps(phi, np.full((3, 6), 0.1), "i: of one", "j: of the other")
    rows = data(chart).set_index("panel")
    assert list(rows.index) == ["q, layer 0", "v, layer 0", "q, layer 5", "chance"]
    np.testing.assert_allclose(rows["phi"]["q, layer 5"], phi[5, "q"].ravel(), atol=1e-3)
    assert rows["down"]["chance"] == [0, 1, 2, 3] and rows["right"]["chance"][-1] == 6
    words = drawn.texts(chart)
    assert "i: of one; j: of the other" in words and f"{phi[0, 'q'][0, 1]:.2f}"[1:] in words
    assert json.dumps(specification(chart)).count('"reverse": true') >= 1


def test_a_large_map_has_evenly_spaced_cells_and_no_numbers():
    phi = np.outer(np.linspace(1, 0.3, 64), np.linspace(1, 0.5, 64))
    chart = figures.figure4({"q": phi}, np.full((64, 64), 0.1))
    row = data(chart).iloc[0]
    assert len(row["phi"]) == maps.CELLS**2 and row["right"][-1] == row["down"][-1] == 64
    assert row["phi"][-1] == pytest.approx(phi[-1, -1], abs=1e-3) and not row["few"]
    assert len(json.dumps(specification(chart))) < 40_000
    titles = [text for text in drawn.texts(chart) if text in ("q", "chance")]
    assert titles == ["q", "chance"]


def test_figure3_has_the_whole_map_and_the_triangle():
    phi = {(2, "q"): np.random.default_rng(0).uniform(0, 1, (4, 12))}
    rows = data(figures.figure3(phi, np.full((4, 12), 0.1))).set_index("panel")
    assert list(rows.index) == ["q, layer 2", "q, layer 2: j ≤ i", "chance", "chance: j ≤ i"]
    zoom = np.array(rows["phi"]["q, layer 2: j ≤ i"], float).reshape(4, 4)
    lower = np.tril(np.ones((4, 4), bool))
    np.testing.assert_allclose(zoom[lower], phi[2, "q"][:, :4][lower], atol=1e-3)
    assert np.isnan(zoom[~lower]).all()
    for shape in ((1, 6), (6, 6), (5, 3)):
        assert drawn.texts(figures.figure3({(0, "q"): np.full(shape, 0.5)}))


def test_figure8_has_the_bases_directions_downwards():
    phi = {"r = 2": np.random.default_rng(0).uniform(0, 1, (2, 30)), "r = 4": np.ones((4, 30))}
    chart = figures.against_base(phi, np.full((4, 30), 0.1))
    rows = data(chart).set_index("panel")
    np.testing.assert_allclose(rows["phi"]["r = 2"], phi["r = 2"].T.ravel(), atol=1e-3)
    assert rows["top"]["r = 2"] == 3.5  # below the third of 30
    assert "i: directions of W; j: directions of ΔW" in drawn.texts(chart)


def test_layer_grid_has_every_number():
    rows = [(0, "q", 1.5), (0, "q", 2.5), (3, "q", 120.0), (3, "v", np.inf)]
    values = pd.DataFrame(rows, columns=["layer", "target", "value"])
    for log in (False, True):
        words = drawn.texts(figures.layer_grid(values, "amplification", log=log))
        assert {"2", "120", "inf", "q", "v", "0", "3", "amplification", "layer"} <= set(words)
    assert drawn.texts(figures.layer_grid(values.assign(value=0.0), "intruders", log=True))


def test_sensitivity_has_shares_and_ranks():
    rows = [(0, "q", 3.0, 4), (1, "q", 1.0, 1), (0, "v", 4.0, 7)]
    ranking = pd.DataFrame(rows, columns=["layer", "target", "score", "rank"])
    chart = figures.sensitivity(ranking)
    np.testing.assert_allclose(data(chart)["shown"], [3 / 8, 1 / 8, 1 / 2])
    assert {"4", "1", "7"} <= set(drawn.texts(chart))


def test_diagonal_has_chance_and_intervals_over_layers():
    band = chance_similarity(24, 4, 6)
    layers = np.random.default_rng(0).uniform(0.3, 0.6, (3, 4, 6))
    chart = figures.diagonal({"seeds": layers, "ranks": np.full((2, 6), 0.9)}, band)
    points = drawn.marks(chart, "symbol")
    at_1 = [m for m in points if m["i"] == "1" and m.get("line") == "seeds"]
    assert numbers(at_1, "mean of φ(i, i)", "layers")[0] == (
        pytest.approx(layers[:, 0, 0].mean(), abs=1e-3),
        3,
    )
    assert sum(m.get("line") == "ranks" for m in points) == 2
    assert {"seeds", "ranks"} <= set(drawn.texts(chart)) and drawn.marks(chart, "area")


def test_table7_shows_the_norm_over_chance(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(1, 4)))
    found, _ = tables.updates(run, run.members.index)
    amplified = tables.amplifications(found, kernels())
    w = kernels()["h/0/attn/q"]
    row = amplified[(amplified["path"] == "h/0/attn/q") & (amplified["rank"] == 4)].iloc[0]
    assert row["by_chance"] == pytest.approx(4 * np.linalg.norm(w) / w.shape[0])
    assert row["over_chance"] == pytest.approx(row["w_in_delta"] / row["by_chance"])
    rng = np.random.default_rng(0)
    draw = lambda: np.linalg.qr(rng.standard_normal((w.shape[0], 4)))[0]
    squares = [np.sum((draw().T @ w @ draw()) ** 2) for _ in range(300)]
    assert np.sqrt(np.mean(squares)) == pytest.approx(row["by_chance"], rel=0.05)
    words = drawn.texts(figures.table7(amplified))
    assert "W in ΔW's directions, over chance" in words and "amplification factor" in words
    amplified["factor"] = np.inf  # W has nothing there: no point, and no failure
    assert drawn.texts(figures.table7(amplified))


def test_means_over_layers_count_a_layer_once():
    rows = [(0, 0, 1.0), (0, 0, 3.0), (1, 0, 2.0), (0, 1, 8.0), (0, 2, np.inf)]
    table = pd.DataFrame(rows, columns=["member", "layer", "x"]).assign(target="q")
    (mean,) = tables.over_layers(table, ["target"], ["x"]).itertuples()
    assert mean.x == 5.0  # of 2 and 8
    assert mean.x_half == pytest.approx(stats.t.ppf(0.975, 1) * np.std([2, 8], ddof=1) / 2**0.5)
    one = tables.over_layers(table[table["layer"] == 0], ["target"], ["x"])
    assert np.isnan(one["x_half"][0])


def test_intruder_counts_are_summed_over_matrices():
    rows = [
        {"member": m, "path": p, "k": k, "epsilon": e, "rank": 2 ** (m // 2)}
        | {"intruders": k * m, "control": np.nan if m < 2 else 1.0}
        for m in range(4)
        for p in "ab"
        for k in (1, 10)
        for e in (0.3, 0.6)
    ]
    chart = figures.intruder_counts(pd.DataFrame(rows), 10)
    found = [(m["rank"], m["ε"], m["number"], m["mean over members"]) for m in
             drawn.marks(chart, "symbol")]  # fmt: skip
    assert ("1", "0.3", "intruders", "10.0") in found and ("2", "0.6", "intruders", "50.0") in found
    controls = [row for row in found if row[2] == "norm-matched control"]
    assert {(row[0], row[3]) for row in controls} == {("2", "2.0")}
    assert "intruders in the top 10 of 2 matrices" in drawn.texts(chart)


def test_base_spectrum_leaves_rounding_out():
    w = np.diag([4.0, 2.0, 1.0, 1e-12])
    base = {f"h/{layer}/{target}": w for layer in range(9) for target in ("q", "v", "up")}
    chart = figures.base_spectrum(tables.base_spectra(base)[0])
    assert len(data(chart)) == 27  # every layer
    assert all(row == [4, 2, 1] for row in data(chart)["sigma"])
    many = {f"h/{layer}/q": w for layer in range(40)}
    assert len(data(figures.base_spectrum(tables.base_spectra(many)[0]))) == 40
    assert "none" in drawn.texts(figures.base_spectrum(tables.base_spectra({"wte": w})[0]))


def test_trajectory_is_the_mean_over_matrices():
    rows = [
        {"member": m, "step": step, "path": path, "norm": step * (m + 1) * scale, "rank": m // 2}
        for m in range(4)
        for step in (0, 10, 20)
        for path, scale in (("a", 1.0), ("b", 3.0))
    ]
    table = pd.DataFrame(rows)
    chart = figures.trajectory(table)
    points = [m for m in drawn.marks(chart, "symbol") if m["rank"] == "0"]
    assert {m["mean over members"] for m in points} == {"0", "30", "60"}  # members 1 and 2, scale 2
    hidden = [m for m in drawn.marks(chart, "symbol", [1]) if m["rank"] == "0"]
    assert {m["mean over members"] for m in hidden} == {"0", "20", "40"}
    assert {"Frobenius norm of ΔW", "optimizer step"} <= set(drawn.texts(chart))
    table["effective"] = 1.0
    two = drawn.texts(figures.trajectory(table))
    assert "effective rank of ΔW" in two
    one = drawn.texts(figures.trajectory(table, quantities=["effective"]))
    assert "Frobenius norm of ΔW" not in one


def test_cka_is_the_mean_over_members():
    rows = [(m, layer, 1 - 0.1 * layer * (m + 1), "lora") for m in range(2) for layer in range(3)]
    table = pd.DataFrame(rows, columns=["member", "layer", "cka", "method"])
    chart = figures.cka(table, "method")
    points = drawn.marks(chart, "symbol")
    assert [m["mean over members"] for m in points] == ["1.0000", "0.8500", "0.7000"]
    assert "lora" in drawn.texts(chart)


def test_numbers_by_layer_are_means_over_members():
    rows = [(m, layer, t, 10.0**layer + m, m % 2) for m in range(4) for layer in range(3) for t in
            "qv"]  # fmt: skip
    table = pd.DataFrame(rows, columns=["member", "layer", "target", "size", "rank"])
    chart = figures.by_layer_and_value(table, "size")
    at = [m for m in drawn.marks(chart, "symbol") if m["layer"] == "2" and m["rank"] == "0"]
    assert [m["mean over members"] for m in at] == ["101", "101"]


def test_overlap_is_a_symmetric_matrix():
    rows = [("a", "b", "input", 0.5, 0.1), ("a", "c", "input", 0.2, 0.1)]
    pairs = pd.DataFrame(rows, columns=["first", "second", "side", "phi", "by_chance"])
    table = data(figures.overlap(pairs, list("abc")))
    assert len(table) == 4 and set(table[table["first"] == "b"]["phi"]) == {0.5}
    assert "input" in drawn.texts(figures.overlap(pairs, list("abc")))


def test_several_adapters_have_a_row_of_panels_for_every_target(learned):
    _, ranks = learned
    one = drawn.texts(figures.by_layer(ranks[ranks["member"] == 0]))
    assert {"norm of ΔW", "effective rank", "stable rank", "q", "v"} <= set(one)
    several = drawn.texts(figures.by_layer(ranks))
    assert {"q: norm of ΔW", "v: stable rank"} <= set(several)


def test_panels_stand_in_rows_with_few_gaps():
    counts = {n: panels.side_by_side(n, 4) for n in (1, 3, 4, 5, 6, 8, 9, 49)}
    assert counts == {1: 1, 3: 3, 4: 4, 5: 3, 6: 3, 8: 4, 9: 4, 49: 4}


@pytest.mark.parametrize("name", ["a.b", "it's", 'x"y', "[z]", "$1$"])
def test_names_may_have_any_characters(learned, name):
    _, ranks = learned
    named = ranks.assign(**{name: ranks["rank"]}, target=name)
    assert name in drawn.texts(figures.update_ranks(named, name))


def test_every_figure_is_a_valid_chart_as_png_and_pdf():
    phi = np.random.default_rng(0).uniform(0, 1, (2, 9))
    chart = figures.figure3({(0, "q"): phi}, expected_similarity(*np.indices(phi.shape) + 1, n=9))
    spec = specification(chart)
    assert "facet" in spec
    assert charts.png(spec).startswith(b"\x89PNG") and charts.pdf(spec).startswith(b"%PDF")


def test_flags_of_figures_are_named_where_they_are_given():
    """A flag that goes by its place takes any value that stands there for yes."""
    for name, function in inspect.getmembers(figures, inspect.isfunction):
        for given in inspect.signature(function).parameters.values():
            flag = isinstance(given.default, bool)
            assert not flag or given.kind is given.KEYWORD_ONLY, (name, given.name)
