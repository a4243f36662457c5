"""Figures of updates say what the tables say."""

import inspect
import io

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from synthetic import kernels, make_run

from lorax.analysis import chance_similarity, figures, runs, tables
from lorax.analysis.figures import lines, rank_lines


def draws(figure):
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue().startswith(b"\x89PNG")


def test_spectra_and_ranks(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(1, 2)))
    found, _ = tables.updates(run, [0, 2, 3])
    ranks_of = runs.summary(run)["rank"]
    sigmas, ranks = tables.spectra(found)
    sigmas["rank"] = sigmas["member"].map(ranks_of)
    figure = figures.spectra(sigmas, [0, 2])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["q, layer 0", "v, layer 0", "q, layer 2", "v, layer 2"]
    assert all(len(axes.lines) == 3 for axes in figure.axes) and draws(figure)
    # A panel of a layer that has no such matrix is not there, its neighbours have their numbers.
    figure = figures.spectra(sigmas[sigmas["path"] != "h/2/attn/v"], [0, 2])
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]
    numbers = [axes.xaxis.get_tick_params()["labelbottom"] for axes in figure.axes[:3]]
    assert numbers == [False, True, True] and draws(figure)
    figure = figures.update_ranks(ranks)
    mean = ranks[ranks["target"] == "q"].groupby("rank")["effective"].mean()
    line = next(line for line in figure.axes[0].lines if line.get_label() == "q")
    np.testing.assert_allclose(line.get_ydata(), mean, atol=1e-12)
    assert draws(figure)


def test_similarity_maps():
    rng = np.random.default_rng(0)
    phi = {(layer, target): rng.uniform(0, 1, (3, 6)) for layer in (0, 5) for target in "qv"}
    del phi[5, "v"]
    figure = figures.similarity_maps(phi, np.full((3, 6), 0.1), "i", "j")
    images = {axes.get_title(): axes.images[0] for axes in figure.axes if axes.images}
    assert set(images) == {"q, layer 0", "v, layer 0", "q, layer 5", "Gaussian control"}
    np.testing.assert_array_equal(images["q, layer 5"].get_array(), phi[5, "q"])
    assert all(image.get_clim() == (0, 1) for image in images.values())
    # phi(1, 1) is centred on i = 1, j = 1, at the upper left.
    assert list(images["q, layer 0"].get_extent()) == [0.5, 6.5, 3.5, 0.5]
    assert draws(figure)


