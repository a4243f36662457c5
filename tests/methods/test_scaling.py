"""(IA)3: PEFT's formulas, a base unchanged at the start and where a member adapts nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import small
from flax import linen as nn
from quick import jit
from small import swept, three_layers
from support import few, require

import lorax
from lorax import intercept, leaves, methods, ops, tree
from lorax.methods.scaling import ia3

TOKENS = np.random.default_rng(1).integers(0, 20, (2, 6), np.int32)
HP = [{}, dict(targets=("mlp", "o"), layers=(0, -1)), dict(targets=("q", "embed"), feedforward=())]


class Words(nn.Module):
    """Two layers, heads in one and a bias in both, that compute in the dtype of their input."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.DenseGeneral((2, 3), name="k")(x))
        return nn.Dense(4, name="down")(x.reshape(*x.shape[:-2], -1))


noisy = functools.partial(small.noisy, scale=0.2, seed=3)


def moved(state):
    """The state with noise on what this member trains: what is zero is padding."""
    noise = noisy(state.trainable)
    return state._replace(
        trainable=jax.tree.map(lambda x, y: jnp.where(x == 0, x, y), state.trainable, noise)
    )


def logits(base, params):
    return np.asarray(jit(functools.partial(lorax.apply, base.module))(params, TOKENS))


# ---------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("hp", HP)
def test_it_starts_as_its_base_and_merges_to_what_is_bound(hp):
    base, method = three_layers(), ia3(**hp)
    state = method.init(jax.random.key(0), base.params, base.sites)
    merged = lorax.merge(method, state, base.params, base.sites)
    jax.tree.map(np.testing.assert_array_equal, merged, base.params)
    plain = logits(base, base.params)
    np.testing.assert_array_equal(
        logits(base, method.bind(*state, base.params, sites=base.sites)), plain
    )

    state = moved(state)
    bound = logits(base, method.bind(*state, base.params, sites=base.sites))
    merged = lorax.merge(method, state, base.params, base.sites)
    assert np.abs(bound - plain).max() > 0.01
    np.testing.assert_allclose(logits(base, merged), bound, rtol=0, atol=1e-5)
    flat, whole = tree.flatten(base.params), tree.flatten(merged)
    delta = method.delta(*state, base.params, base.sites)
    assert {p for p in flat if np.any(whole[p] != flat[p])} == set(delta)
    for path, dw in delta.items():
        assert dw.dtype == jnp.float32
        np.testing.assert_allclose(dw, whole[path] - flat[path], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("hp", "expected"),
    [
        ({}, 3 * (8 + 8 + 12)),
        (dict(targets="down", feedforward=()), 3 * 8),
        (dict(targets=("up", "down"), feedforward="mlp"), 3 * (8 + 12)),
        (dict(layers=(0, -1)), 2 * (8 + 8 + 12)),
        (dict(targets=("k", "embed"), layers=(1,)), 8),
        (dict(targets="embed"), 8),
    ],
)
def test_count_is_the_formula_and_what_starts_at_one(hp, expected):
    base, method = three_layers(), ia3(**hp)
    state = method.init(jax.random.key(0), base.params, base.sites)
    assert method.count(base.params, base.sites) == expected
    vectors = [np.asarray(x) for x in jax.tree.leaves(state.trainable)]
    assert sum(int(x.sum()) for x in vectors) == expected
    assert sum(np.count_nonzero(x) for x in vectors) == expected


