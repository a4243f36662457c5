"""The product with a quantised weight: its values, its gradients, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import quant
from lorax.quant import matmul

#: (in, out): whole tiles; one tile; outputs that are no whole blocks, decoded whole.
SHAPES = [(128, 1024), (192, 96), (172, 64), (33, 7)]


def leaf_of(shape, kind="nf4", dtype=jnp.float32, seed=0, double=True):
    w = np.random.default_rng(seed).standard_normal(shape)
    return quant.quantise(jnp.asarray(w, dtype), kind, double=double)


def rows(n, width, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((n, width)), dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", quant.CODES)
@pytest.mark.parametrize("axis", [0, 1])
def test_it_is_the_product_with_the_decoded_weight(shape, kind, axis):
    leaf = leaf_of(shape, kind)
    x = rows(5, shape[axis])
    w = np.float64(leaf.decoded())
    expected = np.float64(x) @ (w if axis == 0 else w.T)
    found = jax.jit(lambda x, leaf: matmul.product(x, leaf, axis))(x, leaf)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    batched = matmul.product(x.reshape(5, 1, -1), leaf, axis)
    np.testing.assert_allclose(batched[:, 0], expected, atol=1e-5 * np.abs(expected).max())


def test_operands_in_bfloat16_sum_in_float32():
    leaf = leaf_of((4096, 64), dtype=jnp.bfloat16)
    x = rows(3, 4096, jnp.bfloat16)
    expected = np.float64(x) @ np.float64(leaf.decoded())
    found = matmul.product(x, leaf, 0)
    assert found.dtype == jnp.bfloat16
    # One rounding, of the result; sums in bfloat16 would be off by several per cent.
    np.testing.assert_allclose(np.float64(found), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_goes_to_the_input_alone(shape):
    leaf, x, g = leaf_of(shape), rows(4, shape[0]), rows(4, shape[1], seed=2)
    loss = lambda x: jnp.sum(matmul.product(x, leaf, 0) * g)
    expected = np.float64(g) @ np.float64(leaf.decoded()).T
    np.testing.assert_allclose(jax.grad(loss)(x), expected, atol=1e-5 * np.abs(expected).max())


def test_members_are_rows_of_one_product():
    """Batching folds them: the codes get no member axis, whichever way grad and vmap nest."""
    leaf, x = leaf_of((128, 1024)), rows(24, 128).reshape(6, 4, 128)
    square = lambda x: jnp.sum(matmul.product(x, leaf, 0) ** 2)
    one = jax.grad(lambda x: square(x))
    alone = jnp.stack([one(x[i]) for i in range(6)])
    for form in (jax.vmap(one), jax.grad(lambda x: jnp.sum(jax.vmap(square)(x)))):
        np.testing.assert_allclose(jax.jit(form)(x), alone, rtol=1e-5, atol=1e-3)
        text = str(jax.make_jaxpr(form)(x))
        assert "6,4,1024" in text  # members were there to be folded
        assert "u8[2,512,64]" in text and "u8[6," not in text
    folded = jax.jit(jax.vmap(lambda x: matmul.product(x, leaf, 0))).lower(x).compile()
    flat = jax.jit(lambda x: matmul.product(x, leaf, 0)).lower(x.reshape(24, 128)).compile()
    flops = [c.cost_analysis()["flops"] for c in (folded, flat)]
    assert flops[0] <= 1.01 * flops[1]


def test_members_with_weights_of_their_own():
    leaves = [leaf_of((128, 96), seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *leaves)
    x = rows(12, 128).reshape(3, 4, 128)
    product = lambda x, leaf: matmul.product(x, leaf, 0)
    each = jnp.stack([product(x[i], leaves[i]) for i in range(3)])
    np.testing.assert_allclose(jax.vmap(product)(x, stacked), each, rtol=1e-5, atol=1e-4)
    shared = jax.vmap(product, in_axes=(None, 0))(x[0], stacked)
    each = jnp.stack([product(x[0], leaf) for leaf in leaves])
    np.testing.assert_allclose(shared, each, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(1024, 1024), (1000, 1024)])
def test_a_loop_over_micro_batches_keeps_no_decoded_weight(shape):
    """Four layers, eight micro-batches: at most one layer is ever decoded, and of a weight that
    can be tiled, a tile."""
    n_in, n_out = shape
    one = leaf_of((n_in, n_out))
    back = leaf_of((n_out, n_in))
    stack = lambda leaf: jax.tree.map(lambda x: jnp.stack([x] * 4), leaf)

    def loss(x, leaves):
        def layer(h, pair):
            up, down = pair
            return h + matmul.product(jax.nn.relu(matmul.product(h, up, 0)), down, 0), None

        return jnp.sum(jax.lax.scan(layer, x, leaves)[0] ** 2)

    def step(xs, leaves):
        gradient = lambda total, x: (total + jax.grad(loss)(x, leaves), None)
        return jax.lax.scan(gradient, jnp.zeros_like(xs[0]), xs)[0]

    xs = jnp.zeros((8, 4, n_in))
    compiled = jax.jit(step).lower(xs, (stack(one), stack(back))).compile()
    layer = 4 * n_in * n_out
    limit = layer if n_in % 64 == 0 else 3 * layer  # codes to float32, and turned round
    assert compiled.memory_analysis().temp_size_in_bytes < limit
