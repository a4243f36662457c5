"""What can be given as an adapter, and what is refused by name."""

import json

import numpy as np
import pytest
from format_files import dense, draw, written

from lorax.interop import formats

LORA = {"lora_unet_a.lora_down.weight": draw(2, 4), "lora_unet_a.lora_up.weight": draw(4, 2)}


def test_a_folder_stands_for_its_only_adapter(tmp_path):
    written(tmp_path, LORA)
    assert formats.read(tmp_path).format == "kohya"
    written(tmp_path, LORA, "other.safetensors")
    with pytest.raises(ValueError, match="holds 2 adapters, other.safetensors, some lora.safe"):
        formats.read(tmp_path)
    (tmp_path / "step" / "checkpoint-3").mkdir(parents=True)
    written(tmp_path / "step" / "checkpoint-3", LORA, "pytorch_lora_weights.safetensors")
    assert formats.read(tmp_path / "step").format == "kohya"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.pt", b"PK", "a pickle can run code when opened.*weights_only=True"),
        ("x.ckpt", b"PK", "a pickle can run code"),
        ("x.distcp", b"", "export the adapter in PEFT's format"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("x.safetensors", b"", "not a readable safetensors file"),
        ("x.safetensors", (2**40).to_bytes(8, "little") + b"{}", "not a readable safetensors file"),
        ("x.zip", b"PK", "adapters are read from .safetensors"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {words}|{name}: .*{words}"):
        formats.read(tmp_path / name)
    if name.endswith((".pt", ".ckpt", ".distcp")):
        with pytest.raises(ValueError, match=words):
            formats.read(tmp_path)


def test_what_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "x", "./x", "no_slash", "runs/x/adapters/0"):
        with pytest.raises(FileNotFoundError, match=f"^{path}: no such file or directory$"):
            formats.read(path)
    with pytest.raises(FileNotFoundError, match="no adapter in it"):
        formats.read(tmp_path)


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(ValueError, match="an unknown format of adapters; its tensors are x"):
        formats.read(written(tmp_path, {"x": draw(2)}))


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "BF16", "F64", "I32"])
def test_types(tmp_path, kind):
    """8 bits are read as well; integers are no weights."""
    import ml_dtypes

    types = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
    types |= {"BF16": ml_dtypes.bfloat16, "F64": np.float64, "I32": np.int32}
    header, data = {}, b""
    for name, x in LORA.items():
        raw = x.astype(types[kind]).tobytes()
        places = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kind, "shape": x.shape, "data_offsets": places}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    if kind == "I32":
        with pytest.raises(ValueError, match="lora_unet_a.lora_down.weight: I32 given"):
            formats.read(tmp_path)
        return
    (update,) = formats.read(tmp_path).updates
    down, up = (x.astype(types[kind]).astype(np.float64) for x in LORA.values())
    assert update.dtype == kind
    np.testing.assert_allclose(dense(update), (up @ down).T, rtol=1e-6)


def test_our_own_dense_updates(tmp_path):
    dw = draw(4, 6)
    (tmp_path / "method.json").write_text(json.dumps({"name": "full", "hp": {}}))
    written(tmp_path, {"trainable/x": dw}, "state.safetensors")
    with pytest.raises(ValueError, match="full: no update of weights that can be read without"):
        formats.read(tmp_path)
    written(tmp_path, {"h/0/attn/q": dw}, "delta.safetensors")
    found = formats.read(tmp_path)
    (update,) = found.updates
    assert (found.format, update.layer, update.shape) == ("lorax", "h/0/attn/q", (4, 6))
    np.testing.assert_array_equal(update.read(), dw)
    pair = {f"base_model.model.q.lora_{x}": draw(*n) for x, n in (("A", (2, 4)), ("B", (6, 2)))}
    written(tmp_path, pair | {"base_model.model.q.lora_E": draw(2, 1)}, "adapter_model.safetensors")
    config = {"peft_type": "ADALORA", "init_r": 2, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert formats.read(tmp_path).format == "lorax"  # of every method, as the report reads it
    assert formats.read(tmp_path / "adapter_model.safetensors").format == "PEFT"


def test_loralib(tmp_path):
    A, B = draw(4, 8), draw(12, 2)
    tensors = {"module.h.0.c_attn.lora_A": A, "module.h.0.c_attn.lora_B": B}
    tensors |= {"module.h.0.c_proj.lora_A": draw(2, 8), "module.h.0.c_proj.lora_B": draw(6, 2)}
    found = formats.read(written(tmp_path, tensors | {"module.ln.bias": draw(8)}))
    assert found.format == "loralib" and set(found.beside) == {"module.ln.bias"}
    updates = {update.layer: update for update in found.updates}
    assert sorted(updates) == ["h.0.c_attn.0", "h.0.c_attn.1", "h.0.c_proj"]
    for i in (0, 1):
        update = updates[f"h.0.c_attn.{i}"]
        assert update.shape == (8, 6) and "training script" in update.source
        want = B[6 * i : 6 * i + 6].astype(float) @ A[2 * i : 2 * i + 2]
        np.testing.assert_allclose(dense(update), want.T, atol=1e-6)


def test_a_missing_alpha_that_the_header_names_is_said(tmp_path):
    file = written(tmp_path, LORA, ss_network_dim="2", ss_network_alpha="1")
    assert "ss_network_alpha is 1" in formats.read(file).notes[0]
    assert not formats.read(written(tmp_path, LORA, ss_network_alpha="2", ss_network_dim="2")).notes


def test_names_without_a_prefix(tmp_path):
    name = "transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.default.weight": draw(2, 4)}
    tensors |= {f"{name}.lora_B.default.weight": draw(4, 2), f"{name}.alpha": np.array([4.0])}
    found = formats.read(written(tmp_path, tensors))
    assert [(one.layer, one.scale) for one in found.updates] == [(name, 2.0)]


def test_every_float16_is_read_as_numpy_casts_it(tmp_path):
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    names = "lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight"
    factors = formats.read(written(tmp_path, dict.fromkeys(names, every))).updates[0].read()
    cast = every.astype(np.float32)
    for x, expected in ((factors.a, cast.T), (factors.b, cast.T)):
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x.copy().view(np.uint32), expected.copy().view(np.uint32))