def test_the_gradient_is_that_of_finite_differences():
    x = np.random.default_rng(2).normal(size=(5, 4))
    with jax.enable_x64(True):
        params = jit(Words().init)(jax.random.key(0), jnp.asarray(x, jnp.float32))["params"]
        params = jax.tree.map(lambda x: x.astype(jnp.float64), noisy(params))
        sites = intercept.sites(Words(), params, x)
        method = ia3(("k", "down"))
        trainable, constants = method.init(jax.random.key(0), params, sites)
        start = jax.tree.map(lambda x: x.astype(jnp.float64), noisy(trainable))

        @jax.jit
        def loss(trainable):
            bound = method.bind(trainable, constants, params, sites=sites)
            return jnp.sum(jnp.sin(lorax.apply(Words(), bound, x)))

        grads = tree.flatten(jax.jit(jax.grad(loss))(start))
        assert grads.keys() == {"k/kernel/l", "down/kernel/l_in"}
        for path, grad in grads.items():
            for i in (0, len(grad) - 1):
                flat = tree.flatten(start)
                at = lambda h, i=i, path=path, flat=flat: loss(
                    tree.unflatten(flat | {path: flat[path].at[i].add(h)})
                )
                np.testing.assert_allclose((at(1e-5) - at(-1e-5)) / 2e-5, grad[i], rtol=1e-7)
        # A kernel with head axes and its bias: merging is the reference.
        merged = lorax.merge(method, methods.State(start, constants), params, sites)
        bound = method.bind(start, constants, params, sites=sites)
        both = [lorax.apply(Words(), p, jnp.asarray(x)) for p in (merged, bound)]
        np.testing.assert_allclose(*both, rtol=0, atol=1e-6)  # dense leaves are float32


