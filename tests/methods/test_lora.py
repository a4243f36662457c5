"""Methods: a base unchanged at the start, what is drawn, what is counted, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quick import jit

import lorax
from lorax import methods, ops, tree
from lorax.methods import GROUPS, WORDS
from lorax.models import gpt2

#: method -> hyperparameters that each get the tests of the contract
VARIANTS = {
    "lora": [{}, {"init": "gaussian", "scaling": "rslora"}],
}
#: All but those of a mixture of experts, which are tested on one (models/test_experts).
TARGETS = [word for word in (*WORDS, *GROUPS) if "expert" not in word and word != "router"]
TARGETS += ["all-linear", "re:.*/(q|wte)/.*|.*lm_head.*"]


class Words(nn.Module):
    """A module with every canonical word, each a layer of its own."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(12, 8, name="wte")(tokens)
        for word in ("q", "k", "v", "o", "up", "gate", "down"):
            x = nn.tanh(nn.Dense(8, name=word)(x))
        return nn.Dense(12, use_bias=False, name="lm_head")(x)


def shapes_of(module, *inputs):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def gpt2_shapes(**config):
    return shapes_of(gpt2.GPT2(gpt2.Config(**config)), jnp.zeros((1, 1), jnp.int32))


STACKED = gpt2_shapes(vocab_size=20, n_positions=4, n_embd=8, n_layer=3, n_head=2)
WIDE = gpt2_shapes(vocab_size=20, n_positions=4, n_embd=400, n_layer=1, n_head=2)
TOKENS = jnp.arange(12).reshape(2, 6)


@functools.cache
def words_params():
    return jit(Words().init)(jax.random.key(1), TOKENS)["params"]


def factors(state) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{path: (a, b)}"""
    flat = tree.flatten(state.trainable)
    paths = [path.removesuffix("/a") for path in flat if path.endswith("/a")]
    return {path: (np.asarray(flat[f"{path}/a"]), np.asarray(flat[f"{path}/b"])) for path in paths}


# ---------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(("name", "hp"), [(name, hp) for name in VARIANTS for hp in VARIANTS[name]])
def test_an_adapted_model_starts_as_its_base(name, hp, targets):
    method, params = lorax.method(name, rank=2, targets=targets, **hp), words_params()
    state = method.init(jax.random.key(0), params)
    bound = method.bind(*state, params)
    operators = [leaf for leaf in tree.flatten(bound).values() if ops.is_operator(leaf)]
    assert len(operators) == len(methods.resolve((targets,), ops.sites_from_shapes(params)))
    base = Words().apply({"params": params}, TOKENS)
    np.testing.assert_array_equal(lorax.apply(Words(), bound, TOKENS), base)
    merged = lorax.merge(method, state, params)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for path, leaf in tree.flatten(merged).items():
        np.testing.assert_array_equal(leaf, tree.flatten(params)[path], err_msg=path)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_training_can_move_is_what_count_says(name):
    """Entries of a, and entries of b with a gradient: neither padding nor other targets."""
    method, params = lorax.method(name, rank=2, targets=("q", "up")), words_params()
    union = methods.resolve(("all-linear",), ops.sites_from_shapes(params))
    trainable, constants = method.init(jax.random.key(0), params, None, union, pad=5)

    @jit
    @jax.grad
    def gradient(trainable):
        out = lorax.apply(Words(), method.bind(trainable, constants, params), TOKENS)
        return jnp.sum(jnp.sin(out))

    grads = factors(methods.State(gradient(trainable), constants))
    start = factors(methods.State(trainable, constants))
    moving = sum(np.count_nonzero(start[p][0]) + np.count_nonzero(grads[p][1]) for p in start)
    assert moving == method.count(params) == 2 * 2 * (8 + 8)
    assert all(np.count_nonzero(da) == 0 for da, _ in grads.values())


# ------------------------------------------------------------------------------------------- count


@pytest.mark.parametrize(
    ("hp", "expected"),
    [
        (dict(rank=1, targets=("q",)), 3 * (8 + 8)),
        (dict(rank=4, targets=("q", "v")), 3 * 4 * 2 * (8 + 8)),
        (dict(rank=2, targets=("mlp",)), 3 * 2 * 2 * (8 + 32)),
        (dict(rank=2, targets=("all-linear",)), 3 * 2 * (4 * 16 + 2 * 40)),
        (dict(rank=2, targets=("embed",)), 2 * (20 + 8)),
        (dict(rank=2, targets=("q", "embed"), layers=(1,)), 2 * 16),
        (dict(rank=2, targets=("q",), layers=(0, -1)), 2 * 2 * 16),
        (dict(rank=2, targets=("q",), layers=(-1, 2)), 2 * 16),
    ],
)
def test_count_is_the_formula_and_the_size_of_the_tree(hp, expected):
    method = lorax.method("lora", **hp)
    assert method.count(STACKED) == expected
    if "layers" not in hp:
        assert tree.count(method.init(jax.random.key(0), STACKED).trainable) == expected


@pytest.mark.parametrize(
    ("width", "layers", "heads", "expected"), [(1024, 24, 16, 393_216), (1280, 36, 20, 737_280)]
)
def test_count_of_the_papers_gpt2(width, layers, heads, expected):
    """Rank 4 on q and v, as the released checkpoints (the paper's table 3 prints 0.35M, 0.77M)."""
    shapes = gpt2_shapes(n_embd=width, n_layer=layers, n_head=heads)
    assert lorax.method("lora", rank=4).count(shapes) == expected


# ----------------------------------------------------------------------------------------- factors


def test_kaiming_is_uniform_within_one_over_root_in():
    a, b = factors(lorax.method("lora", rank=50).init(jax.random.key(0), WIDE))["h/attn/q/kernel"]
    bound = 1 / np.sqrt(400)
    assert a.shape == (1, 400, 50) and 0.999 * bound < np.abs(a).max() <= bound
    # 20000 draws: five standard deviations of the mean and of the standard deviation.
    assert abs(a.mean()) < 5 * bound / np.sqrt(3 * a.size)
    np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=5 * np.sqrt(0.2 / a.size))
    assert not b.any()


