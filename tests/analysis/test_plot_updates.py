"""Figures of updates say what the tables say."""

import io

import numpy as np
from matplotlib.figure import Figure
from synthetic import make_run

from lorax.analysis import plot_updates, runs, updates


def draws(figure):
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue().startswith(b"\x89PNG")


def test_spectra_and_ranks(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(1, 2)))
    found, _ = updates.adapters(run, [0, 2, 3])
    ranks_of = runs.summary(run)["rank"]
    sigmas, ranks = updates.spectra(found)
    sigmas["rank"] = sigmas["member"].map(ranks_of)
    figure = plot_updates.spectra(sigmas, [0, 2])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["q, layer 0", "v, layer 0", "q, layer 2", "v, layer 2"]
    assert all(len(axes.lines) == 3 for axes in figure.axes) and draws(figure)
    figure = plot_updates.update_ranks(ranks)
    mean = ranks[ranks["target"] == "q"].groupby("rank")["effective"].mean()
    line = next(line for line in figure.axes[0].lines if line.get_label() == "q")
    np.testing.assert_allclose(line.get_ydata(), mean, atol=1e-12)
    assert draws(figure)


def test_similarity_maps():
    rng = np.random.default_rng(0)
    phi = {(layer, target): rng.uniform(0, 1, (3, 6)) for layer in (0, 5) for target in "qv"}
    del phi[5, "v"]
    figure = plot_updates.similarity_maps(phi, np.full((3, 6), 0.1), "i", "j")
    images = {axes.get_title(): axes.images[0] for axes in figure.axes if axes.images}
    assert set(images) == {"q, layer 0", "v, layer 0", "q, layer 5", "Gaussian control"}
    np.testing.assert_array_equal(images["q, layer 5"].get_array(), phi[5, "q"])
    assert all(image.get_clim() == (0, 1) for image in images.values())
    # phi(1, 1) is centred on i = 1, j = 1, at the upper left.
    assert list(images["q, layer 0"].get_extent()) == [0.5, 6.5, 3.5, 0.5]
    assert draws(figure)
