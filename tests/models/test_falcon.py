"""Falcon's three designs are transformers' Falcon, there and back, in every way to run them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from support import require

import lorax
from lorax import models, tree
from lorax.models import falcon
from lorax.models.families import FAMILIES

TINY = dict(vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=6)
NEW = dict(new_decoder_architecture=True, num_kv_heads=2)
VARIANTS = {
    "7b": dict(),
    "40b": NEW | dict(bias=True, rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    "11b": NEW | dict(num_ln_in_parallel_attn=1, tie_word_embeddings=False),
    "rw": dict(alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "sequential": dict(parallel_attn=False, activation="relu", ffn_hidden_size=20),
    "own-keys": dict(multi_query=False, num_hidden_layers=3, layer_norm_epsilon=0.02),
    "alibi-groups": NEW | dict(alibi=True, num_kv_heads=3),
}
TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (3, 10), np.int32)
#: A whole row, one padded on the left and one on the right.
MASK = np.asarray([[1] * 10, [0] * 3 + [1] * 7, [1] * 6 + [0] * 4], np.int32)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(FAMILIES, "falcon", (falcon, falcon.Falcon))


@functools.cache
def reference(name):
    """A random model of transformers, with weights and biases large enough to matter."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    config = transformers.FalconConfig(**TINY | VARIANTS[name])
    model = transformers.FalconForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(5 * parameter + 0.1 * torch.randn_like(parameter))
    return model


