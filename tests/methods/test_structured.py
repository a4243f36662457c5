"""Updates of a structure of their own, against a dense formula, alone and padded.

`tests/methods/test_methods.py` has what holds for every method, `tests/interop` PEFT's files.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from quick import jit

import lorax
from lorax import methods, ops, tree

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


#: method -> (its update by the formula, hyperparameters of it and of a wider member beside it, the
#: rank of the update or None for the full one)
CASES = {
    "gralora": (gralora, dict(rank=4, alpha=6.0, blocks=2), dict(rank=6), 8),
}
BOTH = ("up", "down")


def moved(method, **padding):
    """A state off its start, in what is not padding."""
    return moved_from(method.init(jax.random.key(1), PARAMS, SITES, **padding))


def moved_from(state, scale=0.3):
    rng = np.random.default_rng(1)
    noise = lambda x: x + jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype)
    return state._replace(trainable=jax.tree.map(noise, state.trainable))


@pytest.mark.parametrize("name", CASES)
def test_the_update_is_the_dense_formula(name):
    formula, hp, _, rank = CASES[name]
    method = lorax.method(name, targets=BOTH, **hp)
    state = moved(method)
    updates, flat = method.delta(*state, PARAMS, SITES), tree.flatten(PARAMS)
    bound = tree.flatten(method.bind(*state, PARAMS, sites=SITES))
    for path, x in methods.joined(*state).items():
        if path not in SITES:  # shared arrays
            continue
        w = np.asarray(flat[path], np.float64)
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
    ],
)
def test_a_wrong_hyperparameter_is_one_clear_error(name, hp, message):
    params = PARAMS | {"wte": {"embedding": jnp.ones((24, 12))}}
    with pytest.raises(ValueError, match=message):
        lorax.method(name, **dict(targets=BOTH) | hp).init(jax.random.key(0), params)
