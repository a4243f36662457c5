"""What the report shows is all there is, or it says how much of it."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from reading import Page
from rich.console import Console
from safetensors.numpy import save_file
from synthetic import SOURCES, TARGETS, kernels, make_adapter, make_run, planted_factors

from lorax import config, report
from lorax.analysis import basis_similarity, tables
from lorax.analysis.tables import matrices
from lorax.interop import peft
from lorax.interop.peft import Factors
from lorax.models import gpt2
from lorax.report import page
from lorax.report.__main__ import main
from lorax.report.pages import adapters
from lorax.report.sections import base_weights, shared_directions, spectra


def shown_as(members: list[int], **columns) -> pd.DataFrame:
    return pd.DataFrame({"member": members, **columns}, index=members)


def captions(text: str) -> list[str]:
    return re.findall(r"<(?:fig)?caption>(.*?)</(?:fig)?caption>", text)


def make_dense(directory, seeds=(0, 1), method="full", **sweep):
    """A run whose members have no factors and no rank: each has left its dW."""
    make_run(directory, ranks=(2,), seeds=seeds, adapters=False, **sweep)
    lines = [json.loads(line) for line in (directory / "members.jsonl").read_text().splitlines()]
    lines = [{**line, "method": method, "rank": None} for line in lines]
    (directory / "members.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    deltas = {}
    for line in lines:
        factors = planted_factors(2, line["seed"], 1.0)
        deltas[line["member"]] = {path: f.a @ f.b for path, f in factors.items()}
        folder = directory / "adapters" / str(line["member"])
        folder.mkdir(parents=True)
        save_file(deltas[line["member"]], folder / "delta.safetensors")
        (folder / "method.json").write_text(json.dumps({"name": method, "hp": {}}))
    return deltas


# ------------------------------------------------------------------------------- against the base


def test_all_layers_are_set_against_the_base():
    """26 kernels of 512 x 512: some seconds of work, all of which is done."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    base = {f"h/{n}/attn/q": draw(512, 512) for n in range(26)}
    found = {0: {path: Factors(draw(512, 1), draw(1, 512), 1.0) for path in base}}
    made = base_weights.sections(found, base, "", shown_as([0], rank=[1]), "rank")
    files = {name: table for section in made for name, table in section.files.items()}
    for name in ("amplification", "against_base", "intruders", "base_spectra", "base_ranks"):
        assert list(dict.fromkeys(files[f"{name}.csv"]["layer"])) == list(range(26)), name
        assert "limit" not in files[f"{name}.csv"]
    drawn = next(section for section in made if section.title == "Spectrum of W")
    assert drawn.pictures["base_spectrum"].numbers["layer"].nunique() == 26


def test_every_member_and_value_is_set_against_the_base(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(1, 2, 3, 4, 5))
    text = report.write(directory, kernels()).read_text()
    for name in ("amplification", "against_base", "intruders"):
        stored = pd.read_csv(directory / "analysis" / f"{name}.csv")
        assert set(stored["member"]) == set(range(10)), name
    rows = Page(text).table("rank", "norm-matched control")
    assert [(row["rank"], row["members"]) for row in rows] == [(f"{r}", "2") for r in range(1, 6)]
    stored = stored[np.isclose(stored["epsilon"], 0.5) & (stored["k"] == 10)]
    for row in rows:
        rank = int(row["rank"])
        of = stored[stored["member"].isin([2 * rank - 2, 2 * rank - 1])]
        assert float(row["intruders at ε = 0.5"]) == of["intruders"].sum() / 2
    numbers = pd.read_csv(directory / "figures" / "against_base.csv")
    assert len(set(numbers["shows"])) == 6


