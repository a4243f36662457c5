"""VeRA: the contract of a method, the shared pair, and PEFT's own."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import small
from flax import linen as nn
from quick import jit
from small import noisy
from support import few, require

import lorax
from lorax import leaves, methods, ops, tree
from lorax.methods.vera import SHARED, vera


class Block(nn.Module):
    """A residual layer with the (carry, output) signature of `nn.scan`."""

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(20, name="up")(nn.tanh(nn.Dense(8, name="q")(x))))
        return x + nn.Dense(8, use_bias=False, name="down")(y), None


class Stack(nn.Module):
    """A language model of one token's context, whose embedding is its head."""

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(24, 8, name="wte")
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return embedding.attend(stack(name="h")(embedding(tokens))[0])


MODULE = Stack()
TOKENS = np.random.default_rng(0).integers(0, 24, (4, 8), np.int32)
forward = jit(functools.partial(lorax.apply, MODULE))


@functools.cache
def base():
    params = noisy(jit(MODULE.init)(jax.random.key(1), TOKENS)["params"])
    return params, ops.sites_from_shapes(params)


# ---------------------------------------------------------------------------------------- contract


def test_starts_as_the_base_and_merged_is_bound():
    """Rank 10 is above min(in, out)."""
    params, sites = base()
    method = vera(rank=10, targets=("q", "up", "down", "embed"))
    state = method.init(jax.random.key(0), params, sites)
    for frozen in (params, leaves.to_bfloat16(params, sites)):
        bound = method.bind(*state, frozen, sites=sites)
        np.testing.assert_array_equal(forward(bound, TOKENS), forward(frozen, TOKENS))
    state = state._replace(trainable=noisy(state.trainable))
    logits = forward(method.bind(*state, params, sites=sites), TOKENS)
    assert np.abs(logits - forward(params, TOKENS)).max() > 0.01
    merged = lorax.merge(method, state, params)
    np.testing.assert_allclose(forward(merged, TOKENS), logits, rtol=0, atol=1e-5)
    flat, deltas = tree.flatten(params), method.delta(*state, params)
    shared, own = state.constants[SHARED], methods.joined(state.trainable)
    assert deltas.keys() == own.keys() and len(own) == 4
    for path, (a, b, s, m) in method.factors(*state, params).items():
        n_in, n_out = flat[path].shape[-2:]
        d, v = own[path]["d"], own[path]["v"]
        formula = np.einsum(  # the paper's order: a, then d, then b, then v
            "ir,...r,ro,...o->...io", shared["a"][:n_in], d, shared["b"][:, :n_out], v
        )
        np.testing.assert_allclose(deltas[path], formula, rtol=0, atol=1e-6)
        np.testing.assert_allclose(s[..., None, None] * (a @ b), formula, rtol=0, atol=1e-6)
        np.testing.assert_allclose(tree.flatten(merged)[path], flat[path] + formula, atol=1e-6)
        assert m is None


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (vera(targets="q"), 3 * (256 + 8)),
        (vera(rank=5, targets=("q", "up")), 3 * (5 + 8 + 5 + 20)),
        (vera(rank=5, targets=("q", "embed")), 3 * (5 + 8) + 5 + 8),
        (vera(rank=5, targets=("up", "down"), layers=(0, -1)), 2 * (5 + 20 + 5 + 8)),
    ],
)
def test_count_is_the_formula_and_the_size_of_the_tree(method, expected):
    params, sites = base()
    assert method.count(params) == expected
    layers = len(method.hp["layers"] or range(3))
    trainable = method.init(jax.random.key(0), params, sites).trainable
    stacked = tree.count({"h": trainable["h"]})
    assert stacked * layers // 3 + tree.count(trainable) - stacked == expected


def test_the_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        wide = lambda t: jax.tree.map(lambda x: x.astype(jnp.float64), t)
        params, sites = base()
        params, method = wide(params), vera(rank=4, targets=("q", "up"), layers=(0, 2))
        trainable, constants = method.init(jax.random.key(0), params, sites)
        start = wide(noisy(trainable))

        def loss(trainable):
            bound = method.bind(trainable, constants, params, sites=sites)
            return jnp.mean(jnp.sin(lorax.apply(MODULE, bound, TOKENS)))

        grads, flat, loss = tree.flatten(jit(jax.grad(loss))(start)), tree.flatten(start), jit(loss)
        for path, leaf in flat.items():
            at = tuple(n - 1 for n in leaf.shape)
            moved = lambda h, path=path, at=at: loss(
                tree.unflatten(flat | {path: flat[path].at[at].add(h)})
            )
            slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
            np.testing.assert_allclose(slope, grads[path][at], rtol=1e-6, atol=1e-10)
            assert grads[path][at] != 0


# ------------------------------------------------------------------------------------ shared pair


def test_the_pair_is_drawn_once_for_each_rank_and_is_the_same_for_every_seed():
    params, sites = base()
    pair = lambda key=0, **hp: vera(**hp).init(jax.random.key(key), params, sites).constants[SHARED]
    first = pair(rank=50, targets=("q", "up", "down"))
    assert first["a"].shape == (20, 50) and first["b"].shape == (50, 20)
    for name, x in first.items():  # PEFT: Kaiming's bound with gain sqrt 2
        bound = math.sqrt(6 / len(x))
        assert 0.99 * bound < np.abs(x).max() <= bound
        np.testing.assert_array_equal(x, pair(7, rank=50, targets=("down", "up"))[name])
        other = pair(rank=50, targets=("down", "up"), projection_seed=1)[name]
        assert not np.any(x == other)
    small = pair(rank=49, targets=("q", "up", "down"))
    assert not np.any(np.isin(small["a"], first["a"]))


