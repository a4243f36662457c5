"""HiRA and SHiRA, updates of high rank: their dense formulas, their leaves, and PEFT's own."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import linen as nn
from small import noisy, three_layers
from support import require

import lorax
from lorax import leaves, methods, ops, quant, tree
from lorax.methods.hira import hira
from lorax.methods.shira import shira


def moved(method, base):
    state = method.init(jax.random.key(0), base.params, base.sites)
    return state._replace(trainable=noisy(state.trainable))


def test_hiras_update_is_the_dense_formula_and_of_high_rank():
    base = three_layers()
    method = hira(rank=2, targets=("q", "down"))
    state = moved(method, base)
    assert method.count(base.params, base.sites) == 3 * 2 * (8 + 8 + 12 + 8)
    flat, arrays = tree.flatten(base.params), methods.joined(state.trainable)
    for path, dw in method.delta(*state, base.params, base.sites).items():
        dense = np.asarray(flat[path]) * np.asarray(arrays[path]["a"] @ arrays[path]["b"])
        np.testing.assert_allclose(dw, dense, rtol=1e-5, atol=1e-7)
        assert np.linalg.matrix_rank(np.asarray(dw[1], np.float64), 1e-5) == 8


@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_shiras_update_has_its_values_at_its_places(mask):
    base = three_layers()
    method = shira(rank=2, mask=mask, targets=("q", "down"), layers=(0, 2))
    state = moved(method, base)
    assert method.count(base.params, base.sites) == 2 * 2 * (8 + 8 + 12 + 8)
    flat, trained = tree.flatten(base.params), methods.joined(state.trainable)
    for path, dw in method.delta(*state, base.params, base.sites).items():
        places = np.asarray(methods.joined(state.constants)[path]["places"])
        assert not np.any(places[1]) and not np.any(dw[1])
        for layer in (0, 2):
            own, values = places[layer] - 1, np.asarray(trained[path]["values"][layer])
            assert len(np.unique(own)) == len(own) == 2 * sum(dw.shape[1:])
            dense = np.zeros(dw[layer].size)
            dense[own] = values
            np.testing.assert_array_equal(dw[layer], dense.reshape(dw[layer].shape))
            if mask == "magnitude":
                w = np.abs(np.asarray(flat[path][layer])).ravel()
                assert w[own].min() >= np.delete(w, own).max()
    other = method.init(jax.random.key(1), base.params, base.sites)
    other = jax.tree.leaves(other.constants)
    alike = [np.array_equal(*x) for x in zip(other, jax.tree.leaves(state.constants), strict=True)]
    assert all(alike) == (mask == "magnitude")


@pytest.mark.parametrize("name", ["hira", "shira"])
def test_an_embedding_that_is_the_head_and_a_quantised_base(name):
    base = three_layers()
    tokens = jnp.arange(6)[None] % 5
    method = lorax.method(name, rank=2, targets=("embed", "up"))
    for params in (base.params, quant.quantize(base.params, "nf4", sites=base.sites)):
        state = method.init(jax.random.key(0), params, base.sites)
        state = state._replace(trainable=noisy(state.trainable, 0.3))
        bound = lorax.apply(base.module, method.bind(*state, params), tokens)
        merged = lorax.apply(base.module, lorax.merge(method, state, params, base.sites), tokens)
        np.testing.assert_allclose(bound, merged, rtol=0, atol=2e-5)
        assert np.abs(bound - lorax.apply(base.module, params, tokens)).max() > 0.01


@pytest.mark.parametrize("name", ["hira", "shira"])
def test_a_convolution(name):
    layer, x = nn.Conv(6, (3, 3)), jax.random.normal(jax.random.key(0), (2, 7, 7, 4))
    params = layer.init(jax.random.key(1), x)["params"]
    sites = lorax.sites(layer, params, x)
    method = lorax.method(name, rank=2, targets=("re:kernel",))
    state = method.init(jax.random.key(0), params, sites)
    state = state._replace(trainable=noisy(state.trainable))
    bound = lorax.apply(layer, method.bind(*state, params), x)
    merged = layer.apply({"params": lorax.merge(method, state, params, sites)}, x)
    np.testing.assert_allclose(bound, merged, rtol=0, atol=1e-5)
    assert np.abs(bound - layer.apply({"params": params}, x)).max() > 1e-2


def test_in_bfloat16_a_small_update_is_not_rounded_away():
    w, x = jnp.ones((64, 8)), jnp.full((1, 64), 1.0, jnp.bfloat16)
    params = {"q": {"kernel": w}}
    method = shira(rank=1, targets=("q",))
    trainable, constants = method.init(jax.random.key(0), params)
    small = jax.tree.map(lambda v: jnp.full_like(v, 1e-3), trainable)  # 1 + 0.001 is 1 there
    leaf = method.bind(small, constants, params)["q"]["kernel"]
    wanted = np.asarray(method.delta(small, constants, params)["q/kernel"]).sum(0)
    got = np.asarray(leaf.linear(x) - ops.linear(x, w), np.float32)[0]
    assert wanted.max() > 1e-3 and got.shape == wanted.shape
    update = leaf.update(jnp.zeros_like(w, jnp.bfloat16)).astype(jnp.float32).sum(0)
    np.testing.assert_allclose(update, wanted, rtol=0.01)


def test_hiras_dropout_is_on_the_updates_input():
    w, x = jax.random.normal(jax.random.key(3), (9, 4)), jnp.ones((3, 9))
    params = {"q": {"kernel": w}}
    trainable, constants = hira(2, targets=("q",), dropout=0.5).init(jax.random.key(0), params)
    trainable = noisy(trainable)
    method = hira(2, targets=("q",), dropout=0.5)
    leaf = method.bind(trainable, constants, params, jax.random.key(1))["q"]["kernel"]
    dw = method.delta(trainable, constants, params)["q/kernel"]
    want = x @ w + leaves.dropout(x, leaf.dropout) @ dw
    np.testing.assert_allclose(leaf.linear(x), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: hira(rank=9), "method.rank: 9 given, but h/attn/q/kernel is 8 x 8: at most 8"),
        (lambda: shira(rank=5), "method.rank: 5 given, but h/attn/q/kernel is 8 x 8: at most 4"),
        (lambda: shira(mask="randon"), "method.mask: 'randon' is not one of .*did you mean 'rand"),
        (lambda: hira(dropout=1.0), r"method.dropout: 1.0 given, must be in \[0, 1\)"),
    ],
)
def test_a_wrong_hyperparameter_is_one_clear_error(method, message):
    base = three_layers()
    with pytest.raises(ValueError, match=message):
        method().count(base.params, base.sites)


@pytest.mark.filterwarnings("ignore")  # what PEFT warns about is not ours
@pytest.mark.parametrize("name", ["hira", "shira"])
def test_computes_and_learns_as_peft(name, tmp_path):
    peft = require("peft")
    base, model = parity.pair("llama", tmp_path)
    config = {"hira": peft.HiraConfig, "shira": peft.ShiraConfig}[name]
    model = peft.get_peft_model(model, config(r=3, target_modules=parity.PROJECTIONS))
    parity.disturb(model)
    theirs, modules = parity.arrays(model), dict(model.named_modules())

    def read(module):
        array = lambda key: theirs[f"{module}.{key}.default"]
        if name == "hira":
            return {"a": array("hira_A").T, "b": array("hira_B").T}
        outputs, inputs = modules[module].shira_indices["default"].numpy()
        places = 1 + inputs * modules[module].out_features + outputs
        return {"values": array("shira_weight"), "places": places}

    method = lorax.method(name, rank=3, targets=parity.WORDS)
    state = method.init(jax.random.key(0), base.params, base.sites)
    parity.assert_same(base, method, parity.filled(state, parity.stacked(read)), model)