def test_gaussian_has_standard_deviation_one_over_rank():
    method = lorax.method("lora", rank=50, init="gaussian")
    a, b = factors(method.init(jax.random.key(0), WIDE))["h/attn/q/kernel"]
    np.testing.assert_allclose(a.std(), 1 / 50, rtol=5 / np.sqrt(2 * a.size))
    assert np.abs(a).max() > 3 / 50 and not b.any()


def test_an_embedding_starts_with_zero_rows():
    """As in loralib and PEFT, it is a that starts at zero."""
    a, b = factors(lorax.method("lora", rank=2, targets="embed").init(jax.random.key(0), STACKED))[
        "wte/embedding"
    ]
    assert a.shape == (20, 2) and b.shape == (2, 8)
    assert not a.any() and np.all(b != 0)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_no_two_starts_share_a_number(init):
    """Layers, targets, ranks and seeds: subspaces must start no closer than chance."""
    drawn = []
    for rank in (1, 2, 4):
        for seed in (0, 1):
            method = lorax.method("lora", rank=rank, init=init, targets=("q", "k"))
            state = method.init(jax.random.key(seed), STACKED)
            width = rank if init == "gaussian" else 1  # its standard deviation is 1 / r
            drawn.extend(width * a.ravel() for a, _ in factors(state).values())
    drawn = np.concatenate(drawn)
    assert len(np.unique(drawn)) == len(drawn) == (1 + 2 + 4) * 2 * 2 * 3 * 8