def test_constants_hold_the_pair_once():
    params, sites = base()
    state = vera(rank=6, d_initial=0.3, targets=("q", "up")).init(jax.random.key(0), params, sites)
    sizes = {path: x.shape for path, x in tree.flatten(state.constants).items() if x.ndim > 1}
    assert sizes == {f"{SHARED}/a": (8, 6), f"{SHARED}/b": (6, 20)}
    for path, x in tree.flatten(state.trainable).items():
        np.testing.assert_array_equal(x, np.float32(0.3 if path.endswith("/d") else 0))


# ---------------------------------------------------------------------------------------- members


trained = functools.partial(small.trained, MODULE, base, TOKENS, 4)


@pytest.mark.slow
def test_a_member_of_a_sweep_is_the_member_alone():
    """Other ranks, targets and layers beside it, and targets that are larger than its own."""
    params, sites = base()
    members = [
        vera(rank=3, targets="q", layers=(0,)),
        vera(rank=12, targets=("q", "up")),
        vera(rank=5, targets="down", d_initial=0.5, projection_seed=3),
    ]
    union = methods.resolve(("q", "up", "down"), sites)
    states = [m.init(jax.random.key(0), params, sites, union, 12) for m in members]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    ended = jit(jax.vmap(functools.partial(trained, members[0])))(*together)
    for i, method in enumerate(members):
        state = method.init(jax.random.key(1), params, sites)
        alone = tree.flatten(jit(functools.partial(trained, method))(*state))
        assert all(np.any(x != tree.flatten(state.trainable)[p]) for p, x in alone.items())
        for path, leaf in tree.flatten(ended).items():
            rest = np.array(leaf[i])
            if path in alone:
                corner = tuple(slice(n) for n in alone[path].shape)
                np.testing.assert_allclose(rest[corner], alone[path], rtol=0, atol=1e-6)
                rest[corner] = 0
            assert not rest.any(), path


# -------------------------------------------------------------------------------------------- PEFT

#: family -> {our path: PEFT's module}
MODULES = {
    "gpt2": {"attn/o": "attn.c_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"},
    "llama": {
        **{f"attn/{w}": f"self_attn.{w}_proj" for w in "qkvo"},
        **{f"mlp/{w}": f"mlp.{w}_proj" for w in ("gate", "up", "down")},
    },
}
LAYERS = {
    "gpt2": "base_model.model.transformer.h",
    "llama": "base_model.model.model.layers",
}


def from_peft(family, model) -> dict:
    """{path/name: array} of PEFT's arrays."""
    theirs, found = parity.arrays(model), {}
    for name, named in (("a", "vera_A"), ("b", "vera_B")):  # listed where it is used first
        (found[f"{SHARED}/{name}"],) = (x.T for key, x in theirs.items() if named in key)
    for ours, module in MODULES[family].items():
        for name, named in (("d", "vera_lambda_d"), ("v", "vera_lambda_b")):
            key = f"{LAYERS[family]}.{{}}.{module}.{named}.default"
            layers = [theirs[key.format(i)] for i in range(parity.LAYERS)]
            found[f"h/{ours}/kernel/{name}"] = np.stack(layers)
    return found


@pytest.mark.parametrize("family", few(MODULES, ("llama",)))
def test_starts_computes_and_learns_as_peft(family, tmp_path):
    """(GPT-2's q, k and v are one matrix there and three here, which see other columns of b.)"""
    peft = require("peft")
    base, model = parity.pair(family, tmp_path)
    names = sorted({module.rsplit(".", 1)[-1] for module in MODULES[family].values()})
    config = peft.VeraConfig(r=24, target_modules=names, fan_in_fan_out=family == "gpt2")
    model = peft.get_peft_model(model, config)
    method = vera(rank=24, targets=tuple(path.split("/")[1] for path in MODULES[family]))
    state = method.init(jax.random.key(0), base.params, base.sites)
    theirs = from_peft(family, model)
    for path, x in tree.flatten(state.trainable).items():
        np.testing.assert_array_equal(x, theirs[path])
    for name, x in state.constants[SHARED].items():
        pair = theirs[f"{SHARED}/{name}"]
        np.testing.assert_allclose(np.abs(pair).max(), np.abs(x).max(), rtol=0.02)
    parity.disturb(model)
    start = parity.logits(base, method, state)
    state = parity.filled(state, from_peft(family, model))
    assert np.abs(parity.logits(base, method, state) - start).max() > 1e-2
    parity.assert_same(base, method, state, model)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("hp", "message"),
    [
        (dict(rank=0), "method.rank: 0 given, must be at least 1"),
        (dict(dropout=1.0), r"method.dropout: 1.0 given, must be in \[0, 1\)"),
    ],
)
def test_a_wrong_hyperparameter_is_one_clear_error(hp, message):
    with pytest.raises(ValueError, match=message):
        vera(**hp)
