"""Random subspaces: P is what the formulas say, its gradient P^T, and it comes of a key alone."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

import lorax
from lorax import config, intercept, methods, tree
from lorax.methods import subspace
from lorax.methods.hadamard import at_least, hadamard, matrix
from lorax.models import gpt2
from lorax.train import step as steps

KEY = jax.random.key(5)
MODULE = gpt2.GPT2(gpt2.Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))
TOKENS = jnp.zeros((1, 4), jnp.int32)


@functools.cache
def base():
    params = jit(MODULE.init)(jax.random.key(0), TOKENS)["params"]
    return params, intercept.sites(MODULE, params, TOKENS)


def projected(projection: str, n: int, d: int, key=KEY):
    """(P z as a compiled function of z, what was drawn)."""
    drawn = jit(lambda: subspace.DRAW[projection](key, n, d))()
    return jit(lambda z: subspace.APPLY[projection](z, drawn, n)), drawn


def columns(projection: str, n: int, d: int, which=None, key=KEY):
    """P[:, which] (n, len(which)); all of P by default."""
    apply, _ = projected(projection, n, d, key)
    which = range(d) if which is None else which
    return np.stack([np.asarray(apply(jnp.zeros(d).at[j].set(1.0))) for j in which], axis=1)


# ---------------------------------------------------------------------------------------- Hadamard


@pytest.mark.parametrize("n", [1, 2, 8, 64, 128, 4096])
def test_the_fast_transform_is_the_matrix(n):
    x = np.random.default_rng(0).standard_normal((3, n)).astype(np.float32)
    want = x.astype(np.float64) @ matrix(n)
    np.testing.assert_allclose(jit(hadamard)(x), want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_the_matrix_is_sylvesters():
    h = np.ones((1, 1))
    for _ in range(3):
        h = np.block([[h, h], [h, -h]])
    np.testing.assert_array_equal(matrix(8), h)
    np.testing.assert_array_equal(matrix(8) @ matrix(8), 8 * np.eye(8))


def test_a_transform_needs_a_power_of_two():
    with pytest.raises(ValueError, match="a transform of 12 values: the number must be a power"):
        hadamard(jnp.zeros(12))
    assert [at_least(n) for n in (1, 2, 3, 4, 5, 1000)] == [1, 2, 4, 4, 8, 1024]


# ------------------------------------------------------------------------------------------------ P


@pytest.mark.parametrize(("n", "d"), [(50, 5), (50, 64), (3 * subspace.BLOCK, 7)])
def test_fastfood_is_the_product_of_its_factors(n, d):
    """H G Pi H B with each factor as the paper defines it, rows and columns cut to (n, d)."""
    apply, drawn = projected("fastfood", n, d)
    drawn = jax.tree.map(np.asarray, drawn)
    rows, block = at_least(max(n, d)), len(drawn["order"])
    pi = np.concatenate(
        [
            start * block + drawn["order"][(np.arange(block) + turn) % block]
            for start, turn in enumerate(drawn["offsets"])
        ]
    )
    assert sorted(pi) == list(range(rows)) and set(drawn["signs"]) <= {-1, 1}
    z = np.random.default_rng(1).standard_normal(d).astype(np.float32)
    padded = np.zeros(rows)
    padded[:d] = z * drawn["signs"]  # B z
    transform = lambda x: np.asarray(hadamard(jnp.asarray(x, jnp.float32)), np.float64)
    v = transform(drawn["g"] * transform(padded)[pi])[:n]
    # The published normalisation, sqrt(L sum g^2) sqrt(D / L).
    want = v / (np.sqrt(rows * np.sum(drawn["g"] ** 2.0)) * np.sqrt(n / rows))
    np.testing.assert_allclose(apply(z), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("projection", "n", "d"),
    [("fastfood", 1_000_000, 700), ("sparse", 1_000_000, 50), ("dense", 50_000, 40)],
)
def test_the_gradient_is_the_transpose_and_columns_are_unit(projection, n, d):
    _, drawn = projected(projection, n, d)
    rng = np.random.default_rng(2)
    z, y = (jnp.asarray(rng.standard_normal(k), jnp.float32) for k in (d, n))

    @jit
    def both(z, y):
        forward, pull = jax.vjp(lambda z: subspace.APPLY[projection](z, drawn, n), z)
        return forward, *pull(y)

    forward, back = (np.asarray(x, np.float64) for x in both(z, y))
    # In float64: summing a million products in float32 would be the larger error.
    one, other = forward @ np.asarray(y, np.float64), np.asarray(z, np.float64) @ back
    assert abs(one - other) < 1e-5 * abs(one) and abs(one) > 0.1
    norms = np.linalg.norm(columns(projection, n, d, (0, 1, d - 1)), axis=0)
    np.testing.assert_allclose(norms, 1, rtol=0, atol=0.01)


@pytest.mark.parametrize("projection", subspace.PROJECTIONS)
def test_columns_are_as_orthogonal_as_chance_has_them(projection):
    """Singular values of a Gaussian P fill 1 +- sqrt(d / D) (Marchenko and Pastur). Fastfood's Gram
    matrix weighs L samples by g^2, whose variance of 2 adds 2 d / L, whatever the permutation."""
    n, d = 20_000, 200
    p = columns(projection, n, d)
    np.testing.assert_allclose(np.linalg.norm(p, axis=0), 1, rtol=0, atol=0.06)
    sigma = np.linalg.svd(p, compute_uv=False)
    edge = np.sqrt(d / n + (2 * d / at_least(n) if projection == "fastfood" else 0))
    assert 1 - 1.3 * edge < sigma.min() < 1 - 0.7 * edge
    assert 1 + 0.7 * edge < sigma.max() < 1 + 1.3 * edge


def test_fastfood_has_no_column_that_is_another_one_moved():
    """Without Pi, column j would be column 0 with its index XORed by j."""
    p = columns("fastfood", 4096, 8)
    moved = np.arange(4096) ^ 5
    assert abs(p[:, 5] @ p[moved, 0]) < 0.1


def test_sparse_is_very_sparse():
    p = columns("sparse", 40_000, 30)
    counts = np.count_nonzero(p, axis=0)
    assert abs(counts.mean() / 200 - 1) < 0.06  # 1 / sqrt(D) of D, 30 columns
    for column, count in zip(p.T, counts, strict=True):
        np.testing.assert_allclose(np.abs(column[column != 0]), count**-0.5, rtol=1e-5)
    assert abs(np.sign(p).sum()) < 6 * counts.sum() ** 0.5


@pytest.mark.parametrize("projection", subspace.PROJECTIONS)
def test_a_smaller_d_has_the_first_columns_of_a_larger_one(projection):
    small, large = (columns(projection, 300, d, range(5)) for d in (5, 100))
    np.testing.assert_allclose(small, large, rtol=0, atol=1e-6)
    other = columns(projection, 300, 5, key=jax.random.key(6))
    assert np.abs(other - small).max() > 0.01


# ------------------------------------------------------------------------------------------ methods


def moved(name, z=1.0, seed=3, **hp):
    """(method, state at a random z, {path: dW})."""
    method = lorax.method(name, **hp)
    params, sites = base()
    state = method.init(jax.random.key(seed), params, sites)
    own = state.trainable["subspace"]
    own["z"] = z * jax.random.normal(jax.random.key(9), own["z"].shape)
    delta = jit(lambda state: method.delta(*state, params, sites))(state)
    return method, state, {path: np.asarray(x) for path, x in delta.items()}


@pytest.mark.parametrize("granularity", subspace.GRANULARITIES)
@pytest.mark.parametrize("projection", subspace.PROJECTIONS)
def test_every_parameter_moves_by_its_share(projection, granularity):
    dim = 300
    _, state, delta = moved("subspace", dim=dim, projection=projection, granularity=granularity)
    sizes = {path: x.size for path, x in delta.items()}
    length = np.linalg.norm(state.trainable["subspace"]["z"])
    total = np.sqrt(sum(np.sum(x**2) for x in delta.values()))
    assert set(delta) == set(tree.flatten(base()[0]))
    assert abs(total / length - 1) < 0.15
    for path in ("wte/embedding", "h/mlp/up/kernel"):
        share = np.sum(delta[path] ** 2) / total**2 * sum(sizes.values()) / sizes[path]
        assert 0.7 < share < 1.3, path
    first, second = delta["h/mlp/up/kernel"].reshape(2, -1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2  # layers do not share a P


def test_only_what_the_words_name_moves():
    _, _, delta = moved("subspace", dim=7, parameters=("q", "norms"))
    norms = [
        f"{norm}/{leaf}" for norm in ("h/ln_1", "h/ln_2", "ln_f") for leaf in ("scale", "bias")
    ]
    assert set(delta) == {"h/attn/q/kernel", *norms}
    _, _, delta = moved("subspace", dim=7, parameters=("q",), layers=(1,))
    assert not delta["h/attn/q/kernel"][0].any() and delta["h/attn/q/kernel"][1].any()


LLAMA = dict(
    model_type="llama", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=20, vocab_size=40, max_position_embeddings=12,
)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mnist-lenet"])
@pytest.mark.parametrize("method", ["subspace", "said"])
def test_other_models_move_as_a_whole(name, method, tmp_path):
    """A stack without biases, and convolutions in no stack."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    loaded = lorax.load(f"random:{tmp_path if name == 'llama' else name}")
    made = lorax.method(method, dim=200)
    state = made.init(jax.random.key(0), loaded.params, loaded.sites)
    own = state.trainable["subspace"]
    own["z"] = jax.random.normal(jax.random.key(1), own["z"].shape)
    bound = jit(lambda: made.bind(*state, loaded.params, None, loaded.sites))()
    moves = jax.tree.map(lambda x, y: float(jnp.linalg.norm(x - y)), bound, loaded.params)
    assert min(jax.tree.leaves(moves)) > 0
    total = np.linalg.norm(jax.tree.leaves(moves))
    np.testing.assert_allclose(total, np.linalg.norm(own["z"]), rtol=0.15)


