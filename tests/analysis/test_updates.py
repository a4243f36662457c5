"""What a run has learned, as tables."""

import numpy as np
import pandas as pd
import pytest
from synthetic import LAYERS, SOURCES, TARGETS, WIDTH, kernels, make_run, planted_factors

from lorax import spectrum
from lorax.analysis import (
    amplification,
    expected_similarity,
    intruders,
    runs,
    subspace_similarity,
    tables,
    update_similarity,
)
from lorax.analysis.measures import overlap
from lorax.analysis.tables import directions, matrices
from lorax.interop import peft
from lorax.interop.peft import Factors

HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def planted_kernel(d_in=30, d_out=20, rank=20, seed=0):
    """(u, sigma, v, W = u diag(sigma) v^T), sigma from 12 down to 1."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((d_in, rank)))[0]
    v = np.linalg.qr(rng.standard_normal((d_out, rank)))[0]
    sigma = np.linspace(12.0, 1.0, rank)
    return u, sigma, v, u * sigma @ v.T


def along(u, v, which, strengths) -> Factors:
    """An update with W's own directions: sum of strength u v^T over `which`."""
    return Factors(u[:, which] * np.array(strengths, float), v[:, which].T, 1.0)


def dense(update: Factors) -> np.ndarray:
    return update.s * np.asarray(update.a, float) @ update.b


@pytest.mark.parametrize(
    ("path", "layer", "target"),
    [
        ("h/3/attn/q", 3, "q"),
        ("h/11/mlp/up", 11, "up"),
        ("wte", -1, "wte"),
        ("roberta.encoder.layer.11.attention.self.query", 11, "query"),
        ("model.layers2.proj", -1, "proj"),
        ("h/3/experts/5/up", 3, "experts.5.up"),
        ("h/3/experts/router", 3, "router"),
    ],
)
def test_place(path, layer, target):
    assert tables.layer_and_target(path) == (layer, target)


def test_spectra_are_those_of_the_dense_updates(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(1, 4)))
    found, missing = tables.updates(run, run.members.index)
    sigmas, ranks = tables.spectra(found)
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
    found, _ = tables.updates(run, run.members.index)
    bases = {member: tables.bases(factors) for member, factors in found.items()}
    phi = tables.similarity([(bases[0], bases[2]), (bases[1], bases[3])])
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
    found, _ = tables.updates(run, run.members.index)
    base = kernels()
    rows = tables.amplifications(found, base)
    assert len(rows) == 2 * LAYERS * len(TARGETS)
    for _, row in rows.iterrows():
        path = row["path"]
        expected = amplification(base[path], found[row["member"]][path], 2)
        for field, value in expected._asdict().items():
            assert row[field] == pytest.approx(value, rel=1e-9)
    with pytest.raises(KeyError, match="h/0/attn/q"):
        tables.amplifications(found, {"other": np.ones((WIDTH, WIDTH))})


def test_stacks_change_nothing(tmp_path, monkeypatch):
    """What is computed together is what is computed alone: ranks and widths mixed."""
    run = runs.load(make_run(tmp_path / "run", ranks=(1, 2)))
    found, _ = tables.updates(run, run.members.index)
    found[1]["h/0/mlp/up"] = Factors(*np.random.default_rng(0).standard_normal((2, 4, 4)), 1.0)
    full = {9: {path: np.asarray(w) for path, w in kernels().items()}}
    base = kernels() | {"h/0/mlp/up": np.random.default_rng(1).standard_normal((4, 4))}

    def every_table():
        yield from tables.spectra(found | full)
        yield tables.amplifications(found, base)
        yield tables.intruder_table(found | full, base, draws=0)
        of = {member: tables.bases(factors) for member, factors in found.items()}
        yield tables.angles([(of[0], of[1]), (of[0], of[2])])
        yield tables.interventions(found | full, base, epsilon=0.9).table

    together = list(every_table())
    monkeypatch.setattr(matrices, "TOGETHER", 1)
    for one, other in zip(together, every_table(), strict=True):
        pd.testing.assert_frame_equal(one, other, rtol=0, atol=1e-6)
        assert len(one)