def words(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_a_small_map_has_numbers_and_a_large_one_contours():
    small = figures.figure4({"q": np.eye(3)}, np.full((3, 3), 0.25)).axes[0]
    assert [text.get_text() for text in small.texts[:3]] == ["1.00", ".00", ".00"]
    phi = np.outer(np.linspace(1, 0.3, 20), np.ones(20))
    large = figures.figure4({"q": phi}, np.full((20, 20), 0.1))
    assert len(large.axes[0].collections) == 1 and {t.get_text() for t in large.axes[0].texts} <= {
        "0.5",
        "0.75",
    }
    assert not large.axes[1].texts and draws(large)  # nothing crosses a level there


def test_figure3_has_the_whole_map_and_the_triangle():
    rng = np.random.default_rng(0)
    phi = {(2, "q"): rng.uniform(0, 1, (4, 12)), (2, "v"): rng.uniform(0, 1, (4, 12))}
    control = np.full((4, 12), 0.1)
    figure = figures.figure3(phi, control)
    full, zoom, *_ = figure.axes
    assert full.get_title() == "q, layer 2" and "j ≤ i" in zoom.get_title()
    assert full.get_ylabel() == "i (r = 4)" and figure.axes[4].get_xlabel() == "j (r = 12)"
    np.testing.assert_array_equal(full.images[0].get_array(), phi[2, "q"])
    corner = np.ma.filled(zoom.images[0].get_array(), np.nan)
    lower = np.tril(np.ones((4, 4), bool))
    np.testing.assert_array_equal(corner[lower], phi[2, "q"][:, :4][lower])
    assert np.isnan(corner[~lower]).all() and len(zoom.texts) == lower.sum()
    assert figure.axes[4].get_title() == "Gaussian control"
    assert len(figures.figure3(phi).axes) == 5 and draws(figure)  # four maps and the bar
    for shape in ((1, 6), (6, 6), (5, 3)):
        assert draws(figures.figure3({(0, "q"): rng.uniform(0, 1, shape)}))


def test_figure4_has_the_control_last():
    phi = {(0, "q"): np.full((5, 5), 0.7), (0, "v"): np.full((5, 5), 0.3)}
    figure = figures.figure4(phi, np.full((5, 5), 0.05))
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert titles == ["q, layer 0", "v, layer 0", "Gaussian control"]
    assert (figure.axes[2].images[0].get_array() == 0.05).all() and draws(figure)


def test_figure8_has_the_bases_directions_downwards():
    phi = {"r = 2": np.random.default_rng(0).uniform(0, 1, (2, 30)), "r = 4": np.ones((4, 30))}
    figure = figures.against_base(phi, np.full((4, 30), 0.1))
    first, _, chance, _ = figure.axes
    np.testing.assert_array_equal(first.images[0].get_array(), phi["r = 2"].T)
    assert chance.get_title() == "random directions" and "W" in first.get_ylabel()
    assert first.lines[0].get_ydata()[0] == 3.5 and draws(figure)  # below the third of 30


def test_layer_grid_has_every_number():
    rows = [(0, "q", 1.5), (0, "q", 2.5), (3, "q", 120.0), (3, "v", np.inf)]
    values = pd.DataFrame(rows, columns=["layer", "target", "value"])
    for log in (False, True):
        figure = figures.layer_grid(values, "amplification", log=log)
        axes, bar = figure.axes
        assert [text.get_text() for text in axes.texts] == ["2", "120", "inf"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "v"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "3"]
        assert bar.get_ylabel() == "amplification" and axes.get_xlabel() == "layer"
        assert draws(figure)
    nothing = values.assign(value=0.0)
    assert draws(figures.layer_grid(nothing, "intruders", log=True))


def test_sensitivity_has_shares_and_ranks():
    rows = [(0, "q", 3.0, 4), (1, "q", 1.0, 1), (0, "v", 4.0, 7)]
    ranking = pd.DataFrame(rows, columns=["layer", "target", "score", "rank"])
    figure = figures.sensitivity(ranking)
    axes = figure.axes[0]
    shares = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shares, [[3 / 8, 1 / 8], [1 / 2, np.nan]])
    assert [text.get_text() for text in axes.texts] == ["4", "1", "7"] and draws(figure)


def test_diagonal_lies_over_the_band():
    band = chance_similarity(24, 4, 6)
    phi = {"seeds": np.full((4, 6), 0.5), "ranks": np.full((2, 6), 0.9)}
    figure = figures.diagonal(phi, band)
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["chance, mean"].get_ydata(), np.diag(band.mean))
    assert list(lines["ranks"].get_xdata()) == [1, 2] and len(axes.collections) == 1
    assert words(figure) == ["chance, 5-95%", "chance, mean", "seeds", "ranks"] and draws(figure)


def test_table7_has_medians_and_quartiles(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(1, 4)))
    found, _ = tables.updates(run, run.members.index)
    amplified = tables.amplifications(found, kernels())
    figure = figures.table7(amplified)
    left, right = figure.axes
    medians = amplified.groupby("rank").median(numeric_only=True)
    for container, column in zip(left.containers, lines.NORMS, strict=True):
        np.testing.assert_allclose(container.lines[0].get_xydata()[:, 1], medians[column])
        assert container.has_yerr
    np.testing.assert_allclose(right.containers[0].lines[0].get_xydata()[:, 1], medians["factor"])
    assert left.get_yscale() == right.get_yscale() == "log" and len(words(figure)) == 4
    amplified["factor"] = np.inf  # W has nothing there: no point, and no failure
    assert draws(figures.table7(amplified)) and draws(figure)


