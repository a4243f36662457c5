"""Rows by their expert: products, gradients and members are those of one matrix after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from lorax import grouped, leaves, ops, quant

E, IN, OUT, M = 5, 6, 7, 23
SIZES = np.array([4, 0, 11, 1, 7], np.int32)
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(M, IN)).astype(np.float32), RNG.normal(size=(E, IN, OUT)).astype(np.float32)


def one_by_one(x, w, sizes):
    """The product in numpy."""
    expert = np.repeat(np.arange(len(sizes)), sizes)
    return np.einsum("mi,mio->mo", x, w[expert])


def by_gather(x, w, sizes):
    """The product with each row's matrix copied, for JAX's own gradients."""
    return jnp.einsum("mi,mio->mo", x, grouped.of_rows(w, sizes, len(x)))


@pytest.mark.parametrize("sizes", [SIZES, [0, 0, 23, 0, 0], [23, 0, 0, 0, 0], [5, 5, 5, 5, 3]])
def test_the_product_is_one_matrix_after_the_other(sizes):
    sizes = np.asarray(sizes, np.int32)
    y = jit(grouped.product)(X, W, sizes)
    np.testing.assert_allclose(y, one_by_one(X, W, sizes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m, groups", [(1, 8), (2, 128), (300, 3), (64, 1)])
def test_the_product_at_other_numbers_of_rows(m, groups):
    expert = np.sort(RNG.integers(0, groups, m))
    sizes = np.bincount(expert, minlength=groups).astype(np.int32)
    x = RNG.normal(size=(m, IN)).astype(np.float32)
    w = RNG.normal(size=(groups, IN, 3)).astype(np.float32)
    y = jit(grouped.product)(x, w, sizes)
    np.testing.assert_allclose(y, one_by_one(x, w, sizes), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_a_copy_of_each_rows_matrix():
    dy = RNG.normal(size=(M, OUT)).astype(np.float32)
    loss = lambda f, x, w: jnp.sum(dy * f(x, w, SIZES) ** 2)
    ours, theirs = (
        jit(jax.grad(functools.partial(loss, f), argnums=(0, 1)))(X, W)
        for f in (grouped.product, by_gather)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert not np.asarray(ours[1])[1].any()  # no row: no gradient


def members(n=3):
    sizes = np.stack([RNG.multinomial(M, [1 / E] * E) for _ in range(n)]).astype(np.int32)
    x, w = RNG.normal(size=(n, M, IN)), RNG.normal(size=(n, E, IN, OUT))
    return x.astype(np.float32), w.astype(np.float32), sizes


@pytest.mark.parametrize("own", [(0, None, 0), (0, 0, 0), (0, None, None), (None, 0, None)])
def test_members_side_by_side_are_members_alone(own):
    x, w, sizes = members()
    given = [t if axis == 0 else t[0] for t, axis in zip((x, w, sizes), own, strict=True)]

    def both(x, w, sizes):
        loss = lambda x, w: jnp.sum(grouped.product(x, w, sizes) ** 2)
        return grouped.product(x, w, sizes), *jax.grad(loss, argnums=(0, 1))(x, w)

    together = jit(jax.vmap(both, own))(*given)
    for i in range(3):
        alone = jit(both)(*(t[i] if axis == 0 else t for t, axis in zip(given, own, strict=True)))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


def test_members_of_members():
    x, w, sizes = members()
    f = jax.vmap(jax.vmap(grouped.product, (0, None, 0)), (None, 0, None))
    y = jit(f)(x, w, sizes)
    for i in range(3):
        for j in range(3):
            expected = one_by_one(x[j], w[i], sizes[j])
            np.testing.assert_allclose(y[i, j], expected, rtol=1e-4, atol=1e-4)


def test_an_accelerators_program_is_the_cpus(monkeypatch):
    def on_an_accelerator(*args, cpu, default):
        return default(*args)

    x, w, sizes = members()
    loss = lambda x, w, sizes: jnp.sum(grouped.product(x, w, sizes) ** 2)
    f = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), (0, None, 0))
    here = jit(f)(x, w[0], sizes)
    monkeypatch.setattr(jax.lax, "platform_dependent", on_an_accelerator)
    there = jit(lambda *args: f(*args))(x, w[0], sizes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), here, there)


# ------------------------------------------------------------------------------------------ leaves


def stacked_leaves():
    """{name: leaf of E experts (64, OUT)}, each representing another kernel than `w`."""
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    w, r, s = draw(E, 64, 8), 3, jnp.linspace(0.5, 2, E)
    low = leaves.LowRank(w, draw(E, 64, r), draw(E, r, 8), s)
    nf4 = quant.quantise(w, "nf4", 64, True)
    return {
        "lora": low,
        "lora on nf4": leaves.LowRank(nf4, low.a, low.b, s),
        "dora": leaves.dora(low, draw(E, 8) ** 2, ops.EXPERTS),
        "inputs": leaves.ScaledInput(w, draw(E, 64)),
        "lokr": leaves.Kronecker(w, draw(E, 4, 2), draw(E, 16, 4), s),
        "nf4": nf4,
        "same": leaves.Same(low),
    }


@pytest.mark.parametrize("name", stacked_leaves())
def test_a_leaf_computes_with_the_kernel_that_it_represents(name):
    leaf = stacked_leaves()[name]
    x, bias = RNG.normal(size=(M, 64)).astype(np.float32), RNG.normal(size=(E, 8))
    w, bias = np.asarray(ops.wide(leaf, ops.EXPERTS)), bias.astype(np.float32)
    y, dx = jit(
        lambda x: jax.value_and_grad(
            lambda x: jnp.sum(ops.ragged(x, leaf, jnp.asarray(SIZES), bias) ** 2)
        )(x)
    )(x)
    expected = one_by_one(x, w, SIZES) + np.repeat(bias, SIZES, axis=0)
    np.testing.assert_allclose(y, np.sum(expected**2), rtol=1e-4)
    back = np.einsum("mo,mio->mi", 2 * expected, np.repeat(w, SIZES, axis=0))
    np.testing.assert_allclose(dx, back, rtol=1e-3, atol=1e-3 * np.abs(back).max())


def test_a_leaf_in_bfloat16_sums_in_float32():
    w = jnp.asarray(W, jnp.bfloat16)
    x = jnp.asarray(X, jnp.bfloat16).astype(jnp.float32)
    y = ops.ragged(x, leaves.BFloat16Weight.of(w), jnp.asarray(SIZES))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, one_by_one(x, np.asarray(w, np.float32), SIZES), rtol=2e-2)


def test_dropout_of_experts_is_of_the_updates_input_alone():
    leaf = stacked_leaves()["lora"]
    keys = jax.random.split(jax.random.key(0), E)
    gone = leaves.Dropout(jnp.full(E, 0.999999), keys)
    x = jnp.asarray(RNG.normal(size=(M, 64)), jnp.float32)
    for kind in ("lora", "lokr"):
        leaf = stacked_leaves()[kind]
        y = ops.ragged(x, leaf.__class__(**vars(leaf) | {"dropout": gone}), jnp.asarray(SIZES))
        np.testing.assert_allclose(
            y, ops.ragged(x, leaf.w, jnp.asarray(SIZES)), rtol=1e-5, atol=1e-5
        )