def test_updates_that_are_decomposed_once_give_the_same_tables(tmp_path, monkeypatch):
    run = runs.load(make_run(tmp_path / "run", ranks=(1, 2)))
    found, _ = tables.updates(run, run.members.index)
    full = {9: {path: np.asarray(w) for path, w in kernels().items()}}
    every, base = found | full, kernels()
    svds = tables.base_svds(base)

    def every_table(of=None):
        yield from tables.spectra(every, of)
        yield tables.amplifications(every, base, delta_svds=of)
        yield tables.intruder_table(every, base, (1, 3), svds=svds, delta_svds=of)
        phi = tables.against_base(every, base, every, svds=svds, delta_svds=of)
        yield tables.corners(phi, "in")
        of_each = [tables.bases(found[n], svds=of and of[n]) for n in found]
        yield tables.angles([(of_each[0], of_each[1]), (of_each[0], of_each[2])])

    alone = list(every_table())
    decomposed = tables.update_svds(every)
    assert not decomposed[9]  # it has no factors
    monkeypatch.setattr(spectrum, "factor_svd", None)  # nothing decomposes a second time
    for one, other in zip(alone, every_table(decomposed), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
        assert len(one)


# -------------------------------------------------------------------------------------- directions


@pytest.mark.parametrize("case", ["full rank", "dependent", "no update", "wide", "rank 0"])
def test_directions_of_factors_are_their_singular_vectors(case):
    """Up to sign, those of `overlap.directions`; with the same columns missing."""
    rng = np.random.default_rng(0)
    rank, n_out = {"wide": 5, "rank 0": 0}.get(case, 3), 4
    a, b = rng.standard_normal((6, rank)), rng.standard_normal((rank, n_out))
    if case == "dependent":
        a[:, 2], b[0] = a[:, 1], 0
    if case == "no update":
        b[:] = 0
    got = tables.bases({"q": Factors(np.float32(a), np.float32(b), 0.5)})["q"]
    assert list(got) == list(tables.KINDS)
    for kind, factor in (("A", np.float32(a)), ("B", np.float32(b).T)):
        expected = overlap.directions(factor)
        same = np.abs(np.sum(got[kind] * expected, 0))
        np.testing.assert_allclose(same, expected.any(0), atol=1e-9)
        np.testing.assert_array_equal(got[kind].any(0), expected.any(0))
    assert got["dW in"].shape == (6, min(rank, n_out))
    assert got["dW in"].any(0).sum() == np.linalg.matrix_rank(a @ b if rank else np.zeros((1, 1)))


def test_members_of_different_runs_share_the_paths_that_both_have(tmp_path):
    """A run and a PEFT adapter from elsewhere that adapts one layer of it."""
    run = runs.load(make_run(tmp_path / "run", ranks=(2,)))
    only = {"h/1/attn/q": planted_factors(2, 0, 3.0)["h/1/attn/q"]}
    peft.save(tmp_path / "elsewhere", only, SOURCES, "gpt2-nano")
    other = tables.bases(peft.load(tmp_path / "elsewhere", SOURCES).factors)
    phi = tables.similarity([(tables.bases(run.adapter(0)), other)])
    assert set(phi) == {"h/1/attn/q"} and tuple(phi["h/1/attn/q"]) == tables.KINDS
    for values in phi["h/1/attn/q"].values():  # the same seed: the same factors
        np.testing.assert_allclose(np.diag(values), 1, atol=1e-9)
    assert tables.similarity([(other, tables.bases({"h/0/attn/q": only["h/1/attn/q"]}))]) == {}
    corner = tables.corners(phi, "dW in", 2, 2)
    assert corner.to_dict("records") == [
        {"path": "h/1/attn/q", "layer": 1, "target": "q", "value": pytest.approx(1)}
    ]
    assert tables.corners(phi, "dW in", 3, 1).empty


def test_similarity_of_pairs_with_different_ranks_is_that_of_the_smallest():
    u, _, v, _ = planted_kernel()
    one = tables.bases({"q": along(u, v, [0, 1, 2], [3, 2, 1])})
    two = tables.bases({"q": along(u, v, [1, 5], [2, 1])})
    phi = tables.similarity([(one, one), (two, one)])["q"]["dW in"]
    assert phi.shape == (2, 3)
    second = np.array([[0, 1, 1], [0, 1 / 2, 1 / 2]])
    first = np.array([[1, 1, 1], [1, 1, 1]])
    np.testing.assert_allclose(phi, (first + second) / 2, atol=1e-9)


def test_factors_against_a_dense_update():
    """Full fine-tuning's update holds the adapter's two directions as its second and third."""
    u, _, v, _ = planted_kernel()
    full = dense(along(u, v, [7, 1, 2, 3], [9, 5, 4, 3]))
    lora = tables.bases({"q": along(u, v, [1, 2], [2, 1])})
    other = tables.bases({"q": full.astype(np.float32)}, 3)
    phi = tables.similarity([(lora, other)])["q"]
    assert set(phi) == {"dW in", "dW out"}
    for values in phi.values():
        np.testing.assert_allclose(values, [[0, 1, 1], [0, 1 / 2, 1]], atol=1e-5)


def test_other_widths_are_refused():
    one, other = (
        tables.bases({"q": Factors(np.ones((n, 1)), np.ones((1, n)), 1.0)}) for n in (4, 5)
    )
    with pytest.raises(ValueError, match="q, A: directions in spaces of 4 and 5"):
        tables.similarity([(one, other)])


def test_principal_angles_of_planted_updates():
    u, _, v, _ = planted_kernel()
    turned = np.cos(np.radians(30)) * u[:, 0] + np.sin(np.radians(30)) * u[:, 5]
    one = tables.bases({"h/2/q": along(u, v, [0, 1], [2, 1])})
    b = v[:, [0, 2]].T
    other = tables.bases({"h/2/q": Factors(np.stack([2 * turned, u[:, 6]], 1), b, 1.0)})
    table = tables.angles([(one, other)])
    degrees = table.groupby("kind")["degrees"].apply(list)
    np.testing.assert_allclose(degrees["dW in"], [30, 90], atol=1e-5)
    np.testing.assert_allclose(degrees["dW out"], [0, 90], atol=1e-5)
    assert set(table["layer"]) == {2} and list(table["index"][:2]) == [1, 2]
    assert len(tables.angles([(one, other)], 1)) == 4  # kinds


@pytest.mark.parametrize("size", [(60, 40), (530, 520)])
def test_leading_directions_of_a_dense_update_have_an_error(size):
    """Planted: 6 strong directions over a tail of noise's size."""
    rng = np.random.default_rng(0)
    rank = 40
    u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in size)
    sigma = np.concatenate([[6.0, 5, 4, 3, 2, 1], np.geomspace(0.1, 0.01, rank - 6)])
    found, table = tables.leading({"h/0/q": u * sigma @ v.T}, 6)
    assert list(table["randomised"]) == [min(size) > directions.EXACT] and table["k"][0] == 6
    assert table["energy"][0] == pytest.approx(np.sum(sigma[:6] ** 2) / np.sum(sigma**2), abs=1e-9)
    assert table["error"][0] < 1e-7
    # The range has 16 directions: what is left could all lie in the sixth.
    missed = np.sum(sigma[16:] ** 2) if min(size) > directions.EXACT else 0.0
    assert table["bound"][0] == pytest.approx((np.sqrt(1 + missed) - 1) / 6, rel=0.01, abs=1e-12)
    for kind, planted in (("dW in", u), ("dW out", v)):
        cosines = np.abs(np.sum(found["h/0/q"][kind] * planted[:, :6], axis=0))
        np.testing.assert_allclose(cosines, 1, atol=1e-9)


