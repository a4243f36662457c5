"""Operator leaves in Linen modules that know nothing of them.

Every module of `ZOO` runs with plain, bound and merged parameters: looped, scanned, rematerialised,
vmapped, with kernels whose axes stand in any order.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quick import jit
from support import traced

import lorax
from lorax import leaves, methods, ops, tree
from lorax.methods import lora
from lorax.ops import Site

RANK = 2
METHOD = lorax.method("lora", rank=RANK, targets=("re:.*",))
LINEAR, EMBED = Site("linear", 0, (0,), (1,)), Site("embed", 0, (0,), (1,))
CONV1, CONV2 = Site("conv", 0, (0, 1), (2,)), Site("conv", 0, (0, 1, 2), (3,))


def normal(seed, *shape, scale=1.0):
    """Normal float32 of the given standard deviation."""
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# --------------------------------------------------------------------------------------------- zoo


class Block(nn.Module):
    """A residual layer, with the (carry, output) signature of `nn.scan`."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(6, name="up")(x)
        return x + nn.Dense(4, use_bias=False, name="down")(nn.tanh(y)), None


class Looped(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x, _ = self.block(name=f"h_{i}")(x)
        return x


class Scanned(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            self.block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return stack(name="h")(x)[0]


class Vmapped(nn.Module):
    """Its two experts each see their own inputs: x (2, N, 4)."""

    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True})
        return experts(name="experts")(x)[0]


class Shared(nn.Module):
    """One layer called twice."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, name="dense")
        return dense(nn.tanh(dense(x)))


class Tied(nn.Module):
    """Embeds, and reads out with the transpose of the same matrix."""

    def setup(self):
        self.wte = nn.Embed(11, 4)

    def __call__(self, tokens):
        return self.wte.attend(nn.tanh(self.wte(tokens)))


class ConvNet(nn.Module):
    """Two-dimensional windows: strided SAME, dilated VALID, circular; then a linear layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3, 3), strides=2, name="strided")(x))
        x = nn.tanh(nn.Conv(3, (2, 2), kernel_dilation=2, padding="VALID", name="dilated")(x))
        x = nn.Conv(3, (3, 1), padding="CIRCULAR", use_bias=False, name="circular")(x)
        return nn.Dense(2, name="out")(x.mean(axis=(1, 2)))


class ConvSequence(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, 3, padding="CAUSAL", name="causal")(x))
        return nn.Conv(2, (2,), strides=(2,), padding=1, input_dilation=2, name="up")(x)


class Entry(NamedTuple):
    module: nn.Module
    inputs: jax.Array
    sites: dict[str, Site]


def einsum(string, kernel, ins, outs, *shape):
    """Every letter of the kernel has a size of its own."""
    module = nn.Einsum(kernel, string)
    return Entry(module, normal(1, *shape), {"kernel": Site("linear", 0, ins, outs)})


def general(features, axis, ins, outs, *shape):
    module = nn.DenseGeneral(features, axis=axis)
    return Entry(module, normal(1, *shape), {"kernel": Site("linear", 0, ins, outs)})


IN_BLOCK = {"up": LINEAR, "down": LINEAR}
LOOPED = {f"h_{i}/{name}/kernel": site for i in range(2) for name, site in IN_BLOCK.items()}
SCANNED = {f"h/{name}/kernel": site._replace(stack=1) for name, site in IN_BLOCK.items()}
VMAPPED = {path.replace("h/", "experts/"): site for path, site in SCANNED.items()}
HEADS_OUT = {
    f"{name}/kernel": Site("linear", 0, (0,), (1, 2)) for name in ("query", "key", "value")
}
HEADS_IN = {"out/kernel": Site("linear", 0, (0, 1), (2,))}
CONVS = {f"{name}/kernel": CONV2 for name in ("strided", "dilated", "circular")}
X, TOKENS = normal(1, 3, 4), jnp.array([[1, 5, 5], [0, 10, 2]])

