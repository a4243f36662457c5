"""What a run has learned, as tables."""

import numpy as np
import pytest
from synthetic import LAYERS, TARGETS, WIDTH, kernels, make_run

from lorax.analysis import amplification, runs, subspace_similarity, update_similarity, updates


@pytest.mark.parametrize(
    ("path", "layer", "target"),
    [("h/3/attn/q", 3, "q"), ("h/11/mlp/up", 11, "up"), ("wte", -1, "wte")],
)
def test_place(path, layer, target):
    assert updates.place(path) == (layer, target)


def test_spectra_are_those_of_the_dense_updates(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(1, 4)))
    found, missing = updates.adapters(run, run.members.index)
    sigmas, ranks = updates.spectra(found)
    assert not missing and len(ranks) == 4 * LAYERS * len(TARGETS)
    for (member, path), rows in sigmas.groupby(["member", "path"]):
        a, b, s, _ = found[member][path]
        dense = np.linalg.svd(s * a.astype(float) @ b, compute_uv=False)[: a.shape[1]]
        np.testing.assert_allclose(rows["sigma"], dense, rtol=0, atol=1e-5 * dense[0])
        row = ranks[(ranks["member"] == member) & (ranks["path"] == path)].iloc[0]
        assert row["norm"] == pytest.approx(np.linalg.norm(dense), rel=1e-6)
        assert row["stable"] == pytest.approx(np.sum(dense**2) / dense[0] ** 2, rel=1e-6)
        p = dense / dense.sum()
        assert row["effective"] == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-6)
        assert row["numerical"] == a.shape[1]


def test_similarity_is_the_mean_over_pairs(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(2, 4)))
    found, _ = updates.adapters(run, run.members.index)
    bases = {member: updates.bases(factors) for member, factors in found.items()}
    phi = updates.similarity([(bases[0], bases[2]), (bases[1], bases[3])])
    pairs = ((found[0], found[2]), (found[1], found[3]))
    for path in found[0]:
        expected = np.mean([subspace_similarity(f[path].a, g[path].a) for f, g in pairs], axis=0)
        np.testing.assert_allclose(phi[path]["A"], expected, atol=1e-12)
        expected = np.mean([update_similarity(f[path], g[path], "out") for f, g in pairs], axis=0)
        np.testing.assert_allclose(phi[path]["dW out"], expected, atol=1e-12)
        # The planted direction is everybody's first.
        assert phi[path]["dW in"][0, 0] > 0.99


def test_amplifications_are_table_seven(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(2,)))
    found, _ = updates.adapters(run, run.members.index)
    base = kernels()
    rows = updates.amplifications(found, base)
    assert len(rows) == 2 * LAYERS * len(TARGETS)
    for _, row in rows.iterrows():
        path = row["path"]
        expected = amplification(base[path], found[row["member"]][path], 2)
        for field, value in expected._asdict().items():
            assert row[field] == pytest.approx(value, rel=1e-9)
    with pytest.raises(KeyError, match="h/0/attn/q"):
        updates.amplifications(found, {"other": np.ones((WIDTH, WIDTH))})