def test_the_stated_error_is_large_where_the_directions_are_not_found():
    """A flat spectrum has no leading directions to find."""
    flat = np.random.default_rng(0).standard_normal((520, 520))
    table = tables.leading({"q": flat}, 20)[1]
    assert table["error"][0] > 1e-3 and table["bound"][0] > 0.1
    nothing = tables.leading({"q": np.zeros((9, 7))}, 20)
    assert nothing[1]["k"][0] == 7 and not nothing[0]["q"]["dW in"].any()
    assert (nothing[1][["energy", "error", "bound"]] == 0).all(axis=None)


# ------------------------------------------------------------------------------------ with the base


def test_base_spectra_find_the_planted_deficiency():
    _, sigma, _, w = planted_kernel(rank=12)
    base = {"h/0/q": w.astype(np.float32), "h/1/q": planted_kernel(20, 30)[3]}
    for svds in (None, tables.base_svds(base)):
        sigmas, ranks = tables.base_spectra(base, svds)
        own = sigmas[sigmas["path"] == "h/0/q"]["sigma"]
        np.testing.assert_allclose(own, [*sigma, *[0] * 8], atol=1e-5)
        assert list(ranks["deficiency"]) == [8, 0] and list(ranks["numerical"]) == [12, 20]
        assert list(ranks["rows"]) == [30, 20] and list(ranks["columns"]) == [20, 30]
        assert ranks["norm"][0] == pytest.approx(np.linalg.norm(sigma), abs=1e-5)