@pytest.mark.parametrize("targets", [("q", "v"), ("embed",)])
def test_a_member_starts_the_same_whatever_it_is_padded_to_and_stacked_with(targets):
    method = lorax.method("lora", rank=2, targets=targets)
    alone = factors(method.init(jax.random.key(3), STACKED))
    union = methods.resolve(("all-linear", "embed"), ops.sites_from_shapes(STACKED))
    state = method.init(jax.random.key(3), STACKED, None, union, pad=5)
    together = factors(state)
    assert set(together) == set(union)
    for path, (a, b) in together.items():
        if path in alone:
            np.testing.assert_array_equal(a[..., :2], alone[path][0])
            np.testing.assert_array_equal(b[..., :2, :], alone[path][1])
            a, b = a[..., 2:], b[..., 2:, :]
        assert a.shape[-1] == b.shape[-2] and not a.any() and not b.any()
    assert set(tree.flatten(state.constants)) == {
        f"{p}/{n}" for p in union for n in ("s", "dropout")
    }


def test_layers_that_are_left_out_are_exactly_zero():
    some = lorax.method("lora", rank=2, layers=(0, -1)).init(jax.random.key(0), STACKED)
    every = lorax.method("lora", rank=2).init(jax.random.key(0), STACKED)
    for path, (a, b) in factors(some).items():
        np.testing.assert_array_equal(a[[0, 2]], factors(every)[path][0][[0, 2]])
        assert not a[1].any() and not b.any()


# --------------------------------------------------------------------------------- scale and delta


@pytest.mark.parametrize(
    ("hp", "scale"),
    [
        (dict(rank=4, alpha=8), 2.0),
        (dict(rank=8, alpha=8), 1.0),
        (dict(rank=4, alpha=8, scaling="rslora"), 4.0),
        (dict(rank=2, alpha=3, scaling="rslora"), 3 / np.sqrt(2)),
        (dict(rank=4, alpha=0.5, scaling="fixed"), 0.5),
    ],
)
def test_scale(hp, scale):
    method = lorax.method("lora", **hp)
    constants = method.init(jax.random.key(0), STACKED).constants
    assert method.hp["scale"] == pytest.approx(scale, rel=1e-12)
    for path, leaf in tree.flatten(constants).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, np.full(3, scale if path.endswith("/s") else 0), rtol=1e-6)


def test_delta_is_s_a_b_and_merge_adds_it_in_float32():
    method = lorax.method("lora", rank=2, alpha=3, targets=("q", "embed"))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), words_params())
    state = method.init(jax.random.key(0), params)
    rng = np.random.default_rng(0)
    noise = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    state = state._replace(trainable=jax.tree.map(noise, state.trainable))
    deltas, merged = method.delta(*state, params), tree.flatten(lorax.merge(method, state, params))
    assert set(deltas) == {"q/kernel", "wte/embedding"}
    for path, weight in tree.flatten(params).items():
        expected = np.asarray(weight)
        if path in deltas:
            a, b = factors(state)[path]
            assert deltas[path].dtype == jnp.float32
            np.testing.assert_allclose(deltas[path], 1.5 * a @ b, rtol=1e-6, atol=1e-6)
            expected = (expected.astype(np.float32) + deltas[path]).astype(jnp.bfloat16)
        assert merged[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.float32(merged[path]), np.float32(expected))


def test_dropout_is_bound_where_a_key_is_given():
    method = lorax.method("lora", rank=2, dropout=0.25)
    state = method.init(jax.random.key(0), STACKED)
    leaf = lambda key: tree.flatten(method.bind(*state, STACKED, key))["h/attn/q/kernel"]
    assert leaf(None).dropout is None
    how = leaf(jax.random.key(0)).dropout
    assert how.key.shape == (3,)
    np.testing.assert_array_equal(how.rate, np.full(3, 0.25, np.float32))


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("name", "hp", "message"),
    [
        ("lorra", {}, r"method.name: 'lorra' is not one of lora.*did you mean 'lora'"),
        ("lora", dict(rnak=1), r"method.rnak: lora has no such .*rank.*did you mean 'rank'"),
        ("lora", dict(rank=0), "method.rank: 0 given, must be at least 1"),
        ("lora", dict(dropout=1.0), r"method.dropout: 1.0 given, must be in \[0, 1\)"),
        ("lora", dict(dropout=-0.1), "method.dropout: -0.1 given"),
        ("lora", dict(dropout=float("nan")), "method.dropout: nan given"),
        (
            "lora",
            dict(scaling="rsLora"),
            "method.scaling: 'rsLora' is not one of lora, rslora, fixed",
        ),
        (
            "lora",
            dict(init="kaimng"),
            "method.init: 'kaimng' is not one of.*did you mean 'kaiming'",
        ),
    ],
)
def test_a_wrong_hyperparameter_is_one_clear_error(name, hp, message):
    with pytest.raises(ValueError, match=message):
        lorax.method(name, **hp)