ZOO = {
    "dense": Entry(nn.Dense(3), normal(1, 2, 3, 4), {"kernel": LINEAR}),
    "attention": Entry(
        nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=5),
        normal(1, 2, 3, 4),
        HEADS_OUT | HEADS_IN,
    ),
    "general-last": general((2, 3), -1, (0,), (1, 2), 2, 3, 4),
    "general-middle": general((2, 3), 1, (0,), (1, 2), 2, 3, 4),
    "general-apart": general(5, (-1, 1), (0, 1), (2,), 2, 3, 4, 5),
    "einsum-join": einsum("bthk,hkd->btd", (2, 3, 5), (0, 1), (2,), 2, 3, 2, 3),
    "einsum-dots": einsum("...d,df->...f", (4, 3), (0,), (1,), 2, 3, 4),
    "einsum-out-first": einsum("...d,fd->...f", (3, 4), (1,), (0,), 2, 3, 4),
    "einsum-moved": einsum("b...kh,fkgh->gb...f", (5, 3, 2, 4), (1, 3), (0, 2), 2, 3, 3, 4),
    "einsum-spaced": einsum("b t d, f d -> f t b", (3, 4), (1,), (0,), 2, 3, 4),
    "embed": Entry(nn.Embed(11, 4), TOKENS, {"embedding": EMBED}),
    "tied": Entry(Tied(), TOKENS, {"wte/embedding": EMBED}),
    "conv-2d": Entry(ConvNet(), normal(1, 2, 8, 7, 3), CONVS | {"out/kernel": LINEAR}),
    "conv-1d": Entry(
        ConvSequence(), normal(1, 2, 5, 3), {"causal/kernel": CONV1, "up/kernel": CONV1}
    ),
    "conv-batches": Entry(nn.Conv(4, (3,)), normal(1, 2, 2, 5, 3), {"kernel": CONV1}),
    "shared": Entry(Shared(), X, {"dense/kernel": LINEAR}),
    "looped": Entry(Looped(), X, LOOPED),
    "remat": Entry(Looped(nn.remat(Block)), X, LOOPED),
    "scanned": Entry(Scanned(), X, SCANNED),
    "scanned-remat": Entry(Scanned(nn.remat(Block, prevent_cse=False)), X, SCANNED),
    "vmapped": Entry(Vmapped(), normal(1, 2, 3, 4), VMAPPED),
}
every_entry = pytest.mark.parametrize("name", ZOO)


def start(name):
    """(parameters, trainable, constants) of LoRA on every site, no factor zero."""
    module, inputs, sites = ZOO[name]
    params = random(jax.eval_shape(module.init, jax.random.key(0), inputs)["params"])
    trainable, constants = {}, {}
    for path, site in sites.items():
        layers, n_in, n_out = site.matrix_shape(tree.flatten(params)[path].shape)
        shape = jax.ShapeDtypeStruct
        trainable[path] = {
            "a": shape((*layers, n_in, RANK), jnp.float32),
            "b": shape((*layers, RANK, n_out), jnp.float32),
        }
        constants[path] = {"s": jnp.full(layers, 1.5), "dropout": jnp.full(layers, 0.5)}
    return params, random(tree.unflatten(trainable)), tree.unflatten(constants)


def random(shapes):
    arrays, treedef = jax.tree.flatten(shapes)
    values = [normal(3 + i, *x.shape, scale=0.5) for i, x in enumerate(arrays)]
    return jax.tree.unflatten(treedef, values)


@every_entry
def test_sites_are_the_kernels_and_what_their_axes_mean(name):
    module, inputs, sites = ZOO[name]
    assert lorax.sites(module, start(name)[0], inputs) == sites


