"""The page of adapters in any format: `lorax.xray --out` and `lorax.report` draw the same one."""

import json

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from reading import Page
from small_files import WIDTH, kohya
from support import data

from lorax.analysis import amplification, tables
from lorax.interop import formats, peft
from lorax.interop.adapter import Factors, only, renamed, shapes_of
from lorax.interop.formats import llama_cpp
from lorax.interop.formats.placed import placed
from lorax.interop.places import Places
from lorax.models import gpt2
from lorax.report import __main__ as report
from lorax.report.pages import adapters
from lorax.xray.__main__ import main
from lorax.xray.measured import measure, unread


def read(path):
    return unread(list(measure(formats.read(path).updates)))


def test_a_page_of_two_files_with_a_base_that_is_only_tensors(tmp_path, undrawn, capsys):
    one, dense = kohya(tmp_path / "one.safetensors", layers=2)
    two, _ = kohya(tmp_path / "two.safetensors", layers=2, seed=1, rank=2)
    rng, places = np.random.default_rng(0), ("mlp.fc1", "self_attn.q_proj")
    weights = {
        f"text_model.encoder.layers.{n}.{place}.weight": rng.standard_normal((WIDTH, WIDTH))
        for n in range(2)
        for place in places
    }
    del weights["text_model.encoder.layers.1.mlp.fc1.weight"]  # not all need be there
    weights = {name: w.astype(np.float32) for name, w in weights.items()}
    safetensors.numpy.save_file(weights, tmp_path / "base.safetensors")
    out, base = tmp_path / "out", tmp_path / "base.safetensors"
    assert main([str(one), str(two), f"--out={out}", f"--base={base}"]) == 0
    said = capsys.readouterr().out
    assert "Against the base" in said and said.splitlines()[-1] == str(out / "report.html")

    page = Page((out / "report.html").read_text())
    assert not page.open and page.headings[0] == "one and two"
    wanted = ["How small it can be", "Subspace similarity", "In one sum", "Amplification"]
    assert [heading for heading in page.headings if heading in wanted] == wanted
    assert "3 of 4 matrices are in" in (out / "report.html").read_text()
    ranks = pd.read_csv(out / "analysis/ranks.csv")
    rows = ranks[ranks["member"] == "one"].set_index("path")
    for layer, dw in dense.items():
        assert rows.loc[layer, "norm"] == pytest.approx(np.linalg.norm(dw), rel=1e-6)
    amplified = pd.read_csv(out / "analysis/amplification.csv").set_index(["member", "path"])
    layer, name = [*dense][1], "text_model.encoder.layers.0.self_attn.q_proj.weight"
    factors = read(one)[layer]
    expected = amplification(weights[name].T, factors[:3], 4)
    assert amplified.loc["one", layer].factor == pytest.approx(float(expected.factor), rel=1e-5)
    sums = pd.read_csv(out / "analysis/sums.csv")
    assert len(sums) == 8 and sums["kept"].between(0.8, 1.2).all()


def test_a_report_of_another_format_is_the_same_page(tmp_path, undrawn):
    file, _ = kohya(tmp_path / "style.safetensors", layers=2)
    assert report.main([str(file), f"--out={tmp_path / 'a'}"]) == 0
    assert main([str(file), f"--out={tmp_path / 'b'}"]) == 0
    for name in ("ranks", "spectra", "smaller"):
        first, second = (tmp_path / x / "analysis" / f"{name}.csv" for x in "ab")
        assert first.read_text() == second.read_text()


