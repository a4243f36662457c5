"""Flux.1 between kohya's names and diffusers': what diffusers' own converter makes of a file."""

import itertools

import numpy as np
import pytest
import safetensors.numpy
from format_files import draw, written
from peft_files import foreign
from support import require

from lorax import convert
from lorax.interop import formats
from lorax.interop.formats import dotted, flux, kohya, peft
from lorax.xray import together

H = flux.HIDDEN
#: (inputs, outputs) of kohya's modules
SIZES = {
    **{
        f"double_blocks_0_{x}_{name}": size
        for x in ("img", "txt")
        for name, size in {
            "attn_qkv": (H, 3 * H),
            "attn_proj": (H, H),
            "mlp_0": (H, 4 * H),
            "mlp_2": (4 * H, H),
            "mod_lin": (H, 6 * H),
        }.items()
    },
    "single_blocks_37_linear1": (H, 7 * H),
    "single_blocks_37_linear2": (5 * H, H),
    "single_blocks_37_modulation_lin": (H, 3 * H),
    "img_in": (64, H),
    "txt_in": (4096, H),
    "time_in_in_layer": (256, H),
    "vector_in_out_layer": (H, H),
    "guidance_in_in_layer": (256, H),
    "final_layer_linear": (H, 64),
    "final_layer_adaLN_modulation_1": (H, 2 * H),
}
FUSED = {"double_blocks_0_txt_attn_qkv": [H] * 3, "single_blocks_37_linear1": [H, H, H, 4 * H]}


def kohya_file(path, sizes=SIZES, sparse=False, alpha=1.0, **more):
    """A LoRA of rank 1, of fused modules 3 or 4; `sparse`: of fused modules zero outside blocks."""
    tensors = dict(more)
    for name, (n_in, n_out) in sizes.items():
        r = len(FUSED.get(name, (1,)))
        up = draw(n_out, r)
        if sparse and r > 1:
            of = np.repeat(np.arange(r), FUSED[name])
            up *= of[:, None] == np.arange(r)
        # diffusers drops the alpha of the last layers
        own = r if "final" in name else alpha
        module = {"lora_down.weight": draw(r, n_in), "lora_up.weight": up}
        tensors |= {f"lora_unet_{name}.{word}": x for word, x in module.items()}
        tensors[f"lora_unet_{name}.alpha"] = np.float32(own)
    return written(path, tensors)


def seen(update):
    """dW at some inputs, (3, out)."""
    a, b, s, _ = update.read()
    x = np.random.default_rng(len(a)).standard_normal((3, len(a)))
    return s * (x @ a) @ b


@pytest.mark.parametrize("sparse", [False, True])
def test_every_layer_of_diffusers_is_what_its_converter_makes(tmp_path, sparse):
    conversion, torch = require("diffusers.loaders.lora_conversion_utils"), require("torch")
    file = kohya_file(tmp_path, sparse=sparse, alpha=0.5)
    tensors = {name: torch.tensor(x) for name, x in safetensors.numpy.load_file(file).items()}
    theirs = conversion._convert_kohya_flux_lora_to_diffusers(tensors)
    theirs = {f"transformer.{name.removeprefix('transformer.')}": x for name, x in theirs.items()}
    found = formats.read(file, as_stored=True)
    there = formats.read(dotted.write(tmp_path / "d", found), as_stored=True)
    assert {f"{one.layer}.lora_{x}.weight" for one in there.updates for x in "AB"} == set(theirs)
    for one in there.updates:
        A, B = (theirs[f"{one.layer}.lora_{x}.weight"].numpy() for x in "AB")
        want = seen(one._replace(read=lambda A=A, B=B: formats.contract.Factors(A.T, B.T, 1.0)))
        np.testing.assert_allclose(seen(one), want, rtol=0, atol=1e-4 * np.abs(want).max())
        assert one.rank == len(A)


@pytest.mark.parametrize("sparse", [False, True])
def test_there_and_back_is_the_same_file(tmp_path, sparse):
    file = kohya_file(tmp_path, sparse=sparse)
    found = formats.read(file, as_stored=True)
    names = {"d": dotted, "p": peft}
    for name, format in names.items():
        there = formats.read(format.write(tmp_path / name, found), as_stored=True)
        back = formats.read(kohya.write(tmp_path / f"{name}.safetensors", there), as_stored=True)
        theirs, ours = ({one.layer: one for one in x.updates} for x in (found, back))
        assert theirs.keys() == ours.keys()
        for layer, one in theirs.items():
            assert (ours[layer].scale, ours[layer].shape) == (one.scale, one.shape)
            for x, y in zip(ours[layer].read()[:2], one.read()[:2], strict=True):
                np.testing.assert_array_equal(x, y, err_msg=layer)


