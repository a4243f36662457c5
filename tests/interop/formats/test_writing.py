"""Updates written for MLX and llama.cpp are read back the same; what they can't hold is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from language_files import directory, draw, gguf_file

from lorax import convert
from lorax.interop import formats
from lorax.interop.formats import llama_cpp, mlx

BASE = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = {"peft_type": "LORA", "lora_alpha": 6, "r": 4, "base_model_name_or_path": "some/base"}
CONFIG["target_modules"] = ["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"]
SIZES = {"0.self_attn.q_proj": (16, 16), "1.self_attn.k_proj": (16, 8), "1.mlp.down_proj": (24, 16)}


def peft_adapter(path, dtype=np.float32, rank=4, more=(), **config):
    """PEFT's adapter of three matrices of a LLaMA; its updates. rank: of the last one."""
    tensors = dict(more)
    for i, (name, (n_in, n_out)) in enumerate(SIZES.items()):
        r = rank if i == 2 else 4
        place = f"base_model.model.model.layers.{name}"
        tensors[f"{place}.lora_A.weight"] = draw(r, n_in).astype(dtype)
        tensors[f"{place}.lora_B.weight"] = draw(n_out, r).astype(dtype)
    directory(path, tensors, CONFIG | config)
    return formats.read(path)


def by_name(found):
    return {formats.names.hugging_face(update.layer): update for update in found.updates}


def check_same(found, written):
    """dW equal to the last bit: the numbers and s are the same, ranks may be padded with zeros."""
    theirs, ours = by_name(found), by_name(written)
    assert theirs.keys() == ours.keys()
    for name, update in theirs.items():
        assert ours[name].scale == update.scale and ours[name].dtype == update.dtype
        (a, b, _, m), (c, d, _, n) = update.read(), ours[name].read()
        r = a.shape[1]
        np.testing.assert_array_equal(a, c[:, :r])
        np.testing.assert_array_equal(b, d[:r])
        assert not c[:, r:].any() and not d[r:].any()
        np.testing.assert_array_equal(m if m is not None else 0, n if n is not None else 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_mlx_and_llama_cpp_hold_pefts_updates(tmp_path, dtype):
    found = peft_adapter(
        tmp_path, dtype, rank=2, rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 3}
    )
    there = formats.read(mlx.write(tmp_path / "mlx", found))
    check_same(found, there)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 4,
        "scale": 1.5,
        "dropout": 0.0,
        "keys": ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj"],
    }
    assert config["model"] == "some/base" and config["num_layers"] == -1
    pytest.importorskip("gguf")
    file = llama_cpp.write(tmp_path / "adapter.gguf", there, BASE)
    check_same(found, formats.read(file, BASE))
    check_same(found, formats.read(mlx.write(tmp_path / "back", formats.read(file, BASE))))


