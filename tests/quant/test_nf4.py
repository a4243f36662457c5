"""Codes, scales and decoded values, bit for bit beside bitsandbytes."""

import statistics

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from support import require

import lorax
from lorax import intercept, ops, quant, tree
from lorax.quant import nf4

SHAPES = [(64, 64), (128, 3), (7, 9), (33, 5), (1, 1), (96, 32), (2, 700), (4096, 3)]  # (in, out)


@pytest.fixture(scope="module")
def bnb():
    """`bitsandbytes.functional`, without its attempts to compile what runs once."""
    functional, torch = require("bitsandbytes").functional, require("torch")
    torch.compiler.set_stance("force_eager")
    yield functional
    torch.compiler.set_stance("default")


def matrix(n_in, n_out, seed, kind, block):
    """W (out, in) float32 in which there are ties, blocks of zeros and blocks of one number."""
    rng = np.random.default_rng(seed)
    flat = rng.standard_normal(n_in * n_out).astype(np.float32)
    values = np.sort(nf4.CODES[kind].values)
    between = (values[1:] + values[:-1]) / np.float32(2)
    for start in range(0, flat.size, block):
        own = flat[start : start + block]
        what = rng.integers(5)
        if what == 0:
            own[:] = 0
        elif what == 1:
            own[:] = own[0]
        elif what == 2:  # the scale is a power of two: each is exactly between two values
            own[:] = rng.choice(between, own.size)
            own[rng.integers(own.size)] = 1
            own *= np.float32(2.0) ** rng.integers(-10, 10)
        elif what == 3:
            own *= np.float32(1e-3)
    return flat.reshape(n_out, n_in)


def packed(bnb, w, kind, block, dtype, double=False):
    import torch

    given = torch.tensor(w).to(getattr(torch, dtype))
    return bnb.quantize_4bit(given, blocksize=block, quant_type=kind, compress_statistics=double)


