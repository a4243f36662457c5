"""kohya's, diffusers' and PEFT's files, written from each other: names, scales and numbers stay."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from format_files import dense, draw, written
from peft_files import foreign
from support import require

from lorax import convert
from lorax.interop import formats
from lorax.interop.formats import dotted, image_names, kohya, peft
from lorax.xray import together

ATTENTION = "down_blocks_1_attentions_0_transformer_blocks_0_attn1"
#: kohya's name -> diffusers'.
NAMES = {
    f"lora_unet_{ATTENTION}_to_q": "unet.down_blocks.1.attentions.0.transformer_blocks.0."
    "attn1.to_q",
    "lora_unet_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in",
    "lora_unet_up_blocks_3_resnets_2_conv_shortcut": "unet.up_blocks.3.resnets.2.conv_shortcut",
    "lora_unet_time_embedding_linear_1": "unet.time_embedding.linear_1",
    "lora_te1_text_model_encoder_layers_11_self_attn_out_proj": "text_encoder.text_model.encoder."
    "layers.11.self_attn.out_proj",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": "text_encoder_2.text_model.encoder.layers.0."
    "mlp.fc1",
}
#: Names of SDXL's authors -> diffusers'.
SDXL = {
    "input_blocks_4_1_transformer_blocks_0_attn2_to_out_0": "down_blocks.1.attentions.0."
    "transformer_blocks.0.attn2.to_out.0",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_5_0_in_layers_2": "down_blocks.1.resnets.1.conv1",
    "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_4_1_transformer_blocks_1_ff_net_0_proj": "up_blocks.1.attentions.1."
    "transformer_blocks.1.ff.net.0.proj",
    "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
    "label_emb_0_2": "add_embedding.linear_2",
    "time_embed_0": "time_embedding.linear_1",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}


def test_names():
    for theirs, name in NAMES.items():
        assert image_names.diffusers(theirs) == name == image_names.diffusers(name)
        assert image_names.kohya(name, several=True) == theirs
    for theirs, name in SDXL.items():
        assert image_names.diffusers(f"lora_unet_{theirs}") == f"unet.{name}"
    assert image_names.diffusers("diffusion_model.input_blocks.3.0.op") == (
        "unet.down_blocks.0.downsamplers.0.conv"
    )
    assert image_names.diffusers("lora_unet_double_blocks_0_img_attn_qkv") is None
    assert image_names.diffusers("mid_block.attentions.0.proj_in") == (
        "unet.mid_block.attentions.0.proj_in"
    )
    assert image_names.kohya("transformer.transformer_blocks.0.attn.to_q", False) is None
    assert image_names.kohya("text_encoder.text_model.x", False) == "lora_te_text_model_x"


def test_names_are_diffusers_own():
    """What the library makes of kohya's names."""
    conversion = require("diffusers.loaders.lora_conversion_utils")

    class Config:
        layers_per_block = 2

    tensors = {f"lora_unet_{name}.lora_down.weight": name for name in SDXL}
    tensors = conversion._maybe_map_sgm_blocks_to_diffusers(tensors, Config)
    got = {}
    for key, name in tensors.items():
        key = conversion._convert_unet_lora_key(key).replace(".processor.", ".")
        key = key.replace("to_out_lora", "to_out.0.lora").replace("to_q_lora", "to_q.lora")
        got[name] = key.removesuffix(".lora.down.weight")
    assert got == SDXL


def of_kohya(path, dtype=np.float16):
    """kohya's file of matrices, a convolution and DoRA, each with its own rank and alpha."""
    tensors = {}
    for i, name in enumerate(NAMES):
        r, kernel = 2 + i, (3, 3) if "conv" in name else ()
        tensors[f"{name}.lora_down.weight"] = draw(r, 8, *kernel).astype(dtype)
        tensors[f"{name}.lora_up.weight"] = draw(6, r, *(1 for _ in kernel)).astype(dtype)
        if i != 1:
            tensors[f"{name}.alpha"] = np.array(i + 0.3, dtype)
    return tensors, written(path, tensors)


