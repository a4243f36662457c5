"""Functions computed with operator leaves: what their jaxprs do with a kernel, and the values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from lorax import interpret, leaves, ops
from lorax.ops import Site

IDS = jnp.array([[0, 3, 6], [1, 2, 5]])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X, IMAGES = normal(1, 2, 5, 4), normal(2, 2, 6, 6, 3)
KERNEL, TABLE, HEADS = normal(3, 4, 7), normal(4, 7, 4), normal(5, 4, 2, 3)
STACK, WINDOW = normal(6, 3, 4, 4), normal(7, 3, 3, 3, 5)


def scanned(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def convolved(w, x, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (2, 2), "padding": "SAME", "dimension_numbers": numbers} | options
    return jax.lax.conv_general_dilated(x, w, **options)


def heads_last(x, w):
    """As `jnp.einsum` writes it: the kernel comes first, and the result is transposed."""
    return jnp.einsum("btd,dnh->bnth", x, w)


LINEAR = Site("linear", 0, (0,), (1,))
CASES = {
    "product": (lambda w, x: x @ w, KERNEL, X, LINEAR),
    "transposed": (lambda w, x: x @ w.T, TABLE, X, Site("linear", 0, (1,), (0,))),
    "bfloat16": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), KERNEL, X, LINEAR),
    "heads": (lambda w, x: heads_last(x, w), HEADS, X, Site("linear", 0, (0,), (1, 2))),
    "from heads": (
        lambda w, x: jnp.einsum("btnh,nhd->btd", x, w),
        *(normal(8, 2, 3, 4), normal(9, 2, 5, 2, 3), Site("linear", 0, (0, 1), (2,))),
    ),
    "rows": (lambda w, ids: jnp.take(w, ids, axis=0), TABLE, IDS, Site("embed", 0, (0,), (1,))),
    "tied": (lambda w, ids: jnp.sin(w[ids]) @ w.T, TABLE, IDS, Site("embed", 0, (0,), (1,))),
    "one hot": (lambda w, ids: jax.nn.one_hot(ids, 7) @ w, TABLE, IDS, LINEAR),
    "inside jit": (jax.jit(lambda w, x: jax.nn.gelu(x @ w)), KERNEL, X, LINEAR),
    "remat": (jax.checkpoint(lambda w, x: jnp.sin(x @ w)), KERNEL, X, LINEAR),
    "stack": (scanned, STACK, X, Site("linear", 1, (0,), (1,))),
    "constant of a scan": (
        lambda w, x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0],
        *(normal(8, 4, 4), X, LINEAR),
    ),
    "window": (convolved, WINDOW, IMAGES, Site("conv", 0, (0, 1, 2), (3,))),
}
OTHER = {
    "scaled": (lambda w, x: x @ (2 * w), KERNEL, X),
    "parts": (lambda w, x: x @ w[:, :3], KERNEL, X),
    "branches": (
        lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: -x @ w),
        *(KERNEL, X),
    ),
    "one kernel an expert": (lambda w, x: jnp.einsum("ebd,edf->ebf", x[:, :3], w), STACK[:2], X),
    "groups": (
        functools.partial(convolved, feature_group_count=3),
        *(normal(8, 3, 3, 1, 6), IMAGES),
    ),
}


def low_rank(w, site, rank=2):
    axes, n_in, n_out = site.matrix_shape(w.shape)
    a, b = normal(20, *axes, n_in, rank), normal(21, *axes, rank, n_out)
    return leaves.LowRank(w, a, b, jnp.full(axes, 0.5))


def found_in(function, w, x):
    """(the jaxpr, the site of its first argument, what else is found about it)."""
    jaxpr = jax.make_jaxpr(function)(w, x)
    found = interpret.search(jaxpr, [0])[0]
    return jaxpr, found.site(w.ndim), found


@pytest.mark.parametrize("case", CASES)
def test_a_leaf_is_computed_as_the_kernel_that_it_stands_for(case):
    """Values, gradients of a factor, and two members side by side."""
    function, w, x, expected = CASES[case]
    jaxpr, site, found = found_in(function, w, x)
    assert site == expected and not found.is_whole(site)
    leaf = low_rank(w, site)
    value = lambda leaf: interpret.evaluate(jaxpr, [leaf, x], {0: site}, {})[0]
    dense = lambda leaf: function(ops.dense(leaf, site), x)
    loss = lambda a, f: jnp.sum(jnp.sin(f(dataclasses.replace(leaf, a=a)).astype(jnp.float32)))

    @quick.jit
    def both(leaf):
        two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), leaf)
        return [(f(leaf), jax.grad(loss)(leaf.a, f), jax.vmap(f)(two)) for f in (value, dense)]

    for ours, right in zip(*both(leaf), strict=True):
        assert ours.dtype == right.dtype
        close = {"rtol": 3e-2, "atol": 0.3} if case == "bfloat16" else {"rtol": 1e-4, "atol": 1e-4}
        np.testing.assert_allclose(np.float32(ours), np.float32(right), **close)


@pytest.mark.parametrize("case", OTHER)
def test_what_no_rule_covers_gets_the_plain_kernel_and_is_told(case):
    function, w, x = OTHER[case]
    jaxpr, site, found = found_in(function, w, x)
    assert site.kind == "other" and found.is_whole(site)
    leaf = low_rank(w, site)
    value = lambda leaf: interpret.evaluate(jaxpr, [leaf, x], {0: site}, {})[0]
    dense = lambda leaf: function(ops.dense(leaf, site), x)
    np.testing.assert_allclose(*quick.jit(lambda leaf: (value(leaf), dense(leaf)))(leaf), atol=1e-5)


def test_a_kernel_that_is_also_read_otherwise_is_told():
    function = lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)) + x @ w
    jaxpr, site, found = found_in(function, KERNEL, X)
    assert site == LINEAR and found.is_whole(site)
    leaf = low_rank(KERNEL, site)
    y = interpret.evaluate(jaxpr, [leaf, X], {0: site}, {})[0]
    np.testing.assert_allclose(y, function(ops.dense(leaf, site), X), rtol=1e-5, atol=1e-4)


def test_indices_beyond_the_table_are_as_the_function_has_them():
    ids = jnp.array([0, -1, 9, -9])
    for mode in ("fill", "clip"):
        function = lambda w, ids, mode=mode: jnp.take(w, ids, axis=0, mode=mode)
        jaxpr, site, _ = found_in(function, TABLE, ids)
        leaf = low_rank(TABLE, site)
        y = interpret.evaluate(jaxpr, [leaf, ids], {0: site}, {})[0]
        right = function(ops.dense(leaf, site), ids)
        np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_an_adapter_after_a_layer_reads_its_bias_too(stacked):
    """`Bottleneck.affine`: h = x w + bias, y = h + f(h down) up."""
    layer = lambda x, w, b: jax.nn.relu(x @ w + b[None, None])
    run = lambda w, b, x: jax.lax.scan(lambda x, wb: (layer(x, *wb), None), x, (w, b))[0]
    w, b = (STACK, normal(8, 3, 4)) if stacked else (KERNEL, normal(8, 7))
    function = run if stacked else lambda w, b, x: layer(x, w, b)
    jaxpr = jax.make_jaxpr(function)(w, b, X)
    found = interpret.search(jaxpr, [0, 1] if stacked else [0])
    site = found[0].site(w.ndim)
    assert found[0].bias == 1 and not found[0].is_whole(site)
    assert not stacked or (found[1].uses, len(found[1].scans)) == ((), 1)
    axes, n = (3,) * stacked, w.shape[-1]
    down, up = normal(9, *axes, n, 2), normal(10, *axes, 2, n)
    rest = jnp.ones((*axes, 2)), up, jnp.ones((*axes, n)), jnp.tanh
    leaf = leaves.Bottleneck(w, down, *rest)
    y = quick.jit(lambda *x: interpret.evaluate(jaxpr, x, {0: site}, {0: 1})[0])(leaf, b, X)
    x, w, b, down, up = map(np.asarray, (X, w, b, down, up))
    for i in np.ndindex(*axes):
        h = x @ w[i] + b[i]
        x = np.maximum(h + np.tanh(h @ down[i] + 1) @ up[i] + 1, 0)
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_a_bias_that_does_not_follow_the_product_is_refused_where_it_matters():
    bias = normal(8, 7)
    jaxpr = jax.make_jaxpr(lambda w, b, x: x @ w + b[None, None])(KERNEL, bias, X)
    later = jax.make_jaxpr(lambda w, b, x: jnp.sin(x @ w) + b[None, None])(KERNEL, bias, X)
    assert interpret.search(later, [0])[0].bias is None
    zeros = (jnp.zeros(shape) for shape in ((7, 2), (2,), (2, 7), (7,)))
    arguments = [leaves.Bottleneck(KERNEL, *zeros, jnp.tanh), bias, X]
    interpret.evaluate(jaxpr, arguments, {0: LINEAR}, {0: 1})
    with pytest.raises(ValueError, match="Bottleneck leaf computes with its layer's bias"):
        interpret.evaluate(later, arguments, {0: LINEAR}, {0: 1})


def test_arguments_that_are_passed_on_and_outputs_that_are_needed():
    def layers(x, y, w):
        (x, n), same = jax.lax.scan(lambda c, w: ((c[0] @ w, c[1]), w), (x, 0), w)
        return x, jax.jit(lambda y, w: (w, y))(y, same), n + 1

    jaxpr = jax.make_jaxpr(layers)(X, KERNEL, STACK)
    assert interpret.passed_on(jaxpr.jaxpr) == [None, 2, 1, None]
    smaller, used = interpret.needed(jaxpr, 1)
    assert used == [True, False, True] and len(smaller.out_avals) == 1
    swapped = jax.make_jaxpr(
        lambda a, b: jax.lax.scan(lambda c, _: (c[::-1], None), (a, b), None, 3)
    )
    assert interpret.passed_on(swapped(X, X).jaxpr) == [None, None]
