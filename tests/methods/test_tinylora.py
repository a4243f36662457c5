"""TinyLoRA: the dense formula, its groups, members beside each other, and PEFT's own."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from small import noisy, three_layers
from support import require

import lorax
from lorax import methods, tree
from lorax.methods.tinylora import SHARED, groups_of, tinylora


def test_the_update_is_the_dense_formula():
    base = three_layers()
    method = tinylora(rank=3, numbers=5, tying=0.5, targets=("q", "down"), layers=(0, 2))
    state = method.init(jax.random.key(0), base.params, base.sites)
    assert method.count(base.params, base.sites) == 2 * 5 == tree.count(state.trainable)
    assert not np.any(state.trainable[SHARED]["v"])
    v = np.asarray(noisy(state.trainable)[SHARED]["v"])
    state = state._replace(trainable={SHARED: {"v": jnp.asarray(v)}})
    flat, constants = tree.flatten(base.params), methods.joined(state.constants)
    for path, dw in method.delta(*state, base.params, base.sites).items():
        assert not np.any(dw[1])
        for group, layer in enumerate((0, 2)):  # the two matrices of a layer share
            x = {name: np.asarray(array[layer]) for name, array in constants[path].items()}
            assert x["group"] == group
            w = np.asarray(flat[path][layer])
            u, sigma, zt = np.linalg.svd(w, full_matrices=False)
            best = (u[:, :3] * sigma[:3]) @ zt[:3]
            np.testing.assert_allclose(x["a"] @ x["b"], best, rtol=0, atol=1e-5)
            np.testing.assert_allclose(x["a"].T @ x["a"], np.diag(sigma[:3]), rtol=0, atol=1e-5)
            middle = np.einsum("u,uij->ij", v[group], x["p"])
            np.testing.assert_allclose(dw[layer], x["a"] @ middle @ x["b"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tying", "groups"),
    [
        (0.0, [0, 1, 2, 3, 4, 5, 6]),
        (0.3, [0, 1, 2, 3, 4, 4, 4]),  # 5 groups of one, and the last takes the rest
        (0.6, [0, 0, 1, 1, 2, 2, 2]),
        (1.0, [0] * 7),
    ],
)
def test_groups_are_in_order_of_the_layers(tying, groups):
    """h has q and v of three layers, one of which is not adapted for v; head is behind."""
    q, v, head = np.ones(3, bool), np.array([True, False, True]), np.array(True)
    adapted = {"h/q": (None, q), "h/v": (None, v), "9/head": (None, head), "9/last": (None, head)}
    found, n = groups_of(adapted, tying)
    named = [found["h/q"][0], found["h/v"][0], found["h/q"][1], found["h/q"][2], found["h/v"][2]]
    assert [*named, found["9/head"], found["9/last"]] == groups and found["h/v"][1] == -1
    assert n == max(groups) + 1


def test_p_is_the_same_for_every_seed_and_v_is_of_all_members_matrices():
    base = three_layers()
    init = lambda key, **hp: tinylora(**hp).init(jax.random.key(key), base.params, base.sites)
    p = lambda state: state.constants["h"]["attn"]["q"]["kernel"]["p"]
    np.testing.assert_array_equal(p(init(0)), p(init(1)))
    assert not np.any(p(init(0)) == p(init(0, projection_seed=1)))
    assert abs(np.std(p(init(0))) - 2**-0.5) < 0.05
    union = methods.resolve(("q", "v", "down"), base.sites)
    method = tinylora(tying=1.0, targets=("q",))
    padded = method.init(jax.random.key(0), base.params, base.sites, targets=union, pad=80)
    assert padded.trainable[SHARED]["v"].shape == (9, 80)
    assert not np.any(p(padded)[:, 64:])


@pytest.mark.parametrize(
    ("hp", "message"),
    [
        (dict(rank=0), "method.rank: 0 given, must be at least 1"),
        (dict(numbers=0), "method.numbers: 0 given, must be at least 1"),
        (dict(tying=1.5), "method.tying: 1.5 given, must be from 0 to 1"),
    ],
)
def test_a_wrong_hyperparameter_is_one_clear_error(hp, message):
    with pytest.raises(ValueError, match=message):
        tinylora(**hp)


@pytest.mark.filterwarnings("ignore")
def test_computes_learns_and_ties_as_peft(tmp_path):
    peft = require("peft")
    base, model = parity.pair("llama", tmp_path)
    config = dict(r=2, u=5, weight_tying=0.3, target_modules=parity.PROJECTIONS)
    model = peft.get_peft_model(model, peft.TinyLoraConfig(**config))
    parity.disturb(model)
    method = lorax.method("tinylora", numbers=5, tying=0.3, targets=parity.WORDS)
    state = method.init(jax.random.key(0), base.params, base.sites)
    modules = dict(model.named_modules())

    def read(module):
        own = {name: getattr(modules[module], f"tinylora_{name.upper()}") for name in "abp"}
        own = {name: x["default"].detach().numpy().swapaxes(-1, -2) for name, x in own.items()}
        return own | {"group": int(modules[module]._tinylora_v_key["default"])}

    found = parity.stacked(read)
    for path, constants in methods.joined(state.constants).items():
        np.testing.assert_array_equal(constants["group"], found[f"{path}/group"])
    v = model.base_model.tinylora_v["default"]
    found[f"{SHARED}/v"] = np.stack([v[str(i)].detach().numpy() for i in range(len(v))])
    start = parity.logits(base, method, state)
    state = parity.filled(state, found)
    assert np.abs(parity.logits(base, method, state) - start).max() > 1e-3
    parity.assert_same(base, method, state, model)
