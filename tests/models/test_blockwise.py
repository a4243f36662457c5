"""Attention in blocks against attention at once, and the memory of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quick import jit

from lorax import intercept, tree
from lorax.methods import prefix
from lorax.models import blockwise, cudnn, decoder, falcon, gpt2, layers, masks
from lorax.models.bert import BERT
from lorax.models.bert import Config as BERTConfig
from lorax.models.blocks import UnmaskedAttention

T = 11
PACKED = jnp.array([[-1, -1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of 4 tokens, and masks that are never arrays."""
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    monkeypatch.setattr(masks, "SHORT", 0)


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def with_gradients(attend, *args):
    """The output of a function of arrays, and the gradients with respect to all of them."""
    out, pull = jax.vjp(attend, *args)
    return out, *pull(normal(9, *out.shape).astype(out.dtype))


def assert_same(got, want, tolerance=1e-5):
    for i, (ours, right) in enumerate(zip(got, want, strict=True)):
        assert ours.dtype == right.dtype
        message = f"gradient of argument {i - 1}" if i else "value"
        ours, right = (np.asarray(x, np.float32) for x in (ours, right))
        np.testing.assert_allclose(ours, right, tolerance, tolerance, err_msg=message)


MASKS = {
    "causal": lambda: layers.causal_context(PACKED).mask,
    "packed": lambda: layers.causal_context(PACKED, PACKED).mask,
    "window": lambda: layers.causal_context(PACKED, PACKED, window=3).mask,
    "encoder": lambda: layers.padding_mask(PACKED, PACKED),
    "everyone": lambda: masks.everyone(T, T),
}


@pytest.mark.parametrize(
    ("name", "cap", "sinks"),
    [(name, None, False) for name in MASKS] + [("window", 1.5, True), ("everyone", 1.5, False)],
)
def test_any_mask_with_grouped_heads(blocks, name, cap, sinks):
    mask, causal = MASKS[name](), name not in ("encoder", "everyone")
    assert isinstance(mask, masks.Mask)
    args = normal(0, 2, T, 4, 3), normal(1, 2, T, 2, 3), normal(2, 2, T, 2, 3)
    args += (normal(3, 4),) * sinks

    def attend(mask, causal, q, k, v, sinks=None):
        return layers.attention(q, k, v, mask, 0.7, cap, sinks, causal)

    run = lambda mask, causal: jit(
        functools.partial(with_gradients, functools.partial(attend, mask, causal))
    )(*args)
    assert_same(run(mask, causal), run(masks.dense(mask), causal))


@pytest.mark.parametrize("keys", [T, 6])
def test_attention_of_diffusion_models(monkeypatch, keys):
    """Of themselves, and to a text of another length."""
    attend = UnmaskedAttention(2, False, "float32", nn.initializers.normal(1.0))
    x, context = normal(0, 2, T, 4), normal(1, 2, keys, 6)
    given = (x,) if keys == T else (x, context)
    params = attend.init(jax.random.key(0), *given)
    run = lambda: jax.tree.leaves(
        jit(functools.partial(with_gradients, attend.apply))(params, *given)
    )
    right = run()
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    monkeypatch.setattr(masks, "SHORT", 0)
    assert_same(run(), right)


def test_operands_in_bfloat16_have_float32_sums(blocks):
    q, k, v = (normal(i, 2, T, 2, 8, dtype="bfloat16") for i in range(3))
    mask = masks.everyone(T, T)

    @jit
    def run(q, k, v):
        attend = lambda mask, q, k, v: layers.attention(q, k, v, mask, 0.35)
        exact = (x.astype(jnp.float32) for x in (q, k, v))
        return (
            with_gradients(functools.partial(attend, mask), q, k, v),
            with_gradients(functools.partial(attend, masks.dense(mask)), *exact),
        )

    got, want = run(q, k, v)
    assert {x.dtype for x in got} == {q.dtype}
    assert_same([x.astype("float32") for x in got], want, 0.03)


def test_queries_without_keys_get_zeros(blocks):
    """With a cache: rows that are padding up to some token, and room for more."""
    real = jnp.array([[False] * 5 + [True] * 6 + [False] * 3])
    places = lambda text: masks.Places(
        jnp.arange(text.shape[1])[None], text, jnp.zeros(text.shape, jnp.int32)
    )
    mask = masks.Mask(places(jnp.ones((1, T), int)), places(real.astype(int)), jnp.int32(9))
    q, k, v = normal(0, 1, T, 2, 3), normal(1, 1, 14, 2, 3), normal(2, 1, 14, 2, 3)
    run = lambda mask, q, k, v: jit(
        functools.partial(with_gradients, lambda *x: layers.attention(*x, mask, 0.7))
    )(q, k, v)
    o, dq, dk, dv = run(mask, q, k, v)
    assert not np.abs(o[:, :5]).max() and not np.abs(dq[:, :5]).max()
    some = masks.dense(mask)[:, 5:]
    right = jit(lambda q, k, v: layers.attention(q, k, v, some, 0.7))(q[:, 5:], k, v)
    np.testing.assert_allclose(o[:, 5:], right, 1e-5, 1e-5)
    assert all(np.isfinite(x).all() for x in (dk, dv))


def _models():
    small = dict(hidden_size=16, num_attention_heads=4, num_hidden_layers=2)
    gemma = decoder.Config(
        **small, vocab_size=19, intermediate_size=8, num_key_value_heads=2, sliding_window=3,
        layer_types=("sliding_attention", "full_attention"), attn_logit_softcapping=2.0,
        attention_sinks=True, remat="full",
    )  # fmt: skip
    alibi = falcon.Config(**small, vocab_size=19, alibi=True, multi_query=False)
    bert = BERTConfig(**small, vocab_size=19, intermediate_size=8, max_position_embeddings=32)
    return {
        "gpt2": gpt2.GPT2(gpt2.Config(19, 32, 16, 2, 4)),
        "windows, cap, sinks and remat": decoder.Decoder(gemma),
        "alibi": falcon.Falcon(alibi),
        "bert": BERT(bert),
    }


