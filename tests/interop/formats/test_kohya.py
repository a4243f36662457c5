"""kohya's and LyCORIS's files against dense references of their formulas."""

import numpy as np
import pytest
import safetensors.numpy

from lorax.interop import formats
from lorax.interop.adapter import Factors

RNG = np.random.default_rng(0)


def draw(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def written(path, tensors, **metadata):
    file = path / "some lora.safetensors"
    safetensors.numpy.save_file(tensors, file, metadata or None)
    return file


def dense(update) -> np.ndarray:
    """dW (in, out) float64."""
    x = update.read()
    return x.s * x.a.astype(np.float64) @ x.b if isinstance(x, Factors) else x


def only(path, tensors):
    """The update of a file with one module, whose tensors have these last words."""
    tensors = {f"lora_unet_mid_block.{word}": x for word, x in tensors.items()}
    (update,) = formats.read(written(path, tensors)).updates
    dw = dense(update)
    assert dw.shape == update.shape and np.linalg.matrix_rank(dw) <= update.rank
    return update, dw


def as_matrix(weight) -> np.ndarray:
    """(in kh kw, out) of a weight (out, in, kh, kw)."""
    return weight.reshape(len(weight), -1).T


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