def test_llama_cpp_gets_the_rows_in_its_order(tmp_path):
    gguf = pytest.importorskip("gguf")
    found = peft_adapter(tmp_path)
    reader = gguf.GGUFReader(llama_cpp.write(tmp_path / "adapter.gguf", found, BASE))
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, n in (("blk.0.attn_q", 4), ("blk.1.attn_k", 2)):
        B = draw(8 * n // 2, 4)
        want = B.reshape(n, 2, len(B) // n // 2, 4).swapaxes(1, 2).reshape(B.shape)
        np.testing.assert_array_equal(stored[f"{name}.weight.lora_b"], want)
    np.testing.assert_array_equal(stored["blk.1.ffn_down.weight.lora_a"], draw(4, 24))
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.lora.alpha"].contents() == 6.0


def test_llama_cpps_own_names_keep_its_order(tmp_path):
    pytest.importorskip("gguf")
    file = llama_cpp.write(tmp_path / "adapter.gguf", peft_adapter(tmp_path), BASE)
    again = llama_cpp.write(tmp_path / "again.gguf", formats.read(file, {}))
    assert again.read_bytes() == file.read_bytes()
    again = llama_cpp.write(tmp_path / "again.gguf", formats.read(file, BASE), BASE)
    assert again.read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match="16 rows of blk.0.attn_q don't fit the heads of the base"):
        llama_cpp.write(tmp_path / "again.gguf", formats.read(file, BASE))


def test_dora_goes_to_mlx_alone(tmp_path):
    more = {}
    for name, (_, n_out) in SIZES.items():
        more[f"base_model.model.model.layers.{name}.lora_magnitude_vector"] = draw(n_out)
    found = peft_adapter(tmp_path, more=more, use_dora=True)
    check_same(found, formats.read(mlx.write(tmp_path / "mlx", found)))
    with pytest.raises(ValueError, match="llama.cpp has no DoRA; blk.0.attn_q"):
        llama_cpp.write(tmp_path / "adapter.gguf", found, BASE)


def test_what_they_can_not_hold_is_refused(tmp_path):
    out = tmp_path / "out"
    found = peft_adapter(tmp_path, alpha_pattern={"down_proj": 7})
    with pytest.raises(ValueError, match="it has one scale .* 1.5 in .*, 1.75 in"):
        mlx.write(out, found)
    found = peft_adapter(tmp_path, more={"base_model.model.lm_head.weight": draw(40, 16)})
    with pytest.raises(ValueError, match="lm_head.weight beside the updates"):
        mlx.write(out, found)
    found = peft_adapter(tmp_path)
    with pytest.raises(ValueError, match="no base, or one without model_type, given"):
        llama_cpp.write(out, found)
    with pytest.raises(ValueError, match="\\['llama'\\] given"):
        llama_cpp.write(out, found, {"model_type": ["llama"]})
    with pytest.raises(ValueError, match="rows of blk.0.attn_q don't fit the heads"):
        llama_cpp.write(out, found, {"model_type": "llama"})
    with pytest.raises(ValueError, match="takes 0 for a scale of 1"):
        llama_cpp.write(out, peft_adapter(tmp_path, lora_alpha=0), BASE)
    other = tmp_path / "gpt2"
    other.mkdir()
    tensors = {
        f"base_model.model.transformer.h.0.mlp.c_fc.lora_{x}.weight": draw(4, 4) for x in "AB"
    }
    directory(other, tensors, CONFIG | {"target_modules": ["c_fc"]})
    with pytest.raises(ValueError, match="its name of transformer.h.0.mlp.c_fc is not known"):
        mlx.write(out, formats.read(other))
    with pytest.raises(ValueError, match="its name of transformer.h.0.mlp.c_fc is not known"):
        llama_cpp.write(out, formats.read(other), BASE)
    assert not out.exists()


def test_rows_of_unknown_order_and_lost_scales_are_refused(tmp_path):
    pytest.importorskip("gguf")
    names = [f"blk.0.attn_q.weight.lora_{side}" for side in "ab"]
    file = gguf_file(tmp_path, dict(zip(names, (draw(4, 16), draw(16, 4)), strict=True)))
    with pytest.raises(ValueError, match="need the base's heads; give --base"):
        mlx.write(tmp_path / "out", formats.read(file))
    mlx.write(tmp_path / "out", formats.read(file, BASE))
    (tmp_path / "out" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="its scale is not known"):
        mlx.write(tmp_path / "again", formats.read(tmp_path / "out"))


def test_the_command_writes_for_a_base(tmp_path, capsys):
    pytest.importorskip("gguf")
    found = peft_adapter(tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(BASE))
    out = tmp_path / "out.gguf"
    assert convert.main(["to", "gguf", str(tmp_path), str(out), "--base", str(base)]) == 0
    check_same(found, formats.read(out, BASE))
    assert convert.main(["to", "mlx", str(out), str(tmp_path / "mlx"), "--base", str(base)]) == 0
    check_same(found, formats.read(tmp_path / "mlx"))
    assert convert.main(["to", "peft", str(out), str(tmp_path / "peft"), "--base", str(base)]) == 0
    check_same(found, formats.read(tmp_path / "peft"))
    assert convert.main(["to", "mlx", str(out), str(tmp_path / "again")]) == 2
    assert "give --base" in capsys.readouterr().err and not (tmp_path / "again").exists()