def test_numbers_do_not_depend_on_how_kernels_are_put_together(monkeypatch):
    found = {0: planted_factors(2, 0, 1.0)}
    shown = shown_as([0], rank=[2])
    of = lambda: base_weights.compare(found, kernels(), list(found[0]), shown, "h/1/attn/q")
    together = of()
    monkeypatch.setattr(matrices, "TOGETHER", 1)
    alone = of()
    for name in ("amplified", "held", "sigmas", "ranks"):
        pd.testing.assert_frame_equal(getattr(together, name), getattr(alone, name), rtol=1e-9)
    own = ["member", "path", "k", "epsilon", "intruders"]
    pd.testing.assert_frame_equal(together.intruders[own], alone.intruders[own])
    np.testing.assert_allclose(together.phi[0]["in"], alone.phi[0]["in"], atol=1e-9)


def test_a_limit_is_said_wherever_it_holds(tmp_path, monkeypatch, capsys, undrawn):
    make_adapter(tmp_path / "adapter", 0)
    said = io.StringIO()
    monkeypatch.setattr(page, "CONSOLE", Console(file=said, width=200))
    out = tmp_path / "out"
    assert main([str(tmp_path / "adapter"), f"--out={out}", "--layers=1"]) == 0
    limit = "1 of 2 layers, as requested: 1"
    assert f"against the base: {limit}" in said.getvalue()
    text = (out / "report.html").read_text()
    assert f"python -m lorax.report {tmp_path}/adapter --layers=1 --out={out}" in text
    limited = [c for c in captions(text) if limit in c]
    assert len(limited) == len(captions(text.split('<h2 id="amplification">')[1]))
    for name in ("amplification", "against_base", "intruders", "base_spectra", "base_ranks"):
        stored = pd.read_csv(out / "analysis" / f"{name}.csv")
        assert set(stored["layer"]) == {1} and set(stored["limit"]) == {limit}
    assert set(pd.read_csv(out / "figures" / "against_base.csv")["limit"]) == {limit}
    assert "limit" not in pd.read_csv(out / "analysis" / "spectra.csv")
    assert main([str(tmp_path / "adapter"), f"--out={tmp_path / 'none'}", "--layers=0"]) == 0
    text = (tmp_path / "none" / "report.html").read_text()
    assert "Not computed: 0 of 2 layers were requested" in text
    assert main([str(tmp_path / "adapter"), "--layers=-1"]) == 2
    assert "--layers=-1: a number of layers, 0 for none" in capsys.readouterr().err


def test_a_run_takes_its_limit_from_its_config(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(1, 2))
    about = json.loads((directory / "config.json").read_text())
    about["config"]["analysis"] = {"layers": 2}
    (directory / "config.json").write_text(json.dumps(about))
    text = report.write(directory, kernels()).read_text()
    stored = pd.read_csv(directory / "analysis" / "amplification.csv")
    assert set(stored["layer"]) == {0, 2} and "For 2 of 3 layers, as requested: 0, 2." in text


def test_a_limit_of_a_config_is_checked_and_may_change():
    c = config.default()
    c.analysis.layers = -1
    with pytest.raises(ValueError, match="analysis.layers: -1 given, must not be negative"):
        config.members(c)
    assert "analysis.layers" in config.REVISABLE