@pytest.mark.parametrize("scales", subspace.SCALES)
def test_said_scales_its_layers_or_tensors(scales):
    params, sites = base()
    tensors = {
        (path, i): ("h", i) if path.startswith("h/") else (path.split("/")[0], 0)
        for path, x in tree.flatten(params).items()
        for i in range(len(x) if path.startswith("h/") else 1)
    }  # each tensor, with its layer or module
    n = len(set(tensors.values())) if scales == "layer" else len(tensors)
    assert n == (5 if scales == "layer" else 36)

    method, state, delta = moved("said", dim=60, scales=scales)
    own = state.trainable["subspace"]
    assert own["scale"].shape == (n,) and own["z"].shape == (60 - n,)
    assert method.count(params, sites) == 60 == tree.count(state.trainable)
    plain, direct, _ = moved("subspace", dim=60 - n)
    same = plain.delta({"subspace": {"z": own["z"]}}, direct.constants, params, sites)
    for path, x in delta.items():
        np.testing.assert_allclose(x, same[path], rtol=0, atol=1e-6, err_msg=path)

    doubled = {"subspace": own | {"scale": own["scale"].at[-1].set(2.0)}}
    more = method.delta(doubled, state.constants, params, sites)
    grown = {
        (path, i)
        for path, i in tensors
        for x, y in [(delta[path], np.asarray(more[path]))]
        if np.linalg.norm(y[i] if "h/" in path else y)
        > 1.9 * np.linalg.norm(x[i] if "h/" in path else x)
    }
    layer = {t for t in tensors if tensors[t] == tensors[next(iter(grown))]}
    assert grown == layer if scales == "layer" else len(grown) == 1


