"""kohya's and LyCORIS's files against dense references of their formulas."""

import numpy as np
import pytest
from format_files import as_matrix, dense, draw, written

from lorax.interop import formats


def only(path, tensors):
    """The update of a file with one module, whose tensors have these last words."""
    tensors = {f"lora_unet_mid_block.{word}": x for word, x in tensors.items()}
    (update,) = formats.read(written(path, tensors)).updates
    dw = dense(update)
    assert dw.shape == update.shape and np.linalg.matrix_rank(dw) <= update.rank
    return update, dw


def test_lora_with_alpha(tmp_path):
    down, up = draw(4, 12, dtype=np.float16), draw(6, 4, dtype=np.float16)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(1, np.float16)}
    update, dw = only(tmp_path, tensors)
    assert update[:6] == ("lora_unet_mid_block", "LoRA", (12, 6), 4, 0.25, "tensor alpha / r")
    assert update.dtype == "F16"
    want = (up.astype(np.float64) @ down.astype(np.float64)).T / 4
    np.testing.assert_allclose(dw, want, atol=1e-6)


@pytest.mark.parametrize("alpha", [None, 0])
def test_no_alpha_is_a_scale_of_one(tmp_path, alpha):
    tensors = {"lora_down.weight": draw(4, 12), "lora_up.weight": draw(6, 4)}
    if alpha is not None:
        tensors["alpha"] = np.array(alpha, np.float32)
    update, _ = only(tmp_path, tensors)
    assert update.scale == 1 and ("default" in update.source) == (alpha is None)


def test_convolutions(tmp_path):
    down, up = draw(4, 5, 3, 3), draw(6, 4, 1, 1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(8)}
    update, dw = only(tmp_path, tensors)
    assert update.kind == "LoCon" and update.shape == (45, 6) and update.rank == 4
    want = np.einsum("or,rihw->oihw", up[:, :, 0, 0], down) * 2
    np.testing.assert_allclose(dw, as_matrix(want), atol=1e-5)


def test_lengths_of_dora(tmp_path):
    """One for each output, or in old files for each input: the place of the ones tells."""
    tensors = {"lora_down.weight": draw(2, 6), "lora_up.weight": draw(6, 2)}
    m = draw(6, 1)
    update, _ = only(tmp_path, tensors | {"dora_scale": m})
    assert update.kind == "DoRA" and not update.warnings
    np.testing.assert_array_equal(update.read().m, m[:, 0])
    update, _ = only(tmp_path, tensors | {"dora_scale": draw(1, 6)})
    assert update.read().m is None and "one length per input" in update.warnings[0]
    with pytest.raises(ValueError, match=r"mid_block: need dora_scale \(6, 1, ...\) or"):
        only(tmp_path, tensors | {"dora_scale": draw(1, 5)})


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"oft_blocks": (2, 3, 3)}, "OFT rotates the base's weights"),
        ({"weight": (4,), "on_input": (1,)}, "IA3 scales the base's weights"),
        ({"a1.weight": (4, 2)}, "GLoRA multiplies the base's weights"),
        ({"lora_down.weight": (2, 4)}, "lora_up is missing; there is lora_down (2, 4)"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (4, 3)}, "need lora_down (r, in"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "x": (1,)}, "unknown tensors x"),
        ({"lora_down.weight": (0, 4), "lora_up.weight": (4, 0)}, "lora_down is empty"),
        ({"lora_down.weight": (), "lora_up.weight": (4, 3)}, "need lora_down (r, in"),
        (
            {"lora_down.weight": (2, 4), "lora_up.weight": (1, 2), "dora_scale": ()},
            "need dora_scale",
        ),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4)}, "hada_w2_a is missing"),
        ({"lokr_w1": (70000, 1), "lokr_w2": (1, 70000)}, "the most is 268435456 numbers"),
        ({"diff": (4, 4), "lora_up.weight": (4, 2), "lora_down.weight": (2, 4)}, "diff can't be"),
        ({"alpha": ()}, "alpha without an update"),
        ({"lora_down.weight": (2, 4), "lora_A.weight": (2, 4)}, "has lora_down twice"),
        ({"diff": (4, 4), "alpha": (2,), "x": ()}, "unknown tensors x"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, tensors, words):
    tensors = {word: draw(*shape) for word, shape in tensors.items()}
    with pytest.raises(ValueError) as error:
        only(tmp_path, tensors)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "some lora.safetensors: lora_unet_mid_block" in str(error.value)


def test_biases_and_norms_stand_beside(tmp_path):
    tensors = {"lora_unet_a.diff": draw(6, 4), "lora_unet_a.diff_b": draw(6)}
    tensors |= {"lora_unet_n.w_norm": draw(4), "lora_unet_n.b_norm": draw(4)}
    tensors |= {"bundle_emb.cat.clip_l": draw(2, 4)}
    found = formats.read(written(tmp_path, tensors, ss_network_dim="4", ss_tag="[1]"))
    (update,) = found.updates
    assert (update.kind, update.rank, update.scale) == ("full", 4, 1)
    np.testing.assert_array_equal(update.read(), tensors["lora_unet_a.diff"].T)
    names = {"lora_unet_a.diff_b", "lora_unet_n.w_norm", "lora_unet_n.b_norm"}
    assert set(found.beside) == names | {"bundle_emb.cat.clip_l"}
    assert found.config == {"ss_network_dim": "4", "ss_tag": [1]}


def test_numbers_that_are_not_finite_are_returned(tmp_path):
    down = draw(2, 4)
    down[0, 0] = np.nan
    tensors = {"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": draw(4, 2)}
    (update,) = formats.read(written(tmp_path, tensors)).updates
    assert np.isnan(update.read().a[0, 0])


def test_only_shapes_are_read_before_an_update_is(tmp_path):
    """A file cut after it was opened: the error is that of reading."""
    tensors = {"lora_unet_a.lora_down.weight": draw(2, 4), "lora_unet_a.lora_up.weight": draw(4, 2)}
    file = written(tmp_path, tensors)
    (update,) = formats.read(file).updates
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="it ends within lora_unet_a.lora_"):
        update.read()