@hypothesis.given(
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(["nf4", "fp4"]),
    block=st.sampled_from([32, 64, 4096]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 10**6),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_codes_scales_and_values_are_those_of_bitsandbytes(bnb, shape, kind, block, dtype, seed):
    w = matrix(*shape, seed, kind, block)
    given = jnp.asarray(w).astype(dtype)
    ours = quant.quantise(given.T, kind, block)
    codes, state = packed(bnb, np.asarray(given, np.float32), kind, block, dtype)
    # A last block of zeros that is short gets the scale 1e-38 there, zero here: zero, both of them.
    absmax = np.where(state.absmax.numpy() == np.float32(1e-38), 0, state.absmax.numpy())
    np.testing.assert_array_equal(ours.absmax.reshape(-1), absmax)
    np.testing.assert_array_equal(ours.codes.reshape(-1), codes.numpy().reshape(-1))
    theirs = defined(codes.numpy().reshape(-1), absmax, state.code.numpy(), block, w.shape)
    if shape[0] % 64 == 0 and block < 2048:  # where the native decoder is right
        native = bnb.dequantize_4bit(codes, state).float().numpy()
        np.testing.assert_array_equal(native, np.asarray(jnp.asarray(theirs, given.dtype), "f4"))
    found = jax.jit(quant.Quantised.rows_of_outputs)(ours)
    assert found.dtype == given.dtype
    np.testing.assert_array_equal(found, jnp.asarray(theirs).astype(given.dtype))


def defined(codes, absmax, values, block, shape):
    """The definition, in float32 numpy."""
    n = np.prod(shape)
    each = np.repeat(absmax, block)[:n]
    return (values[np.stack([codes >> 4, codes & 15], 1).reshape(-1)[:n]] * each).reshape(shape)


def test_the_table_is_made_of_quantiles():
    """QLoRA's code: quantiles at equal steps of probability, 8 above zero and 7 below."""
    quantile = np.vectorize(statistics.NormalDist().inv_cdf)
    edge = 1 - (1 / 32 + 1 / 30) / 2
    above = quantile(np.linspace(edge, 0.5, 9)[:-1])
    below = -quantile(np.linspace(edge, 0.5, 8)[:-1])
    table = np.sort(np.concatenate([above, below, [0.0]])) / above.max()
    np.testing.assert_allclose(nf4.CODES["nf4"].values, table, atol=2e-7)


def test_the_dynamic_map_is_that_of_bitsandbytes(bnb):
    np.testing.assert_array_equal(nf4.DYNAMIC.values, bnb.create_dynamic_map().numpy())


def test_eight_bits_decode_as_those_of_bitsandbytes(bnb):
    import torch

    w = matrix(128, 5, 3, "int8", 64)
    ours = quant.quantise(jnp.asarray(w).T, "int8")
    theirs = bnb.dequantize_blockwise(
        torch.tensor(np.asarray(ours.codes).reshape(-1)),
        absmax=torch.tensor(np.asarray(ours.absmax).reshape(-1)),
        code=torch.tensor(nf4.CODES["int8"].values), blocksize=64,
    )  # fmt: skip
    np.testing.assert_array_equal(ours.rows_of_outputs().reshape(-1), theirs.numpy())
    # Steps are 1/127 of a block's scale: half of one is the most that is lost.
    lost = np.abs(w.reshape(-1, 64) - np.asarray(ours.rows_of_outputs()).reshape(-1, 64))
    assert np.all(lost <= np.asarray(ours.absmax).reshape(-1, 1) * (0.5 / 127 + 1e-6))


@pytest.mark.parametrize("shape", [(1024, 512), (100, 77)])
def test_nested_scales_decode_as_those_of_bitsandbytes(bnb, shape):
    """In one program, where a compiler would like to round a product and a sum only once."""
    w = np.random.default_rng(1).standard_normal(shape[::-1]).astype(np.float32)
    codes, state = packed(bnb, w, "nf4", 64, "float32", double=True)
    absmax = nf4.Nested(*(jnp.asarray(x.numpy()) for x in (
        state.absmax, state.state2.absmax, state.offset)))  # fmt: skip
    scales = (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).numpy()
    np.testing.assert_array_equal(jax.jit(nf4.Nested.decoded)(absmax), scales)
    codes = jnp.asarray(codes.numpy().reshape(-1))
    leaf = nf4.from_flat(codes, absmax, shape, "nf4", 64, jnp.float32)
    theirs = defined(np.asarray(codes), scales, state.code.numpy(), 64, w.shape)
    np.testing.assert_array_equal(jax.jit(nf4.Quantised.rows_of_outputs)(leaf), theirs)


def test_nested_codes_are_the_nearest():
    absmax = jnp.asarray(np.random.default_rng(0).uniform(0.01, 0.2, 5000), jnp.float32)
    nested = nf4._nest(absmax)
    assert nested.absmax.shape == (20,)
    values, scales = (
        np.float64(nf4.DYNAMIC.values),
        np.repeat(np.float64(nested.absmax), 256)[:5000],
    )
    wanted = (np.asarray(absmax) - np.asarray(nested.offset)) / np.where(scales, scales, 1)
    distance = np.abs(wanted[:, None] - values)
    chosen = distance[np.arange(5000), np.asarray(nested.codes)]
    assert np.all(chosen <= distance.min(1) + 1e-7)


def test_the_mean_of_scales_is_that_of_a_flat_list():
    """Bit for bit: with an axis of outputs, a compiler would sum it in another order."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 256, 192)), jnp.float32)
    scales = quant.quantise(w).absmax.reshape(2, -1)
    offset = jax.jit(lambda x: jnp.mean(x, axis=1))(scales)
    np.testing.assert_array_equal(quant.quantise(w, double=True).absmax.offset, offset)


def test_a_stack_of_layers_is_its_layers():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 128, 40)), jnp.float32)
    whole = quant.quantise(w, double=True)
    assert whole.shape == w.shape
    for i in range(3):
        one = quant.quantise(w[i], double=True)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b[i])
    np.testing.assert_array_equal(
        whole.decoded()[1], jnp.swapaxes(whole.rows_of_outputs(), 1, 2)[1]
    )


def test_bits_of_a_gpt2_medium():
    """4 bits a number, 8 for 64 of them and 32 for 256 of those: 4.127."""
    linear = {"qkvo": (1024, 1024, 4), "up": (1024, 4096, 1), "down": (4096, 1024, 1)}
    nbytes = size = 0
    for n_in, n_out, count in linear.values():
        leaf = quant.quantise(jnp.ones((24, n_in, n_out)), double=True)
        nbytes += count * tree.nbytes(leaf)
        size += count * 24 * n_in * n_out
    assert 4 + 8 / 64 < 8 * nbytes / size <= 4.13


def test_linear_layers_are_taken_and_nothing_else():
    base = lorax.load("gpt2-nano")
    params = tree.flatten(quant.quantize(base.params, double=True, sites=base.sites))
    for path, leaf in params.items():
        before = tree.flatten(base.params)[path]
        assert isinstance(leaf, quant.Quantised) == path.endswith("kernel")
        assert (leaf.shape, leaf.dtype) == (before.shape, before.dtype)
    assert tree.count(params) == tree.count(base.params)
    planned = jax.eval_shape(lambda p: quant.quantize(p, double=True), base.params)
    assert tree.nbytes(planned) == tree.nbytes(params)


def test_a_model_on_codes_is_the_model_on_what_they_stand_for():
    base = lorax.load("gpt2-nano")
    coded = quant.quantize(base.params, "nf4", True, sites=base.sites)
    dense = {
        path: ops.dense(leaf, base.sites[path]) if ops.is_operator(leaf) else leaf
        for path, leaf in tree.flatten(coded).items()
    }
    tokens = jnp.arange(24).reshape(2, 12)
    logits = intercept.apply(base.module, coded, tokens)
    expected = intercept.apply(base.module, tree.unflatten(dense), tokens)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "nf3"}, "'nf3' is not one of nf4, fp4, int8"),
        ({"block": 48}, "blocks of 48 are not one of 32, 64"),
        ({"w": np.full((64, 2), np.nan, np.float32)}, "not finite"),
        ({"w": np.full((64, 2), np.inf, np.float32)}, "not finite"),
        ({"w": np.full((10, 2), 2e38, np.float32)}, "above 9e\\+37"),
    ],
)
def test_what_cannot_be_quantised_is_said(given, message):
    with pytest.raises(ValueError, match=message):
        quant.quantise(**({"w": np.ones((64, 2), np.float32)} | given))


def test_an_error_names_the_parameter():
    base = lorax.load("gpt2-nano")
    flat = tree.flatten(base.params)
    path = next(path for path in flat if path.endswith("up/kernel"))
    flat[path] = flat[path].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=f"quant: {path}: holds numbers that are not finite"):
        quant.quantize(tree.unflatten(flat))
