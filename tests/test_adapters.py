"""Adapters on a base: bound, merged, mixed in one batch, and as what training starts from."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

import lorax
from lorax import adapters, leaves, ops, tree
from lorax.interop.peft import Adapter, Factors
from lorax.methods import lora

WIDTH, VOCABULARY, CONTEXT = 16, 40, 12
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (4, 9), np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """GPT-2 of three layers, tied, its weights large enough to matter."""
    directory = tmp_path_factory.mktemp("base")
    sizes = dict(n_embd=WIDTH, n_head=2, n_layer=3, vocab_size=VOCABULARY, n_positions=CONTEXT)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes))
    base = lorax.load(f"random:{directory}")
    rng = np.random.default_rng(1)
    noise = lambda x: 4 * x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)
    return base.replace(params=jax.tree.map(noise, base.params))


@functools.cache
def factors(n_in, rank, n_out, s, seed=0, m=False):
    rng = np.random.default_rng([seed, n_in, rank, n_out])
    draw = lambda *shape: 0.3 * rng.standard_normal(shape).astype(np.float32)
    return Factors(draw(n_in, rank), draw(rank, n_out), s, 1 + abs(draw(n_out)) if m else None)


def plain(seed=0) -> Adapter:
    """Layers of different rank and scale, some without, matrices of every kind."""
    square = functools.partial(factors, WIDTH, n_out=WIDTH)
    return Adapter(
        {
            "h/0/attn/q": square(2, s=0.5, seed=seed),
            "h/2/attn/q": square(4, s=-2.0, seed=seed),
            "h/1/attn/o": square(1, s=1.5, seed=seed),
            "h/1/mlp/up": factors(WIDTH, 3, 4 * WIDTH, 1.0, seed),
            "wte": factors(VOCABULARY, 2, WIDTH, 0.5, seed),
            "wpe": factors(CONTEXT, 3, WIDTH, 0.5, seed),
        },
        {},
        {},
    )


def dora() -> Adapter:
    """Some layers of a stack with lengths, some without."""
    own = {path: factor for path, factor in plain().factors.items() if path != "h/2/attn/q"}
    own |= {p: f._replace(m=1 + np.arange(f.b.shape[1], dtype=np.float32)) for p, f in own.items()}
    return Adapter(own | {"h/2/attn/q": plain().factors["h/2/attn/q"]}, {}, {})


def whole() -> Adapter:
    """With parameters trained in full, one of them adapted as well."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    shapes = {
        "h/2/attn/k/bias": (WIDTH,),
        "ln_f/scale": (WIDTH,),
        "wpe/embedding": (CONTEXT, WIDTH),
    }
    return plain()._replace(weights={path: draw(*shape) for path, shape in shapes.items()})


KINDS = {"plain": plain, "dora": dora, "whole": whole}


def logits(base, params, tokens=TOKENS):
    return np.asarray(jit(functools.partial(lorax.apply, base.module))(params, tokens))


def exact(base, adapter, path, index=None):
    """A merged matrix by the formulas, in float64."""
    parameter, last = (
        path.replace(f"/{index}/", "/", 1),
        "embedding" if path[0] == "w" else "kernel",
    )
    w = tree.flatten(base.params)[f"{parameter}/{last}"]
    w = adapter.weights.get(f"{path}/{last}", w if index is None else w[index])
    a, b, s, m = adapter.factors[path]
    merged = np.asarray(w, np.float64) + s * (a.astype(np.float64) @ b)
    return merged if m is None else merged * (m / np.linalg.norm(merged, axis=0))


