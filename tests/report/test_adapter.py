"""An adapter from anywhere: with its base, without it, and two of them."""

import numpy as np
import pandas as pd
import pytest
from reading import Page
from support import data
from synthetic import make_adapter

from lorax import models, naming
from lorax.analysis import amplification, basis_similarity, tables
from lorax.interop import loralib, peft
from lorax.report.pages import adapters

LAYERS = 2  # that `make_adapter` adapts


def test_with_the_base_that_it_names(tmp_path, undrawn):
    factors = make_adapter(tmp_path / "adapter", 0)
    text = adapters.write([tmp_path / "adapter"], out=tmp_path / "out").read_text()
    page = Page(text)
    assert not page.open and page.headings[0] == "adapter"
    wanted = ["What it is", "Layer by layer", "Spectra of the updates", "How small it can be"]
    wanted += ["Between layers"]
    wanted += ["Amplification", "ΔW against W", "Intruder dimensions", "Spectrum of W"]
    assert page.headings[1:] == [*wanted, "Method notes"]
    kernels = models.kernels(models.load("gpt2-nano"))
    stored = pd.read_csv(tmp_path / "out" / "analysis" / "amplification.csv").set_index("path")
    for path, factor in factors.items():
        expected = amplification(kernels[path], factor[:3], 4).factor
        assert stored.loc[path, "factor"] == pytest.approx(expected, rel=1e-4)
    names = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert names >= {"layers", "spectra", "between_layers", "against_base", "intruders"}


def test_without_its_base_the_page_says_what_is_missing(tmp_path, undrawn):
    make_adapter(tmp_path / "adapter", 0, base="nobody/no-such-model")
    text = adapters.write([tmp_path / "adapter"], out=tmp_path / "out").read_text()
    assert "its base nobody/no-such-model is not on this machine; give it with --base=" in text
    assert "need the base&#x27;s weights" in text
    assert not (tmp_path / "out" / "analysis" / "amplification.csv").exists()


def test_two_adapters_are_compared(tmp_path, undrawn):
    one, two = (make_adapter(tmp_path / name, n, base="elsewhere") for n, name in enumerate("ab"))
    text = adapters.write([tmp_path / "a", tmp_path / "b"], out=tmp_path / "out").read_text()
    assert Page(text).headings[0] == "a and b"
    with np.load(tmp_path / "out" / "analysis" / "similarity.npz") as stored:
        phi = stored["adapters/h/1/attn/q/dW in"]
    own, other = (tables.bases(of)["h/1/attn/q"]["dW in"] for of in (one, two))
    np.testing.assert_allclose(phi, basis_similarity(own, other), atol=1e-9)
    assert {"Between layers of a", "Between layers of b"} <= set(Page(text).headings)


def test_any_number_of_adapters_is_compared_pairwise(tmp_path, undrawn):
    found = [
        make_adapter(tmp_path / f"study-{n}", n, rank=n + 1, base="elsewhere") for n in range(3)
    ]
    paths = [tmp_path / f"study-{n}" for n in range(3)]
    text = adapters.write(paths, out=tmp_path / "out").read_text()
    page = Page(text)
    assert page.headings[0] == "study-0, study-1 and study-2" and not page.open
    pairs = pd.read_csv(tmp_path / "out" / "analysis" / "overlap.csv")
    assert len(pairs) == 6  # of two sides
    row = pairs[(pairs["first"] == "study-0") & (pairs["second"] == "study-2")].iloc[0]
    assert (row["side"], row["i"], row["j"], row["by_chance"]) == ("input", 1, 3, 3 / 128)
    one, two = (tables.bases(found[n]) for n in (0, 2))
    phi = [basis_similarity(one[p]["dW in"], two[p]["dW in"])[-1, -1] for p in one]
    assert row["phi"] == pytest.approx(np.mean(phi)) and row["matrices"] == 4
    assert len(page.table("adapter", "and", "over chance")) == 6
    assert {r["adapter"] for r in page.table("matrix", "adapter")} == {p.name for p in paths}


