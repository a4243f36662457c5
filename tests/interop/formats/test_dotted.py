"""diffusers' three generations, ComfyUI's style and XLabs, against dense references."""

import json

import numpy as np
import pytest
from format_files import dense, draw, written

from lorax.interop import formats

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
NAME = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    "down, up, layer",
    [
        ("processor.to_q_lora.down.weight", "processor.to_q_lora.up.weight", "to_q"),
        ("processor.to_out_lora.down.weight", "processor.to_out_lora.up.weight", "to_out.0"),
        ("to_q.lora.down.weight", "to_q.lora.up.weight", "to_q"),
        ("to_q.lora_A.weight", "to_q.lora_B.weight", "to_q"),
        ("to_q.lora_A.default.weight", "to_q.lora_B.default.weight", "to_q"),
        ("q_proj.lora_linear_layer.down.weight", "q_proj.lora_linear_layer.up.weight", "q_proj"),
        ("to_q.lora_down.weight", "to_q.lora_up.weight", "to_q"),
    ],
)
def test_generations(tmp_path, down, up, layer):
    a, b = draw(3, 8), draw(6, 3)
    tensors = {f"unet.{ATTENTION}.{down}": a, f"unet.{ATTENTION}.{up}": b}
    found = formats.read(written(tmp_path, tensors, NAME).parent)
    assert found.format == "diffusers"
    (update,) = found.updates
    assert update.layer == f"unet.{ATTENTION}.{layer}" and update.shape == (8, 6)
    assert (update.scale, update.source) == (1.0, "default 1: the file has none")
    read = update.read()
    np.testing.assert_array_equal(read.a @ read.b, a.T @ b.T)


def test_the_scale_of_the_metadata(tmp_path):
    tensors = {f"unet.{n}.lora_A.weight": draw(r, 8) for n, r in (("x", 2), ("y", 4))}
    tensors |= {f"unet.{n}.lora_B.weight": draw(6, r) for n, r in (("x", 2), ("y", 4))}
    config = {"unet.r": 2, "unet.lora_alpha": 3, "unet.rank_pattern": {"y": 4}}
    config["unet.alpha_pattern"] = {"y": 1.5}
    file = written(tmp_path, tensors, lora_adapter_metadata=json.dumps(config))
    updates = {update.layer: update for update in formats.read(file).updates}
    assert updates["unet.x"].scale == 1.5 and updates["unet.y"].scale == 0.375
    assert updates["unet.x"].source == "metadata lora_alpha / r"
    both = tensors | {"unet.x.alpha": np.float32([2])}
    file = written(tmp_path, both, lora_adapter_metadata=json.dumps(config))
    with pytest.raises(ValueError, match="unet.x: a tensor alpha, and lora_adapter_metadata"):
        formats.read(file)


def test_comfyui_and_xlabs(tmp_path):
    tensors = {"diffusion_model.layers.0.attention.qkv.lora_A.weight": draw(2, 8)}
    tensors |= {"diffusion_model.layers.0.attention.qkv.lora_B.weight": draw(6, 2)}
    tensors |= {"diffusion_model.layers.0.attention.qkv.alpha": np.float32(4)}
    tensors |= {"diffusion_model.layers.0.norm.diff": draw(8)}
    tensors |= {"diffusion_model.layers.0.attention.qkv.diff_b": draw(6)}
    found = formats.read(written(tmp_path, tensors))
    assert found.format == "ComfyUI"
    assert [(u.layer, u.scale) for u in found.updates] == [
        ("diffusion_model.layers.0.attention.qkv", 2.0)
    ]
    assert set(found.beside.values()) == {(8,), (6,)}
    names = [f"double_blocks.0.processor.{part}" for part in ("qkv_lora1", "proj_lora2")]
    tensors = {f"{name}.down.weight": draw(2, 8) for name in names}
    tensors |= {f"{name}.up.weight": draw(6, 2) for name in names}
    found = formats.read(written(tmp_path, tensors))
    assert found.format == "XLabs" and sorted(u.layer for u in found.updates) == sorted(names)