@every_entry
def test_bound_is_merged_in_value_and_gradients_and_starts_as_its_base(name):
    module, inputs, sites = ZOO[name]
    params, trainable, constants = start(name)
    plain = lambda params: module.apply({"params": params}, inputs)
    bound = lambda trainable: lorax.apply(module, lora.bind(trainable, constants, params), inputs)

    def merged(trainable):
        state = methods.State(trainable, constants)
        return plain(lorax.merge(METHOD, state, params, sites))

    @jit
    def run(trainable):
        at_start = {
            path: jnp.zeros_like(leaf) if path.endswith("/b") else leaf
            for path, leaf in tree.flatten(trainable).items()
        }
        one, pull_bound = jax.vjp(bound, trainable)
        two, pull_merged = jax.vjp(merged, trainable)
        dy = normal(9, *one.shape)
        grads = pull_bound(dy)[0], pull_merged(dy)[0]
        return plain(params), bound(tree.unflatten(at_start)), one, two, *grads

    base, unchanged, one, two, grads, expected = jax.device_get(run(trainable))
    # Adding zero is exact; the same product in another program may be rounded otherwise.
    np.testing.assert_allclose(unchanged, base, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    assert np.abs(one - base).max() > 0.1
    for path, want in tree.flatten(expected).items():
        assert np.abs(want).max() > 1e-2, path
        grad = tree.flatten(grads)[path]
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-4, err_msg=path)


@every_entry
def test_without_the_interceptor_a_call_fails(name):
    module, inputs, _ = ZOO[name]
    params, trainable, constants = start(name)
    variables = {"params": lora.bind(trainable, constants, params)}
    with pytest.raises((TypeError, ValueError), match="LowRank"):
        jax.eval_shape(module.apply, variables, inputs)


@pytest.mark.parametrize("name", ["attention", "einsum-moved", "conv-batches", "scanned", "tied"])
def test_dense_is_the_merged_kernel(name):
    params, trainable, constants = start(name)
    sites = ZOO[name].sites

    @jit
    def run(trainable):
        state = methods.State(trainable, constants)
        merged = tree.flatten(lorax.merge(METHOD, state, params, sites))
        bound = tree.flatten(lora.bind(*state, params))
        return {path: (ops.dense(bound[path], site), merged[path]) for path, site in sites.items()}

    for path, (kernel, merged) in run(trainable).items():
        np.testing.assert_allclose(kernel, merged, rtol=1e-6, atol=1e-6, err_msg=path)


def test_dense_rounds_the_update_once():
    """In bfloat16 the sum is made in float32: w + s a b rounded, not rounded parts added."""
    w, a, b = normal(0, 8, 8).astype(jnp.bfloat16), normal(1, 8, 2, scale=0.01), normal(2, 2, 8)
    kernel = ops.dense(leaves.LowRank(w, a, b, jnp.float32(1)), LINEAR)
    exact = w.astype(np.float32) + a @ b
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(kernel), np.float32(exact.astype(jnp.bfloat16)))
    g = normal(3, 8)
    scaled = ops.dense(leaves.Scaled(leaves.LowRank(w, a, b, jnp.float32(1)), g), LINEAR)
    exact = (exact * g[None]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(scaled), np.float32(exact))


HALF = ("dense", "attention", "general-apart", "einsum-moved", "embed", "conv-batches")


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_computation_leaves_adapters_in_float32(name):
    module, inputs, _ = ZOO[name]
    params, trainable, constants = start(name)

    @functools.partial(jit, static_argnums=0)
    def run(module, trainable):
        out, pull = jax.vjp(
            lambda t: lorax.apply(module, lora.bind(t, constants, params), inputs), trainable
        )
        return out, pull(jnp.ones_like(out))[0]

    out, grads = jax.device_get(run(module.clone(dtype=jnp.bfloat16), trainable))
    full, full_grads = jax.device_get(run(module, trainable))
    assert out.dtype == jnp.bfloat16 and full.dtype == jnp.float32
    np.testing.assert_allclose(np.float32(out), full, rtol=0.05, atol=0.1)
    for path, grad in tree.flatten(grads).items():
        want = tree.flatten(full_grads)[path]
        assert grad.dtype == jnp.float32
        np.testing.assert_allclose(grad, want, rtol=0.1, atol=0.03 * np.abs(want).max())