def same(found, other, name_of=image_names.diffusers):
    """dW, s and the type of every matrix are equal to the last bit."""
    by_name = lambda file: {name_of(one.layer): one for one in file.updates}
    theirs, ours = by_name(found), by_name(other)
    assert theirs.keys() == ours.keys()
    for name, one in theirs.items():
        assert (one.scale, one.rank, one.dtype) == (ours[name].scale, ours[name].rank, one.dtype)
        for x, y in zip(one.read(), ours[name].read(), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_kohya_to_diffusers_and_back(tmp_path, dtype):
    tensors, file = of_kohya(tmp_path, dtype)
    found = formats.read(file, as_stored=True)
    there = formats.read(dotted.write(tmp_path / "diffusers", found, {}), as_stored=True)
    assert there.format == "diffusers"
    same(found, there)
    back = kohya.write(tmp_path / "back.safetensors", there, {})
    same(found, formats.read(back, as_stored=True))
    stored = safetensors.numpy.load_file(back)
    for name, x in tensors.items():
        if not name.endswith("alpha"):
            assert stored[name].dtype == x.dtype
            np.testing.assert_array_equal(stored[name], x)


def test_a_file_of_diffusers_keeps_its_names(tmp_path):
    """Also those of components that kohya's files do not have."""
    names = [f"controlnet.down_blocks.0.attn1.to_{x}" for x in "qk"]
    tensors = {f"{name}.lora_A.weight": draw(2, 8) for name in names}
    tensors |= {f"{name}.lora_B.weight": draw(6, 2) for name in names}
    found = formats.read(written(tmp_path, tensors), as_stored=True)
    same(found, formats.read(dotted.write(tmp_path / "out", found)), str)


def test_dora_and_peft(tmp_path):
    layers = {"mid_block.attentions.0.proj_in": (), "conv_in": (3, 3)}
    tensors = {}
    for name, kernel in layers.items():
        tensors[f"{name}.lora_A.weight"] = draw(2, 8, *kernel)
        tensors[f"{name}.lora_B.weight"] = draw(6, 2, *(1 for _ in kernel))
        m = draw(6)
        tensors[f"{name}.lora_magnitude_vector"] = m.reshape(1, 6, 1, 1) if kernel else m
    path = foreign(tmp_path / "peft", tensors, use_dora=True, r=2, lora_alpha=3)
    found = formats.read(path, as_stored=True)
    file = kohya.write(tmp_path / "k.safetensors", found, {})
    shapes = {k: x.shape for k, x in safetensors.numpy.load_file(file).items() if "dora" in k}
    assert shapes == {
        "lora_unet_conv_in.dora_scale": (6, 1, 1, 1),
        "lora_unet_mid_block_attentions_0_proj_in.dora_scale": (6, 1),
    }
    there = formats.read(dotted.write(tmp_path / "d", formats.read(file, as_stored=True), {}))
    back = formats.read(peft.write(tmp_path / "p", there, {}))
    same(found, back)
    same(found, there)
    assert {one.kind for one in back.updates} == {"DoRA"}
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["use_dora"] and config["target_modules"] == sorted(layers)


def test_loha_and_lokr_keep_their_tensors(tmp_path):
    """PEFT's in kohya's file, and back again."""
    layers = ["mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out"]
    shapes = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}
    tensors = {f"{x}.{word}": draw(*shape) for x in layers for word, shape in shapes.items()}
    fields = dict(peft_type="LOHA", r=2, alpha=3)
    path = foreign(tmp_path / "peft", tensors, **fields, alpha_pattern={layers[1]: 0.7})
    config = json.loads((path / "adapter_config.json").read_text())
    config.pop("lora_alpha")
    (path / "adapter_config.json").write_text(json.dumps(config))
    found = formats.read(path)
    there = formats.read(kohya.write(tmp_path / "k.safetensors", found))
    assert there.config["ss_network_module"] == "lycoris.kohya"
    back = formats.read(peft.write(tmp_path / "p", there))
    for file in (there, back):
        by_name = {image_names.diffusers(one.layer): one for one in file.updates}
        for one in found.updates:
            other = by_name[image_names.diffusers(one.layer)]
            assert (other.kind, other.scale) == ("LoHa", one.scale) and one.scale in (1.5, 0.35)
            np.testing.assert_array_equal(dense(other), dense(one))
    tensors = {f"{layers[0]}.lokr_w1": draw(2, 2), f"{layers[0]}.lokr_w2": draw(3, 4)}
    for alpha in (2, 3):  # both sides whole: kohya's has no scale then
        path = foreign(tmp_path / f"lokr{alpha}", tensors, peft_type="LOKR", r=2, alpha=alpha)
        (path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LOKR", "r": 2, "alpha": alpha})
        )
        found, file = formats.read(path), tmp_path / f"lokr{alpha}.safetensors"
        if alpha == 3:
            with pytest.raises(ValueError, match="has the scale 1.5, and no rank: it takes 1"):
                kohya.write(file, found)
        else:
            (update,) = formats.read(kohya.write(file, found)).updates
            np.testing.assert_array_equal(update.read(), found.updates[0].read())
            (back,) = formats.read(peft.write(tmp_path / "back", formats.read(file))).updates
            np.testing.assert_array_equal(back.read(), found.updates[0].read())


