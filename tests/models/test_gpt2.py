"""GPT-2 is transformers' GPT-2, there and back, however its layers are run."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from support import require

import lorax
from lorax import models, tree
from lorax.models import gpt2

TINY = dict(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2)
VARIANTS = {
    "one-layer": dict(n_layer=1, n_head=1),
    "untied-relu": dict(tie_word_embeddings=False, activation_function="relu", n_inner=20),
    "deep-gelu": dict(n_layer=4, n_embd=24, n_head=4, activation_function="gelu"),
    "unscaled": dict(n_layer=3, scale_attn_weights=False, layer_norm_epsilon=0.02),
}
TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (3, 12), np.int32)


@functools.cache
def reference(name):
    """A random model of transformers, with weights and biases large enough to matter."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY | VARIANTS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(5 * parameter + 0.1 * torch.randn_like(parameter))
    return model


def torch_logits(model):
    """In float64: rounding is ours alone."""
    torch = require("torch")
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.from_numpy(TOKENS).long()).logits
    return logits.float().numpy()


def assert_same_logits(base, expected):
    assert np.ptp(expected) > 5  # flat logits would agree with anything
    logits = jit(functools.partial(lorax.apply, base.module))(base.params, TOKENS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers_there_and_back(name, tmp_path):
    transformers, model = require("transformers"), reference(name)
    model.save_pretrained(tmp_path / "theirs")
    base = lorax.load(str(tmp_path / "theirs"))
    expected = torch_logits(model)
    assert_same_logits(base, expected)
    models.save(tmp_path / "ours", base)
    back, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    np.testing.assert_array_equal(torch_logits(back.eval()), expected)


def bare(model, directory):
    """Its names lack "transformer."; the head is tied."""
    model.transformer.save_pretrained(directory)


def sharded(model, directory):
    model.save_pretrained(directory, max_shard_size="5KB")
    assert len(list(directory.glob("*.safetensors"))) > 2


def half(model, directory, dtype):
    copy.deepcopy(model).to(getattr(require("torch"), dtype)).save_pretrained(directory)


@pytest.mark.parametrize(
    ("save", "dtype"),
    [
        (bare, "float32"),
        (sharded, "float32"),
        (functools.partial(half, dtype="bfloat16"), "bfloat16"),
        (functools.partial(half, dtype="float16"), "float16"),
    ],
    ids=["bare", "sharded", "bfloat16", "float16"],
)
def test_every_way_to_save_a_model_loads_the_same(save, dtype, tmp_path):
    model = reference("one-layer")
    model.save_pretrained(tmp_path / "plain")
    save(model, tmp_path / "other")
    plain, other = (lorax.load(str(tmp_path / name)).params for name in ("plain", "other"))
    for path, leaf in tree.flatten(other).items():
        want = np.asarray(tree.flatten(plain)[path]).astype(jnp.dtype(dtype))
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, want.astype(np.float32), err_msg=path)


# ------------------------------------------------------------------------------ how layers are run


@functools.cache
def start():
    """(parameters, a method with random factors) of a model of three layers."""
    module = gpt2.GPT2(gpt2.Config(**TINY | {"n_layer": 3}))
    params = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    method = lorax.method("lora", rank=2, targets=("q", "up", "embed"))
    state = method.init(jax.random.key(0), params)
    rng = np.random.default_rng(0)
    noise = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
    return (
        jax.tree.map(noise, params),
        method,
        state._replace(trainable=jax.tree.map(noise, state.trainable)),
    )


@functools.cache
def logits_and_gradients(remat, unroll):
    """Logits, and the gradients of the adapter and of the base's weights."""
    params, method, (trainable, constants) = start()
    module = gpt2.GPT2(gpt2.Config(**TINY | {"n_layer": 3}, remat=remat, unroll=unroll))

    def loss(both):
        logits = lorax.apply(module, method.bind(both["lora"], constants, both["base"]), TOKENS)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1)), logits

    return jit(jax.grad(loss, has_aux=True))({"lora": trainable, "base": params})


@pytest.mark.parametrize(("remat", "unroll"), [("full", 1), ("none", 2), ("dots", 3)])
def test_remat_and_unroll_change_nothing(remat, unroll):
    grads, logits = logits_and_gradients(remat, unroll)
    plain_grads, plain_logits = logits_and_gradients("none", 1)
    np.testing.assert_allclose(logits, plain_logits, rtol=1e-5, atol=1e-5)
    for path, grad in tree.flatten(grads).items():
        want = tree.flatten(plain_grads)[path]
        assert path.endswith("k/bias") or np.abs(want).max() > 1e-5, (
            path
        )  # softmax ignores k's bias
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(("unroll", "few", "many"), [(1, 2, 12), (4, 8, 24)])
def test_the_program_does_not_grow_with_depth(unroll, few, many):
    def lines(n_layer):
        module = gpt2.GPT2(gpt2.Config(**TINY | {"n_layer": n_layer}, unroll=unroll))
        params = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
        loss = lambda params: jnp.sum(module.apply({"params": params}, TOKENS))
        return len(jax.jit(jax.value_and_grad(loss)).lower(params).as_text().splitlines())

    assert lines(few) == lines(many)


def test_bfloat16_computes_in_half_and_answers_in_float32():
    params, *_ = start()
    run = lambda dtype: jit(gpt2.GPT2(gpt2.Config(**TINY | {"n_layer": 3}, dtype=dtype)).apply)(
        {"params": params}, TOKENS
    )
    half, full = run("bfloat16"), run("float32")
    assert half.dtype == full.dtype == jnp.float32
    error = np.abs(np.asarray(half) - np.asarray(full)).max()
    assert 1e-4 < error < 0.05 * np.abs(full).max()


def test_more_tokens_than_positions_are_an_error():
    module = gpt2.GPT2(gpt2.Config(**TINY))
    with pytest.raises(ValueError, match="13 tokens, but n_positions is 12"):
        jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 13), np.int32))


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=true"),
        ("add_cross_attention", True, "add_cross_attention=true"),
        (
            "activation_function",
            "swish7",
            "activation_function: .swish7. given, .*gelu_new",
        ),
        ("n_head", 3, "n_embd 16 is not a multiple of n_head 3"),
    ],
)
def test_what_the_module_does_not_compute_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        gpt2.config_from_hf(TINY | {field: value})


def test_config_survives_hugging_faces_names():
    config = gpt2.Config(**TINY | VARIANTS["untied-relu"], dtype="bfloat16", unroll=2)
    back = gpt2.config_from_hf(gpt2.hf_config(config), dtype="bfloat16", unroll=2)
    assert back == config and gpt2.hf_config(config)["model_type"] == "gpt2"
    assert gpt2.config_from_hf({}) == gpt2.Config()  # GPT-2 small
