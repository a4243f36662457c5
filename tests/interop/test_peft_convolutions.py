"""Adapters of convolutions, in PEFT's files and in PEFT."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import linen as nn
from quick import jit
from support import require

import lorax
from lorax import adapters
from lorax.interop import peft


class Convs(nn.Module):
    """A strided convolution with a window that is no square, one of single pixels, and a sum."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 2), strides=(2, 1), padding=((1, 1), (0, 0)), name="wide")(x)
        x = nn.Conv(5, (1, 1), name="point")(jnp.tanh(x))
        return nn.Dense(4, name="scores")(jnp.tanh(x).mean(axis=(1, 2)))


def network():
    return Convs(), np.zeros((1, 7, 8, 3), np.float32)


def twin(base):
    """The same network in torch."""
    torch = require("torch")

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = torch.nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0))
            self.point = torch.nn.Conv2d(6, 5, 1)
            self.scores = torch.nn.Linear(5, 4)

        def forward(self, x):
            x = self.point(torch.tanh(self.wide(x)))
            return self.scores(torch.tanh(x).mean(dim=(2, 3)))

    model = Twin()
    with torch.no_grad():
        for name, module in model.named_children():
            kernel, bias = (np.array(base.params[name][key]) for key in ("kernel", "bias"))
            axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
            module.weight.copy_(torch.tensor(kernel.transpose(axes)))
            module.bias.copy_(torch.tensor(bias))
    return model.eval()


IMAGES = np.random.default_rng(0).normal(size=(2, 7, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def base():
    return lorax.load(network)


@pytest.fixture(scope="module")
def scores(base):
    """Ours with bound parameters."""
    run = jit(functools.partial(lorax.apply, base.module))
    return lambda params: np.asarray(run(params, IMAGES))


def theirs(model) -> np.ndarray:
    torch = require("torch")
    with torch.no_grad():
        return model(torch.tensor(IMAGES.transpose(0, 3, 1, 2).copy())).numpy()


@pytest.mark.filterwarnings("ignore")  # what PEFT warns about is not ours
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_peft_and_we_compute_the_same_with_each_others_files(name, base, scores, tmp_path):
    library = require("peft")
    method = lorax.method(name, rank=2, alpha=24, targets=("conv",))
    state = method.init(jax.random.key(0), base.params, base.sites)
    state = state._replace(trainable=small.noisy(state.trainable))
    assert not adapters.save(tmp_path / "ours", adapters.from_training(base, method, state))
    expected = scores(method.bind(*state, base.params, sites=base.sites))
    assert np.abs(expected - scores(base.params)).max() > 0.05
    loaded = adapters.load(tmp_path / "ours", base)
    np.testing.assert_allclose(scores(loaded.bind()), expected, rtol=0, atol=1e-6)
    model = library.PeftModel.from_pretrained(twin(base), tmp_path / "ours").eval()
    np.testing.assert_allclose(theirs(model), expected, rtol=0, atol=1e-5)
    # and PEFT's own file, in which it says the same in its way
    model.save_pretrained(tmp_path / "theirs")
    again = adapters.load(tmp_path / "theirs", base)
    assert {*again.updates} == {"wide", "point"}
    np.testing.assert_allclose(scores(again.bind()), expected, rtol=0, atol=1e-5)


def test_a_merged_kernel_is_the_one_that_is_convolved(base, scores, tmp_path):
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    factors = {"wide": peft.Factors(draw(18, 2), draw(2, 6), 0.5)}
    peft.save(tmp_path, factors, base.sources, "base", task_type=None)
    loaded = adapters.load(tmp_path, base)
    np.testing.assert_array_equal(loaded.updates["wide"].a, factors["wide"].a)
    merged = scores(loaded.merge().params)
    np.testing.assert_allclose(scores(loaded.bind()), merged, rtol=0, atol=1e-5)
    assert np.abs(merged - scores(base.params)).max() > 0.05


def test_another_window_is_refused(base, tmp_path):
    sources = copy.copy(base.sources)
    window = {"wide/kernel": sources["wide/kernel"]._replace(window=(2, 3))}
    factors = {"wide": peft.Factors(np.ones((18, 1)), np.ones((1, 6)), 1.0)}
    peft.save(tmp_path, factors, {**sources, **window}, "base", task_type=None)
    with pytest.raises(ValueError, match=r"wide: its window is \(2, 3\), the base.s \(3, 2\)"):
        adapters.load(tmp_path, base)
