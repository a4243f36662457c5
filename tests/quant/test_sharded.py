"""Quantised weights that a mesh divides: the same codes and products, and no device holds more than
its part of one layer."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax import divided, sharding
from lorax.quant import matmul, nf4, packed
from lorax.sharding import AFTER, LINEAR, Shape

MESHES = [Shape(1, 4, 2), Shape(2, 4, 1)]
LAYERS, WIDTH, INNER = 3, 256, 512


def drawn(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def placed(mesh, tree, specs):
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return jax.tree.map(place, tree, specs)


def on_devices(mesh, leaf):
    return placed(mesh, leaf, leaf.specs(leaf.by, mesh.shape))


def on_mesh(f, mesh, *specs):
    """f of members, as `lorax.train.members` spreads it."""
    return jax.shard_map(
        f, mesh=mesh, in_specs=specs, out_specs=P("member"), axis_names={"member"}, check_vma=False
    )


# ------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize(
    ("shape", "kind", "size"),
    [
        (MESHES[0], "nf4", (LAYERS, WIDTH, INNER)),
        (MESHES[1], "int8", (LAYERS, WIDTH, INNER)),
        (MESHES[0], "nf4", (2, 100, 32)),
    ],
)
def test_a_divided_kernel_has_the_codes_of_one_device(shape, kind, size):
    mesh, w = sharding.mesh(shape), drawn(*size, dtype=jnp.bfloat16)
    for by in (LINEAR, AFTER):
        one = nf4.quantise(w, kind, double=True, by=by)
        given = jax.device_put(w, NamedSharding(mesh, P(None, *by)))
        leaf = nf4.quantise(given, kind, double=True, by=by)
        specs = leaf.specs(by, mesh.shape)
        expected = placed(mesh, one, specs)
        for ours, theirs in zip(jax.tree.leaves(leaf), jax.tree.leaves(expected), strict=True):
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
            np.testing.assert_array_equal(ours, theirs)
        if size[1] == WIDTH:
            part = leaf.codes.addressable_shards[0].data
            assert part.size * shape.fsdp * shape.tensor == leaf.codes.size


# ---------------------------------------------------------------------------------------- products


def gradient(x, up, down):
    """Of a residual network under scan, as a model's layers are."""

    def layer(h, weights):
        up, down = weights
        y = matmul.product(jax.nn.silu(matmul.product(h, up, 0)), down, 0)
        return h + y / INNER, None

    value = lambda x: jnp.sum(jax.lax.scan(layer, x, (up, down))[0] ** 2)
    return jax.value_and_grad(value)(x)


@functools.cache
def weights(kind, double):
    up = nf4.quantise(drawn(LAYERS, WIDTH, INNER), kind, double=double)
    down = nf4.quantise(drawn(LAYERS, INNER, WIDTH, seed=1), kind, double=double, by=AFTER)
    return up, down


@pytest.mark.parametrize(
    ("shape", "kind", "double"),
    [(MESHES[0], "nf4", True), (MESHES[1], "nf4", False), (MESHES[0], "int8", True)],
)
def test_products_and_gradients_are_those_of_one_device(shape, kind, double):
    x, mesh = drawn(4, 8, 16, WIDTH, seed=2), sharding.mesh(shape)
    of_members = jax.vmap(gradient, in_axes=(0, None, None))
    expected = jax.jit(of_members)(x, *weights(kind, double))
    places = jax.device_put(x, NamedSharding(mesh, P("member", "fsdp")))
    arguments = places, *(on_devices(mesh, leaf) for leaf in weights(kind, double))
    compiled = jax.jit(on_mesh(of_members, mesh, P("member"), P(), P())).lower(*arguments).compile()
    for found, one in zip(compiled(*arguments), expected, strict=True):
        np.testing.assert_allclose(found, one, atol=1e-5 * np.abs(one).max())
    assert_local(compiled.as_text(), shape)