class Unadaptable(nn.Module):
    """Kernels that are many matrices, and a product that sums over its input."""

    @nn.compact
    def __call__(self, x):  # (2, 3, 4)
        x = nn.DenseGeneral(4, batch_dims=(0,), name="batched")(x)
        x = nn.Einsum((3, 4, 4), "btd,tdf->btf", name="experts")(x)
        x = x + nn.Einsum((4, 4), "btd,df->bf", name="summed")(x)[:, None]
        x = nn.Conv(4, (3,), feature_group_count=2, name="grouped")(x)
        return nn.Dense(2, name="plain")(x)


def test_sites_leave_out_what_is_no_product_with_one_matrix():
    x = normal(1, 2, 3, 4)
    shapes = jax.eval_shape(Unadaptable().init, jax.random.key(0), x)["params"]
    assert lorax.sites(Unadaptable(), shapes, x) == {"plain/kernel": LINEAR}


# ---------------------------------------------------------------------------------- merged product


def low_rank():
    """(x, leaf) with as many rows as merging needs to pay."""
    w, a, b = normal(2, 6, 5), normal(3, 6, 2), normal(4, 2, 5)
    return normal(1, 3, 40, 6), leaves.LowRank(w, a, b, jnp.float32(0.7))


def test_the_product_out_of_a_rank_and_its_derivatives_are_those_of_a_product():
    """Of members side by side, with matrices of their own: value, gradients, and the derivative of
    the gradients, which curvature takes."""
    z, b, dy = normal(1, 4, 3, 5, 2), normal(2, 4, 2, 6), normal(3, 4, 3, 5, 6)

    @functools.partial(jit, static_argnums=0)
    def run(product, z, b):
        def of_member(z, b, dy):
            loss = lambda z, b: jnp.sum(dy * jnp.sin(product(z, b)))
            return product(z, b), *jax.jvp(jax.grad(loss, (0, 1)), (z, b), (jnp.cos(z), jnp.cos(b)))

        return jax.tree.leaves(jax.vmap(of_member)(z, b, dy))

    for ours, plain in zip(run(leaves.out_of_rank, z, b), run(jnp.matmul, z, b), strict=True):
        assert ours.dtype == plain.dtype
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_b_transposes_nothing_of_the_outputs_width():
    x, leaf = normal(1, 3, 40, 6), low_rank()[1]
    loss = lambda b: jnp.sum(jnp.tanh(ops.linear(x, dataclasses.replace(leaf, b=b))))
    text = jax.jit(jax.grad(loss)).lower(leaf.b).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert any("tensor<3x40x2xf32>, tensor<3x40x5xf32>) -> tensor<2x5xf32>" in x for x in products)


def test_merged_linear_has_the_value_and_the_five_gradients_of_the_factored_form():
    x, leaf = low_rank()
    dy = normal(5, 3, 40, 5)

    @functools.partial(jit, static_argnums=0)
    def run(f, *args):
        out, pull = jax.vjp(f, *args)
        return out, *pull(dy)

    factored = lambda x, w, a, b, s: x @ w + s * ((x @ a) @ b)
    args = (x, leaf.w, leaf.a, leaf.b, leaf.s)
    names = ("y", "dx", "dw", "da", "db", "ds")
    merged = run(leaves.merged_linear, *args)
    with jax.enable_x64(True):  # in float32 the sum of ds alone is off by 2e-4
        out, pull = jax.vjp(factored, *(jnp.asarray(np.float64(x)) for x in args))
        exact = (out, *pull(jnp.asarray(np.float64(dy))))
    for name, ours, plain in zip(names, merged, exact, strict=True):
        assert ours.shape == plain.shape and ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-4, err_msg=name)


def merges(x, leaf) -> bool:
    with pytest.MonkeyPatch.context() as patched:
        calls = traced(patched, leaves, "merged_linear")
        jax.eval_shape(ops.linear, x, leaf)
    return bool(calls)


