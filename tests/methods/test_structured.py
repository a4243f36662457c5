"""Updates of a structure of their own, against a dense formula, alone and padded.

`tests/methods/test_methods.py` has what holds for every method, `tests/interop` PEFT's files.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from flax import linen as nn
from quick import jit
from support import require

import lorax
from lorax import config, methods, ops, permutations, tree
from lorax.methods.elimination import inverse

IN, OUT = 12, 24


class Layers(nn.Module):
    """Two layers, of which the second has more inputs than outputs."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(IN, name="down")(nn.tanh(nn.Dense(OUT, name="up")(x)))


RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.standard_normal((7, IN)), jnp.float32) for _ in range(2))
PARAMS = jit(Layers().init)(jax.random.key(0), X)["params"]
SITES = ops.sites_from_shapes(PARAMS)


def gralora(x, w, hp):
    """Entry by entry: input i of part n, output o of part m."""
    k, c, dw = hp["blocks"], hp["rank"] // hp["blocks"], np.zeros(w.shape)
    rows, columns = (size // k for size in w.shape)
    for i, o in np.ndindex(*w.shape):
        n, m = i // rows, o // columns
        for j in range(c):
            dw[i, o] += x["a"][n, m, i % rows, j] * x["b"][n, m, j, o % columns]
    return hp["alpha"] / hp["rank"] * dw


def oft(x, w, hp):
    """Cayley's rotation of each block of inputs."""
    b, dw = hp["block_size"], np.zeros(w.shape)
    for n in range(len(w) // b):
        q = np.zeros((b, b))
        q[np.triu_indices(b, 1)] = x["q"][n]
        q -= q.T
        rotation = (np.eye(b) + q) @ np.linalg.inv(np.eye(b) - q)
        if hp["neumann"]:
            rotation = np.eye(b) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        rows = slice(n * b, n * b + b)
        dw[rows] = rotation @ w[rows] - w[rows]
    return dw


def fourierft(x, w, hp):
    """Wave by wave."""
    i, o = (np.arange(size) / size for size in w.shape)
    dw = np.zeros(w.shape)
    for value, u, v in zip(x["values"], x["rows"], x["columns"], strict=True):
        dw += value * np.cos(2 * np.pi * (u * i[:, None] + v * o[None]))
    return hp["spectral_scale"] * dw / w.size


def hra(x, w, hp):
    """Reflection by reflection, of what the ones before have made of w."""
    reflected = w
    for u in x["u"].T:
        reflected = reflected - 2 * np.outer(u, u @ reflected) / (u @ u)
    return reflected - w


def randlora(x, w, hp):
    """Entry by entry of the inner index."""
    (r, n), (_, least) = x["lam"].shape, x["gamma"].shape
    inner = np.zeros((r * n, least))
    for i, j in np.ndindex(r, n):
        inner[i * n + j] = x["lam"][i, j] * x["a"][i, :least] * x["gamma"][j]
    b = x["b"][: max(w.shape), : r * n]
    dw = inner.T @ b.T if w.shape[0] <= w.shape[1] else b @ inner
    return hp["alpha"] / r * dw


#: method -> (its update by the formula, hyperparameters of it and of a wider member beside it, the
#: rank of the update or None for the full one)
CASES = {
    "gralora": (gralora, dict(rank=4, alpha=6.0, blocks=2), dict(rank=6), 8),
    "oft": (oft, dict(block_size=4), dict(block_size=8), None),
    "oft-series": (oft, dict(block_size=6, neumann=5), dict(block_size=12), None),
    "fourierft": (
        fourierft,
        dict(frequencies=40, std=0.5, spectral_scale=40.0),
        dict(frequencies=47),
        None,
    ),
    "hra": (hra, dict(rank=3), dict(rank=5), 3),
    "randlora": (randlora, dict(rank=5, alpha=2.0), {}, None),
}
BOTH = ("up", "down")


def moved(state, scale=0.3):
    """A state off its start."""
    rng = np.random.default_rng(1)
    noise = lambda x: x + jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype)
    return state._replace(trainable=jax.tree.map(noise, state.trainable))


@pytest.mark.parametrize("name", CASES)
def test_the_update_is_the_dense_formula(name):
    formula, hp, _, rank = CASES[name]
    method = lorax.method(name.split("-")[0], targets=BOTH, **hp)
    state = moved(method.init(jax.random.key(1), PARAMS, SITES))
    updates, flat = method.delta(*state, PARAMS, SITES), tree.flatten(PARAMS)
    bound = tree.flatten(method.bind(*state, PARAMS, sites=SITES))
    arrays = methods.joined(*state)
    shared = arrays.pop(name, {})
    for path, x in arrays.items():
        w, x = np.asarray(flat[path], np.float64), x | shared
        x = {key: np.asarray(array, np.float64) for key, array in x.items()}
        dw = formula(x, w, method.hp)
        np.testing.assert_allclose(updates[path], dw, rtol=0, atol=2e-6)
        assert np.linalg.matrix_rank(dw) == (rank or min(w.shape))
        np.testing.assert_allclose(ops.dense(bound[path], SITES[path]), w + dw, rtol=0, atol=2e-6)
        rows = np.asarray(RNG.standard_normal((3, len(w))), np.float32)
        product = ops.linear(jnp.asarray(rows), bound[path])
        np.testing.assert_allclose(product, rows @ (w + dw), rtol=0, atol=2e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", CASES)
def test_three_steps_padded_are_three_steps_alone(name, optimizer):
    """Beside a wider member, with arrays for a matrix that only the other one adapts."""
    _, hp, wider, _ = CASES[name]
    name = name.split("-")[0]
    method = lorax.method(name, targets=("up",), **hp)
    pad = lorax.method(name, **hp | wider).width
    union = methods.resolve(BOTH, SITES)
    step = {"adamw": optax.adamw(1e-2, weight_decay=0.1), "sgd": optax.sgd(0.5, momentum=0.9)}

    @jit
    def trained(trainable, constants):
        def loss(trainable):
            bound = method.bind(trainable, constants, PARAMS, None, SITES)
            return jnp.mean(jnp.square(lorax.apply(Layers(), bound, X) - Y))

        state, losses = step[optimizer].init(trainable), []
        for _ in range(3):
            value, gradient = jax.value_and_grad(loss)(trainable)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = step[optimizer].update(gradient, state, trainable)
                trainable = optax.apply_updates(trainable, updates)
            losses.append(value)
        return trainable, jnp.stack([*losses, loss(trainable)])

    states = [method.init(jax.random.key(1), PARAMS, SITES)]
    states.append(method.init(jax.random.key(1), PARAMS, SITES, targets=union, pad=pad))
    assert tree.count(states[1].trainable) > tree.count(states[0].trainable)
    (alone, losses), (padded, padded_losses) = (trained(*state) for state in states)
    np.testing.assert_allclose(losses, padded_losses, rtol=2e-6)
    assert losses[-1] < losses[0]
    pairs = zip((alone, padded), states, strict=True)
    updates, beside = (method.delta(t, state.constants, PARAMS, SITES) for t, state in pairs)
    for path, dw in beside.items():
        np.testing.assert_allclose(dw, updates.get(path, 0 * dw), rtol=0, atol=1e-6)
    # As many numbers have moved or started off zero as there are without padding: no others live.
    live = [sum(int(jnp.sum(x != 0)) for x in jax.tree.leaves(t)) for t in (alone, padded)]
    assert live[0] == live[1]


# ----------------------------------------------------------------------------- each method's own


def test_an_exact_rotation_keeps_singular_values_and_the_series_almost_does():
    w = np.asarray(PARAMS["up"]["kernel"])
    sigma = np.linalg.svd(w, compute_uv=False)
    for neumann, least, most in ((0, 0, 2e-6), (5, 1e-5, 0.05)):
        method = lorax.method("oft", block_size=6, neumann=neumann, targets=("up",))
        state = moved(method.init(jax.random.key(0), PARAMS, SITES), 0.1)
        turned = w + np.asarray(method.delta(*state, PARAMS, SITES)["up/kernel"])
        off = np.abs(np.linalg.svd(turned, compute_uv=False) - sigma).max() / sigma.max()
        assert least <= off <= most, (neumann, off)


def test_inverses_and_their_derivatives_are_those_of_lapack():
    rng = np.random.default_rng(2)
    q = jnp.asarray(3 * rng.standard_normal((4, 7, 7)), jnp.float32)
    a = jnp.eye(7)[None] + q - jnp.swapaxes(q, 1, 2)
    np.testing.assert_allclose(inverse(a), np.linalg.inv(a), rtol=0, atol=1e-5)
    way = q / jnp.max(jnp.abs(q))  # a derivative's rounding grows with the tangent
    near = lambda function: jax.jvp(lambda t: function(a + t * way), (0.0,), (1.0,))[1]
    np.testing.assert_allclose(near(inverse), near(jnp.linalg.inv), rtol=0, atol=1e-5)
    second = lambda function: jax.grad(jax.grad(lambda t: jnp.sum(function(a + t * q) ** 3)))(0.1)
    np.testing.assert_allclose(second(inverse), second(jnp.linalg.inv), rtol=1e-3)


def test_block_sizes_share_a_program_where_one_divides_the_other():
    c = config.default()
    c.method.name, c.sweep.block_size = "oft", (4, 16, 6, 24, 10)
    keys = [config.group_key(member) for member in config.members(c)]
    assert keys[0] == keys[1] != keys[2] == keys[3] != keys[4] != keys[0]


def test_places_are_those_that_torch_would_draw():
    torch = require("torch")
    for size, n, seed in ((7, 7, 0), (300, 40, 777), (3 * 10**6, 500, 2**31 + 5)):
        drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n]
        np.testing.assert_array_equal(permutations.first(size, n, seed), drawn)


@pytest.mark.parametrize(
    ("name", "hp", "away"),
    [
        ("hra", dict(rank=4), False),
        ("hra", dict(rank=3), True),
        ("fourierft", dict(frequencies=9), False),
        ("fourierft", dict(frequencies=9, std=1.0), True),
    ],
)
def test_starts_are_away_from_the_base_where_the_method_says_so(name, hp, away):
    base = small.three_layers()
    method = lorax.method(name, targets=("q", "v"), **hp)
    state = method.init(jax.random.key(0), base.params, base.sites)
    tokens = np.random.default_rng(0).integers(0, 20, (4, 7)).astype(np.int32)
    logits = lambda params: lorax.apply(base.module, params, tokens)
    bound = method.bind(*state, base.params, sites=base.sites)
    off = jit(lambda a, b: jnp.abs(logits(a) - logits(b)).max())(bound, base.params)
    assert (off > 1e-3) if away else (off < 1e-6), off


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("name", "hp", "message"),
    [
        ("gralora", dict(rank=5), "method.rank: 5 given, must be a multiple of blocks, 2"),
        ("gralora", dict(blocks=0), "method.blocks: 0 given, must be at least 1"),
        (
            "gralora",
            dict(rank=5, blocks=5),
            "method.blocks: 5 given, but down/kernel is 24 x 12; both must be multiples of it",
        ),
        ("gralora", dict(targets=("embed",)), "wte/embedding is not a linear layer's kernel"),
        ("oft", dict(block_size=1), "method.block_size: 1 given, must be at least 2"),
        ("oft", dict(neumann=1), r"method.neumann: 1 given, must be 0 \(exact\) or from 2 to 64"),
        (
            "oft",
            dict(block_size=8),
            "method.block_size: 8 given, but up/kernel has 12 inputs, which",
        ),
        ("oft", dict(targets=("embed",)), "wte/embedding is not a linear layer's kernel"),
        ("fourierft", dict(frequencies=0), "method.frequencies: 0 given, must be at least 1"),
        (
            "fourierft",
            dict(frequencies=999),
            "method.frequencies: 999 given, but down/kernel is 24 x 12: at most 288",
        ),
        ("fourierft", dict(places_seed=-1), "method.places_seed: -1 given, must be from 0 to 2"),
        ("fourierft", dict(std=-1.0), "method.std: -1.0 given, must be at least 0"),
        ("fourierft", dict(targets=("embed",)), "wte/embedding is not a linear layer's kernel"),
        ("hra", dict(rank=0), "method.rank: 0 given, must be at least 1"),
        ("hra", dict(targets=("embed",)), "wte/embedding is not a linear layer's kernel"),
        (
            "randlora",
            dict(rank=13),
            "method.rank: 13 given, but down/kernel is 24 x 12: at most 12",
        ),
        (
            "randlora",
            dict(rank=2, targets=("embed",)),
            "wte/embedding is not a linear layer's kernel",
        ),
    ],
)
def test_a_wrong_hyperparameter_is_one_clear_error(name, hp, message):
    params = PARAMS | {"wte": {"embedding": jnp.ones((24, 12))}}
    with pytest.raises(ValueError, match=message):
        lorax.method(name, **dict(targets=BOTH) | hp).init(jax.random.key(0), params)
