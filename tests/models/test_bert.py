"""BERT and RoBERTa are transformers' own, with each of their heads, there and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from quick import jit
from support import require

import lorax
from lorax import models, tree
from lorax.models import bert

TINY = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=14,
)
VARIANTS = {
    "bert": dict(num_attention_heads=1, num_hidden_layers=1),
    "bert-untied": dict(
        tie_word_embeddings=False, hidden_act="relu", layer_norm_eps=0.02, type_vocab_size=3
    ),
    "roberta": dict(type_vocab_size=1, layer_norm_eps=1e-5),
    "roberta-relu": dict(hidden_act="relu", pad_token_id=0, tie_word_embeddings=False),
}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, TINY["vocab_size"], (3, 12), np.int32)
RIGHT = np.arange(12)[None] < np.array([12, 5, 9])[:, None]  # real tokens of rows, padded after
TYPES = RNG.integers(0, 2, TOKENS.shape, np.int32)


@functools.cache
def reference(name, head="ForMaskedLM", **more):
    """A random model of transformers, with weights and biases large enough to matter."""
    torch, transformers = require("torch"), require("transformers")
    stem = "Roberta" if name.startswith("roberta") else "Bert"
    config = getattr(transformers, f"{stem}Config")(**TINY | VARIANTS[name] | more)
    torch.manual_seed(0)
    model = getattr(transformers, stem + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(5 * parameter + 0.1 * torch.randn_like(parameter))
    return model


def theirs(model, tokens=TOKENS, mask=RIGHT, types=TYPES):
    """First output of transformers' model: logits or hidden states."""
    torch = require("torch")
    tokens, mask, types = (torch.from_numpy(x.astype(np.int64)) for x in (tokens, mask, types))
    with torch.no_grad():
        return model(tokens, attention_mask=mask, token_type_ids=types)[0].numpy()


def types_of(model):
    return TYPES % model.config.type_vocab_size


def ours(base, tokens=TOKENS, segments=RIGHT, types=TYPES):
    run = jit(functools.partial(lorax.apply, base.module))
    out = run(base.params, tokens, segments.astype(np.int32), types)
    assert out.dtype == jnp.float32
    return out


def assert_back(base, model, directory, rest=()):
    """transformers reads what `save` wrote as the same model; `rest` is what ours has none of."""
    models.save(directory, base)
    back, info = type(model).from_pretrained(directory, output_loading_info=True)
    assert info["missing_keys"] == set(rest)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    tensors = back.state_dict()
    for name, tensor in model.state_dict().items():
        assert name in rest or bool((tensors[name] == tensor).all()), name
    types = types_of(model)
    got, expected = theirs(back.eval(), types=types), theirs(model, types=types)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_masked_token_logits_are_those_of_transformers_there_and_back(name, tmp_path):
    model = reference(name)
    model.save_pretrained(tmp_path / "theirs")
    base = lorax.load(str(tmp_path / "theirs"))
    assert base.config.head == "mlm" and base.fresh == ()
    types = types_of(model)
    expected = theirs(model, types=types)[RIGHT]
    assert np.ptp(expected) > 5  # flat logits would agree with anything
    np.testing.assert_allclose(ours(base, types=types)[RIGHT], expected, rtol=0, atol=1e-4)
    dead = {"bert-untied": ["cls.predictions.bias"], "roberta-relu": ["lm_head.bias"]}
    assert_back(base, model, tmp_path / "ours", rest=dead.get(name, ()))


@pytest.mark.parametrize(("name", "labels"), [("bert", 1), ("bert-untied", 2), ("roberta", 3)])
def test_scores_are_those_of_transformers_there_and_back(name, labels, tmp_path):
    model = reference(name, "ForSequenceClassification", num_labels=labels)
    model.save_pretrained(tmp_path / "theirs")
    base = lorax.load(str(tmp_path / "theirs"))
    assert base.config.head == "classification" and base.config.labels == labels
    types = types_of(model)
    expected = theirs(model, types=types)
    assert expected.shape == (3, labels) and np.ptp(expected) > 0.2
    np.testing.assert_allclose(ours(base, types=types), expected, rtol=0, atol=1e-4)
    assert_back(base, model, tmp_path / "ours")