def test_three_loras_that_are_stored_as_one_are_three(tmp_path):
    """sd-scripts' split_qkv: up is zero outside its blocks, alpha is that of one."""
    rank, parts = 2, [(draw(2, 12), draw(5, 2)) for _ in range(3)]
    up = np.zeros((15, 6), np.float32)
    for i, (_, block) in enumerate(parts):
        up[5 * i : 5 * i + 5, 2 * i : 2 * i + 2] = block
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": np.concatenate([down for down, _ in parts])}
    tensors |= {f"{name}.lora_up.weight": up, f"{name}.alpha": np.float32(1)}
    updates = formats.read(written(tmp_path, tensors)).updates
    assert [update.layer for update in updates] == [f"{name}.{part}" for part in "qkv"]
    for update, (down, block) in zip(updates, parts, strict=True):
        assert (update.rank, update.shape, update.scale) == (rank, (12, 5), 0.5)
        assert "split_qkv" in update.warnings[0]
        a, b, s, _ = update.read()
        np.testing.assert_array_equal(s * a @ b, down.T @ block.T / 2)
    of_all = {f"{name}.alpha": np.float32(6)}  # as convert_flux_lora stores it
    of_another = {
        "lora_unet_x.lora_down.weight": draw(4, 8),
        "lora_unet_x.lora_up.weight": draw(8, 4),
    }
    of_another |= {"lora_unet_x.alpha": np.float32(1), f"{name}.alpha": np.float32(1.5)}
    other = "lora_unet_layers_0_attention_qkv"  # whose parts sd-scripts does not train
    renamed = {key.replace(name, other): x for key, x in tensors.items()}
    for converted, scale in ((tensors | of_all, 1), (tensors | of_another, 0.25), (renamed, 1 / 6)):
        updates = formats.read(written(tmp_path, converted)).updates
        three = [update for update in updates if update.rank == rank]
        assert len(three) == 3 and {update.scale for update in three} == {scale}
        assert not any("split_qkv" in update.warnings[0] for update in three)
        for update, (down, block) in zip(three, parts, strict=True):
            want = scale * down.T @ block.T
            np.testing.assert_allclose(dense(update), want, rtol=1e-5, atol=1e-6)
    up[0, 5] = 1e-3  # no longer three
    tensors[f"{name}.lora_up.weight"] = up
    (update,) = formats.read(written(tmp_path, tensors)).updates
    assert update.rank == 6 and update.scale == 1 / 6


def test_linear1_is_four(tmp_path):
    up = np.zeros((3 * 4 + 7, 8), np.float32)
    for i, (start, stop) in enumerate([(0, 4), (4, 8), (8, 12), (12, 19)]):
        up[start:stop, 2 * i : 2 * i + 2] = draw(stop - start, 2)
    name = "lora_unet_single_blocks_3_linear1"
    tensors = {f"{name}.lora_down.weight": draw(8, 4), f"{name}.lora_up.weight": up}
    found = formats.read(written(tmp_path, tensors)).updates
    assert [(u.layer.rpartition(".")[2], u.shape) for u in found] == [
        ("q", (4, 4)), ("k", (4, 4)), ("v", (4, 4)), ("mlp", (4, 7))
    ]  # fmt: skip


def test_parts_of_one_lora_are_counted_once(tmp_path):
    """A converter split qkv: three B with copies of one A."""
    a, around = draw(2, 8), "transformer.transformer_blocks.0.attn"
    tensors = {f"{around}.to_{x}.lora_A.weight": a.copy() for x in "vkq"}
    tensors |= {f"{around}.to_{x}.lora_B.weight": draw(4, 2) for x in "vkq"}
    other = around.replace("0", "1")
    tensors |= {f"{other}.to_q.lora_A.weight": a.copy(), f"{other}.to_q.lora_B.weight": draw(5, 2)}
    found = formats.read(written(tmp_path, tensors)).updates
    assert sorted(u.layer for u in found) == [f"{around}.to_q+to_k+to_v", f"{other}.to_q"]
    fused = next(u for u in found if "+" in u.layer)
    assert fused.shape == (8, 12) and fused.rank == 2 and "one A" in fused.warnings[0]
    read = fused.read()
    want = np.concatenate([tensors[f"{around}.to_{x}.lora_B.weight"] for x in "qkv"]).T
    np.testing.assert_array_equal(read.a @ read.b, a.T @ want)
    tensors[f"{around}.to_q.alpha"] = np.array(1.0)
    assert len(formats.read(written(tmp_path, tensors)).updates) == 4  # one has another scale


@pytest.mark.parametrize(
    "words, why",
    [
        ({"to_q.lora_A.weight": (), "to_q.lora_B.weight": (4, 2)}, "need lora_down"),
        ({"to_q.lora_A.weight": (2, 4), "to_q.lora_B.weight": ()}, "need lora_down"),
        ({"to_q.lora.down.weight": (2, 4), "to_q.lora.up.weight": (4, 2), "to_q.lora.alpha": ()},
         "to_q.lora: alpha without an update"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, words, why):
    file = written(tmp_path, {f"unet.x.{word}": draw(*shape) for word, shape in words.items()})
    with pytest.raises(ValueError, match=f"some lora.safetensors: unet.x.{why}|{file}.*{why}"):
        formats.read(file)
