"""Leaves in a kernel's order: what they stand for, their products, and when they are made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import ops, quant, tree
from lorax.quant import packed


class Device:
    """An accelerator that is not here, and compiles nothing."""

    platform, compute_capability, device_kind = "gpu", "9.0", "H200"


def leaf_of(shape, kind="nf4", seed=0):
    w = np.random.default_rng(seed).standard_normal(shape)
    return quant.quantise(jnp.asarray(w, jnp.bfloat16), kind, double=True)


@pytest.mark.parametrize("on", ["gpu", "tpu"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_it_stands_for_the_same_weight(on, kind):
    """Table, scale and product are rounded to bfloat16 one by one: three times 2^-8 at most."""
    leaf = leaf_of((2, 256, 128), kind)
    other = packed.pack(leaf, on)
    assert (other.shape, other.dtype) == (leaf.shape, leaf.dtype)
    expected = np.float64(leaf.decoded())
    np.testing.assert_allclose(np.float64(other.decoded()), expected, rtol=4 * 2**-8)


@pytest.mark.parametrize("on", ["gpu", "tpu"])
@pytest.mark.parametrize("rows", [3, 600])
def test_its_products_and_gradient(on, rows):
    leaf = packed.pack(leaf_of((256, 384)), on)
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(rng.standard_normal((rows, n)), jnp.bfloat16) for n in (256, 384))
    w = np.float64(leaf.decoded())
    y = leaf.product(x, 0)
    assert y.dtype == jnp.bfloat16
    # A compiler may leave out some of a weight's three roundings, each 2^-9 at most.
    off = lambda y, exact: np.linalg.norm(np.float64(y) - exact) / np.linalg.norm(exact)
    assert off(y, np.float64(x) @ w) < 4 * 2**-9
    loss = lambda x: jnp.sum((leaf.product(x, 0) * g).astype(jnp.float32))
    dx = jax.jit(jax.grad(loss))(x)
    assert off(dx, np.float64(g) @ w.T) < 4 * 2**-9
    members = jax.vmap(lambda x: leaf.product(x, 0))(x.reshape(3, -1, 256))
    np.testing.assert_array_equal(members.reshape(rows, 384), y)


@pytest.mark.parametrize("rows", [3, 600])
def test_the_product_of_a_kernel_with_several_output_axes(rows):
    """A layer with heads (`nn.DenseGeneral`): its kernel is (in, heads, features)."""
    flat = packed.pack(leaf_of((256, 384)), "gpu")
    heads = dataclasses.replace(flat, kernel=(256, 3, 128))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 256)), jnp.bfloat16)
    np.testing.assert_array_equal(heads.product(x, 0), flat.product(x, 0))


def test_the_kernel_of_few_rows_is_in_the_program():
    """Lowered for a GPU that is not here: for 16 rows, not for 600 and not backward."""
    leaf = packed.pack(leaf_of((256, 384)), "gpu")
    x = lambda rows, n: jax.ShapeDtypeStruct((rows, n), jnp.bfloat16)
    text = lambda rows, n, axis: (
        jax.jit(lambda x: leaf.product(x, axis))
        .trace(x(rows, n))
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert "mosaic_gpu" in text(16, 256, 0)
    assert "mosaic_gpu" not in text(600, 256, 0)
    assert "mosaic_gpu" not in text(16, 384, 1)


def test_a_base_is_packed_where_a_kernel_compiles(monkeypatch):
    base = lorax.load("gpt2-nano")
    # Of q, k, v and o (128 x 128) the kernel can do none: it wants 256 inputs.
    params = quant.quantize(base.params, sites=base.sites)
    monkeypatch.setattr(packed, "_fails", lambda *_: "")
    found = tree.flatten(quant.placed(params, Device(), "bfloat16"))
    kinds = {p.split("/")[-2]: type(x).__name__ for p, x in found.items() if ops.is_operator(x)}
    assert kinds.pop("down") == "Packed" and set(kinds.values()) == {"Quantised"}
    for device, dtype in ((Device(), "float32"), (jax.devices()[0], "bfloat16")):
        assert quant.placed(params, device, dtype) is params
    older = Device()
    older.compute_capability = "8.0"
    assert quant.placed(params, older, "bfloat16") is params


def test_a_kernel_that_does_not_compile_is_left_with_one_warning(monkeypatch):
    params = quant.quantize(lorax.load("gpt2-nano").params)
    monkeypatch.setattr(packed, "_fails", lambda *_: "NotImplementedError: no such layout")
    with pytest.warns(UserWarning, match="gpu kernel: NotImplementedError: no such") as said:
        assert quant.placed(params, Device(), "bfloat16") is params
    assert len(said) == 1


def test_why_it_does_not_compile_is_the_compilers_word():
    """On a CPU there is no such kernel."""
    why = packed._fails("gpu", 256, 128, "nf4", jax.devices("cpu")[0])
    assert "cpu" in why.lower()