def test_base_svds_are_those_of_the_kernels_asked_for():
    base = kernels()
    path = "h/1/attn/v"
    (u, sigma, vt) = tables.base_svds(base, [path, path])[path]
    np.testing.assert_allclose(u * sigma @ vt, base[path], atol=1e-5)
    assert list(tables.base_svds(base)) == list(base)


@pytest.mark.parametrize("full", [False, True])
def test_figure_8_of_an_update_made_of_the_bases_own_directions(full):
    u, _, v, w = planted_kernel()
    which = [4, 0, 11]  # W's 5th, 1st and 12th direction, in dW's order
    update = along(u, v, which, [3, 2, 1])
    found = {7: {"h/0/q": dense(update) if full else update}}
    got = tables.against_base(found, {"h/0/q": w}, [7], k=3)["h/0/q"]
    i, j = np.arange(1, 4)[:, None], np.arange(1, 21)
    inside = np.cumsum(np.array(which)[:, None] < j, axis=0)  # of the first i, those within W's j
    for side in ("in", "out"):
        np.testing.assert_allclose(got[side], inside / np.minimum(i, j), atol=1e-9)
    np.testing.assert_allclose(got["in chance"], expected_similarity(i, j, 30), atol=1e-12)
    np.testing.assert_allclose(got["out chance"], expected_similarity(i, j, 20), atol=1e-12)


def test_figure_8_of_random_updates_is_chance():
    _, _, _, w = planted_kernel(20, 20)
    rng = np.random.default_rng(0)
    draw = lambda: Factors(rng.standard_normal((20, 4)), rng.standard_normal((4, 20)), 1.0)
    found = {n: {"q": draw()} for n in range(400)}
    got = tables.against_base(found, {"q": w}, found)["q"]
    # The standard error of phi(1, 1), the largest of all beside its mean, is sqrt(2) / n / 20.
    np.testing.assert_allclose(got["in"], got["in chance"], atol=5 * 0.0036)
    np.testing.assert_allclose(got["out"][:, -1], 1, atol=1e-9)  # all of W's hold all


def turning(u, sigma, v, which=(2, 3, 4, 5)) -> Factors:
    """Turns four of W's output directions by a Hadamard matrix: cosine 1/2 with four of W's."""
    which = list(which)
    return Factors(u[:, which] * sigma[which], (v[:, which] @ HADAMARD - v[:, which]).T, 1.0)


def test_intruder_table_counts_what_is_planted():
    u, sigma, v, w = planted_kernel(rank=12)
    found = {
        0: {"h/0/q": turning(u, sigma, v), "h/1/q": along(u, v, [0, 3], [1, 1])},
        1: {"h/0/q": turning(u, sigma, v, (6, 7, 8, 9))},
    }
    full = {2: {"h/0/q": dense(found[0]["h/0/q"])}}
    base = {"h/0/q": w, "h/1/q": w}
    table = tables.intruder_table(found | full, base, (1, 3, 8, 25), (0.4, 0.6), draws=0)
    counts = table.pivot_table(
        index=["member", "path"], columns=["epsilon", "k"], values="intruders"
    )
    assert list(counts.columns) == [(0.4, 1), (0.4, 3), (0.4, 8), (0.6, 1), (0.6, 3), (0.6, 8)]
    expected = [[0, 0, 0, 0, 1, 4], [0] * 6, [0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 1, 4]]
    np.testing.assert_array_equal(counts, expected)
    assert table["control"].isna().all() and len(table) == 4 * 6
    sides = tables.intruder_table(found, base, (8,), (0.6,), side="in", draws=0)
    assert not sides["intruders"].any()  # the input directions did not turn