def test_a_vector_near_one_is_felt_in_bfloat16():
    """bfloat16 has no number between 1 and 1.0078."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.bfloat16)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(8, 16)), jnp.bfloat16)
    for leaf in (leaves.Scaled(w, jnp.full(16, 1.003)), leaves.ScaledInput(w, jnp.full(8, 1.003))):
        y = ops.linear(x, leaf)
        assert y.dtype == jnp.bfloat16
        ratio = np.float32(y).ravel() @ np.float32(x @ w).ravel() / np.sum(np.float32(x @ w) ** 2)
        assert abs(ratio - 1.003) < 0.001


# ------------------------------------------------------------------------------------------- sweep


@pytest.mark.slow
def test_a_member_learns_the_same_alone_and_in_a_sweep():
    built = [ia3(), ia3(targets=("q", "down"), layers=(0, 2))]
    state, losses = swept(built, three_layers())
    assert np.all(losses[:, 0] == losses[0, 0]) and np.all(np.diff(losses[0]) != 0)
    together = tree.flatten(state.trainable)
    assert len(together) == 4
    for i, method in enumerate(built):
        alone, loss = swept([method], three_layers())
        np.testing.assert_allclose(losses[i], loss[0], rtol=1e-6)
        own = tree.flatten(alone.trainable)
        for path, leaf in together.items():
            expected = own[path][0] if path in own else np.zeros_like(leaf[i])
            np.testing.assert_allclose(leaf[i], expected, rtol=0, atol=1e-6)
            if path in own and method.hp["layers"] is not None:
                out = [k for k in range(3) if k not in method.hp["layers"]]
                assert not np.any(leaf[i][np.array(out)]) and np.all(np.delete(leaf[i], out, 0))


def test_a_trained_bias_is_scaled_as_well():
    base = three_layers()
    method = methods.full.beside(ia3(), ("biases",), "float32")
    state = method.init(jax.random.key(0), base.params, base.sites)
    state = state._replace(trainable=noisy(state.trainable))
    bound = method.bind(*state, base.params, sites=base.sites)
    scale, w = (tree.flatten(state.trainable)[f"h/attn/k/{n}"] for n in ("kernel/l", "bias/w"))
    np.testing.assert_allclose(bound["h"]["attn"]["k"]["bias"], scale * w, rtol=1e-6)
    merged = lorax.merge(method, state, base.params, base.sites)
    np.testing.assert_allclose(logits(base, merged), logits(base, bound), rtol=0, atol=1e-5)
    whole, flat = tree.flatten(merged), tree.flatten(base.params)
    for path, dw in method.delta(*state, base.params, base.sites).items():
        np.testing.assert_allclose(dw, whole[path] - flat[path], rtol=0, atol=1e-6)


def test_the_bias_of_a_model_that_is_one_layer_is_scaled():
    module, x = nn.Dense(5), jnp.ones((2, 4))
    params = jax.tree.map(lambda w: w + 1, module.init(jax.random.key(0), x)["params"])
    sites = intercept.sites(module, params, x)
    method = ia3(targets=("re:kernel",), feedforward=())
    state = method.init(jax.random.key(0), params, sites)
    state.trainable["kernel"]["l"] *= 2
    bound = method.bind(*state, params, sites=sites)
    plain = module.apply({"params": params}, x)
    np.testing.assert_allclose(lorax.apply(module, bound, x), 2 * plain, rtol=1e-6)
    assert {*method.delta(*state, params, sites)} == {"kernel", "bias"}


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("hp", "message"),
    [
        (dict(targets="qq"), "'qq' matches nothing"),
        (dict(feedforward="doun"), "'doun' matches nothing"),
        (dict(targets="embed", feedforward="embed"), "method.feedforward: wte/embedding is no"),
        (dict(layers=(3,)), r"method.layers: \[3\] given, the targets have 3 layers"),
    ],
)
def test_what_does_not_fit_the_model_is_one_clear_error(hp, message):
    base, method = three_layers(), ia3(**hp)
    for ask in (method.count, functools.partial(method.init, jax.random.key(0))):
        with pytest.raises(ValueError, match=message):
            ask(base.params, base.sites)


def test_feedforward_that_nobody_named_counts_for_nothing():
    base = three_layers()
    flat = {path: leaf for path, leaf in tree.flatten(base.params).items() if "down" not in path}
    params = tree.unflatten(flat)
    sites = {path: site for path, site in base.sites.items() if path in flat}
    assert ia3(targets=("q",)).count(params, sites) == 3 * 8
    with pytest.raises(ValueError, match="method.feedforward: 'down' matches nothing"):
        ia3(targets=("q",), feedforward=("down",)).count(params, sites)


def test_an_embedding_has_no_scaled_input():
    leaf = leaves.ScaledInput(jnp.ones((5, 2)), jnp.ones(5))
    for ask in (lambda: ops.embed(jnp.arange(2), leaf), lambda: ops.attend(jnp.ones((3, 2)), leaf)):
        with pytest.raises(ValueError, match="an embedding with a ScaledInput leaf"):
            ask()


# ------------------------------------------------------------------------------------------ parity

#: family -> (ours, PEFT's modules, those of the feed-forward)
PEFT = {
    "llama": (("k", "v", "down"), ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (
        ("q", "k", "v", "o", "up", "down"),
        ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        ["mlp.c_proj"],
    ),
}
_HERE = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "c_fc": "up", "down_proj": "down"}


def ours(arrays, family):
    """PEFT's vectors as leaves of our state; the fused c_attn in three."""
    rows = {}
    for name, x in arrays.items():
        layer, block, module = name.split(".")[-5:-2]
        x = x.reshape(-1)
        if module == "c_proj":
            module = "o" if block == "attn" else "down"
        parts = {"c_attn": zip("qkv", np.split(x, 3), strict=True)} if module == "c_attn" else {}
        for word, part in parts.get(module, [(_HERE.get(module, module), x)]):
            block_ = "attn" if word in "qkvo" else "mlp"
            leaf = "l_in" if word == "down" else "l"
            rows.setdefault(f"h/{block_}/{word}/kernel/{leaf}", {})[int(layer)] = part
    return {path: np.stack([x[i] for i in range(len(x))]) for path, x in rows.items()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("family", few(PEFT, ("llama",)))
def test_peft_computes_and_learns_the_same(family, tmp_path):
    peft = require("peft")
    targets, modules, feedforward = PEFT[family]
    base, theirs = parity.pair(family, tmp_path)
    model = peft.get_peft_model(
        theirs,
        peft.IA3Config(
            target_modules=modules, feedforward_modules=feedforward, fan_in_fan_out=family == "gpt2"
        ),
    )
    parity.disturb(model)
    method = ia3(targets)
    state = method.init(jax.random.key(0), base.params, base.sites)
    state = parity.filled(state, ours(parity.arrays(model), family))
    assert all(np.all(x != 1) for x in jax.tree.leaves(state.trainable))
    assert method.count(base.params, base.sites) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    expected = parity.logits_torch(model)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(parity.logits(base, method, state), expected, rtol=0, atol=1e-5)
    losses = parity.train_torch(model)
    assert losses[-1] != losses[0]
    np.testing.assert_allclose(parity.train(base, method, state), losses, rtol=1e-4)