def torch_logits(model):
    torch = require("torch")
    tokens, mask = torch.from_numpy(TOKENS).long(), torch.from_numpy(MASK).long()
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits.numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers_there_and_back(name, tmp_path):
    transformers, model = require("transformers"), reference(name)
    model.save_pretrained(tmp_path / "theirs")
    base = lorax.load(str(tmp_path / "theirs"))
    expected, real = torch_logits(model), MASK > 0
    assert np.ptp(expected[real]) > 5  # flat logits would agree with anything
    logits = jit(functools.partial(lorax.apply, base.module))(base.params, TOKENS, MASK)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=1e-4)
    models.save(tmp_path / "ours", base)
    back, info = transformers.FalconForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    np.testing.assert_allclose(torch_logits(back.eval()), expected, rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(back.named_parameters(), model.parameters(), strict=True):
        np.testing.assert_array_equal(ours.detach(), theirs.detach(), err_msg=name)


def test_slopes_and_their_rounding_are_those_of_transformers():
    """Also where bfloat16 cannot hold the position, above 256."""
    torch = require("torch")
    theirs = pytest.importorskip("transformers.models.falcon.modeling_falcon").build_alibi_tensor
    positions = np.arange(700)[None]
    for heads in (1, 6, 12, 32, 71):
        mask = torch.ones((1, 700), dtype=torch.long)
        want = theirs(mask, heads, torch.float32).numpy()  # (heads, 1, positions)
        ours = falcon.alibi(jnp.asarray(positions), heads, 1)
        np.testing.assert_array_equal(np.float32(ours[0, :, 0].T), want[:, 0], err_msg=str(heads))


# --------------------------------------------------------------------------- ways to run the layers


@functools.cache
def start(name):
    """(module, random parameters) of a variant."""
    fields = {k: v for k, v in VARIANTS[name].items() if k != "rope_parameters"}
    module = falcon.Falcon(falcon.Config(**TINY | fields))
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
    return module, jax.tree.map(draw, shapes)


@pytest.mark.parametrize("name", ["40b", "alibi-groups"])
def test_a_cache_and_packing_change_nothing(name):
    module, params = start(name)
    whole = functools.partial(jit(functools.partial(lorax.apply, module)), params)
    padded = np.asarray([[0] * 3 + [1] * 7, [1] * 10, [0] + [1] * 9], np.int32)
    want = whole(TOKENS, padded)

    @jit
    def step(params, tokens, segments, cache):
        hidden, cache = lorax.apply(module, params, tokens, segments, cache, method="hidden")
        return lorax.apply(module, params, hidden, method="logits"), cache

    cache, got = module.empty_cache(3, 12), []
    for part in (slice(0, 7), slice(7, 8), slice(8, 9), slice(9, 10)):
        logits, cache = step(params, TOKENS[:, part], padded[:, part], cache)
        got.append(logits)
    got = np.concatenate(got, axis=1)
    np.testing.assert_allclose(got[padded > 0], want[padded > 0], rtol=0, atol=1e-4)

    packed = np.asarray([[1] * 4 + [2] * 6] * 3, np.int32)
    apart = np.where(packed == 2, packed, 0)  # the second text alone, what is before it padding
    second = whole(TOKENS, packed)[:, 4:]
    np.testing.assert_allclose(second, whole(TOKENS, apart)[:, 4:], rtol=0, atol=1e-4)
    assert np.abs(second - whole(TOKENS, np.ones_like(packed))[:, 4:]).max() > 0.1


def test_remat_and_unroll_change_nothing_and_half_is_near():
    module, params = start("alibi-groups")

    def gradients(**run):
        other = falcon.Falcon(dataclasses.replace(module.config, **run))

        def loss(params):
            logits = lorax.apply(other, params, TOKENS)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1)), logits

        return jit(jax.grad(loss, has_aux=True))(params)

    grads, logits = gradients(unroll=1)
    other_grads, other_logits = gradients(remat="full", unroll=2)
    np.testing.assert_allclose(other_logits, logits, rtol=1e-5, atol=1e-5)
    for path, want in tree.flatten(grads).items():
        assert np.abs(want).max() > 1e-5, path
        np.testing.assert_allclose(
            tree.flatten(other_grads)[path], want, rtol=1e-4, atol=1e-6, err_msg=path
        )
    _, half = gradients(dtype="bfloat16")
    assert half.dtype == jnp.float32
    error = np.abs(np.asarray(half) - np.asarray(logits)).max()
    assert 1e-4 < error < 0.05 * np.abs(logits).max()


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(activation="swish7"), "activation: .swish7. given, must be one of .*gelu"),
        (dict(num_attention_heads=5), "hidden_size 24 is not a multiple of num_attention_heads 5"),
        (dict(num_attention_heads=8), "3 features: rotary positions need an even number"),
        (NEW | dict(num_kv_heads=4), "num_attention_heads 6 is not a multiple of 4 key heads"),
        (dict(multi_query=False, num_kv_heads=2), "num_kv_heads 2 needs new_decoder_architecture"),
        (dict(num_ln_in_parallel_attn=2), "num_ln_in_parallel_attn 2 is not supported"),
        (NEW | dict(num_ln_in_parallel_attn=3), "num_ln_in_parallel_attn 3 is not supported"),
        (NEW | dict(parallel_attn=False), "parallel_attn=false is not supported"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_type 'linear'"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_type 'yarn'"),
        (dict(n_embed=24), "n_embed=24 is not supported"),
    ],
)
def test_what_the_module_does_not_compute_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        falcon.config_from_hf(TINY | fields)


def test_config_survives_hugging_faces_names_and_its_older_ones():
    config = falcon.Config(**TINY | NEW, rope_theta=50.0, bias=True, dtype="bfloat16", unroll=2)
    back = falcon.config_from_hf(falcon.hf_config(config), dtype="bfloat16", unroll=2)
    assert back == config and falcon.hf_config(config)["model_type"] == "falcon"
    assert falcon.config_from_hf(TINY | {"rope_theta": 50.0}).rope_theta == 50.0
    assert falcon.config_from_hf({}) == falcon.Config()  # Falcon-7B


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 6_921_720_704),  # tiiuae/falcon-7b
        (
            dict(vocab_size=65024, hidden_size=8192, num_hidden_layers=60, num_kv_heads=8)
            | dict(num_attention_heads=128, new_decoder_architecture=True),
            41_303_293_952,  # tiiuae/falcon-40b
        ),
    ],
)
def test_the_published_models_have_their_size(fields, count):
    module = falcon.Falcon(falcon.Config(**fields))
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))
    assert tree.count(shapes) == count