def test_linear_merges_only_where_it_may_and_where_it_pays():
    x, leaf = low_rank()
    allowed = leaves.allow_merge({"q": {"kernel": leaf, "bias": x}})["q"]["kernel"]
    assert merges(x, allowed)
    assert not merges(x, leaf)
    assert not merges(x[:1, :2], allowed)  # few rows: making w + s a b costs more than it saves
    assert not merges(x.astype(jnp.bfloat16), allowed)  # would round small updates away
    how = leaves.Dropout(jnp.float32(0.5), jax.random.key(0))
    assert not merges(x, dataclasses.replace(allowed, dropout=how))


# ----------------------------------------------------------------------------------- other leaves


def around(leaf, seed):
    """Another update, of the same sizes, on top of a `LowRank`."""
    like = lambda x, i: normal(seed + i, *x.shape, scale=0.5)
    return leaves.LowRank(leaf, like(leaf.a, 1), like(leaf.b, 2), jnp.full(leaf.s.shape, 0.7))


def bound_leaves(name):
    params, trainable, constants = start(name)
    return params, tree.flatten(lora.bind(trainable, constants, params)), ZOO[name].sites


NESTED = ("dense", "attention", "general-apart", "einsum-moved", "tied", "conv-2d", "scanned")


@pytest.mark.parametrize("name", NESTED)
def test_leaves_around_leaves_are_the_kernel_that_they_stand_for(name):
    """Columns scaled of w + s a b + s' a' b', in value and gradients; biases are not scaled."""
    module, inputs, _ = ZOO[name]
    params, flat, sites = bound_leaves(name)
    for path in sites:
        leaf = around(flat[path], 20)
        flat[path] = leaves.Scaled(leaf, normal(30, *leaf.b.shape[:-2], leaf.b.shape[-1]))
    nested = {path: flat.pop(path) for path in sites}

    def bound(nested):
        return lorax.apply(module, tree.unflatten(flat | nested), inputs)

    def plain(nested):
        kernels = {path: ops.dense(leaf, sites[path]) for path, leaf in nested.items()}
        return module.apply({"params": tree.unflatten(flat | kernels)}, inputs)

    def run(f):
        out, pull = jax.vjp(f, nested)
        return out, pull(normal(9, *out.shape))[0]

    (one, grads), (two, expected) = (
        jit(run, static_argnums=0)(bound),
        jit(run, static_argnums=0)(plain),
    )
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-4)
    pairs = zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True)
    for (path, grad), want in pairs:
        size = np.abs(want).max()
        assert size > 1e-2, path
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5 * size, err_msg=str(path))


ROWS = {"dense": 2, "attention": 2, "general-last": 2, "einsum-join": 2, "tied": 2, "scanned": 3}


@pytest.mark.parametrize("name", ROWS)
def test_each_row_has_its_own_adapter(name):
    """One call with three adapters, the second nothing, is three calls, row by row."""
    module, inputs, _ = ZOO[name]
    params, flat, sites = bound_leaves(name)
    rows = jnp.array([2, 0, 1][: ROWS[name]], jnp.int32)
    assert inputs.shape[0] == len(rows)
    three = [dict(flat), dict(flat), dict(flat)]
    for path in sites:
        leaf = flat[path]
        other = dataclasses.replace(around(leaf, 40), w=leaf.w)
        own = [leaf, dataclasses.replace(leaf, s=0 * leaf.s), other]
        for one, params_of in zip(own, three, strict=True):
            params_of[path] = one
        stack = leaf.s.ndim
        a, b, s = (jnp.stack([getattr(x, k) for x in own], stack) for k in "abs")
        every_layer = jnp.broadcast_to(rows, (*leaf.s.shape, len(rows)))
        flat[path] = leaves.Mixed(leaf.w, a, b, s, every_layer)
    apply = lambda flat: lorax.apply(module, tree.unflatten(flat), inputs)
    mixed, *separate = jit(lambda: [apply(x) for x in (flat, *three)])()
    assert np.abs(separate[0] - separate[1]).max() > 0.1
    for i, row in enumerate(rows):
        np.testing.assert_allclose(mixed[i], separate[row][i], rtol=1e-5, atol=1e-5)