def test_each_module_is_counted_once_and_has_one_name(tmp_path):
    """Of kohya's file, of diffusers', and of PEFT's; parts of rank 1 where they have an A each."""
    for sparse in (False, True):
        (tmp_path / str(sparse)).mkdir()
        file = kohya_file(tmp_path / str(sparse), sparse=sparse, alpha=1.0)
        found = formats.read(file, as_stored=True)
        files = [file]
        files += [x.write(tmp_path / f"{sparse}{x.__name__}", found) for x in (dotted, peft)]
        each = [
            {together.same_matrix(one.layer): one for one in formats.read(x).updates} for x in files
        ]
        assert each[0].keys() == each[1].keys() == each[2].keys()
        assert len(each[0]) == len(SIZES) + (5 if sparse else 0)
        for one, other in itertools.pairwise(each):
            for name in one:
                assert one[name].rank == other[name].rank and one[name].shape == other[name].shape


def test_comfyui_and_xlabs(tmp_path):
    qkv = {"lora_down.weight": draw(2, H), "lora_up.weight": draw(3 * H, 2)}
    name = "diffusion_model.double_blocks.3.img_attn.qkv"
    file = written(tmp_path, {f"{name}.{word}": x for word, x in qkv.items()})
    found = formats.read(file, as_stored=True)
    (one,) = formats.read(kohya.write(tmp_path / "k.safetensors", found), as_stored=True).updates
    assert one.layer == "lora_unet_double_blocks_3_img_attn_qkv"
    np.testing.assert_array_equal(one.read().b, qkv["lora_up.weight"].T)
    words = {"down": qkv["lora_down.weight"], "up": qkv["lora_up.weight"]}
    conversion, torch = require("diffusers.loaders.lora_conversion_utils"), require("torch")
    for module in ("double_blocks.3.processor.qkv_lora2", "single_blocks.3.processor.qkv_lora"):
        file = written(tmp_path, {f"{module}.{word}.weight": x for word, x in words.items()})
        tensors = {name: torch.tensor(x) for name, x in safetensors.numpy.load_file(file).items()}
        theirs = conversion._convert_xlabs_flux_lora_to_diffusers(tensors)
        folder = dotted.write(tmp_path / module, formats.read(file, as_stored=True))
        stored = safetensors.numpy.load_file(folder / dotted.FILE)
        assert stored.keys() == theirs.keys()
        for key, x in stored.items():
            np.testing.assert_array_equal(x, theirs[key].numpy())
        back = kohya.write(tmp_path / f"{module}.safetensors", formats.read(file, as_stored=True))
        (one,) = formats.read(back, as_stored=True).updates
        want = "single_blocks_3_linear1" if "single" in module else "double_blocks_3_txt_attn_qkv"
        assert one.layer == f"lora_unet_{want}" and one.rank == 2
        np.testing.assert_array_equal(one.read().b[:, : 3 * H], words["up"].T)
        assert not one.read().b[:, 3 * H :].any()