@pytest.mark.parametrize("name", _models())
def test_models_of_members_side_by_side(monkeypatch, name):
    """Their losses and gradients under vmap, with rows that are packed and padded."""
    module = _models()[name]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 19, (2, 2, T)))
    segments = jnp.stack([jnp.maximum(PACKED, 0), jnp.ones((2, T), int)])
    params = jit(jax.vmap(lambda key: module.init(key, tokens[0])["params"]))(
        jax.random.split(jax.random.key(0))
    )
    weights = (segments > 0).astype(jnp.float32)[..., None]

    def loss(params, tokens, segments, weights):
        logits = intercept.apply(module, params, tokens, segments)
        return jnp.mean(jnp.square(logits) * weights)

    def run():
        return jit(jax.vmap(jax.value_and_grad(loss)))(params, tokens, segments, weights)

    want = run()
    monkeypatch.setattr(masks, "SHORT", 0)
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    got = run()
    np.testing.assert_allclose(got[0], want[0], 1e-5)
    for path, x in tree.flatten(got[1]).items():
        np.testing.assert_allclose(x, tree.flatten(want[1])[path], 1e-4, 1e-6, err_msg=path)


def test_a_prefix_and_a_cache(monkeypatch):
    """Keys in front of the text, in a layer with a prefix and in one without, under a window; and a
    prompt read into a cache with room for more."""
    q, k, v = normal(0, 2, T, 4, 3), normal(1, 2, T, 2, 3), normal(2, 2, T, 2, 3)
    keys, values = normal(3, 2, 5, 6), normal(4, 2, 5, 6)
    module = layers.Attend()
    call = functools.partial(module.apply, {})

    def attend(q, k, v, keys, values):
        mask = layers.causal_context(PACKED, PACKED, window=3).mask
        leaves = (prefix.Prefix(keys[i], values[i], jnp.float32(i)) for i in range(2))
        return jnp.stack([leaf(module, call, q, k, v, mask, 0.7)[0] for leaf in leaves])

    def cached(q, k, v):  # no gradient goes through a cache
        cache = layers.empty_cache(1, 2, 16, 2, 3, "float32")
        mask = layers.causal_context(PACKED, jnp.abs(PACKED), cache, window=3).mask
        o, kv = call(q, k, v, mask, 0.7, (cache.k[0], cache.v[0]), 0)
        real = (PACKED != 0).astype(jnp.float32)[..., None, None]
        return o * real

    run = lambda: jit(functools.partial(with_gradients, attend))(q, k, v, keys, values)
    want, want_cached = run(), jax.jit(lambda *x: cached(*x))(q, k, v)
    monkeypatch.setattr(masks, "SHORT", 0)
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    assert_same(run(), want)
    np.testing.assert_allclose(jax.jit(lambda *x: cached(*x))(q, k, v), want_cached, 1e-5, 1e-6)


def test_rows_divided_over_devices(blocks):
    """On a mesh: each device has its rows, and attention sends nothing between them."""
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    args = [normal(i, 2, T, 2, 3) for i in range(3)]

    def attend(q, k, v):
        mask = layers.causal_context(PACKED, PACKED).mask
        return layers.causal_attention(q, k, v, mask, 0.7)

    run = jit(functools.partial(with_gradients, attend))
    divided = [jax.device_put(x, rows) for x in args]
    assert_same(run(*divided), run(*args))


@pytest.mark.parametrize("window", [None, 3])
def test_cudnn_is_asked_for_the_same(blocks, window):
    """Its plain form, for the rows that its kernel takes."""
    mask = layers.causal_context(PACKED, window=window).mask
    args = [normal(i, 2, T, h, 8) for i, h in enumerate((4, 2, 2))]

    @jit
    def run(*args):
        theirs = lambda *x: cudnn.attention(*x, mask, 0.7, implementation="xla")
        ours = lambda *x: layers.causal_attention(*x, mask, 0.7)
        return with_gradients(theirs, *args), with_gradients(ours, *args)

    assert_same(*run(*args))
    half = args[0].astype("bfloat16")
    assert cudnn.takes(half, mask, None, None) and not cudnn.takes(args[0], mask, None, None)
    assert not cudnn.takes(half, mask, 1.5, None) and not cudnn.takes(
        half[..., :4], mask, None, None
    )
    for other in (
        layers.causal_context(PACKED, PACKED).mask,
        layers.padding_mask(PACKED),
        masks.ahead(mask, 2, jnp.bool_(True)),
        masks.dense(mask),
    ):
        assert not cudnn.takes(half, other, None, None)


def temporaries(t: int) -> int:
    """Bytes beside the arguments and results of the gradient of layers of attention."""

    def loss(x):
        mask = layers.causal_context(jnp.zeros((1, t), jnp.int32)).mask
        layer = lambda x, _: (x + layers.causal_attention(x, x, x, mask, 0.5), None)
        return jnp.sum(jax.lax.scan(layer, x, length=3)[0])

    x = jax.ShapeDtypeStruct((1, t, 2, 4), jnp.float32)
    return jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch):
    """Also beyond all of what a block takes; attention at once is quadratic."""
    assert 4096**2 > masks.SHORT
    long, longer = temporaries(4096), temporaries(8192)
    assert longer < 2.1 * long and longer < 2 * 8192**2  # less than a mask with two bytes
    monkeypatch.setattr(masks, "SHORT", 1 << 62)
    at_once = temporaries(1024)
    assert temporaries(2048) > 3 * at_once
