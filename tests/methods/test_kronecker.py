"""LoHa and LoKr: the contract of a method, PEFT's own, and what padding may not do."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import small
from flax import linen as nn
from jax.extend.core import jaxprs_in_params
from quick import jit
from small import noisy
from support import few, require

import lorax
from lorax import leaves, methods, ops, tree
from lorax.factorization import factorization
from lorax.methods.kronecker import loha, lokr


class Block(nn.Module):
    """A residual layer with the (carry, output) signature of `nn.scan`."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(12, name="v")(nn.tanh(nn.Dense(12, name="q")(x)))
        y = nn.gelu(nn.Dense(48, name="up")(y))
        return x + nn.Dense(12, use_bias=False, name="down")(y), None


class Stack(nn.Module):
    """A language model of one token's context, whose embedding is its head."""

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(20, 12, name="wte")
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return embedding.attend(stack(name="h")(embedding(tokens))[0])


#: 12 = 3 * 4, 48 = 6 * 8, 20 = 4 * 5: w2 of q is a product up to rank 1, of up to rank 3.
MODULE = Stack()
TOKENS = np.random.default_rng(0).integers(0, 20, (4, 8), np.int32)
CASES = {
    "loha": functools.partial(loha, rank=2, alpha=3),
    "lokr": functools.partial(lokr, rank=1, alpha=3),
    "lokr-whole": functools.partial(lokr, rank=3, alpha=3),
    "lokr-both": functools.partial(
        lokr, rank=2, alpha=3, decompose_both=True, factor=6, scaling="rslora"
    ),
}
case = pytest.mark.parametrize("name", CASES)


@functools.cache
def base():
    params = jit(MODULE.init)(jax.random.key(1), TOKENS)["params"]
    return noisy(params), ops.sites_from_shapes(params)


forward = jit(functools.partial(lorax.apply, MODULE))


# ---------------------------------------------------------------------------------------- contract


@case
def test_starts_as_the_base_and_merged_is_bound(name):
    params, sites = base()
    method = CASES[name](targets=("q", "mlp", "embed"))
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
    assert set(deltas) == {"h/q/kernel", "h/up/kernel", "h/down/kernel", "wte/embedding"}
    for path, dw in deltas.items():
        assert dw.dtype == jnp.float32
        np.testing.assert_allclose(flat[path] + dw, tree.flatten(merged)[path], rtol=0, atol=1e-6)
    if method.factors is None:
        return
    for path, (a, b, s, m) in method.factors(*state, params).items():
        assert m is None and a.shape[-1] == b.shape[-2] == 4
        np.testing.assert_allclose(s[..., None, None] * (a @ b), deltas[path], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (loha(rank=2, targets="q"), 3 * 2 * 2 * (12 + 12)),
        (loha(rank=5, targets=("q", "up"), layers=(0, -1)), 2 * 2 * 5 * (24 + 60)),
        (lokr(rank=1, targets="q"), 3 * (3 * 3 + (4 + 4))),
        (lokr(rank=2, targets="q"), 3 * (3 * 3 + 4 * 4)),
        (lokr(rank=50, targets=("q", "embed")), 3 * (3 * 3 + 4 * 4) + 4 * 3 + 5 * 4),
        (lokr(rank=3, targets="up", layers=(1,)), 3 * 6 + 3 * (4 + 8)),
        (lokr(rank=2, targets="up", decompose_both=True), 3 * (2 * (3 + 6) + 2 * (4 + 8))),
        (lokr(rank=2, targets="up", factor=6), 3 * (6 * 6 + 2 * (2 + 8))),
    ],
)
def test_count_is_the_formula_and_the_size_of_the_tree(method, expected):
    params, sites = base()
    assert method.count(params) == expected
    layers = len(method.hp["layers"] or range(3))
    trainable = method.init(jax.random.key(0), params, sites).trainable
    stacked = tree.count(trainable["h"])
    assert stacked * layers // 3 + tree.count(trainable) - stacked == expected


@pytest.mark.parametrize("name", ["loha", "lokr-whole", "lokr-both"])
def test_the_gradient_is_that_of_finite_differences(name):
    with jax.enable_x64(True):
        wide = lambda t: jax.tree.map(lambda x: x.astype(jnp.float64), t)
        params, sites = base()
        params, method = wide(params), CASES[name](targets=("v", "up"), layers=(0, 2))
        trainable, constants = method.init(jax.random.key(0), params, sites)
        start = wide(noisy(trainable))

        def loss(trainable):
            bound = method.bind(trainable, constants, params, sites=sites)
            return jnp.mean(jnp.sin(lorax.apply(MODULE, bound, TOKENS)))

        grads, flat, loss = tree.flatten(jit(jax.grad(loss))(start)), tree.flatten(start), jit(loss)
        rng = np.random.default_rng(3)
        for path, leaf in flat.items():
            at = tuple(int(rng.integers(n)) for n in leaf.shape)
            moved = lambda h, path=path, at=at: loss(
                tree.unflatten(flat | {path: flat[path].at[at].add(h)})
            )
            slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
            np.testing.assert_allclose(slope, grads[path][at], rtol=1e-6, atol=1e-10)
            assert grads[path][at] != 0


