"""Adapters of any format made smaller, added and subtracted without their base."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy
from language_files import gguf_file
from small_files import WIDTH, kohya

from lorax import convert, shrinking
from lorax.interop import formats
from lorax.interop.adapter import Factors
from lorax.xray import __main__ as xray

LORA = ("lora_a", "lora_b")


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def dense(path):
    """{layer: dW} of a file."""
    found = {}
    for update in formats.read(path).updates:
        given = update.read()
        of_factors = isinstance(given, Factors)
        found[update.layer] = (
            given.s * given.a.astype(np.float64) @ given.b if of_factors else given
        )
    return found


def best(dw, k):
    u, sigma, vt = np.linalg.svd(dw)
    return (u[:, :k] * sigma[:k]) @ vt[:k]


def peft(directory, rank=4, seed=0, dora=False):
    directory.mkdir()
    rng, tensors = np.random.default_rng(seed), {}
    for n in range(2):
        key = f"base_model.model.model.layers.{n}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((rank, WIDTH)).astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = rng.standard_normal((8, rank)).astype(np.float32)
        if dora:
            tensors[f"{key}.lora_magnitude_vector"] = 1 + rng.random(8).astype(np.float32)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "use_rslora": True, "use_dora": dora}
    config |= {"target_modules": ["q_proj"], "base_model_name_or_path": "x/y"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_a_file_of_kohyas_keeps_its_leading_directions(tmp_path, capsys):
    file, before = kohya(tmp_path / "a.safetensors", layers=2)
    out = tmp_path / "out.safetensors"
    assert run("shrink", file, out, "--rank", 2) == 0
    said, after = capsys.readouterr().out, dense(out)
    assert formats.read(out).format == "kohya" and after.keys() == before.keys()
    for layer, dw in before.items():
        np.testing.assert_allclose(after[layer], best(dw, 2), atol=1e-5)
        assert f"{layer}: rank 4 -> 2, relative error " in said
    left = sum(np.sum((after[layer] - dw) ** 2) for layer, dw in before.items())
    whole = sum(np.sum(dw**2) for dw in before.values())
    printed = float(re.search(r"relative error (\S+) of all together", said)[1])
    assert printed == pytest.approx(np.sqrt(left / whole), rel=1e-2)


def test_an_error_of_all_together_is_kept(tmp_path, capsys):
    file, before = kohya(tmp_path / "a.safetensors", layers=3)
    assert run("shrink", file, tmp_path / "out.safetensors", "--error", 0.4) == 0
    after = dense(tmp_path / "out.safetensors")
    left = sum(np.sum((after.get(layer, 0) - dw) ** 2) for layer, dw in before.items())
    error = np.sqrt(left / sum(np.sum(dw**2) for dw in before.values()))
    assert 0.2 < error <= 0.4


@pytest.mark.parametrize("dora", [False, True])
def test_peft_stays_peft_and_dora_keeps_its_lengths(dora, tmp_path):
    before = peft(tmp_path / "a", dora=dora)
    assert run("shrink", before, tmp_path / "out", "--energy", 0.9) == 0
    found = formats.read(tmp_path / "out")
    assert found.config["base_model_name_or_path"] == "x/y"
    for update, old in zip(found.updates, formats.read(before).updates, strict=True):
        new, was = update.read(), old.read()
        dw = was.s * was.a @ was.b
        np.testing.assert_allclose(new.s * new.a @ new.b, best(dw, update.rank), atol=1e-5)
        assert (new.m is None) == (not dora)
        if dora:
            np.testing.assert_array_equal(new.m, was.m)


def test_a_sum_is_that_of_the_dense_updates_and_has_the_rank_that_was_asked_for(tmp_path, capsys):
    one, first = kohya(tmp_path / "one.safetensors", layers=2)
    two, second = kohya(tmp_path / "two.safetensors", layers=1, seed=1, rank=2)
    whole = tmp_path / "whole.safetensors"
    assert run("add", one, two, whole, "--weights=0.5,2") == 0
    printed = re.search(r"relative error (\S+) of all together", capsys.readouterr().out)[1]
    assert float(printed) < 1e-6
    total = dense(whole)
    for layer, dw in first.items():
        expected = 0.5 * dw + 2 * second.get(layer, 0)
        np.testing.assert_allclose(total[layer], expected, atol=1e-5)
    assert run("add", one, two, tmp_path / "r.safetensors", "--weights=0.5,2", "--rank=3") == 0
    for layer, dw in dense(tmp_path / "r.safetensors").items():
        np.testing.assert_allclose(dw, best(total[layer], 3), atol=1e-5)


def test_what_was_added_is_subtracted_again(tmp_path):
    one, two = peft(tmp_path / "one"), peft(tmp_path / "two", rank=2, seed=1)
    assert run("add", one, two, tmp_path / "both") == 0
    assert run("subtract", tmp_path / "both", two, tmp_path / "back") == 0
    back = dense(tmp_path / "back")
    for layer, dw in dense(one).items():
        np.testing.assert_allclose(back[layer], dw, atol=1e-4)
    ranks = {update.rank for update in formats.read(tmp_path / "back").updates}
    assert ranks == {4}  # rounding is no direction


def test_a_mistake_is_one_line(tmp_path, capsys):
    file, _ = kohya(tmp_path / "a.safetensors", layers=1)
    other, _ = kohya(tmp_path / "b.safetensors", layers=1, seed=1)
    same, _ = kohya(tmp_path / "c.safetensors", layers=1)
    dora, out = peft(tmp_path / "dora", dora=True), tmp_path / "o"
    file_out = tmp_path / "o.safetensors"
    cases = {
        ("shrink", file, out, "--loss", 0.1): "--loss: needs the base; give it with --base",
        ("shrink", file, out, "--error", 2): "--error: 2 given, must be a relative error",
        ("shrink", file, out, "--rank", 1): "kohya's files end in .safetensors",
        ("add", file, out): "one adapter given, at least two are needed before OUT",
        ("add", file, other, out, "--weights=1"): "--weights: 1 given for 2 adapters",
        ("add", dora, file, out): "is DoRA, whose lengths belong to its own update",
        ("subtract", file, f"{tmp_path}/./{file.name}", out): "given twice",
        ("subtract", file, same, file_out): "nothing to shrink: every update is 0",
    }
    for arguments, words in cases.items():
        assert run(*arguments) == 2, arguments
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
        assert not out.exists() and not file_out.exists()


def test_what_a_format_cannot_hold_is_refused_before_the_numbers_are_read(
    tmp_path, capsys, monkeypatch
):
    file, _ = kohya(tmp_path / "a.safetensors", layers=1)
    mlx = tmp_path / "mlx"
    mlx.mkdir()
    tensors = {f"model.layers.0.mlp.up_proj.{x}": np.ones((4, 4), np.float32) for x in LORA}
    safetensors.numpy.save_file(tensors, mlx / "adapters.safetensors")
    loha, word = tmp_path / "loha.safetensors", "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {
        f"{word}.hada_w{i}": np.ones((4, 4), np.float32) for i in ("1_a", "1_b", "2_a", "2_b")
    }
    tensors[f"{word}.dora_scale"] = np.ones((4, 1), np.float32)
    safetensors.numpy.save_file(tensors, loha)
    monkeypatch.setattr(shrinking, "measure", None)
    out = tmp_path / "o"
    cases = {
        ("shrink", file, out): "o: kohya's files end in .safetensors",
        ("shrink", file, out, "--format=gguf"): "GGUF can't hold it",
        ("shrink", mlx, out): "its scale is not known: model.layers.0.mlp.up_proj has default 1",
        ("shrink", loha, out, "--format=diffusers"): "mlp_fc1 is LoHa, DoRA; it holds LoRA",
    }
    for arguments, words in cases.items():
        assert run(*arguments, "--rank", 1) == 2, arguments
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and not out.exists(), said


def test_rows_in_two_orders_are_neither_added_nor_compared(tmp_path, capsys):
    """q and k of llama.cpp's files are in another order than Hugging Face's."""
    key = "blk.0.attn_q.weight"
    tensors = {f"{key}.lora_a": np.ones((2, WIDTH), np.float32)}
    tensors[f"{key}.lora_b"] = np.ones((8, 2), np.float32)
    file, other = gguf_file(tmp_path, tensors), peft(tmp_path / "peft")
    for arguments in ((file, other), (other, file)):
        assert run("add", *arguments, tmp_path / "out.gguf") == 2
        assert "are in another order than in another file" in capsys.readouterr().err
    assert xray.main([str(file), str(other)]) == 0
    assert "nothing in common" in capsys.readouterr().out
    fields = {"num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert xray.main([str(file), str(other)]) == 0
    assert "Directions in common" in capsys.readouterr().out
    assert run("add", other, file, tmp_path / "both") == 0