def test_peft_is_read_a_matrix_at_a_time_and_has_the_same_numbers(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {}
    for name in ("attn.c_proj", "mlp.c_proj", "attn.c_attn"):
        key = f"base_model.model.transformer.h.0.{name}"
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((2, 8)).astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = rng.standard_normal((8, 2)).astype(np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = (
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_proj", "c_attn"]}'
    )
    (tmp_path / "adapter_config.json").write_text(config)
    given = adapters.read("x", tmp_path)
    names = ["attn.c_attn", "attn:c_proj", "mlp:c_proj"]
    assert [*given.updates] == [f"transformer.h.0.{name}" for name in names]
    whole = peft.load(tmp_path).factors
    read_alone = tables.spectra({"x": given.updates})[0]["sigma"]
    np.testing.assert_array_equal(read_alone, tables.spectra({"x": whole})[0]["sigma"])


@pytest.mark.parametrize(
    "path, layer, target",
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 4, "attn1.to_q"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 4, "attn1_to_q"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q", 4, "attn1_to_q"),
        ("unet.mid_block.resnets.1.conv1", 12, "conv1"),
        ("lora_unet_middle_block_1_proj_in", 12, "proj_in"),
        ("unet.up_blocks.1.attentions.2.proj_in", 18, "proj_in"),
        ("lora_unet_output_blocks_5_1_proj_in", 18, "proj_in"),
        ("unet.down_blocks.0.downsamplers.0.conv", 3, "conv"),
        ("transformer.transformer_blocks.7.attn.to_out.0", 7, "attn.to_out.0"),
        ("transformer.single_transformer_blocks.7.attn.to_q", 7, "single:attn.to_q"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 0, "img_attn_qkv"),
        ("lora_unet_single_blocks_3_linear1", 3, "single:linear1"),
        ("lora_te_text_model_encoder_layers_5_mlp_fc1", 5, "mlp_fc1"),
        ("lora_te2_text_model_encoder_layers_5_mlp_fc1", 5, "te2:mlp_fc1"),
    ],
)
def test_layers_of_image_models(path, layer, target):
    assert tables.layer_and_target(path) == (layer, target)


def test_pairs_are_compared_a_stack_at_a_time_with_the_same_result(tmp_path):
    files = {n: read(kohya(tmp_path / f"{n}.safetensors", 2, n)[0]) for n in range(3)}
    layers = [*files[0]]
    files[2] = only(files[2], layers[1:])
    found = tables.pairwise(files)
    assert [*found] == [(0, 1), (0, 2), (1, 2)] and [*found[0, 2]] == layers[1:]
    expected = tables.similarity([(tables.bases(files[0]), tables.bases(files[1]))])
    for layer, kinds in expected.items():
        for kind, phi in kinds.items():
            np.testing.assert_array_equal(found[0, 1][layer][kind], phi)


def test_updates_by_the_layers_of_a_base():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((8, 2)), rng.standard_normal((2, 24))
    places = Places(gpt2.hf_tensors(gpt2.Config(n_embd=8, n_layer=1)))
    fused = placed({"transformer.h.0.attn.c_attn": Factors(a, b, 0.5)}, places)
    assert fused.shapes == {f"h/0/attn/{x}": (8, 8, 2) for x in "qkv"}
    np.testing.assert_array_equal(fused["h/0/attn/k"].b, b[:, 8:16])
    dense = placed({"transformer.h.0.attn.c_attn": a @ b}, places)
    np.testing.assert_array_equal(dense["h/0/attn/v"], (a @ b)[:, 16:])
    with pytest.raises(ValueError, match="h.0.attn.c_attm: the base has no such module"):
        placed({"transformer.h.0.attn.c_attm": a @ b}, places)


def test_updates_under_other_names_are_still_unread(tmp_path):
    updates = read(kohya(tmp_path / "a.safetensors", 1)[0])
    first, second = updates
    other = renamed(updates, {first: "x", second: "y"})
    assert shapes_of(other) == {"x": (WIDTH, WIDTH, 4), "y": (WIDTH, WIDTH, 4)}
    np.testing.assert_array_equal(other["x"].a, updates[first].a)
    assert "x" in other and [*only(other, {"y"})] == ["y"]


def test_a_base_without_a_page(tmp_path, undrawn, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, _ = kohya(tmp_path / "one.safetensors", layers=1)
    rng = np.random.default_rng(0)
    weights = {
        f"text_model.encoder.layers.0.{place}.weight": rng.standard_normal(
            (WIDTH, WIDTH), dtype=np.float32
        )
        for place in ("mlp.fc1", "self_attn.q_proj")
    }
    safetensors.numpy.save_file(weights, tmp_path / "base.safetensors")
    assert main([str(file), f"--base={tmp_path / 'base.safetensors'}"]) == 0
    said = capsys.readouterr().out
    assert "Against the base" in said and "report.html" not in said
    assert {x.name for x in tmp_path.iterdir()} == {"one.safetensors", "base.safetensors"}


def mlx_adapter(folder, base):
    """An adapter of MLX in a folder: its dW of one matrix."""
    width = json.loads((base / "config.json").read_text())["hidden_size"]
    rng, key = np.random.default_rng(0), "model.layers.0.self_attn.q_proj"
    tensors = {f"{key}.lora_a": rng.random((width, 2)), f"{key}.lora_b": rng.random((2, width))}
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return 3 * tensors[f"{key}.lora_a"] @ tensors[f"{key}.lora_b"]


def amplified(adapter, base, out):
    assert main([str(adapter), f"--out={out}", f"--base={base}"]) == 0
    return pd.read_csv(out / "analysis/amplification.csv")


def test_an_adapter_of_mlx_on_a_base_that_lorax_knows(tmp_path, undrawn):
    base = data("models/stories-llama-260k/config.json").parent
    dw = mlx_adapter(tmp_path, base)
    rows = amplified(tmp_path, base, tmp_path / "out")
    assert rows["path"].tolist() == ["h/0/attn/q"]
    assert rows["delta_norm"][0] == pytest.approx(np.linalg.norm(dw), rel=1e-5)


def test_an_adapter_of_llama_cpp_is_compared_by_the_names_and_rows_of_its_base(tmp_path, undrawn):
    pytest.importorskip("gguf")
    base = data("models/stories-llama-260k/config.json").parent
    mlx_adapter(tmp_path, base)
    rows = amplified(tmp_path, base, tmp_path / "mlx")
    file, fields = tmp_path / "adapter.gguf", json.loads((base / "config.json").read_text())
    llama_cpp.write(file, formats.read(tmp_path), fields)
    same = amplified(file, base, tmp_path / "gguf")
    numbers = ["delta_norm", "w_in_delta", "factor"]
    assert same["path"].tolist() == rows["path"].tolist()
    np.testing.assert_allclose(same[numbers], rows[numbers], rtol=1e-5)