@pytest.mark.parametrize(
    ("name", "fresh"),
    [
        ("bert", {"head/out/kernel", "head/out/bias"}),
        (
            "roberta",
            {"head/pooler/kernel", "head/pooler/bias", "head/out/kernel", "head/out/bias"},
        ),
    ],
)
def test_a_bare_model_takes_a_new_classifier(name, fresh, tmp_path):
    """Bare names, and the names that norms had in BERT's first files. BERT's own pooler is kept."""
    model = reference(name, "Model")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    old = {
        key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for key, value in tensors.items()
    }
    assert not any(key.startswith(name) for key in old) and len(set(old) - set(tensors)) > 4
    safetensors.numpy.save_file(old, file)

    bare = lorax.load(str(tmp_path))
    assert bare.config.head == "none" and bare.fresh == ()
    types = types_of(model)
    np.testing.assert_allclose(
        ours(bare, types=types)[RIGHT], theirs(model, types=types)[RIGHT], rtol=0, atol=1e-4
    )
    assert_back(bare, model, tmp_path / "ours", rest={"pooler.dense.weight", "pooler.dense.bias"})

    base = lorax.load(str(tmp_path), head="classification", labels=4)
    assert set(base.fresh) == fresh and base.params["head"]["out"]["kernel"].shape == (16, 4)
    if name == "bert":
        pooler = tensors["pooler.dense.weight"].T
        np.testing.assert_array_equal(base.params["head"]["pooler"]["kernel"], pooler)


# ------------------------------------------------------------------------------ rows and how to run


def start(kind, **run):
    """(module, random parameters)."""
    module = bert.BERT(bert.config_from_hf(TINY | {"model_type": kind}, **run))
    params = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    noise = lambda path, x: jnp.float32(path.endswith("scale") + 0.4 * rng.standard_normal(x.shape))
    flat = tree.flatten(params)
    return module, tree.unflatten({path: noise(path, leaf) for path, leaf in flat.items()})


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_texts_in_one_row_are_texts_apart(kind):
    module, params = start(kind, head="none")
    tokens, types, segments = (np.tile(x, (3, 1)) for x in (TOKENS[:1], TYPES[:1], [12 * [0]]))
    segments[0] = [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0]
    for row, text in ((1, slice(2, 7)), (2, slice(7, 10))):
        n = text.stop - text.start
        for rows in (tokens, types):
            rows[row, :n] = rows[0, text]
        segments[row, :n] = 1
    run = jit(lambda segments: module.apply({"params": params}, tokens, segments, types))
    hidden = run(segments)
    np.testing.assert_allclose(hidden[0, 2:7], hidden[1, :5], rtol=0, atol=2e-5)
    np.testing.assert_allclose(hidden[0, 7:10], hidden[2, :3], rtol=0, atol=2e-5)
    assert np.abs(run(np.sign(segments))[0] - hidden[0]).max() > 0.1  # the two as one text


def test_roberta_padded_on_the_left_is_transformers_own(tmp_path):
    """Their position numbers come from the padding tokens, ours from the segments."""
    model = reference("roberta")
    model.save_pretrained(tmp_path)
    left = RIGHT[:, ::-1]
    tokens = np.where(left, TOKENS, model.config.pad_token_id)
    expected = theirs(model, tokens, left, 0 * TYPES)[left]
    got = ours(lorax.load(str(tmp_path)), tokens, left, 0 * TYPES)[left]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_remat_and_unroll_change_nothing():
    def loss_and_gradients(**run):
        module, params = start("bert", **run)
        loss = lambda p: jnp.mean(jax.nn.logsumexp(module.apply({"params": p}, TOKENS), axis=-1))
        return jit(jax.value_and_grad(loss))(params)

    loss, grads = loss_and_gradients(unroll=1)
    again, same = loss_and_gradients(unroll=2, remat="full")
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for path, grad in tree.flatten(same).items():
        want = tree.flatten(grads)[path]
        # The softmax ignores k's bias.
        assert path.endswith("k/bias") or np.abs(want).max() > 1e-6, path
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6, err_msg=path)