def test_adapters_without_a_common_matrix_are_named(tmp_path, undrawn):
    for n in range(2):
        make_adapter(tmp_path / f"{n}", n, base="elsewhere")
    make_adapter(tmp_path / "wide", 2, base="elsewhere", width=64)
    paths = [tmp_path / name for name in ("0", "1", "wide")]
    text = adapters.write(paths, out=tmp_path / "out").read_text()
    assert "No matrix of the same name and shape: 0 and wide; 1 and wide." in text


def test_names_are_shortened_so_that_they_can_be_told_apart():
    names = [f"a-long-name-of-a-study-of-ranks,lr=0.01,rank={n}-adapters" for n in (1, 16)]
    assert naming.shortened(names) == ["…rank=1…", "…rank=16…"]
    assert naming.shortened(["a", "b"]) == ["a", "b"]
    long = ["x" * 60 + "1" + "x" * 60, "x" * 60 + "2" + "x" * 60]
    short = naming.shortened(long)
    assert len(set(short)) == 2 and all(len(name) <= 36 for name in short)


def test_between_layers_is_phi_of_all_directions(tmp_path, undrawn):
    factors = make_adapter(tmp_path / "a", 0, base="elsewhere")
    adapters.write([tmp_path / "a"], out=tmp_path / "out")
    cells = pd.read_csv(tmp_path / "out" / "figures" / "between_layers.csv")
    cells = cells[(cells["target"] == "q") & (cells["side"] == "output")]
    phi = cells.pivot(index="layer", columns="other", values="phi").to_numpy()
    both = [tables.bases(factors)[f"h/{n}/attn/q"]["dW out"] for n in range(LAYERS)]
    expected = basis_similarity(*both)[-1, -1]
    np.testing.assert_allclose(phi, [[1, expected], [expected, 1]], atol=1e-9)


def test_a_released_adapter_of_peft(tmp_path, undrawn):
    path = data("adapters/peft_gpt2_lora/adapter_config.json").parent
    text = adapters.write([path], out=tmp_path).read_text()
    rows = Page(text).table("matrix", "effective rank", "layer")
    assert len(rows) == 36 and {row["rank"] for row in rows} == {"8"}
    assert {row["target"] for row in rows} == {"c_attn", "attn:c_proj", "mlp:c_proj"}
    factors = peft.load(path).factors["transformer.h.11.attn.c_proj"]
    sigma = np.linalg.svd(factors.s * factors.a @ factors.b, compute_uv=False)[:8]
    row = next(row for row in rows if row["matrix"] == "transformer.h.11.attn:c_proj")
    assert float(row["‖ΔW‖"]) == pytest.approx(np.linalg.norm(sigma), abs=1e-4)
    shares = sigma / sigma.sum()
    assert float(row["effective rank"]) == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum()), abs=0.006
    )
    assert "its base gpt2 is not on this machine" in text or "Table 7" in text


def test_a_checkpoint_of_loralib(tmp_path, undrawn):
    path = data("adapters/lora_roberta_mnli/roberta_base_lora_mnli.npz").parent
    text = adapters.write([path], out=tmp_path).read_text()
    rows = Page(text).table("matrix", "effective rank", "layer")
    assert len(rows) == 24 and "s = 1, so norms are those of BA; give --alpha" in text
    scaled = adapters.write([path], out=tmp_path / "scaled", alpha=16).read_text()
    assert f"python -m lorax.report {path} --alpha=16 --out={tmp_path / 'scaled'}" in scaled
    scaled = Page(scaled).table("matrix", "effective rank", "layer")
    norm = lambda row: float(row["‖ΔW‖"])
    rank = int(rows[0]["rank"])
    assert norm(scaled[0]) == pytest.approx(norm(rows[0]) * 16 / rank, rel=1e-3)
    assert scaled[0]["effective rank"] == rows[0]["effective rank"]
    file = next(path.glob("*.npz"))
    assert len(loralib.load(file, 16).factors) == len(rows)
