"""LyCORIS's modules, as the library saves them: dW is what the library's module adds to a layer."""

import numpy as np
import pytest
import safetensors.numpy
from format_files import dense
from support import require

from lorax.interop import formats

#: {case: (algorithm, arguments of its module, whether the layer is a convolution)}
CASES = {
    "lora": ("locon", {}, False),
    "lora-rs": ("locon", {"rs_lora": True}, False),
    "locon": ("locon", {}, True),
    "locon-tucker": ("locon", {"use_tucker": True}, True),
    "loha": ("loha", {}, False),
    "loha-conv": ("loha", {}, True),
    "loha-tucker": ("loha", {"use_tucker": True}, True),
    "lokr": ("lokr", {"factor": 4}, False),
    "lokr-both": ("lokr", {"factor": 8, "decompose_both": True}, False),
    "lokr-full": ("lokr", {"factor": 4, "full_matrix": True}, False),
    "lokr-conv": ("lokr", {"factor": 4}, True),
    "lokr-tucker": ("lokr", {"factor": 4, "use_tucker": True}, True),
    "full": ("full", {}, True),
}


@pytest.fixture(scope="module")
def lycoris():
    return require("lycoris.modules")


def saved(lycoris, tmp_path, algorithm, arguments, conv, alpha=3.0):
    """(file, weight's change (out, in, ...) by the library) of one module with random numbers."""
    import importlib

    import torch

    torch.manual_seed(0)
    layer = torch.nn.Conv2d(16, 24, 3, bias=False) if conv else torch.nn.Linear(16, 24, bias=False)
    shape = tuple(layer.weight.shape)
    names = {"locon": "LoConModule", "loha": "LohaModule", "lokr": "LokrModule"}
    kind = importlib.import_module(f"lycoris.modules.{algorithm}")
    kind = getattr(kind, names.get(algorithm, "FullModule"))
    module = kind("lora_unet_layer", layer, lora_dim=2, alpha=alpha, **arguments)
    module.apply_to()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if hasattr(module, "get_weight"):  # of LoHa and LoKr, whose get_diff_weight scales twice
            change = module.get_weight(module.shape)
        else:
            change = module.get_diff_weight(shape=shape)[0]
        tensors = {f"lora_unet_layer.{k}": v for k, v in module.custom_state_dict().items()}
    file = tmp_path / "lycoris.safetensors"
    tensors = {k: v.detach().contiguous().numpy() for k, v in tensors.items()}
    safetensors.numpy.save_file(tensors, file)
    return file, change.detach().numpy()


@pytest.mark.parametrize("case", CASES)
def test_updates_are_the_librarys(lycoris, tmp_path, case):
    file, change = saved(lycoris, tmp_path, *CASES[case])
    (update,) = formats.read(file).updates
    dw = dense(update)
    np.testing.assert_allclose(dw, change.reshape(len(change), -1).T, atol=1e-6)
    assert dw.shape == update.shape and np.linalg.matrix_rank(dw, tol=1e-5) <= update.rank
    assert np.abs(dw).max() > 1e-3


@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize("conv", [True, False])
def test_lengths_of_dora(lycoris, tmp_path, on_out, conv):
    arguments = {"weight_decompose": True, "wd_on_out": on_out}
    file, _ = saved(lycoris, tmp_path, "locon", arguments, conv)
    (update,) = formats.read(file).updates
    assert update.kind == "DoRA" and (update.read().m is not None) == on_out
    assert bool(update.warnings) != on_out