def test_bfloat16_computes_in_half_and_answers_in_float32():
    def run(dtype):
        module, params = start("bert", dtype=dtype)
        return jit(module.apply)({"params": params}, TOKENS)

    half, full = run("bfloat16"), run("float32")
    assert half.dtype == full.dtype == jnp.float32
    assert 1e-4 < np.std(half - full) < 0.03 * np.std(full)
    module, params = start("bert", head="classification", dtype="bfloat16")
    assert jax.eval_shape(module.apply, {"params": params}, TOKENS).dtype == jnp.float32


def test_logits_read_what_head_names_and_only_the_head_that_is_there():
    module, params = start("roberta")
    part = {name: params[name] for name in module.head}
    call = functools.partial(module.apply, {"params": part}, method="logits")
    assert jax.eval_shape(call, jnp.zeros((2, 16))).shape == (2, 40)
    with pytest.raises(ValueError, match="scores: head is 'mlm'; load with head='classification'"):
        module.apply({"params": params}, jnp.zeros((1, 2, 16)), method="scores")


@pytest.mark.parametrize(("kind", "room"), [("bert", 14), ("roberta", 12)])
def test_more_tokens_than_positions_are_an_error(kind, room):
    module, _ = start(kind)
    message = f"{room + 1} tokens, but max_position_embeddings leaves room for {room}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, room + 1), np.int32))


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_decoder": True}, "is_decoder=true is not supported for Bert"),
        ({"add_cross_attention": True}, "add_cross_attention=true"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"hidden_act": "swish7"}, "hidden_act: .swish7. given, must be one of .*gelu_new"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification.*set head"),
        ({"model_type": "albert"}, "model_type 'albert' is not one of bert, roberta"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id null"),
    ],
)
def test_what_the_module_does_not_compute_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        bert.config_from_hf(TINY | fields)


@pytest.mark.parametrize(
    ("run", "message"),
    [({"head": "mln"}, "head 'mln' is not one of mlm,"), ({"labels": 0}, "labels 0")],
)
def test_a_head_that_there_is_none_of_is_refused(run, message):
    with pytest.raises(ValueError, match=message):
        bert.config_from_hf(TINY, **run)


@pytest.mark.parametrize(
    ("fields", "run", "expected"),
    [
        ({}, {}, ("mlm", 2)),
        ({"architectures": ["BertForPreTraining"]}, {}, ("mlm", 2)),
        ({"architectures": ["BertModel"]}, {}, ("none", 2)),
        ({"architectures": ["BertForSequenceClassification"]}, {}, ("classification", 2)),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, {}, ("mlm", 3)),
        ({"num_labels": 1}, {"head": "classification"}, ("classification", 1)),
        ({"num_labels": 1}, {"labels": 5}, ("mlm", 5)),
        ({"architectures": ["BertForTokenClassification"]}, {"head": "none"}, ("none", 2)),
    ],
)
def test_head_and_labels_are_as_given_or_as_in_the_files(fields, run, expected):
    config = bert.config_from_hf(fields, **run)
    assert (config.head, config.labels) == expected


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("head", ["mlm", "classification", "none"])
def test_config_survives_hugging_faces_names(name, head):
    config = bert.Config(name.split("-")[0], **TINY | VARIANTS[name], head=head)
    back = bert.config_from_hf(bert.hf_config(config))
    assert back == config and bert.hf_config(config)["model_type"] == config.model_type


def test_defaults_are_those_of_transformers():
    transformers = require("transformers")
    for kind in ("Bert", "Roberta"):
        fields = getattr(transformers, f"{kind}Config")().to_dict()
        assert bert.config_from_hf(fields) == bert.config_from_hf({"model_type": kind.lower()})