def test_intruder_counts_are_summed_over_matrices():
    rows = [
        {"member": m, "path": p, "k": k, "epsilon": e, "rank": 2 ** (m // 2)}
        | {"intruders": k * m, "control": np.nan if m < 2 else 1.0}
        for m in range(4)
        for p in "ab"
        for k in (1, 10)
        for e in (0.3, 0.6)
    ]
    figure = figures.intruder_counts(pd.DataFrame(rows), 10)
    axes = figure.axes[0]
    first, second = (container.lines[0].get_xydata()[:, 1] for container in axes.containers)
    np.testing.assert_allclose(first, 20 * np.mean([0, 1]))
    np.testing.assert_allclose(second, 20 * np.mean([2, 3]))
    assert len(axes.containers) == 2 and "top 10 of 2 matrices" in axes.get_ylabel()
    controls = [line for line in axes.lines if line.get_linewidth() == 1]
    assert len(controls) == 1 and (controls[0].get_ydata() == 2).all()
    assert words(figure) == ["rank = 1", "rank = 2", "norm-matched control"] and draws(figure)


def test_base_spectrum_leaves_rounding_out():
    w = np.diag([4.0, 2.0, 1.0, 1e-12])
    base = {f"h/{layer}/{target}": w for layer in range(9) for target in ("q", "v", "up")}
    figure = figures.base_spectrum(tables.base_spectra(base)[0])
    assert [axes.get_title() for axes in figure.axes] == ["q", "v", "up"]
    for axes in figure.axes:
        assert len(axes.lines) == rank_lines.MOST_LINES
        np.testing.assert_allclose(axes.lines[0].get_ydata(), [4, 2, 1])
    assert words(figure)[0] == "layer = 0" and words(figure)[-1] == "layer = 8" and draws(figure)
    embedding = figures.base_spectrum(tables.base_spectra({"wte": w})[0])
    assert words(embedding) == ["layer = none"]


def test_trajectory_is_the_mean_over_matrices():
    rows = [
        {"member": m, "step": step, "path": path, "norm": step * (m + 1) * scale, "rank": m // 2}
        for m in range(4)
        for step in (0, 10, 20)
        for path, scale in (("a", 1.0), ("b", 3.0))
    ]
    table = pd.DataFrame(rows)
    figure = figures.trajectory(table)
    (axes,) = figure.axes
    thick = [line for line in axes.lines if line.get_linewidth() > 1]
    assert len(thick) == 2 and len(axes.lines) == 6
    np.testing.assert_allclose(thick[0].get_ydata(), [0, 30, 60])  # members 1 and 2, scale 2
    assert "‖ΔW‖" in axes.get_ylabel() and figure.get_supxlabel() == "optimizer step"
    table["effective"] = 1.0
    assert len(figures.trajectory(table).axes) == 2
    assert len(figures.trajectory(table, quantities=["effective"]).axes) == 1 and draws(figure)


def test_cka_is_the_mean_over_members():
    rows = [(m, layer, 1 - 0.1 * layer * (m + 1), "lora") for m in range(2) for layer in range(3)]
    table = pd.DataFrame(rows, columns=["member", "layer", "cka", "method"])
    figure = figures.cka(table, "method")
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.containers[0].lines[0].get_xydata()[:, 1], [1, 0.85, 0.7])
    assert words(figure) == ["method = lora"] and "CKA" in axes.get_ylabel() and draws(figure)


def test_flags_of_figures_are_named_where_they_are_given():
    """A flag that goes by its place takes any value that stands there for yes."""
    for module in (figures,):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            for given in inspect.signature(function).parameters.values():
                flag = isinstance(given.default, bool)
                assert not flag or given.kind is given.KEYWORD_ONLY, (name, given.name)