def test_the_factors_of_a_lora_move_from_where_they_start():
    params, sites = base()
    method, state, _ = moved("lora-subspace", dim=11, rank=2, targets=("q", "up"))
    inner = lorax.method("lora", rank=2, targets=("q", "up"))
    start = inner.init(jax.random.key(3), params, sites)
    for path, (a, b, s, _) in jit(lambda: method.factors(*state, params, sites))().items():
        own = methods.joined(start.trainable)[path]
        moves = np.concatenate(
            [(np.asarray(a) - own["a"]).ravel(), (np.asarray(b) - own["b"]).ravel()]
        )
        assert 0.1 < np.linalg.norm(moves) and np.all(np.asarray(s) == 8.0)
    assert method.count(params, sites) == 11


# -------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("name", ["subspace", "said"])
def test_nothing_of_p_is_stored_but_its_key(name):
    params, sites = base()
    method = lorax.method(name, dim=100)
    state = method.init(jax.random.key(0), params, sites)
    assert tree.nbytes(state.constants) <= 4 * 100 + 8
    expanded = jit(lambda: method.expand(state.constants, params, sites))()
    assert tree.nbytes(expanded) > 4 * tree.count(params)
    z = {"subspace": state.trainable["subspace"] | {"z": state.trainable["subspace"]["z"] + 1}}
    bound = lambda constants: jit(lambda: method.bind(z, constants, params, None, sites))()
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    jax.tree.map(same, bound(state.constants), bound(expanded))