def test_full_changes_of_comfyui_go_to_kohya(tmp_path):
    """Of a matrix, of its bias and of a norm."""
    block = "diffusion_model.input_blocks.4.1.transformer_blocks.0"
    tensors = {f"{block}.attn2.to_out.0.diff": draw(6, 8).astype(np.float16)}
    tensors |= {f"{block}.attn2.to_out.0.diff_b": draw(6), f"{block}.norm1.w_norm": draw(8)}
    found = formats.read(written(tmp_path, tensors), as_stored=True)
    stored = safetensors.numpy.load_file(kohya.write(tmp_path / "k.safetensors", found))
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    for (key, want), word in zip(tensors.items(), ("diff", "diff_b", "w_norm"), strict=True):
        got = stored.pop(f"{block}_{'norm1' if 'norm' in key else 'attn2_to_out_0'}.{word}")
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert not stored
    with pytest.raises(
        ValueError, match="is full; .*convert shrink makes LoRA of it, with --format"
    ):
        dotted.write(tmp_path / "d", found)


def test_scales_are_exact(tmp_path):
    """alpha is stored in 64 bits where 32 do not hold it."""
    name = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": draw(8, 4), f"{name}.lora_B.weight": draw(4, 8)}
    metadata = {"unet.r": 8, "unet.lora_alpha": 16, "unet.use_rslora": True}
    file = written(tmp_path, tensors, lora_adapter_metadata=json.dumps(metadata))
    found = formats.read(file)
    back = kohya.write(tmp_path / "k.safetensors", found, {})
    assert formats.read(back).updates[0].scale == found.updates[0].scale == 16 / 8**0.5
    (stored,) = (x for k, x in safetensors.numpy.load_file(back).items() if "alpha" in k)
    assert stored.dtype == np.float64


def test_a_file_of_kohyas_keeps_its_texts(tmp_path):
    """Also those that are JSON; not the ranks and hashes, which are the new file's."""
    stored, _ = of_kohya(tmp_path)
    texts = {"ss_tag_frequency": '{"cats": {"cat": 2}}', "ss_network_module": "lycoris.kohya"}
    theirs = {"ss_network_dim": "7", "sshs_model_hash": "1", "modelspec.hash_sha256": "1"}
    found = formats.read(written(tmp_path, stored, **texts, **theirs), as_stored=True)
    file = kohya.write(tmp_path / "k.safetensors", found)
    with safetensors.safe_open(file, "numpy") as handle:
        assert handle.metadata() == texts | {
            "ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"
        }  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lora_unet_x.lora_down.weight": (2, 4), "lora_unet_x.lora_up.weight": (4, 2)}, "name of"),
        ({"lora_unet_conv_in.w_norm": (4,)}, "lora_unet_conv_in.w_norm beside the updates"),
        ({"lora_unet_conv_out.diff": (4, 4)}, "is full; it holds LoRA, LoCon, DoRA, AdaLoRA"),
        ({"lora_unet_input_blocks_0_0.lora_down.weight": (2, 4)}
         | {"lora_unet_input_blocks_0_0.lora_up.weight": (4, 2)}, "unet.conv_in occurs twice"),
        ({"lora_unet_conv_in.dora_scale": (1, 4)}, "one length per input"),
    ],
)  # fmt: skip
def test_what_another_format_cannot_hold_is_named(tmp_path, change, words):
    shapes = {
        "lora_unet_conv_in.lora_down.weight": (2, 4),
        "lora_unet_conv_in.lora_up.weight": (6, 2),
    }
    tensors = {name: draw(*shape) for name, shape in (shapes | change).items()}
    found = formats.read(written(tmp_path, tensors), as_stored=True)
    with pytest.raises(ValueError, match="diffusers can't hold it") as error:
        dotted.write(tmp_path / "out", found, {})
    assert words in str(error.value)


