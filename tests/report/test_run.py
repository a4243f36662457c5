"""The report: right numbers, one self-contained file, and something sensible for every run."""

import hashlib
import html
import json
import re

import numpy as np
import pandas as pd
import pytest
from drawn import specification
from reading import Page
from synthetic import STEPS, WIDTH, kernels, make_run, make_search, planted_factors

from lorax import report
from lorax.analysis import amplification, runs, subspace_similarity
from lorax.analysis.answer import lines
from lorax.analysis.figures import vega
from lorax.report import bases, charts, images


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A rank sweep with two seeds, one of them diverged at rank 1."""
    directory = tmp_path_factory.mktemp("runs") / "sweep"
    make_run(directory, ranks=(1, 2, 4, 8, 16), diverged=(0,))
    path = report.write(directory, kernels())
    return directory, path.read_text()


def test_answer_and_tables_say_the_same(written):
    directory, text = written
    answer = re.search(r'class="answer"><p><strong>(.*?)</strong>', text)[1]
    assert "rank 4" in answer and "eval loss 1.200" in answer and "base&#x27;s 3.456" in answer
    found = json.loads((directory / "analysis" / "answer.json").read_text())
    assert lines(found)[0].startswith(html.unescape(answer))
    shown = {row["setting"]: row for row in Page(text).table("setting", "verdict")}
    assert shown["rank 4"]["eval loss [95%]"] == "1.200" and shown["rank 4"]["verdict"] == "best"
    assert shown["rank 1"]["verdict"] == "not eligible"
    rows = {row["rank"]: row for row in Page(text).table("rank", "scale s", "95% from")}
    assert rows["4"]["validation loss"] == "1.2000" and rows["4"]["to"] == "1.3271"
    assert rows["1"]["seeds"] == "1" and rows["1"]["to"] == "–"
    stored = pd.read_csv(directory / "analysis" / "settings.csv").set_index("rank")
    assert stored.loc[2, "mean"] == pytest.approx(1.4, abs=1e-12)
    assert stored.loc[2, "trainable_params"] == 2 * WIDTH * 2 * 6


def test_member_table(written):
    seen = Page(written[1])
    rows = seen.table("member", "status", "best validation loss")
    assert len(rows) == 10
    assert rows[0]["status"] == f"diverged at step {STEPS[1]}" and rows[0]["validation loss"] == "–"
    assert all(row["status"] == "finished" for row in rows[1:])
    sortable = [a for tag, a in seen.tags if tag == "th" and "aria-sort" in a]
    assert len(sortable) >= len(rows[0])
    linked = [a["href"] for tag, a in seen.tags if tag == "a" and "adapters/" in a["href"]]
    first, table = linked[:2], linked[2:]
    assert sorted(first) == ["adapters/4/", "adapters/5/"]  # of the answer
    assert table == [f"adapters/{member}/" for member in range(10)]


def test_the_run_can_be_cited(written):
    directory, text = written
    entry = text.split('id="cite-this-run"')[1]
    settings = json.loads((directory / "config.json").read_text())["config"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    assert f"sha256 of config {digest[:16]}, of base {'f' * 16}" in entry and "@misc{" in entry


def test_diverged_members_are_named(written):
    assert re.search(
        r"Diverged: rank=1,.*?seed=0 at step 50. Their settings are not eligible", written[1]
    )


def test_scale_confound_is_said_with_its_size(written, tmp_path, undrawn):
    assert "by up to a factor of 16" in written[1] and "scaling to rslora" in written[1]
    fixed = make_run(tmp_path / "fixed", ranks=(1, 2), scaling="fixed", adapters=False)
    assert "mix capacity with scale" not in report.write(fixed).read_text()


def test_similarity_table_and_arrays(written):
    directory, text = written
    with np.load(directory / "analysis" / "similarity.npz") as stored:
        phi = stored["ranks_across_seeds/h/1/attn/v/A"]
        control = stored["ranks_across_seeds/chance/mean"]
    small, large = ([planted_factors(rank, seed, 1.0) for seed in (0, 1)] for rank in (8, 16))
    path = "h/1/attn/v"
    pairs = ((small[0], large[1]), (small[1], large[0]))
    expected = np.mean([subspace_similarity(f[path].a, g[path].a) for f, g in pairs], axis=0)
    np.testing.assert_allclose(phi, expected, atol=1e-9)
    i, j = np.arange(1, 9)[:, None], np.arange(1, 17)[None]
    np.testing.assert_allclose(control, np.maximum(i, j) / WIDTH)
    rows = pd.read_csv(directory / "analysis" / "similarity.csv")
    assert set(rows["comparison"]) == {"ranks_same_seed", "ranks_across_seeds", "between_seeds"}
    row = rows[(rows["comparison"] == "ranks_across_seeds") & (rows["path"] == path)].iloc[0]
    assert row["directions"] == "A" and row["phi_r1_r2"] == pytest.approx(phi[7, 15], abs=1e-9)
    assert row["expected_r1_r2"] == pytest.approx(16 / WIDTH, abs=1e-12)
    shown = Page(text).table("directions of", "φ(8, 16)")[0]
    assert (
        shown["target"] == "q"
        and shown["directions of"] == "A"
        and shown["φ(1, 1)"] == "1.000 ± 0.000"
    )


def test_amplification_table(written):
    directory, text = written
    stored = pd.read_csv(directory / "analysis" / "amplification.csv")
    assert len(stored) == 9 * 6 and set(stored["layer"]) == {0, 1, 2}
    expected = {}
    for layer in range(3):
        path = f"h/{layer}/attn/q"
        factors = [planted_factors(4, seed, 4.0)[path] for seed in (0, 1)]
        expected[layer] = np.mean([amplification(kernels()[path], f, 4).factor for f in factors])
    of_q = lambda rows: [r for r in rows if r["target"] == "q" and r["rank"] == "4"]
    rows = of_q(Page(text).table("amplification", "target", "layer", "rank"))
    shown = {int(row["layer"]): float(row["amplification"]) for row in rows}
    assert shown == pytest.approx(expected, abs=5e-4)
    drawn = pd.read_csv(directory / "figures" / "amplification_layers.csv")
    largest = stored[stored["member"].isin([8, 9])].groupby(["target", "layer"])["factor"].mean()
    pd.testing.assert_series_equal(
        drawn.set_index(["target", "layer"])["value"].sort_index(), largest, check_names=False
    )
    assert "Amplification of every matrix at r = 16, means over members." in text
    (mean,) = of_q(Page(text).table("amplification", "target", "rank", "W's own"))
    assert float(mean["amplification"].partition(" ± ")[0]) == pytest.approx(
        np.mean([*expected.values()]), abs=1e-3
    )


def test_every_figure_is_a_file_and_in_the_page(written):
    directory, text = written
    files = {path.name for path in (directory / "figures").iterdir()}
    names = {
        "rank_curve",
        "size_curve",
        "parallel",
        "learning_curves",
        "spectra",
        "spectra_layers",
        "update_ranks",
        "similarity",
        "similarity_grid",
        "amplification",
        "amplification_layers",
        "over_chance_layers",
        "against_base",
        "against_base_layers",
        "intruders",
        "base_spectrum",
    }
    for which in ("ranks_same_seed", "ranks_across_seeds", "between_seeds"):
        names |= {f"similarity_{which}", f"similarity_{which}_layers"}
    assert files == {f"{name}.csv" for name in names}
    seen = Page(text)
    drawn = [attributes for _, attributes in seen.tags if "data-chart" in attributes]
    assert {chart["data-chart"] for chart in drawn} == names
    assert all(len(chart["aria-label"]) > 10 for chart in drawn)
    linked = {a["href"] for tag, a in seen.tags if tag == "a" and "figures/" in a["href"]}
    assert linked == {f"figures/{name}" for name in files}


def test_page_needs_nothing_but_itself(written):
    seen = Page(written[1])
    assert not seen.open
    for tag, attributes in seen.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            target = attributes.get(name)
            if target is None:
                continue
            beside = ("https://arxiv.org/", "#", "figures/", "adapters/", "config.json")
            link = tag == "a" and target.startswith(beside)
            link |= tag == "img" and "noscript" in written[1].split(f'src="{target}"')[0][-20:]
            assert link or target.startswith("data:image/png;base64,"), (tag, target[:60])
        assert tag not in ("link", "iframe", "object", "base")
    own = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", written[1], re.S)
    style_and_script = "".join(part for part in own if "window.vegaEmbed=" not in part)
    assert not re.search(r"url\(|@import|fetch\(|import\s|XMLHttp", style_and_script)
    assert "color-scheme: light dark" in style_and_script and "@media print" in style_and_script


def test_page_is_well_made(written):
    seen = Page(written[1])
    tags = [tag for tag, _ in seen.tags]
    assert tags.count("h1") == tags.count("main") == 1
    ids = {a["id"] for _, a in seen.tags if "id" in a}
    assert {a["href"][1:] for _, a in seen.tags if a.get("href", "").startswith("#")} <= ids
    assert all(a.get("scope") in ("col", "row") for tag, a in seen.tags if tag == "th")
    assert "Answer" in seen.headings[1] and "Method notes" in seen.headings[-2]


def test_one_seed(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(1, 4), seeds=(0,))
    text = report.write(directory, kernels()).read_text()
    assert "Undecided: the best, rank 4" in text and "1 seed: at least 3 are needed" in text
    assert "1 seed, so there is no interval" in text
    assert "Between seeds: not available" in text
    assert not (directory / "figures" / "similarity_between_seeds.csv").exists()


def test_a_curve_that_still_falls_at_its_end_is_said(tmp_path, undrawn):
    text = lambda ranks: report.write(make_run(tmp_path / str(ranks), ranks=ranks)).read_text()
    assert "The best rank, 2, is the largest tried" in text((1, 2))
    assert "is the largest tried" not in text((1, 2, 4, 8))


def test_no_rank_axis(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(4,), alphas=(8.0, 16.0))
    text = report.write(directory).read_text()
    assert "Loss against alpha" in text and "the best, alpha 8 (" in text
    assert "Between ranks: not available" in text
    assert "Not computed: the base model&#x27;s kernels were not given. Amplification" in text


def test_one_setting_and_kernels_that_do_not_fit(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(4,), seeds=(0,))
    text = report.write(directory, {"h/0/attn/q": np.ones((3, 3))}).read_text()
    assert "One setting, so nothing is compared: rank 4 (" in text
    assert "has eval loss 1.190, 2.266 below the base&#x27;s 3.456." in text
    assert "kernels don&#x27;t fit the adapters" in text


def test_torn_line_and_unfinished_run(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(1, 2), adapters=False)
    status = json.loads((directory / "status.json").read_text())
    status |= {"state": "running", "step": 50, "members": {}}
    (directory / "status.json").write_text(json.dumps(status))
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"member": 1, "st')
    with pytest.warns(UserWarning, match="torn"):
        text = report.write(directory).read_text()
    assert "not finished" in text and "Not analysed" in text


def test_nothing_evaluated_yet(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(1, 2), adapters=False)
    (directory / "metrics.jsonl").write_text("")
    assert "No answer yet: no setting" in report.write(directory).read_text()


def test_all_diverged(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(1,), diverged=(0, 1))
    text = report.write(directory).read_text()
    assert "No answer yet: no setting" in text and "Diverged: rank=1" in text


def test_names_from_outside_are_text(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(1,), adapters=False)
    lines = (
        (directory / "members.jsonl").read_text().replace("rank=1,", "<script>alert(1)</script>")
    )
    (directory / "members.jsonl").write_text(lines)
    text = report.write(directory).read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_what_evidence_chose_is_shown(tmp_path, undrawn):
    make_run(tmp_path, ranks=(2,), seeds=(0,))
    (tmp_path / "analysis").mkdir(exist_ok=True)
    (tmp_path / "analysis" / "sensitivity.csv").write_text(
        "member,path,energy,share,score,rank\n"
        "0,h/1/attn/v,3.0,0.9,0.006,4\n0,h/0/attn/q,1.0,0.5,0.002,0\n"
        "1,h/0/attn/q,9.0,0.9,0.9,4\n"
    )
    seen = Page(report.write(tmp_path).read_text())
    rows = seen.table("matrix", "low-rank share")
    assert [row["matrix"] for row in rows] == ["h/1/attn/v", "h/0/attn/q"]
    assert [row["rank"] for row in rows] == ["4", "0"] and rows[0]["low-rank share"] == "0.900"
    assert "Which matrices matter" in seen.headings
    assert (tmp_path / "figures" / "sensitivity.csv").exists()


def test_a_search_is_reported_by_its_dimension(tmp_path):
    make_search(tmp_path, conditions=(False, True), lora_ranks=(1, 10, 100), diverged=(1,))
    written = report.write(tmp_path)
    text = written.read_text()
    seen = Page(text)
    assert not seen.open and seen.headings[1:] == [
        "Intrinsic dimension", "What was run", "Members", "Learning curves", "Method notes",
        "Cite this run",
    ]  # fmt: skip
    stored = pd.read_csv(tmp_path / "analysis" / "intrinsic.csv").set_index("condition")
    plain = stored.loc["shuffle=False"]
    assert plain["n"] == 3 and plain["low"] < plain["d"] < plain["high"]
    answer = re.search(r'class="answer">(.*?)</div>', text)[1]
    assert f"shuffle=False: d90 = {plain['d']:.0f} (95% CI {plain['low']:.0f} to" in answer
    assert "shuffle=True: d90 &gt; 1,000 of D = 1,000" in answer
    rows = {row["condition"]: row for row in seen.table("d90", "95% interval", "D/d90")}
    assert rows["shuffle=False"]["d90"] == f"{plain['d']:.0f}"
    assert rows["shuffle=False"]["verdict"] == "reached (3 of 3 seeds)"
    assert rows["shuffle=False"]["LoRA parameters"] == f"{plain['lora_params']:.0f}"
    assert rows["shuffle=True"]["d90"] == "> 1,000"
    assert rows["shuffle=True"]["LoRA parameters"] == rows["shuffle=True"]["verdict"]
    assert "1 member diverged and counts as if" in text
    points = pd.read_csv(tmp_path / "analysis" / "intrinsic_points.csv")
    assert len(points) == len((tmp_path / "members.jsonl").read_text().splitlines())
    assert {"dim", "lr", "seed", "value", "params"} <= set(points)
    files = lambda: {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    numbers = {"intrinsic.csv", "learning_curves.csv"}
    assert set(files()) == numbers

    # As images, drawn from the page: as the figures themselves are, but for digits of numbers.
    images.add(written, ("png", "pdf"))
    drawn = files()
    names = {f"{name[:-4]}.{suffix}" for name in numbers for suffix in ("png", "pdf")}
    assert set(drawn) == names | numbers
    linked = {a["href"] for tag, a in Page(written.read_text()).tags if tag == "a"}
    assert {f"figures/{name}" for name in drawn} <= linked
    assert drawn["intrinsic.png"].startswith(b"\x89PNG")
    assert b"/CreationDate" not in drawn["intrinsic.pdf"]
    report.write(tmp_path)
    assert set(files()) == numbers


def test_a_search_that_has_just_begun(tmp_path, undrawn):
    make_search(tmp_path)
    status = {"state": "running", "members": {}}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert "No subspace has been trained yet" in report.write(tmp_path).read_text()


def test_a_base_that_cannot_be_loaded_is_a_sentence():
    kernels_, reason = bases.of_config({"config": {"base": "no-such-model-anywhere"}})
    assert kernels_ is None and "no-such-model-anywhere could not be loaded" in reason
    assert bases.of_config({}) == (None, "config.json names no base model")


def test_tables_hold_every_member(written):
    directory, _ = written
    members = pd.read_csv(directory / "analysis" / "members.csv")
    assert list(members["member"]) == list(range(10))
    spectra = pd.read_csv(directory / "analysis" / "spectra.csv")
    assert set(spectra["member"]) == set(range(1, 10))
    run = runs.load(directory)
    assert len(spectra) == sum(f.a.shape[1] for m in range(1, 10) for f in run.adapter(m).values())


def test_what_training_left_is_drawn(tmp_path, undrawn):
    make_run(tmp_path, ranks=(1, 2), seeds=(0,))
    points = [
        (m, step, path) for m in (0, 1) for step in (0, 50) for path in planted_factors(1, 0, 1)
    ]
    table = pd.DataFrame(points, columns=["member", "step", "path"])
    table = table.assign(norm=table["step"] / 10, effective=1.5, stable=1.0, energy90=1)
    (tmp_path / "analysis").mkdir()
    table.assign(overlap_final=0.5).to_csv(tmp_path / "analysis" / "trajectory.csv", index=False)
    cka = pd.DataFrame({"member": [0, 1], "layer": [0, 0], "cka": [0.9, 0.7]})
    cka.to_csv(tmp_path / "analysis" / "cka.csv", index=False)
    text = report.write(tmp_path).read_text()
    assert {"During training", "Activations"} <= set(Page(text).headings)
    assert "the effective rank is 1.5 on average" in text
    assert "lowest, 0.700, in layer 0 at rank 2" in text
    drawn = pd.read_csv(tmp_path / "figures" / "cka.csv")
    assert drawn[["member", "cka", "rank"]].to_numpy().tolist() == [[0, 0.9, 1], [1, 0.7, 2]]


def test_images_are_the_same_bytes_every_time():
    def draw():
        chart = vega.Chart(pd.DataFrame({"φ(i, i)": [1.0, 2.0]})).mark("tick").encode(x="φ(i, i):Q")
        spec = specification(chart)
        return charts.png(spec), charts.pdf(spec)

    png, pdf = draw()
    assert png == draw()[0] and png.startswith(b"\x89PNG")
    assert b"/Type0" in pdf or b"/TrueType" in pdf  # text stays text


def test_what_draws_charts_is_bundled_once(tmp_path, monkeypatch):
    bundles = iter(["one", "two", "three"])
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda: next(bundles))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [charts.library(), charts.library()] == ["one", "one"]
    (tmp_path / "lorax").rename(tmp_path / "elsewhere")
    (tmp_path / "lorax").write_text("no folder can be made here")
    assert [charts.library(), charts.library()] == ["two", "three"]