def test_mixed_leaves_say_what_they_can_not():
    w, a, b = normal(0, 3, 4), normal(1, 2, 3, 1), normal(2, 2, 1, 4)
    leaf = leaves.Mixed(w, a, b, jnp.ones(2), jnp.array([0, 1, 1], jnp.int32))
    with pytest.raises(ValueError, match="a batch of 2 rows, but adapters for 3"):
        ops.linear(normal(3, 2, 5, 3), leaf)
    with pytest.raises(ValueError, match="a Mixed leaf is not a single kernel"):
        ops.dense(leaf, LINEAR)
    with pytest.raises(ValueError, match="convolution with a Mixed"):
        lorax.apply(nn.Conv(4, (3,)), {"kernel": leaf, "bias": b[0, 0]}, normal(3, 3, 5, 3))


def test_positions_that_all_rows_share_still_differ_by_adapter():
    w, a, b = normal(0, 5, 4), normal(1, 2, 5, 1), normal(2, 2, 1, 4)
    leaf = leaves.Mixed(w, a, b, jnp.array([1.0, 0.0]), jnp.array([0, 1, 0], jnp.int32))
    out = jit(ops.embed)(jnp.array([[3, 1]]), leaf)
    own = (w + a[0] @ b[0])[jnp.array([3, 1])]
    np.testing.assert_allclose(
        out, jnp.stack([own, w[jnp.array([3, 1])], own]), rtol=1e-5, atol=1e-6
    )


def test_an_untied_embedding_reads_out_with_its_head():
    params, flat, _ = bound_leaves("tied")
    w, head = flat["wte/embedding"], normal(50, 11, 4)
    x = normal(1, 2, 4)
    leaf = leaves.Untied(w, head)
    np.testing.assert_allclose(ops.attend(x, leaf), x @ head.T, rtol=1e-6)
    np.testing.assert_array_equal(ops.embed(TOKENS, leaf), ops.embed(TOKENS, w))
    with pytest.raises(ValueError, match="Untied leaf is not a single kernel"):
        ops.dense(leaf, EMBED)


@pytest.mark.parametrize("name", ["dense", "attention", "tied", "scanned", "conv-2d"])
def test_dora_gives_the_columns_their_lengths(name):
    params, flat, sites = bound_leaves(name)

    @jit
    def run():
        out = {}
        for path, site in sites.items():
            *layers, _, n_out = flat[path].b.shape
            m = 1 + jnp.abs(normal(60, *layers, n_out))
            kernel = site.to_matrix(ops.dense(flat[path], site))
            scaled = site.to_matrix(ops.dense(leaves.dora(flat[path], m, site), site))
            out[path] = kernel, scaled, leaves.column_norms(flat[path], site), m
        return out

    for kernel, scaled, norms, m in run().values():
        want = np.linalg.norm(kernel, axis=-2)
        np.testing.assert_allclose(norms, want, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(scaled, axis=-2), m, rtol=1e-5)
        np.testing.assert_allclose(scaled / m[..., None, :], kernel / want[..., None, :], atol=1e-5)


def test_dora_takes_the_lengths_it_divides_by_for_constants():
    """Section 4.3 of the paper; and a column of zeros stays one."""
    x, leaf = low_rank()
    leaf = dataclasses.replace(leaf, w=leaf.w.at[:, 1].set(0), b=leaf.b.at[:, 1].set(0))
    m = jnp.arange(1.0, 6.0)

    def ours(a, b, m):
        return jnp.sum(
            ops.linear(x, leaves.dora(dataclasses.replace(leaf, a=a, b=b), m, LINEAR)) ** 2
        )

    def formula(a, b, m):
        kernel = leaf.w + leaf.s * a @ b
        norms = jax.lax.stop_gradient(jnp.linalg.norm(kernel, axis=0))
        return jnp.sum((x @ (kernel * (m / jnp.where(norms > 0, norms, 1))[None])) ** 2)

    grads = [jit(jax.value_and_grad(f, (0, 1, 2)))(leaf.a, leaf.b, m) for f in (ours, formula)]
    for one, two in zip(*map(jax.tree.leaves, grads), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-3)