@pytest.mark.parametrize(
    ("hp", "message"),
    [
        (dict(rank=9), "method.rank: 9 given, but h/attn/q/kernel is 8 x 8: at most 8"),
        (
            dict(rank=9, targets="up"),
            "method.rank: 9 given, but h/mlp/up/kernel is 8 x 32: at most 8",
        ),
        (dict(layers=(3,)), r"method.layers: \[3\] given, the targets have 3 layers"),
        (dict(layers=(0, -4)), r"method.layers: \[-4\] given, the targets have 3 layers"),
        (dict(layers=()), r"method.layers: \(\) given, the targets have 3 layers"),
        (dict(layers=(0,), targets="embed"), "method.layers: .*the targets have 0 layers"),
    ],
)
def test_what_does_not_fit_the_model_is_one_clear_error(hp, message):
    method = lorax.method("lora", **{"rank": 2} | hp)
    for ask in (method.count, lambda shapes: method.init(jax.random.key(0), shapes)):
        with pytest.raises(ValueError, match=message):
            ask(STACKED)


# -------------------------------------------------------------------- parameters trained in full


def test_parameters_trained_in_full_start_at_the_base_and_merge_exactly():
    method = lorax.method("lora", rank=2, targets="q", full=("biases", "re:wpe/.*"))
    params = {
        "h": {"q": {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.full((3, 5), 0.3)}},
        "wpe": {"embedding": jnp.ones((6, 4))},
    }
    state = method.init(jax.random.key(0), params)
    full = {p for p in tree.flatten(state.trainable) if p.endswith("/w")}
    assert full == {"h/q/bias/w", "wpe/embedding/w"}
    assert method.count(params) == 3 * 2 * (4 + 5) + 3 * 5 + 6 * 4
    moved = jax.tree.map(lambda x: x + 0.1, state.trainable)
    bound = tree.flatten(method.bind(moved, state.constants, params))
    merged = tree.flatten(lorax.merge(method, state._replace(trainable=moved), params))
    delta = method.delta(moved, state.constants, params)
    for path in ("h/q/bias", "wpe/embedding"):
        np.testing.assert_array_equal(merged[path], tree.flatten(moved)[f"{path}/w"])
        np.testing.assert_array_equal(bound[path], merged[path])
        np.testing.assert_allclose(delta[path], 0.1, rtol=1e-6)


def test_a_word_of_full_that_matches_nothing_or_a_target_is_an_error():
    params = {"q": {"kernel": jnp.ones((4, 5))}}
    with pytest.raises(ValueError, match="method.full: 'classifier' matches nothing; there is q/k"):
        lorax.method("lora", rank=2, targets="q", full="classifier").init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="q/kernel are in method.targets as well"):
        lorax.method("lora", rank=2, targets="q", full="q").init(jax.random.key(0), params)


def test_the_dtype_of_what_is_trained():
    params = {"q": {"kernel": jnp.ones((4, 5))}}
    state = lorax.method("lora", rank=2, targets="q", dtype="bfloat16").init(
        jax.random.key(0), params
    )
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("bfloat16")}
    with pytest.raises(ValueError, match="method.dtype: 'int8' is not one of float32, bfloat16"):
        lorax.method("lora", dtype="int8")