def assert_local(text, shape):
    """Codes and scales of one layer are gathered along fsdp; nothing larger than it is decoded."""
    size = lambda axes: int(np.prod([int(n) for n in axes.split(",")]))
    layer = WIDTH * INNER // shape.tensor
    most = {"u8": layer, "f32": layer // 64}
    gathers = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
    assert any(dtype == "u8" for dtype, _ in gathers)
    assert all(size(axes) <= most[dtype] for dtype, axes in gathers)
    activations = 4 * 8 * 16 * INNER // 8
    floats = re.findall(r"f32\[([\d,]+)\]", text)
    assert max(map(size, floats)) <= max(layer, activations * LAYERS)


@pytest.mark.parametrize("by", [LINEAR, AFTER])
def test_few_rows_are_sent_to_the_weight(by):
    """As those of a step of decoding: neither codes nor numbers of the weight are gathered."""
    mesh, leaf = sharding.mesh(Shape(1, 4, 2)), nf4.quantise(drawn(WIDTH, INNER), by=by)
    w, x = leaf.decoded(), drawn(4, 2, WIDTH, seed=1)

    def products(x, leaf, w):
        value = lambda x: jnp.sum(jnp.sin(divided.product(x, w, by, 0)))
        return matmul.product(x, leaf, 0), divided.product(x, w, by, 0), jax.grad(value)(x)

    expected = x @ w, x @ w, jnp.cos(x @ w) @ w.T
    given = x, on_devices(mesh, leaf), placed(mesh, w, P(*by))
    with jax.set_mesh(mesh):
        compiled = jax.jit(products).lower(*given).compile()
    for found, one in zip(compiled(*given), expected, strict=True):
        np.testing.assert_allclose(found, one, atol=1e-5 * np.abs(one).max())
    gathers = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    assert all(int(np.prod([int(n) for n in axes.split(",")])) <= 8 * INNER for axes in gathers)


# ----------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("on", ["gpu", "tpu"])
def test_a_kernels_order_is_divided_and_multiplies_as_one_device(on):
    """Few rows go to the parts of the weight, many rows gather it; the first use the kernel."""
    mesh, shape = sharding.mesh(Shape(1, 2, 2)), (512, 512)
    w = drawn(2, *shape, dtype=jnp.bfloat16)
    for by in (LINEAR, AFTER):
        one = packed.pack(nf4.quantise(w, by=by), on)
        given = on_devices(mesh, nf4.quantise(w, by=by))
        assert packed._device_part(given, on) == (256, 256)
        leaf = packed.pack(given, on)
        for ours, theirs in zip(*map(jax.tree.leaves, (leaf, on_devices(mesh, one))), strict=True):
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
            np.testing.assert_array_equal(ours, theirs)

        def products(x, leaf):
            few = leaf.product(x[0, :2], 0)
            return few, leaf.product(x, 0), leaf.product(few, 1)

        layer = jax.tree.map(lambda x: x[1], one)
        x = drawn(2, 4, 200, 512, seed=1, dtype=jnp.bfloat16)
        expected = jax.jit(products)(x, layer)
        last = jax.tree.map(lambda x: x[1], leaf)
        with jax.set_mesh(mesh):
            found = jax.jit(products)(x, last)
        for y, exact in zip(found, expected, strict=True):
            np.testing.assert_allclose(
                np.float64(y), np.float64(exact), atol=2**-7 * np.abs(np.float64(exact)).max()
            )


def test_the_kernel_is_called_on_each_device():
    """Lowered for GPUs that are not here."""
    mesh = sharding.mesh(Shape(1, 2, 2))
    leaf = packed.pack(on_devices(mesh, nf4.quantise(drawn(512, 512, dtype=jnp.bfloat16))), "gpu")
    x = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16)
    with jax.set_mesh(mesh):
        traced = jax.jit(lambda x, leaf: leaf.product(x, 0)).trace(x, leaf)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "32x256xi32" not in text


def test_a_part_that_the_kernel_cannot_use_stays_in_the_order_of_bitsandbytes():
    mesh = sharding.mesh(Shape(1, 4, 2))
    leaf = on_devices(
        mesh, nf4.quantise(drawn(512, 512, dtype=jnp.bfloat16))
    )  # parts have 128 inputs
    assert packed._device_part(leaf, "gpu") is None