def test_merging_is_allowed_inside_a_scaled_leaf():
    x, leaf = low_rank()
    allowed = leaves.allow_merge({"q": leaves.Scaled(leaf, jnp.ones(5))})["q"]
    assert merges(x, allowed)


# ----------------------------------------------------------------------------------------- dropout


def drop(x, rate, seed=0):
    return jit(leaves.dropout)(x, leaves.Dropout(jnp.float32(rate), jax.random.key(seed)))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(rate):
    out = np.asarray(drop(np.full((200, 500), 3, np.float32), rate))
    deviation = np.sqrt(rate * (1 - rate) / out.size)
    assert abs(np.mean(out == 0) - rate) <= 5 * deviation
    np.testing.assert_allclose(out[out != 0], 3 / (1 - rate), rtol=1e-6)
    assert abs(out.mean() - 3) <= 5 * 3 * deviation / (1 - rate) + 1e-5


def test_dropout_is_a_function_of_its_key():
    x = np.ones((20, 20), np.float32)
    np.testing.assert_array_equal(drop(x, 0.5, seed=1), drop(x, 0.5, seed=1))
    assert np.mean(np.asarray(drop(x, 0.5, seed=1)) != np.asarray(drop(x, 0.5, seed=2))) > 0.3
    assert leaves.dropout(x, None) is x
    assert drop(x.astype(jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_dropout_acts_on_the_input_of_the_adapter_alone():
    x, leaf = low_rank()
    how = leaves.Dropout(jnp.float32(0.5), jax.random.key(0))
    out = jit(ops.linear)(x, dataclasses.replace(leaf, dropout=how))
    x, dropped, w, a, b = map(np.asarray, (x, drop(x, 0.5), leaf.w, leaf.a, leaf.b))
    np.testing.assert_allclose(out, x @ w + 0.7 * (dropped @ a @ b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["attention", "conv-batches", "einsum-moved", "scanned-remat"])
def test_dropout_reaches_every_kind_of_layer(name):
    module, inputs, _ = ZOO[name]
    params, trainable, constants = start(name)

    def run(key):
        return lorax.apply(module, lora.bind(trainable, constants, params, key), inputs)

    keys = jnp.stack([jax.random.key(seed) for seed in (0, 0, 1)])
    once, again, other = np.asarray(jit(lambda keys: jax.lax.map(run, keys))(keys))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 1e-2


def test_layers_of_a_stack_drop_different_entries():
    params, trainable, constants = start("scanned")
    bound = tree.flatten(lora.bind(trainable, constants, params, jax.random.key(0)))
    keys = np.concatenate([jax.random.key_data(bound[path].dropout.key) for path in SCANNED])
    assert len(np.unique(keys, axis=0)) == len(keys) == 4


# ------------------------------------------------------------------------------------------- sites


@pytest.mark.parametrize("layers", [(), (2,), (2, 3)])
def test_a_site_takes_any_kernel_to_a_matrix_and_back(layers):
    """Every order of the axes and every cut between `ins` and `outs`."""
    shape = (2, 3, 4)
    orders = itertools.permutations(range(len(shape)))
    sites = [
        Site("linear", len(layers), order[:cut], order[cut:])
        for order in orders
        for cut in range(1, len(shape))
    ]
    kernel = np.arange(math.prod(layers + shape), dtype=np.float32).reshape(layers + shape)
    there_and_back = lambda site, kernel: site.from_matrix(site.to_matrix(kernel), kernel.shape)
    matrices = jit(lambda kernel: [site.to_matrix(kernel) for site in sites])(kernel)
    kernels = jit(lambda kernel: [there_and_back(site, kernel) for site in sites])(kernel)
    for site, matrix, back in zip(sites, matrices, kernels, strict=True):
        letters = lambda axes: "".join("abcd"[i] for i in axes)
        moved = np.einsum(f"...{'abcd'[: len(shape)]}->...{letters(site.ins + site.outs)}", kernel)
        axes, n_in, n_out = site.matrix_shape(kernel.shape)
        assert (axes, n_in) == (layers, math.prod(shape[i] for i in site.ins))
        np.testing.assert_array_equal(matrix, moved.reshape(*layers, n_in, n_out))
        np.testing.assert_array_equal(back, kernel)


# ---------------------------------------------------------------------------- bfloat16 operands


def test_half_multiplies_in_bfloat16_and_sums_in_float32():
    rng = np.random.default_rng(0)
    x, w, dy = (
        jnp.asarray(rng.standard_normal(s), "float32") for s in ((3, 5, 64), (64, 7), (3, 5, 7))
    )
    wide = lambda t: np.asarray(t.astype(jnp.bfloat16), np.float64)
    leaf = leaves.BFloat16Weight.of(w)
    y, pull = jax.vjp(lambda x: ops.linear(x, leaf), x)
    assert y.dtype == pull(dy)[0].dtype == jnp.float32
    np.testing.assert_allclose(y, wide(x) @ wide(w), rtol=0, atol=1e-5)
    np.testing.assert_allclose(pull(dy)[0], wide(dy) @ wide(w).T, rtol=0, atol=1e-5)
    head, pull = jax.vjp(lambda y: ops.attend(y, leaf), dy)
    np.testing.assert_allclose(head, wide(dy) @ wide(w).T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(pull(x)[0], wide(x) @ wide(w), rtol=0, atol=1e-5)
    rows = ops.embed(jnp.array([3, 0]), leaf, "float32")
    np.testing.assert_array_equal(rows, wide(w)[[3, 0]])


def test_an_adapter_on_a_half_weight_is_added_in_float32():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), "float32")
    x, w, a, b = draw(4, 16), draw(16, 6), draw(16, 2), 1e-3 * draw(2, 6)
    plain = leaves.BFloat16Weight.of(w)
    adapted = leaves.LowRank(plain, a, b, jnp.float32(0.5), merge=True)
    update = ops.linear(x, adapted) - ops.linear(x, plain)
    np.testing.assert_allclose(update, 0.5 * x @ a @ b, rtol=0, atol=1e-5)


def test_a_loop_over_layers_makes_no_float32_copy_of_half_weights():
    """What XLA does with bfloat16 arrays that a loop slices on a CPU."""
    stack, x = jnp.ones((3, 32, 32), jnp.bfloat16), jnp.ones((4, 32))

    def loss(x, stack, linear):
        return jnp.sum(jax.lax.scan(lambda x, w: (linear(x, w), None), x, stack)[0])

    def compiled(stack, linear):
        f = jax.jit(lambda x, stack: jax.grad(loss)(x, stack, linear))
        return f.lower(x, stack).compile().as_text()

    # Without the leaf, XLA of jaxlib 0.10 widens the whole stack; that of 0.12 no longer does.
    assert "f32[3,32,32]" not in compiled(leaves.BFloat16Weight.of(stack), ops.linear)


LAYERS = {
    "Dense": (nn.Dense(4), jnp.ones((2, 3))),
    "DenseGeneral": (nn.DenseGeneral((2, 2)), jnp.ones((2, 3))),
    "Einsum": (nn.Einsum((3, 4), "bi,io->bo"), jnp.ones((2, 3))),
    "Embed": (nn.Embed(5, 3), jnp.ones(2, jnp.int32)),
    "Conv": (nn.Conv(4, (3,)), jnp.ones((2, 8, 3))),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", ["plain", "jit"])
def test_a_call_without_lorax_apply_is_one_short_error(name, how):
    layer, x = LAYERS[name]
    params = layer.init(jax.random.key(0), x)["params"]
    kernel = "embedding" if name == "Embed" else "kernel"
    low = leaves.LowRank(params[kernel], jnp.ones((9, 2)), jnp.ones((2, 4)), jnp.float32(1))
    for leaf in (low, leaves.Scaled(low, jnp.ones(4)), leaves.Same(params[kernel])):
        call = jax.jit(layer.apply) if how == "jit" else layer.apply
        with pytest.raises((TypeError, ValueError), match=r"lorax\.apply") as caught:
            call({"params": params | {kernel: leaf}}, x)
        assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)