def test_the_command(tmp_path, capsys):
    _, file = of_kohya(tmp_path)
    out = tmp_path / "out"
    assert convert.main(["to", "diffusers", str(file), str(out)]) == 0
    assert f"{out}: 6 matrices of kohya as diffusers" in capsys.readouterr().out
    same(formats.read(file, as_stored=True), formats.read(out, as_stored=True))
    assert convert.main(["to", "kohya", str(out), str(tmp_path / "k.safetensors")]) == 0
    assert convert.main(["to", "peft", str(out), str(tmp_path / "p")]) == 2
    assert not (tmp_path / "p").exists()
    assert "one directory is of one model" in capsys.readouterr().err
    assert convert.main(["to", "kohya", str(out), str(tmp_path / "k.safetensors")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert set(convert.FORMATS) == set(formats.WRITERS)


def test_one_directory_of_peft_is_of_one_model(tmp_path):
    _, file = of_kohya(tmp_path)
    found = formats.read(file, as_stored=True)
    with pytest.raises(ValueError, match="one directory is of one model"):
        peft.write(tmp_path / "p", found, {})


def test_an_embedding_of_pefts_stays_one(tmp_path):
    """Whatever its name is; so does what a config says beside."""
    tensors = {"emb.lora_embedding_A": draw(2, 30), "emb.lora_embedding_B": draw(8, 2)}
    tensors |= {"wte.lora_A.weight": draw(2, 8), "wte.lora_B.weight": draw(6, 2)}
    fields = dict(fan_in_fan_out=True, task_type="CAUSAL_LM", base_model_name_or_path="some/base")
    path = foreign(tmp_path / "peft", tensors, **fields)
    found = formats.read(path, as_stored=True)
    there = peft.write(tmp_path / "p", found)
    same(found, formats.read(there), lambda name: name)
    stored = safetensors.numpy.load_file(there / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.") for key in stored} == set(tensors)
    config = json.loads((there / "adapter_config.json").read_text())
    assert {name: config[name] for name in fields} == fields


def test_language_models_come_back_to_peft(tmp_path):
    """From MLX, whose embedding has names of its own in PEFT's files."""
    module = "model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_a": draw(8, 2), f"{module}.lora_b": draw(2, 6)}
    tensors |= {"model.embed_tokens.lora_a": draw(30, 2), "model.embed_tokens.lora_b": draw(2, 8)}
    (tmp_path / "mlx").mkdir()
    written(tmp_path / "mlx", tensors, "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 10.0}}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    found = formats.read(tmp_path / "mlx", as_stored=True)
    there = formats.read(peft.write(tmp_path / "p", found, {}))
    same(found, there, lambda name: name)
    stored = safetensors.numpy.load_file(tmp_path / "p" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in stored


def small_unet():
    diffusers, torch = require("diffusers"), require("torch")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def test_what_diffusers_saves_of_one_model(tmp_path):
    """`save_lora_adapter` writes names and metadata without the name of a component."""
    library, torch, unet = require("peft"), require("torch"), small_unet()
    target = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    config = dict(r=2, lora_alpha=5, target_modules=["to_q", "to_k"], rank_pattern={target: 3})
    unet.add_adapter(library.LoraConfig(**config, init_lora_weights=False))
    unet.save_lora_adapter(tmp_path)
    found = formats.read(tmp_path)
    scales = {update.layer: update.scale for update in found.updates}
    assert scales[target] == 5 / 3 and set(scales.values()) == {5 / 3, 2.5}
    for update in found.updates:
        with torch.no_grad():
            want = unet.get_submodule(update.layer).get_delta_weight("default").numpy()
        np.testing.assert_allclose(dense(update), want.T, atol=1e-6)


def test_diffusers_loads_what_we_write(tmp_path):
    """A small U-Net of the library computes W + dW with our file."""
    unet = small_unet()
    names = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.resnets.0.conv1",
    ]
    tensors = {}
    for i, name in enumerate(names):
        weight, r = unet.get_submodule(name).weight, 2 + i
        flat = f"lora_unet_{name.replace('.', '_')}"
        kernel = tuple(weight.shape[2:])
        tensors[f"{flat}.lora_down.weight"] = draw(r, weight.shape[1], *kernel)
        tensors[f"{flat}.lora_up.weight"] = draw(len(weight), r, *(1 for _ in kernel))
        tensors[f"{flat}.alpha"] = np.array(i + 0.7, np.float32)
    found = formats.read(written(tmp_path, tensors), as_stored=True)
    folder = dotted.write(tmp_path / "out", found, {})
    unet.load_lora_adapter(str(folder), weight_name=dotted.FILE, prefix="unet")
    for update in found.updates:
        layer = unet.get_submodule(image_names.diffusers(update.layer).removeprefix("unet."))
        (name,) = layer.scaling
        assert layer.scaling[name] == update.scale and layer.r[name] == update.rank
        a, b, s, _ = update.read()
        want = (s * a @ b).T.reshape(layer.weight.shape)
        got = layer.get_delta_weight(name).detach().numpy()
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


def test_one_matrix_has_one_name_in_the_x_ray():
    """Of files of different programs, so that their directions can be compared."""
    sgm = "input_blocks_4_1_transformer_blocks_0_attn2_to_out_0"
    for names in (
        [f"lora_unet_{sgm}", f"unet.{SDXL[sgm]}", SDXL[sgm]],
        ["lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"],
        ["lora_te_text_model_encoder_layers_0_mlp_fc1"]
        + [f"{x}text_model.encoder.layers.0.mlp.fc1" for x in ("text_encoder.", "")],
        ["blk.3.attn_q", "model.layers.3.self_attn.q_proj", "layers.3.attention.wq"],
    ):
        assert len({together.same_matrix(name) for name in names}) == 1, names
