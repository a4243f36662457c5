"""MiSS: the dense formula, members beside each other, and PEFT's own."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from small import noisy, three_layers
from support import few, require

import lorax
from lorax import leaves, methods
from lorax.methods.miss import miss


@pytest.mark.parametrize("mini_rank", [None, 4])
def test_the_update_is_the_dense_formula(mini_rank):
    """Ranks that do not divide the inputs, 8 and 12."""
    base = three_layers()
    method = miss(rank=5, mini_rank=mini_rank, targets=("q", "down"), layers=(0, 2))
    state = method.init(jax.random.key(0), base.params, base.sites)
    assert method.count(base.params, base.sites) == 2 * 5 * (2 * mini_rank if mini_rank else 8 + 8)
    state = state._replace(trainable=noisy(state.trainable))
    deltas = method.delta(*state, base.params, base.sites)
    assert len(deltas) == 2
    for path, dw in deltas.items():
        (layers, n_in, n_out), d = dw.shape, np.asarray(methods.joined(state.trainable)[path]["d"])
        dense = np.zeros((layers, n_in, n_out))
        for layer in (0, 2):
            for i in range(n_in):
                for o in range(n_out):
                    dense[layer, i, o] = d[layer, i % 5, o % (mini_rank or n_out)]
        np.testing.assert_array_equal(dw, dense.astype(np.float32))


def test_dropout_is_of_the_inputs():
    """With the same mask as a LoRA's, and none of what the layer itself reads."""
    x, w = jax.random.normal(jax.random.key(2), (3, 9)), jnp.ones((9, 4))
    params = {"q": {"kernel": w}}
    method = miss(rank=4, targets=("q",), dropout=0.5)
    trainable, constants = method.init(jax.random.key(0), params)
    trainable = noisy(trainable)
    leaf = method.bind(trainable, constants, params, jax.random.key(1))["q"]["kernel"]
    seen = leaf.linear(x) - x @ w
    kept = leaves.dropout(x, leaf.dropout)
    groups = np.pad(kept, ((0, 0), (0, 3))).reshape(3, 3, 4).sum(1)
    np.testing.assert_allclose(seen, groups @ trainable["q"]["kernel"]["d"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("hp", "message"),
    [
        (dict(rank=0), "method.rank: 0 given, must be at least 1"),
        (dict(rank=9), "method.rank: 9 given, but h/attn/q/kernel has 8 inputs: at most that"),
        (dict(rank=2, mini_rank=0), "method.mini_rank: 0 given, must be at least 1"),
        (dict(rank=2, mini_rank=3), "method.mini_rank: 3 given, but .* has 8 outputs: must be a d"),
    ],
)
def test_a_wrong_hyperparameter_is_one_clear_error(hp, message):
    base = three_layers()
    with pytest.raises(ValueError, match=message):
        miss(**hp, targets=("q", "down")).count(base.params, base.sites)


@pytest.mark.parametrize("mini", few([False, True], [False]))
def test_computes_and_learns_as_peft(mini, tmp_path):
    peft = require("peft")
    base, model = parity.pair("llama", tmp_path)
    options = dict(r=6, target_modules=parity.PROJECTIONS)
    options |= dict(init_weights="mini", mini_r=4) if mini else {}
    model = peft.get_peft_model(model, peft.MissConfig(**options))
    method = lorax.method("miss", rank=6, mini_rank=4 if mini else None, targets=parity.WORDS)
    state = method.init(jax.random.key(0), base.params, base.sites)
    parity.disturb(model)
    theirs = parity.arrays(model)
    found = parity.stacked(lambda module: {"d": theirs[f"{module}.miss_block.default"]})
    parity.assert_same(base, method, parity.filled(state, found), model)
