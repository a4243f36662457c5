"""Layers with a backward pass of their own, against the formula and what autodiff makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quick import jit

from lorax.methods import prefix
from lorax.models import layers


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_same_with_gradients(f, formula, *args, rtol=1e-5, atol=1e-5):
    """Value and gradients with respect to every argument, for a random cotangent."""

    @functools.partial(jit, static_argnums=0)
    def run(f, *args):
        out, pull = jax.vjp(f, *args)
        return out, *pull(normal(9, *out.shape).astype(out.dtype))

    for i, (got, want) in enumerate(zip(run(f, *args), run(formula, *args), strict=True)):
        assert got.shape == want.shape and got.dtype == want.dtype
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        message = f"gradient of argument {i - 1}" if i else "value"
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=message)


def attention(q, k, v, scale):
    """softmax(scale q k^T + mask) v, position by position: query t sees keys up to t + S - T."""
    t, s = q.shape[1], k.shape[1]
    rows = []
    for i in range(t):
        seen = slice(0, i + 1 + s - t)
        scores = scale * jnp.einsum("bhd,bshd->bhs", q[:, i], k[:, seen])
        rows.append(jnp.einsum("bhs,bshd->bhd", jax.nn.softmax(scores), v[:, seen]))
    return jnp.stack(rows, axis=1)


def causal(q, k, v, scale):
    t, s = q.shape[1], k.shape[1]
    mask = jnp.arange(t)[None, :, None] + s - t >= jnp.arange(s)[None, None]
    return layers.attention(q, k, v, mask, scale)


@pytest.mark.parametrize(("t", "s", "scale"), [(5, 5, 0.5), (1, 1, 0.5), (2, 5, 0.5), (4, 5, 3.0)])
def test_causal_attention(t, s, scale):
    q, k, v = normal(0, 2, t, 3, 4), normal(1, 2, s, 3, 4), normal(2, 2, s, 3, 4)
    ours = functools.partial(causal, scale=scale)
    assert_same_with_gradients(ours, lambda q, k, v: attention(q, k, v, scale), q, k, v)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_causal_attention_stands_large_scores_and_keeps_the_softmax_in_float32(dtype):
    q, k, v = (normal(i, 1, 4, 1, 8, scale=s).astype(dtype) for i, s in enumerate((30, 30, 1)))

    def run(attend, *qkv):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, 0.1), *qkv)
        return out, pull(jnp.ones_like(out))

    out, grads = jit(functools.partial(run, causal))(q, k, v)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    exact, _ = jit(functools.partial(run, attention))(*wide)
    assert {x.dtype for x in (out, *grads)} == {q.dtype}
    assert all(np.isfinite(np.float32(g)).all() for g in grads)
    tolerance = 1e-5 if dtype == "float32" else 0.02
    np.testing.assert_allclose(np.float32(out), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_causal_attention_in_blocks(tokens):
    """Also where the mask hides more than the future, and where blocks are uneven or one token."""
    q, k, v = (normal(i, 2, tokens, h, 3) for i, h in enumerate((4, 2, 2)))
    mask = np.random.default_rng(3).random((2, tokens, tokens)) < 0.6
    mask = jnp.asarray(np.tril(mask) | np.eye(tokens, dtype=bool))
    ours = lambda q, k, v: layers.causal_attention(q, k, v, mask, 0.7)
    whole = lambda q, k, v: layers.attention(q, k, v, mask, 0.7)
    assert_same_with_gradients(ours, whole, q, k, v)


@pytest.mark.parametrize(("keep", "cap"), [(1 << 30, None), (0, None), (1 << 30, 1.5), (0, 1.5)])
def test_grouped_attention_under_any_mask(monkeypatch, keep, cap):
    """Four query heads on two of keys: each pair is plain attention on a copy of its keys. A soft
    cap comes after the scale and before the mask."""
    monkeypatch.setattr(layers, "KEEP", keep)
    q, k, v = normal(0, 2, 5, 4, 3), normal(1, 2, 6, 2, 3), normal(2, 2, 6, 2, 3)
    mask = jnp.asarray(np.random.default_rng(3).random((2, 5, 6)) < 0.7).at[:, :, 0].set(True)

    def formula(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = 0.7 * jnp.einsum("bthd,bshd->bhts", q, k)
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)

    ours = lambda q, k, v: layers.attention(q, k, v, mask, 0.7, cap)
    assert_same_with_gradients(ours, formula, q, k, v)


def test_every_way_to_attend_caps_the_scores():
    """In blocks, with a cache, in an encoder, behind a prefix, and in LLaMA-Adapter's softmax."""
    q, k, v = normal(0, 2, 8, 4, 3), normal(1, 2, 8, 2, 3), normal(2, 2, 8, 2, 3)
    mask, everyone = jnp.tril(jnp.ones((1, 8, 8), bool)), jnp.ones((1, 8, 3), bool)
    module, encoder = layers.Attend(cap=1.5), layers.Attend(causal=False, cap=1.5)

    @jit
    def run(q, k, v):
        first = lambda x: jnp.broadcast_to(x[:1, :3], (2, 3, 2, 3))
        want = layers.attention(q, k, v, mask, 2.0, 1.5)
        extra = layers.attention(q, first(k), first(v), everyone, 2.0, 1.5)
        cache = layers.empty_cache(1, 2, 8, 2, 3, "float32")
        tokens = (x[0, :3].reshape(3, 6) for x in (k, v))
        off = prefix.Prefix(k[0, :1].reshape(1, 6), v[0, :1].reshape(1, 6), jnp.float32(0))
        gated = prefix.Gated(*tokens, jnp.float32(1))
        call = functools.partial(module.apply, {})
        ways = {
            "blocks": call(q, k, v, mask, 2.0),
            "cache": call(q, k, v, mask, 2.0, (cache.k[0], cache.v[0]), 0),
            "encoder": encoder.apply({}, q, k, v, mask, 2.0),
            "prefix": off(module, call, q, k, v, mask, 2.0),
            "gated": gated(module, call, q, k, v, mask, 2.0),
        }
        ways = {name: o for name, (o, _) in ways.items()}
        return ways, want, extra, layers.attention(q, k, v, mask, 2.0)

    ways, want, extra, free = run(q, k, v)
    assert np.abs(want - free).max() > 0.1
    for name, got in ways.items():
        right = want + extra if name == "gated" else want
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5, err_msg=name)


SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1]])


def test_causal_context_keeps_texts_apart_and_counts_from_their_start():
    context = layers.causal_context(SEGMENTS, SEGMENTS)
    np.testing.assert_array_equal(context.positions, [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
    seen = [[t >= s and row[t] == row[s] for s in range(6)] for row in SEGMENTS for t in range(6)]
    np.testing.assert_array_equal(context.mask.reshape(12, 6), seen)
    window = layers.causal_context(SEGMENTS, window=2).mask[0]
    near = [[0 <= t - s < 2 for s in range(6)] for t in range(6)]
    np.testing.assert_array_equal(window, near)


@pytest.mark.parametrize("window", [None, 2])
def test_context_of_a_cache_is_that_of_the_whole_text(window):
    """Left-padded rows read in parts of 3, 1 and 2 tokens: the last columns of one pass."""
    rows = jnp.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    whole = layers.causal_context(rows, rows, window=window)
    cache = layers.empty_cache(1, 2, 8, 1, 1, "float32")
    at = 0
    for size in (3, 1, 2):
        part = rows[:, at : at + size]
        context = layers.causal_context(part, part, cache, window)
        real = rows[:, at : at + size] > 0
        np.testing.assert_array_equal(
            np.where(real, context.positions, 0),
            np.where(real, whole.positions[:, at : at + size], 0),
        )
        got = context.mask & real[..., None]
        want = whole.mask[:, at : at + size] & real[..., None]
        np.testing.assert_array_equal(got[..., :6], want)
        assert not got[..., 6:].any()
        cache, at = context.cache, at + size
    assert int(cache.length) == 6


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_layer_norm(shape, epsilon):
    def formula(x, scale, bias):
        wide = lambda p: jnp.broadcast_to(p, x.shape)
        mean = jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, -1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + epsilon) * wide(scale) + wide(bias)

    args = normal(0, *shape, scale=3) + 1, normal(1, 7), normal(2, 7)
    assert_same_with_gradients(lambda *a: layers.layer_norm(*a, epsilon), formula, *args, atol=3e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_module_has_the_parameters_and_values_of_flax(dtype):
    x, params = normal(0, 3, 7).astype(dtype), {"scale": normal(1, 7), "bias": normal(2, 7)}
    ours, theirs = layers.LayerNorm(1e-3), nn.LayerNorm(1e-3, dtype="float32")
    wide = x.astype(jnp.float32)
    assert jax.eval_shape(ours.init, jax.random.key(0), x) == jax.eval_shape(
        theirs.init, jax.random.key(0), wide
    )
    out = jit(ours.apply)({"params": params}, x)
    expected = jit(theirs.apply)({"params": params}, wide).astype(dtype)
    assert out.dtype == x.dtype
    np.testing.assert_allclose(np.float32(out), np.float32(expected), rtol=1e-5, atol=1e-5)


def test_gelu_tanh():
    plain = lambda x: jax.nn.gelu(x, approximate=True)
    x = jnp.concatenate([jnp.linspace(-6, 6, 241), jnp.array([-100.0, 0.0, 100.0])])
    assert_same_with_gradients(layers.gelu_tanh, plain, x, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("name", "at_one"),
    [
        ("gelu_new", 0.841192),
        ("gelu_pytorch_tanh", 0.841192),
        ("gelu", 0.841345),
        ("relu", 1.0),
        ("silu", 0.731059),
        ("quick_gelu", 0.845796),
    ],
)
def test_activations_by_hugging_faces_names(name, at_one):
    f = layers.ACTIVATIONS[name]
    np.testing.assert_allclose(f(jnp.array([1.0, 0.0])), [at_one, 0], rtol=0, atol=1e-6)


def test_every_activation_is_tested():
    (mark,) = test_activations_by_hugging_faces_names.pytestmark
    assert {name for name, _ in mark.args[1]} == set(layers.ACTIVATIONS)
