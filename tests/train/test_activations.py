"""The residual stream: what is read of it, and how alike two of them are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

import lorax
from lorax import config, intercept, tasks, tree
from lorax.analysis import linear_cka
from lorax.models import Base, bert, decoder, falcon, gpt2
from lorax.tasks import kinds
from lorax.train import activations, prepare

SMALL = dict(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
#: family -> (Config, Linen class, the norm between the last layer and the hidden states)
FAMILIES = {
    "gpt2": (
        gpt2.Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2),
        gpt2.GPT2,
        "ln_f",
    ),
    "llama": (
        decoder.Config(**SMALL, intermediate_size=24, num_key_value_heads=1),
        decoder.Decoder,
        "norm",
    ),
    "falcon": (falcon.Config(**SMALL), falcon.Falcon, "norm"),
    "bert": (
        bert.Config(**SMALL, intermediate_size=24, max_position_embeddings=20, head="none"),
        bert.BERT,
        None,
    ),
}


def make(family, **run):
    own, model, norm = FAMILIES[family]
    own = dataclasses.replace(own, **run)
    module, tokens = model(own), np.zeros((1, 4), np.int32)
    params = jit(module.init)(jax.random.key(1), tokens)["params"]
    params = jax.tree.map(lambda x: 3 * x, params)
    return Base(module, params, own, None, intercept.sites(module, params, tokens), family, "tiny")


@pytest.fixture(scope="module")
def base():
    return make("gpt2")


def rows(n=6, seed=0):
    """Rows of a language model: a prompt of 3 tokens, a completion, padding from there on."""
    rng = np.random.default_rng(seed)
    tokens, mask = rng.integers(1, 50, (n, 13)).astype(np.int32), np.zeros((n, 13), np.float32)
    for i in range(n):
        mask[i, 3 : 6 + i] = 1
        tokens[i, 6 + i :] = 0
    return {"tokens": tokens, "mask": mask}


def task(n=6):
    return tasks.Task("random", rows(2), rows(n), "")


def batches(n=6, size=3):
    return {name: jnp.asarray(x.reshape(-1, size, 13)) for name, x in rows(n).items()}


# ----------------------------------------------------------------------------------------- the tap


@pytest.mark.parametrize(
    ("family", "remat"),
    [
        ("gpt2", "none"),
        ("llama", "none"),
        pytest.param("falcon", "none", marks=pytest.mark.soak),
        pytest.param("bert", "none", marks=pytest.mark.soak),
        pytest.param("gpt2", "full", marks=pytest.mark.slow),
    ],
)
def test_the_stream_after_a_layer_is_what_a_model_of_so_many_layers_ends_in(family, remat):
    base, depth = make(family, remat=remat), "n_layer" if family == "gpt2" else "num_hidden_layers"
    given, norm = batches(), FAMILIES[family][2]
    found = jit(lambda p: activations.residuals(base.module, kinds.TEXTS, p, given))(base.params)
    assert found.shape == (3, 6 * 12, 16) and found.dtype == jnp.float32
    tokens = rows()["tokens"][:, :-1]
    shorter = type(base.module)(dataclasses.replace(base.config, **{depth: 2}))

    def both(params, stream):
        params = {"params": {**params, "h": jax.tree.map(lambda x: x[:2], params["h"])}}
        if norm:
            stream = shorter.apply(params, stream, method=lambda m, x: getattr(m, norm)(x))
        return shorter.apply(params, tokens, method="hidden"), stream

    hidden, last = jit(both)(base.params, found[1].reshape(6, 12, 16))
    np.testing.assert_allclose(hidden, last, atol=1e-5)


def test_only_a_texts_own_tokens_count():
    real = np.asarray(activations.real(kinds.TEXTS, batches())).reshape(6, 12)
    # A row of 6 + i tokens ends in its end token, which is predicted and not read.
    assert real.sum(1).tolist() == [5, 6, 7, 8, 9, 10]
    assert (np.diff(real, axis=1) <= 0).all()
    segments = np.array([[[1, 1, 0]], [[1, 1, 1]]])
    assert activations.real(kinds.LABELLED, {"segments": segments}).tolist() == [1, 1, 0, 1, 1, 1]


# ----------------------------------------------------------------------------------------- numbers


def test_cka_on_the_device_is_numpys_of_the_real_tokens():
    rng = np.random.default_rng(3)
    x = 100 + 50 * rng.standard_normal((2, 40, 7)).astype(np.float32)
    y = x[..., :5] + 30 * rng.standard_normal((2, 40, 5)).astype(np.float32)
    weights = (rng.random(40) < 0.7).astype(np.float32)
    expected = linear_cka(x[:, weights > 0], y[:, weights > 0])
    assert 0.3 < expected.min() < expected.max() < 0.95
    np.testing.assert_allclose(activations.cka(x, y, weights), expected, rtol=1e-5)
    np.testing.assert_allclose(activations.cka(1e9 * x, y, weights), expected, rtol=1e-5)
    np.testing.assert_array_equal(activations.cka(0 * x, y, weights), [0, 0])


def stacked(method, base, n=2):
    states = [method.init(jax.random.key(i), base.params, base.sites) for i in range(n)]
    return jax.tree.map(lambda *x: jnp.stack(x), *states)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_at_its_start_is_its_base_and_a_moved_one_is_not(family):
    base = make(family)
    method = lorax.method("lora", rank=2, targets=("v",), layers=(1,))
    trainable, constants = stacked(method, base)
    flat = tree.flatten(trainable)
    flat["h/attn/v/kernel/b"] = flat["h/attn/v/kernel/b"].at[1, 1].set(0.5)
    given = tree.unflatten(flat), constants, task(), 5, 2  # 5 rows, and a last batch not full
    found = activations.similarity(base, method, *given)
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found[0], 1, atol=1e-5)
    np.testing.assert_allclose(found[1, 0], 1, atol=1e-5)  # before the layer that is adapted
    assert (found[1, 1:] < 0.999).all()

    # As numpy has it, of those rows' own tokens one by one.
    bound = method.bind(*jax.tree.map(lambda x: x[1], given[:2]), base.params, sites=base.sites)
    some = tasks.spread(task().eval, 5)
    batch = {name: x[None] for name, x in some.items()}
    stream = jit(lambda params: activations.residuals(base.module, kinds.TEXTS, params, batch))
    streams = stream(base.params), stream(bound)
    keep = np.asarray(activations.real(kinds.TEXTS, batch)) > 0
    expected = linear_cka(*(np.asarray(x)[:, keep] for x in streams))
    np.testing.assert_allclose(found[1], expected, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["prompt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("prefix", "houlsby"))],
)
def test_methods_that_are_no_change_of_weights_are_compared_token_by_token(base, name):
    more = {"tokens": 3} if name != "houlsby" else {"rank": 2}
    method = lorax.method(name, **more)
    trainable, constants = stacked(method, base, 1)
    found = activations.similarity(base, method, trainable, constants, task(), 6, 3)
    assert found.shape == (1, 3) and (found <= 1.00001).all() and (found > 0.1).all()
    if name == "houlsby":  # the identity at its start
        np.testing.assert_allclose(found, 1, atol=1e-5)
    else:
        assert (found < 0.9999).any()


def test_a_base_of_images_is_refused_before_anything_is_trained():
    c = config.default()
    c.base, c.task.name, c.analysis.cka = "random:mlp-64-12-10", "digits", 8
    c.method.targets = ("re:.*/kernel",)
    with pytest.raises(ValueError, match=r"analysis.cka: 8 given, but random:mlp-64-12-10"):
        prepare.groups(config.members(c), lambda line: None)
    c.analysis.cka = -1
    with pytest.raises(ValueError, match=r"analysis.cka: -1 given, must not be negative"):
        config.members(c)