# ---------------------------------------------------------------------------------------- members


trained = functools.partial(small.trained, MODULE, base, TOKENS, 6)


MEMBERS = {
    "loha": [
        loha(rank=2, targets="q", layers=(0,)),
        loha(rank=5, alpha=3, targets=("q", "up")),
        loha(rank=1, targets=("v",), scaling="rslora"),
    ],
    "lokr-both": [
        lokr(rank=1, targets=("q", "up"), decompose_both=True),
        lokr(rank=2, alpha=3, targets=("v", "up"), decompose_both=True),
        lokr(rank=5, targets=("q", "up"), decompose_both=True),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_of_a_sweep_is_the_member_alone(name):
    """Other ranks, on both sides of where w2 is whole, other targets and layers beside it."""
    params, sites = base()
    members, key = MEMBERS[name], jax.random.key(4)
    union = methods.resolve(("q", "v", "up"), sites)
    states = [m.init(key, params, sites, union, 5) for m in members]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    ended = jit(jax.vmap(functools.partial(trained, members[0])))(*together)
    for i, method in enumerate(members):
        state = method.init(key, params, sites)
        alone = tree.flatten(jit(functools.partial(trained, method))(*state))
        assert any(np.any(x != tree.flatten(state.trainable)[p]) for p, x in alone.items())
        for path, leaf in tree.flatten(ended).items():
            rest = np.array(leaf[i])
            if path in alone:
                corner = tuple(slice(n) for n in alone[path].shape)
                # Sums over padding round otherwise, and Adam divides by what it rounds: within a
                # ten-thousandth of the 4e-2 that the steps can move a number.
                np.testing.assert_allclose(rest[corner], alone[path], rtol=0, atol=4e-6)
                rest[corner] = 0
            assert not rest.any(), path


# ---------------------------------------------------------------------------------- no dense update


def outputs(jaxpr):
    """Shapes of all that a program computes, in inner programs as well."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from outputs(inner)


@case
def test_no_array_as_large_as_the_kernel_is_made(name):
    params = {"q": {"kernel": jnp.ones((60, 60))}}
    method = CASES[name](targets="q")
    trainable, constants = method.init(jax.random.key(0), params)
    x = jnp.ones((3, 60))

    def loss(trainable):
        return jnp.sum(ops.linear(x, method.bind(trainable, constants, params)["q"]["kernel"]))

    shapes = list(outputs(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr))
    assert max(math.prod(shape) for shape in shapes) <= 60 * 6 * 2, shapes


@pytest.mark.parametrize("method", [loha(rank=2, dropout=0.5), lokr(rank=2, dropout=0.5)])
def test_dropout_is_on_the_input_of_the_update_where_a_key_is_given(method):
    params, sites = base()
    trainable, constants = method.init(jax.random.key(0), params, sites)
    bound = lambda key: method.bind(noisy(trainable), constants, params, key)["h"]["q"]["kernel"]
    leaf, plain = bound(jax.random.key(1)), bound(None)
    assert plain.dropout is None and leaf.dropout.key.shape == (3,)
    x = jnp.ones((5, 12))
    for i in range(3):
        layer = lambda tree_, i=i: jax.tree.map(lambda v: v[i], tree_)
        dropped = leaves.dropout(x, layer(leaf.dropout))
        assert set(np.unique(dropped)) == {0, 2}
        update = ops.linear(dropped, layer(plain)) - ops.linear(dropped, layer(leaf.w))
        expected = ops.linear(x, layer(leaf.w)) + update
        np.testing.assert_allclose(ops.linear(x, layer(leaf)), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (loha(rank=9, targets="q"), dict(a1=600, b1=9, a2=0, b2=9)),
        (lokr(rank=9, targets="q"), dict(w1=0, a2=25, b2=9)),
        (lokr(rank=99, targets="q"), dict(w1=0, w2=25)),
        (lokr(rank=9, targets="q", decompose_both=True), dict(a1=24, b1=0, a2=25, b2=9)),
    ],
)
def test_what_starts_at_zero_and_how_wide_the_rest_is(method, rows):
    """U(-1/sqrt(rows), 1/sqrt(rows)), 600 = 24 * 25, 800 = 25 * 32."""
    start = method.init(jax.random.key(0), {"q": {"kernel": jnp.zeros((600, 800))}}).trainable
    assert start["q"]["kernel"].keys() == rows.keys()
    for name, x in start["q"]["kernel"].items():
        if not rows[name]:
            assert not x.any()
            continue
        bound = 1 / math.sqrt(rows[name])
        assert len(x) == rows[name] and 0.95 * bound < np.abs(x).max() <= bound
        np.testing.assert_allclose(x.std(), bound / math.sqrt(3), rtol=5 / math.sqrt(x.size))


def test_factorization_is_that_of_peft():
    require("peft")
    from peft.tuners.lokr.layer import factorization as pefts

    for factor in (-1, 1, 2, 3, 4, 7, 8, 60):
        for size in (*range(1, 130), 768, 2304, 3072, 50257):
            assert factorization(size, factor) == pefts(size, factor)


# -------------------------------------------------------------------------------------------- PEFT

#: our names -> PEFT's, transposed
HADA = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}
LOKR = {name: f"lokr_{name}" for name in ("w1", "w2")}
LOKR |= {f"{ours}{i}": f"lokr_w{i}_{t}" for i in (1, 2) for ours, t in (("a", "b"), ("b", "a"))}
#: our words -> PEFT's modules; PEFT has no LoHa or LoKr of GPT-2's Conv1D.
MODULES = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "down": "mlp.down_proj"}
PEFT = {
    "loha": ("LoHaConfig", loha, HADA, dict(r=3, alpha=6), dict(rank=3, alpha=6)),
    "lokr-whole": ("LoKrConfig", lokr, LOKR, dict(r=4, alpha=2), dict(rank=4, alpha=2)),
    "lokr-both": (
        "LoKrConfig",
        lokr,
        LOKR,
        dict(r=1, alpha=2, decompose_both=True, decompose_factor=4),
        dict(rank=1, alpha=2, decompose_both=True, factor=4),
    ),
}


def from_peft(model, state, names) -> dict:
    """{path/name: array} of PEFT's arrays, as the state has them. names: `HADA` or `LOKR`."""
    theirs, found = parity.arrays(model), {}
    for path in tree.flatten(state.trainable):
        target, name = path.split("/kernel/")
        module = MODULES[target.rsplit("/", 1)[-1]]
        key = f"base_model.model.model.layers.{{}}.{module}.{names[name]}.default"
        found[path] = np.stack([theirs.pop(key.format(i)).T for i in range(parity.LAYERS)])
    assert not theirs, sorted(theirs)
    return found


@pytest.mark.parametrize("name", few(PEFT, ("loha", "lokr-whole")))
def test_starts_computes_and_learns_as_peft(name, tmp_path):
    peft = require("peft")
    config, function, names, theirs, ours = PEFT[name]
    modules = [m.rsplit(".", 1)[-1] for m in MODULES.values()]
    base, model = parity.pair("llama", tmp_path)
    model = peft.get_peft_model(model, getattr(peft, config)(target_modules=modules, **theirs))
    method = function(targets=tuple(MODULES), **ours)
    state = method.init(jax.random.key(0), base.params, base.sites)
    start, own = from_peft(model, state, names), tree.flatten(state.trainable)
    for path, x in start.items():  # zero where ours is, otherwise as wide
        assert own[path].shape == x.shape
        assert np.any(x) == np.any(own[path])
        assert np.abs(x).max() <= 1 / math.sqrt(x.shape[1])
    parity.disturb(model)
    state = parity.filled(state, from_peft(model, state, names))
    assert np.abs(parity.logits(base, method, state) - forward_of(base)).max() > 1e-2
    parity.assert_same(base, method, state, model)


def forward_of(base):
    """The base's logits on the batch of `parity.logits`."""
    return np.asarray(
        lorax.apply(base.module, base.params, jnp.asarray(parity.batches()[0, :, :-1]))
    )


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("function", "hp", "message"),
    [
        (loha, dict(rank=0), "method.rank: 0 given, must be at least 1"),
        (lokr, dict(rank=0), "method.rank: 0 given, must be at least 1"),
        (lokr, dict(dropout=1.0), r"method.dropout: 1.0 given, must be in \[0, 1\)"),
        (lokr, dict(factor=0), "method.factor: 0 given, must be at least 1, or -1"),
    ],
)
def test_a_wrong_hyperparameter_is_one_clear_error(function, hp, message):
    with pytest.raises(ValueError, match=message):
        function(**hp)
