"""DeBERTa v2 and v3 are transformers' own, with each of their options and heads, there and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from support import require

import lorax
from lorax import models, tree
from lorax.models import deberta

TINY = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=14,
)
RELATIVE = dict(relative_attention=True, position_biased_input=False)
VARIANTS = {
    "plain": dict(num_attention_heads=1, pos_att_type=["p2c"]),  # only the scale knows of p2c
    "v2": dict(
        **RELATIVE,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=5,
        norm_rel_ebd="layer_norm",
        type_vocab_size=2,
        hidden_act="relu",
        tie_word_embeddings=False,
    ),
    "v3": dict(
        **RELATIVE,
        pos_att_type="p2c|c2p",
        share_att_key=True,
        position_buckets=6,
        norm_rel_ebd="layer_norm",
        pooler_hidden_act="relu",
        legacy=False,
    ),
    "xlarge": dict(
        **RELATIVE,
        num_hidden_layers=3,
        pos_att_type="p2c|c2p",
        share_att_key=True,
        position_buckets=4,
        conv_kernel_size=3,
        embedding_size=12,
        layer_norm_eps=0.02,
    ),
    "c2p": dict(relative_attention=True, pos_att_type=["c2p"], conv_kernel_size=5, conv_act="gelu"),
    "p2c": dict(**RELATIVE, num_hidden_layers=1, pos_att_type=["p2c"], position_buckets=4),
}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, TINY["vocab_size"], (3, 12), np.int32)
TYPES = RNG.integers(0, 2, TOKENS.shape, np.int32)
RIGHT = np.arange(12)[None] < np.array([12, 5, 9])[:, None]  # real tokens of rows, padded after


@functools.cache
def reference(name, head="ForMaskedLM", **more):
    """A random model of transformers, with weights and biases large enough to matter."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(**TINY | VARIANTS[name] | more)
    model = getattr(transformers, f"DebertaV2{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(5 * parameter + 0.1 * torch.randn_like(parameter))
    return model


def theirs(model, mask=RIGHT):
    """First output of transformers' model: logits or hidden states."""
    torch = require("torch")
    tokens, mask, types = (torch.from_numpy(x.astype(np.int64)) for x in (TOKENS, mask, TYPES))
    with torch.no_grad():
        return model(tokens, attention_mask=mask, token_type_ids=types)[0].numpy()


def ours(base, segments=RIGHT):
    run = jit(functools.partial(lorax.apply, base.module))
    out = run(base.params, TOKENS, segments.astype(np.int32), TYPES)
    assert out.dtype == jnp.float32
    return out


def assert_back(base, model, directory):
    """transformers reads what `save` wrote as the same model."""
    models.save(directory, base)
    back, info = type(model).from_pretrained(directory, output_loading_info=True)
    rest = {"cls.predictions.bias"} if not model.config.tie_word_embeddings else set()
    assert info["missing_keys"] <= rest
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    tensors = back.state_dict()
    for name, tensor in model.state_dict().items():
        assert name in rest or bool((tensors[name] == tensor).all()), name
    np.testing.assert_allclose(theirs(back.eval()), theirs(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_masked_token_logits_are_those_of_transformers_there_and_back(name, tmp_path):
    model = reference(name)
    model.save_pretrained(tmp_path / "theirs")
    base = lorax.load(str(tmp_path / "theirs"))
    assert base.config.head == "mlm" and base.fresh == ()
    expected = theirs(model)[RIGHT]
    assert np.ptp(expected) > 5  # flat logits would agree with anything
    np.testing.assert_allclose(ours(base)[RIGHT], expected, rtol=0, atol=1e-4)
    if not base.config.position_biased_input:  # absolute positions differ: ours start at the text
        left = RIGHT[:, ::-1]
        np.testing.assert_allclose(ours(base, left)[left], theirs(model, left)[left], atol=1e-4)
    assert_back(base, model, tmp_path / "ours")


@pytest.mark.parametrize(("name", "labels"), [("v3", 1), ("xlarge", 3)])
def test_scores_are_those_of_transformers_there_and_back(name, labels, tmp_path):
    model = reference(name, "ForSequenceClassification", num_labels=labels)
    model.save_pretrained(tmp_path / "theirs")
    base = lorax.load(str(tmp_path / "theirs"))
    assert base.config.head == "classification" and base.config.labels == labels
    expected = theirs(model)
    assert expected.shape == (3, labels) and np.ptp(expected) > 0.2
    np.testing.assert_allclose(ours(base), expected, rtol=0, atol=1e-4)
    assert_back(base, model, tmp_path / "ours")


def test_a_bare_model_takes_a_new_classifier(tmp_path):
    model = reference("v2", "Model")
    model.save_pretrained(tmp_path)
    bare = lorax.load(str(tmp_path))
    assert bare.config.head == "none" and bare.fresh == ()
    np.testing.assert_allclose(ours(bare)[RIGHT], theirs(model)[RIGHT], rtol=0, atol=1e-4)
    assert_back(bare, model, tmp_path / "ours")
    base = lorax.load(str(tmp_path), head="classification", labels=4)
    layers = ("pooler", "out")
    assert set(base.fresh) == {f"head/{layer}/{p}" for layer in layers for p in ("kernel", "bias")}
    assert base.params["head"]["out"]["kernel"].shape == (16, 4)


# ------------------------------------------------------------------------------- relative positions


@pytest.mark.parametrize(
    ("buckets", "furthest"), [(256, 512), (256, 256), (32, 129), (6, 5), (-1, 64)]
)
def test_rows_of_relative_positions_are_those_of_transformers(buckets, furthest):
    """v3's sizes, and two at which the logarithm in float64 would give other rows than theirs."""
    torch = require("torch")
    require("transformers")
    from transformers.models.deberta_v2 import modeling_deberta_v2 as their

    text = torch.zeros(1, 1300, 1)
    distance = their.build_relative_position(text, text, buckets, furthest)[0].numpy()
    config = deberta.Config(position_buckets=buckets, max_relative_positions=furthest)
    span = buckets if buckets > 0 else furthest
    expected = np.clip(distance + span, 0, 2 * span - 1)
    np.testing.assert_array_equal(deberta.relative_rows(config, 1300), expected)


def start(name, **run):
    """(module, random parameters)."""
    module = deberta.DeBERTa(deberta.config_from_hf(TINY | VARIANTS[name], **run))
    params = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    noise = lambda path, x: jnp.float32(path.endswith("scale") + 0.4 * rng.standard_normal(x.shape))
    flat = tree.flatten(params)
    return module, tree.unflatten({path: noise(path, leaf) for path, leaf in flat.items()})


def test_an_adapter_of_a_shared_projection_adapts_positions_too():
    module, params = start("v3")
    method = lorax.method("lora", rank=2, targets=("q", "k"))
    trainable, constants = method.init(jax.random.key(0), params)
    trainable = jax.tree.map(lambda x: 0.3 + x, trainable)
    run = jit(functools.partial(lorax.apply, module))
    adapted = run(method.bind(trainable, constants, params), TOKENS)
    merged = run(lorax.merge(method, (trainable, constants), params), TOKENS)
    np.testing.assert_allclose(adapted, merged, rtol=0, atol=1e-4)
    assert np.abs(merged - run(params, TOKENS)).max() > 0.1


# ------------------------------------------------------------------------------ rows and how to run


@pytest.mark.parametrize("name", ["v2", "xlarge", "c2p"])
def test_texts_in_one_row_are_texts_apart(name):
    module, params = start(name, head="none")
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


def test_remat_and_unroll_change_nothing_and_everything_has_a_gradient():
    def loss_and_gradients(**run):
        module, params = start("xlarge", **run)
        loss = lambda p: jnp.mean(jax.nn.logsumexp(module.apply({"params": p}, TOKENS), axis=-1))
        return jit(jax.value_and_grad(loss))(params)

    loss, grads = loss_and_gradients(unroll=1)
    again, same = loss_and_gradients(unroll=2, remat="full")
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for path, grad in tree.flatten(same).items():
        want = tree.flatten(grads)[path]
        assert np.abs(want).max() > 1e-6, path
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6, err_msg=path)


def test_bfloat16_computes_in_half_and_answers_in_float32():
    def run(dtype):
        module, params = start("xlarge", dtype=dtype)
        return jit(module.apply)({"params": params}, TOKENS)

    half, full = run("bfloat16"), run("float32")
    assert half.dtype == full.dtype == jnp.float32
    assert 1e-4 < np.std(half - full) < 0.03 * np.std(full)


def test_only_absolute_positions_limit_the_length():
    call = lambda name: jax.eval_shape(
        start(name)[0].init, jax.random.key(0), np.zeros((1, 15), int)
    )
    with pytest.raises(ValueError, match="15 tokens, but max_position_embeddings is 14"):
        call("c2p")
    call("v3")


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "swish7"}, "hidden_act: .swish7. given, must be one of .*gelu_new"),
        ({"pooler_hidden_act": "swish7"}, "pooler_hidden_act: .swish7."),
        ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"attention_head_size": 4}, "attention_head_size 4 is not supported, only 8"),
        ({"pooler_hidden_size": 8}, "pooler_hidden_size 8 is not supported, only 16"),
        ({"conv_groups": 2}, "conv_groups 2 is not supported, only 1"),
        ({"conv_kernel_size": 4}, "conv_kernel_size 4"),
        ({"conv_kernel_size": 3, "conv_act": "swish7"}, "conv_act 'swish7'"),
        ({"pos_att_type": ["c2p", "p2p"]}, r"pos_att_type \['c2p', 'p2p'\]"),
        ({"relative_attention": True}, "relative_attention=true needs 'c2p'"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd: .batch_norm. given, must be one of"),
        ({"position_buckets": 256}, "position_buckets 256"),
        ({"legacy": False, "embedding_size": 8}, "legacy=false .* embedding_size 8"),
        ({"legacy": False, "tie_word_embeddings": False}, "legacy=false .*tie_word_embeddings"),
        ({"architectures": ["DebertaV2ForQuestionAnswering"]}, "ForQuestionAnswering.*set head"),
    ],
)
def test_what_the_module_does_not_compute_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        deberta.config_from_hf(TINY | fields)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("head", ["mlm", "classification", "none"])
def test_config_survives_hugging_faces_names(name, head):
    config = deberta.config_from_hf(TINY | VARIANTS[name], head=head)
    assert config.head == head and isinstance(config.pos_att_type, tuple)
    assert deberta.config_from_hf(deberta.hf_config(config)) == config


def test_defaults_are_those_of_transformers():
    transformers = require("transformers")
    assert deberta.config_from_hf(transformers.DebertaV2Config().to_dict()) == deberta.Config()