def test_parts_that_lack_are_zero_and_dora_is_joined(tmp_path):
    around = "transformer_blocks.0.attn"
    tensors = {
        f"{around}.to_q.lora_A.weight": draw(1, H),
        f"{around}.to_q.lora_B.weight": draw(H, 1),
    }
    tensors |= {
        f"{around}.to_v.lora_A.weight": draw(2, H),
        f"{around}.to_v.lora_B.weight": draw(H, 2),
    }
    config = dict(r=1, lora_alpha=1, rank_pattern={"to_v": 2}, alpha_pattern={"to_v": 2})
    found = formats.read(foreign(tmp_path / "p", tensors, **config), as_stored=True)
    (one,) = formats.read(kohya.write(tmp_path / "k.safetensors", found), as_stored=True).updates
    a, b, s, _ = one.read()
    assert (one.layer, one.rank, s) == ("lora_unet_double_blocks_0_img_attn_qkv", 3, 1.0)
    parts = [seen(update) for update in found.updates]
    got = seen(one)
    np.testing.assert_allclose(got[:, :H], parts[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got[:, 2 * H :], parts[1], rtol=1e-5, atol=1e-4)
    assert not got[:, H : 2 * H].any()


WIDE = {"double_blocks_0_img_attn_qkv": (H, 3 * H)}


@pytest.mark.parametrize(
    "sizes, change, why",
    [
        ({"double_blocks_0_img_attn_qkv": (64, 192)}, {}, "64 inputs, in Flux.1 3072"),
        ({"double_blocks_0_img_mlp_2": (6 * H, 2 * H)}, {}, "18432 inputs, in Flux.1 12288"),
        ({"final_layer_linear": (H, 64)}, {}, "no module in its blocks"),
        ({"single_blocks_0_linear1": (H, 9 * H)}, {}, "27648 outputs, Flux.1 has 21504"),
        (WIDE, {"lora_unet_double_blocks_1_img_attn_qkv.diff": draw(3 * H, H)[:, :H]},
         "is full of a fused module"),
        (WIDE, {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": draw(1, 4),
                "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": draw(4, 1)},
         "name of lora_te3_encoder_block_0_layer_0_SelfAttention_q is not known"),
    ],
)  # fmt: skip
def test_what_is_no_flux_is_refused(tmp_path, capsys, sizes, change, why):
    file = kohya_file(tmp_path, sizes, **change)
    assert convert.main(["to", "diffusers", str(file), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tensors, config, why",
    [
        ({"transformer_blocks.0.attn.to_q": (1536, 1536)}, {}, "1536 inputs, in Flux.1 3072"),
        ({"x_embedder": (64, H)}, {}, "no module in its blocks"),
        ({f"transformer_blocks.0.attn.to_{x}": (H, H) for x in "qk"},
         {"alpha_pattern": {"to_k": 5}}, "several scales"),
    ],
)  # fmt: skip
def test_what_kohya_has_no_names_for_is_refused(tmp_path, tensors, config, why):
    pairs = {
        f"{name}.lora_{side}.weight": draw(*((1, n_in) if side == "A" else (n_out, 1)))
        for name, (n_in, n_out) in tensors.items()
        for side in "AB"
    }
    found = formats.read(foreign(tmp_path / "p", pairs, r=1, **config), as_stored=True)
    with pytest.raises(ValueError, match=f"kohya can't hold it: .*{why}"):
        kohya.write(tmp_path / "k.safetensors", found)


def test_stable_diffusion_3_is_read_and_not_taken_for_flux(tmp_path):
    """Its fused modules are counted once; kohya's names of diffusers' modules are not known."""
    rows = np.repeat(np.arange(3), 8)[:, None] == np.repeat(np.arange(3), 2)
    tensors = {}
    for x in ("x_block_attn", "context_block_attn", "x_block_attn2"):
        name = f"lora_unet_joint_blocks_0_{x}_qkv"
        tensors[f"{name}.lora_down.weight"] = draw(6, 8)
        tensors |= {f"{name}.lora_up.weight": draw(24, 6) * rows, f"{name}.alpha": np.float32(1)}
    file = written(tmp_path, tensors)
    updates = formats.read(file).updates
    assert len(updates) == 9 and {(one.rank, one.scale) for one in updates} == {(2, 0.5)}
    with pytest.raises(ValueError, match="its name of lora_unet_joint_blocks_0_.* is not known"):
        dotted.write(tmp_path / "d", formats.read(file, as_stored=True))
    a, pairs = draw(2, 8), {}
    for module in ("attn.to_q", "attn.to_k", "attn.to_v", "attn2.to_q", "attn.add_q_proj"):
        name = f"transformer.transformer_blocks.0.{module}"
        pairs[f"{name}.lora_A.weight"] = draw(2, 8) if "add" in module else a
        pairs[f"{name}.lora_B.weight"] = draw(8, 2)
    file = written(tmp_path, pairs)
    layers = sorted(one.layer.rpartition("0.")[2] for one in formats.read(file).updates)
    assert layers == ["attn.add_q_proj", "attn.to_q+to_k+to_v", "attn2.to_q"]
    with pytest.raises(ValueError, match="has 8 inputs, in Flux.1 3072"):
        kohya.write(tmp_path / "k.safetensors", formats.read(file, as_stored=True))