def step_bytes(width: int, dim: int) -> tuple[int, int]:
    """(temporary bytes of a compiled training step, D) of a GPT-2 of that width."""
    c = gpt2.Config(vocab_size=64, n_positions=8, n_embd=width, n_layer=2, n_head=2)
    module, example = gpt2.GPT2(c), jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    sites = intercept.sites(module, params, example)
    method, section = lorax.method("subspace", dim=dim), config.default().train
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    state = method.init(jax.random.key(0), zeros, sites)
    hyper = steps.Hyper(jnp.float32(0.1), jnp.float32(0.0), jax.random.key(0))
    program = steps.Program(module, method, sites, section, dropout=False, merge=True)
    member = steps.start(method, *state, section, hyper, sites)
    batches = {"tokens": jnp.zeros((2, 1, 1, 9), jnp.int32), "mask": jnp.ones((2, 1, 1, 9))}
    run = jax.jit(functools.partial(steps.train_steps, program))
    compiled = run.lower(params, state.constants, hyper, member, batches).compile()
    return compiled.memory_analysis().temp_size_in_bytes, tree.count(params)


def test_memory_of_a_step_is_of_the_order_of_d_parameters_whatever_the_dimension():
    few, size = step_bytes(192, 10)
    many, _ = step_bytes(192, 2000)
    assert many < 1.05 * few + 4 * 10 * 2000
    assert few < 4 * 12 * at_least(size)
    assert 4 * size * 2000 > 20 * many  # what a dense P would take


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "hp", "message"),
    [
        ("subspace", dict(dim=0), "method.dim: 0 given, must be at least 1"),
        ("subspace", dict(projection="dnese"), "method.projection: 'dnese' is not one of fastfood"),
        ("subspace", dict(granularity="layer"), "method.granularity: 'layer' is not one of global"),
        ("said", dict(scales="all"), "method.scales: 'all' is not one of layer, tensor"),
        ("said", dict(dim=5), "method.dim: 5 given, of which 5 would be scales; must be larger"),
        ("subspace", dict(dim=10**6), "method.dim: 1000000 given, there are 7,488 parameters"),
        ("subspace", dict(parameters=("qq",)), "'qq' matches nothing"),
        ("lora-subspace", dict(init="pissa"), "method.init: 'pissa' given, lora-subspace has"),
    ],
)
def test_mistakes_are_named(name, hp, message):
    params, sites = base()
    with pytest.raises(ValueError, match=message):
        method = lorax.method(name, **hp)
        method.count(params, sites)