@pytest.mark.parametrize("kind", KINDS)
def test_bound_is_merged_and_unmerged_is_the_base(kind, base):
    adapter = KINDS[kind]()
    before, bound = logits(base, base.params), adapters.bind(base, adapter)
    merged = adapters.merge(base, adapter)
    assert jax.tree.all(jax.tree.map(lambda x: isinstance(x, jax.Array), merged.params))
    flat = tree.flatten(merged.params)
    for path, index in (("h/0/attn/q", 0), ("h/1/mlp/up", 1), ("wte", None), ("wpe", None)):
        stacked = path.replace(f"/{index}/", "/", 1)
        got = flat[f"{stacked}/embedding" if index is None else f"{stacked}/kernel"]
        want = exact(base, adapter, path, index)
        np.testing.assert_array_equal(got if index is None else got[index], want.astype(np.float32))
    assert set(merged.error) == set(adapter.factors)
    assert 0 < max(merged.error.values()) <= 2**-24
    after = logits(base, merged.params)
    assert np.abs(after - before).max() > 0.5
    np.testing.assert_allclose(logits(base, bound), after, rtol=1e-4, atol=1e-4)
    back = adapters.unmerge(merged)
    assert jax.tree.structure(back) == jax.tree.structure(base.params)
    jax.tree.map(np.testing.assert_array_equal, back, base.params)
    assert set(merged.replaced) <= set(flat) and len(merged.replaced) < len(flat)


def test_a_merge_into_bfloat16_rounds_once_and_says_how_much(base):
    half = base.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params))
    merged = adapters.merge(half, dora())
    got = tree.flatten(merged.params)["h/attn/q/kernel"]
    want = exact(half, dora(), "h/0/attn/q", 0)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[0], want.astype(np.float32).astype(jnp.bfloat16))
    error = np.abs(np.float64(got[0]) - want).max() / np.abs(want).max()
    np.testing.assert_allclose(merged.error["h/0/attn/q"], error, rtol=1e-6)
    assert 2**-12 < error <= 2**-9
    jax.tree.map(np.testing.assert_array_equal, adapters.unmerge(merged), half.params)


def test_ranks_are_padded_to_the_largest_of_the_stack(base):
    leaf = tree.flatten(adapters.bind(base, plain()))["h/attn/q/kernel"]
    assert leaf.a.shape == (3, WIDTH, 4) and leaf.b.shape == (3, 4, WIDTH)
    np.testing.assert_array_equal(leaf.s, [0.5, 0, -2])
    assert not np.asarray(leaf.a)[0, :, 2:].any() and not np.asarray(leaf.b)[1].any()


def test_a_batch_of_mixed_adapters_is_separate_runs(base):
    own = [plain(), None, plain(seed=7), Adapter({}, {}, {})]
    rows = [2, 0, 1, 2]
    mixed = logits(base, adapters.mixed(base, own, np.array(rows)))
    alone = {
        i: logits(base, adapters.bind(base, own[i]) if own[i] else base.params) for i in (0, 1, 2)
    }
    assert np.abs(alone[0] - alone[2]).max() > 0.5 and np.abs(alone[0] - alone[1]).max() > 0.5
    for i, row in enumerate(rows):
        np.testing.assert_allclose(mixed[i], alone[row][i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("own", "rows", "words"),
    [
        ([plain(), None], [0, 2], "rows: 0 to 2 given for 2 adapters"),
        ([plain(), None], [-1, 0], "rows: -1 to 0"),
        ([plain(), None], [[0]], "integers are needed"),
        ([plain(), None], [0.5], "integers are needed"),
        ([None, dora()], [0], "adapters.1.: only low-rank"),
        ([whole(), None], [0], "adapters.0.: only low-rank"),
        ([plain()._replace(config={"ensure_weight_tying": False})], [0], "adapters.0.: only low"),
    ],
)
def test_mixed_refuses_what_no_row_can_have_to_itself(own, rows, words, base):
    with pytest.raises(ValueError, match=words):
        adapters.mixed(base, own, np.array(rows))


def test_training_starts_where_the_adapter_is(base):
    state = adapters.state(base, plain())
    ours, lowrank = adapters.bind(base, plain()), lora.bind(*state, base.params)
    assert jax.tree.structure(ours) == jax.tree.structure(lowrank)
    jax.tree.map(np.testing.assert_array_equal, ours, lowrank)
    method = lorax.method("lora")._replace(hp={})  # each layer has a scale of its own
    back = adapters.factored(base, method, state)
    assert set(back.factors) == set(plain().factors)
    for path, want in plain().factors.items():
        for x, y in zip(back.factors[path][:3], want[:3], strict=True):
            np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="h/attn/q/kernel: has DoRA"):
        adapters.state(base, dora())