def test_long_work_is_announced_with_a_way_out(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(page, "CONSOLE", Console(file=said, width=300))
    wide = {f"h/{n}/attn/q": np.broadcast_to(np.float32(0), (4096, 4096)) for n in range(32)}
    base_weights._announce(list(wide), wide, 4)
    assert re.search(
        r"32 matrices of the base.*4 members takes about \d+ min.*--layers=N",
        said.getvalue(),
    )
    base_weights._announce(["h/0/attn/q"], kernels(), 4)
    assert said.getvalue().count("matrices") == 1


# --------------------------------------------------------------------------- what figures show


def test_every_layer_and_target_is_drawn():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    paths = [f"h/{layer}/{target}" for layer in range(6) for target in "abcdefghij"]
    one, two = ({path: Factors(draw(16, 2), draw(2, 16), 1.0) for path in paths} for _ in "ab")
    sigmas, _ = tables.spectra({0: one})
    section = spectra.spectra(sigmas.assign(rank=2), "rank")
    assert list(section.pictures) == ["spectra", "spectra_layers_1", "spectra_layers_2"]
    both = [section.pictures[f"spectra_layers_{n}"].numbers["path"] for n in (1, 2)]
    assert set(pd.concat(both)) == set(paths) and both[0].nunique() == 30
    assert "every matrix of layers 3 to 5: means over members" in section.content
    found = shared_directions.compare("x", "one and two", [(tables.bases(one), tables.bases(two))])
    made = shared_directions.section([found])
    middle = made.pictures["similarity_x"].numbers
    assert set(middle["layer"].dropna()) == {3} and middle["target"].nunique() == 11  # and chance
    layers = [made.pictures[f"similarity_x_layers_{n}"].numbers["layer"] for n in (1, 2)]
    assert set(pd.concat(layers).dropna()) == set(range(6))
    assert "in layer 3; last: chance" in made.content and "Drawn:" not in made.content
    many = [found._replace(name=f"{n}", title=f"pair {n}") for n in range(8)]
    for section in (shared_directions.section(many), shared_directions.across(many, [])):
        assert "Maps are shown for the first 6 of 8 comparisons" in section.content
        assert section.files["similarity.csv"]["comparison"].nunique() == 8
    assert "Maps are shown" not in shared_directions.section([found]).content


def test_phi_is_over_all_pairs_of_seeds(tmp_path):
    seeds = tuple(range(7))
    found = {seed: planted_factors(2, seed, 1.0) for seed in seeds}
    (between,) = shared_directions.of_sweep(shown_as(list(seeds), rank=2, seed=seeds), found)
    assert between.pairs == 21
    path = "h/0/attn/q"
    own = [tables.bases(of)[path]["dW in"] for of in found.values()]
    pairs = [(i, j) for i in seeds for j in seeds if i < j]
    mean = np.mean([basis_similarity(own[i], own[j]) for i, j in pairs], axis=0)
    np.testing.assert_allclose(between.phi[path]["dW in"], mean, atol=1e-9)


def test_phi_is_of_members_that_differ_in_the_seed_alone():
    members = list(range(4))
    shown = shown_as(members, rank=2, seed=[0, 1, 0, 1], lr=[1e-3, 1e-3, 1e-2, 1e-2])
    found = {member: planted_factors(2, member, 1.0) for member in members}
    made = shared_directions.of_sweep(shown, found, ["lr"])
    assert [(c.title, c.pairs) for c in made] == [
        ("two seeds at r = 2, learning rate = 0.001", 1),
        ("two seeds at r = 2, learning rate = 0.01", 1),
    ]
    (of,) = shared_directions.of_sweep(shown[:2], found, ["lr"])
    path = "h/2/attn/v"
    np.testing.assert_allclose(made[0].phi[path]["A"], of.phi[path]["A"], atol=1e-12)


# ------------------------------------------------------------------------------- without factors


def test_updates_without_factors_have_their_own_reasons_and_phi(tmp_path, undrawn):
    deltas = make_dense(tmp_path / "run")
    text = report.write(tmp_path / "run", kernels()).read_text()
    assert "the sweep has one rank" not in text and "there is one seed" not in text
    assert "from the factors" not in text and "Between seeds" not in text
    assert "Between ranks: not available: full has no rank." in text
    assert "Not computed for 2 of 2 members: U and V have as many directions as the adapter" in text
    path = "h/1/attn/v"
    with np.load(tmp_path / "run" / "analysis" / "similarity.npz") as stored:
        phi = stored[f"between_seeds/{path}/dW in"]
    one, two = (np.linalg.svd(deltas[member][path])[0] for member in (0, 1))
    np.testing.assert_allclose(phi[:2, :2], basis_similarity(one[:, :2], two[:, :2]), atol=1e-6)
    rows = Page(text).table("directions of", "φ(1, 1)")
    assert {row["directions of"] for row in rows} == {"ΔW in", "ΔW out"}
    stored = pd.read_csv(tmp_path / "run" / "analysis" / "intruders.csv")
    assert set(stored["member"]) == {0, 1} and stored["path"].nunique() == 3 * len(TARGETS)


@pytest.mark.parametrize(
    "ranks, seeds, ranks_here, said",
    [
        ((2, 2), (0, 0), (2, 2), ["the sweep has one rank", "the sweep has one seed"]),
        ((2, 4), (0, 1), (4,), ["1 of 2 members are compared here, and they have one rank"]),
        ((2, 4), (0, 1), (4,), ["1 of 2 members are compared here, and those have one seed"]),
    ],
)
def test_what_is_absent_has_its_true_reason(ranks, seeds, ranks_here, said):
    table = pd.DataFrame({"rank": ranks, "seed": seeds, "method": "lora"})
    shown = table[table["rank"].isin(ranks_here)]
    text = " ".join(shared_directions.absent_of_sweep([], "rank", table, shown))
    assert all(reason in text for reason in said)


# ------------------------------------------------------------------------------------- no update


def test_no_update_is_said_and_is_no_number(tmp_path, undrawn):
    factors = make_adapter(tmp_path / "adapter", 0)
    sources = gpt2.hf_tensors(gpt2.Config(n_embd=128))
    none = {path: f._replace(b=0 * f.b) for path, f in factors.items()}
    peft.save(tmp_path / "none", none, sources, "gpt2-nano")
    with pytest.warns(UserWarning, match="No update: ΔW = 0 in all 4 matrices"):
        text = adapters.write([tmp_path / "none"], out=tmp_path / "out").read_text()
    assert "none: No update: ΔW = 0 in all 4 matrices." in text
    assert "0/0 and left out of all means" in text
    rows = Page(text).table("amplification", "target", "layer")
    assert rows and {row["amplification"] for row in rows} == {"–"}
    stored = pd.read_csv(tmp_path / "out" / "analysis" / "amplification.csv")
    assert stored["factor"].isna().all() and (stored["delta_norm"] == 0).all()
    some = {path: f._replace(b=f.b * (path != "h/1/attn/v")) for path, f in factors.items()}
    peft.save(tmp_path / "some", some, sources, "gpt2-nano")
    with pytest.warns(UserWarning, match="No update: ΔW = 0 in 1 of 4 matrices"):
        text = adapters.write([tmp_path / "some"], out=tmp_path / "out").read_text()
    stored = pd.read_csv(tmp_path / "out" / "analysis" / "amplification.csv").set_index("path")
    assert stored["factor"].isna().sum() == 1 and np.isnan(stored.loc["h/1/attn/v", "factor"])


def test_no_update_of_a_run_is_said(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(1, 2), seeds=(0,))
    none = {path: f._replace(b=0 * f.b) for path, f in planted_factors(2, 0, 1.0).items()}
    peft.save(directory / "adapters" / "1", none, SOURCES, "gpt2-nano")
    text = report.write(directory, kernels()).read_text()
    assert "No update: ΔW = 0 in 6 of 12 matrices (6 of 6 of member 1)." in text
    assert not re.search(r"\bnan\b", re.sub(r"<script>.*?</script>", "", text, flags=re.S))


@pytest.mark.parametrize("members", [(0,), (0, 1)])
def test_an_empty_update_is_said(tmp_path, members, undrawn):
    """What an export leaves of dense updates that are all zero: a file without any matrix."""
    make_dense(tmp_path / "run")
    for member in members:
        save_file({}, tmp_path / "run" / "adapters" / str(member) / "delta.safetensors")
    text = report.write(tmp_path / "run", kernels()).read_text()
    assert text.count("no update: ΔW = 0 in all matrices") == len(members)
    assert ("Spectra of the updates" in Page(text).headings) == (len(members) == 1)