def test_the_control_of_intruders_is_a_random_update_of_the_same_norm():
    """Strong in W's own directions: no intruder, but three of them if turned at random."""
    u, _, v, w = planted_kernel(120, 120, 120)
    found = {0: {"q": along(u, v, [0, 1, 2], [900, 800, 700])}}
    table = tables.intruder_table(found, {"q": w}, (2, 10), (0.5,), draws=3)
    assert list(table["intruders"]) == [0, 0]
    assert table["control"][0] == 2 and table["control"][1] >= 3
    svds = tables.base_svds({"q": w})
    again = tables.intruder_table(found, {"q": w}, (2, 10), (0.5,), draws=3, svds=svds)
    pd.testing.assert_frame_equal(table, again)


def test_kernels_that_do_not_fit_are_named():
    update = {0: {"h/0/q": Factors(np.ones((4, 1)), np.ones((1, 5)), 1.0)}}
    for function in (
        lambda base: tables.intruder_table(update, base),
        lambda base: tables.interventions(update, base),
        lambda base: tables.against_base(update, base, [0]),
        lambda base: tables.amplifications(update, base),
    ):
        with pytest.raises(KeyError, match="h/0/q: adapted, but not among"):
            function({})
        with pytest.raises(ValueError, match=r"h/0/q: an update of \(4, 5\), but .* \(5, 4\)"):
            function({"h/0/q": np.ones((5, 4))})


@pytest.mark.parametrize("full", [False, True])
def test_interventions_give_updates_to_evaluate(full):
    u, sigma, v, w = planted_kernel(rank=12)
    update = turning(u, sigma, v)._replace(s=0.5)
    update = update._replace(a=2 * update.a)
    quiet = along(u, v, [0], [1])
    of = {"h/0/q": update, "h/1/q": quiet}
    of = {path: dense(factors) if full else factors for path, factors in of.items()}
    base = {"h/0/q": w, "h/1/q": w}
    got = tables.interventions({5: of}, base, (0.0, 0.5, 1.0), 8, 0.6)
    as_dense = (lambda x: x) if full else dense
    for lam in (0.0, 0.5, 1.0):
        changed, shrunk = got.changed[lam][5], got.shrunk[lam][5]
        assert isinstance(changed["h/0/q"], np.ndarray if full else Factors)
        # W + dW keeps all singular values but its strongest intruder's, the third.
        expected = np.sort([*np.delete(sigma, 2), lam * sigma[2], *[0] * 8])[::-1]
        values = np.linalg.svd(w + as_dense(changed["h/0/q"]), compute_uv=False)
        np.testing.assert_allclose(values, expected, atol=1e-5)
        row = got.table[(got.table["lam"] == lam) & (got.table["layer"] == 0)].iloc[0]
        norm = np.linalg.norm(as_dense(changed["h/0/q"]))
        assert row["index"] == 2 and row["norm"] == pytest.approx(norm, abs=1e-5)
        assert row["before"] == pytest.approx(np.linalg.norm(dense(update)), abs=1e-9)
        ratio = as_dense(shrunk["h/0/q"]) / dense(update)
        np.testing.assert_allclose(ratio, norm / row["before"], rtol=1e-5)
        # Without an intruder nothing changes.
        for side in (changed, shrunk):
            np.testing.assert_allclose(as_dense(side["h/1/q"]), dense(quiet), atol=1e-6)
    assert set(got.table[got.table["layer"] == 1]["index"]) == {-1}
    np.testing.assert_allclose(as_dense(got.changed[1.0][5]["h/0/q"]), dense(update), atol=1e-5)


def test_intruder_table_is_the_definitions_count(tmp_path):
    run = runs.load(make_run(tmp_path / "run", ranks=(4,)))
    found, _ = tables.updates(run, [0, 1])
    base = kernels()
    table = tables.intruder_table(found, base, (3, 10), (0.3, 0.8), draws=0)
    for (member, path, k), rows in table.groupby(["member", "path", "k"]):
        expected = intruders(base[path], found[member][path][:3], k, (0.3, 0.8)).count
        np.testing.assert_array_equal(rows["intruders"], expected)
    assert table["intruders"].sum() > 0