@pytest.mark.parametrize(
    ("own", "weights", "words"),
    [
        ({"h/3/attn/q": factors(WIDTH, 1, WIDTH, 1.0)}, {}, "h/3/attn/q: .*no such layer; did you"),
        ({"h/0/attn/q": factors(8, 1, WIDTH, 1.0)}, {}, r"a \(8, 1\), b .* do not fit .*16 x 16"),
        ({"wte": factors(WIDTH, 1, WIDTH, 1.0)}, {}, "40 x 16"),
        ({"wpe": factors(12, 1, 16, 1.0)._replace(m=np.ones(3))}, {}, r"m \(3,\) do not fit"),
        ({}, {"h/0/attn/q/bais": np.ones(WIDTH)}, "no such parameter; did you mean 'h/0/attn/q/bi"),
        ({}, {"ln_f/scale": np.ones(3)}, r"ln_f/scale: \(3,\) given, the base's has \(16,\)"),
        ({"lm_head": factors(8, 1, 40, 1.0)}, {}, "wte: a .* do not fit"),
        ({"lm_head": factors(16, 1, 40, 1.0, m=True)}, {}, "lm_head: DoRA"),
        ({}, {"lm_head/kernel": np.ones((3, 40))}, r"lm_head/kernel: \(3, 40\) given"),
    ],
)
def test_what_does_not_fit_is_named(own, weights, words, base):
    with pytest.raises(ValueError, match=words):
        adapters.bind(base, Adapter(own, weights, {}))


APART = {
    "lookup alone": (["wte"], [], {"ensure_weight_tying": False}),
    "head alone": (["lm_head"], [], {}),
    "each its own": (["wte", "lm_head"], [], {}),
    "a head of its own": (["wte"], ["lm_head/kernel"], {"ensure_weight_tying": False}),
}


@pytest.mark.parametrize("name", APART)
def test_a_tied_embedding_can_be_updated_in_one_use_alone(name, base):
    paths, weights, config = APART[name]
    whole = np.random.default_rng(5).standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
    own = {"wte": factors(VOCABULARY, 2, WIDTH, 0.5), "lm_head": factors(WIDTH, 3, VOCABULARY, 0.7)}
    adapter = Adapter({p: own[p] for p in paths}, {p: whole for p in weights}, config)
    leaf = tree.flatten(adapters.bind(base, adapter))["wte/embedding"]
    assert isinstance(leaf, leaves.Untied)
    w = np.asarray(base.params["wte"]["embedding"])
    update = lambda path: own[path].s * own[path].a @ own[path].b if path in paths else 0
    x = jnp.asarray(np.random.default_rng(6).standard_normal((3, WIDTH)), jnp.float32)
    head = (whole.T if weights else w) + np.transpose(update("lm_head"))
    np.testing.assert_allclose(jit(ops.attend)(x, leaf), x @ head.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        jit(ops.embed)(TOKENS, leaf), (w + update("wte"))[TOKENS], rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="wte/embedding: the model's head is its embedding"):
        adapters.merge(base, adapter)


def test_a_merged_weight_is_rounded_once_where_twice_gives_another(base):
    """1 + 2^-8 + 2^-40 lies above the middle of two numbers of bfloat16, and on it in float32."""
    half = jax.tree.map(lambda x: jnp.ones_like(x, jnp.bfloat16), base.params)
    a = np.zeros((WIDTH, 2), np.float32)
    a[0], a[1] = (2**-8, 2**-20), (2**-8, -(2**-20))
    b = np.float32([[1] * WIDTH, [2**-20] * WIDTH])
    adapter = Adapter({"h/0/attn/q": Factors(a, b, 1.0)}, {}, {})
    wide = base.replace(params=jax.tree.map(jnp.ones_like, base.params))
    for own, dtypes in (
        (base.replace(params=half), None),
        (wide, {"h/attn/q/kernel": jnp.bfloat16}),
    ):
        merged = adapters.merge(own, adapter, dtypes).params["h"]["attn"]["q"]["kernel"]
        assert merged.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.float32(merged)[0, :2, 0], [1 + 2**-7, 1])
