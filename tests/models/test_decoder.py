"""Every family of decoders is transformers' own, there and back, in whatever way texts come."""

import dataclasses
import functools
import re
from pathlib import Path

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import CASES, LLAMA3, LONG, OF_FAMILY, TINY, TOKENS, YARN, reference, saved
from quick import jit
from support import data, few, require

import lorax
from lorax import decode, models, tree
from lorax.methods import targets
from lorax.models import decoder, layers, rope
from lorax.models.decoder import FULL, SLIDING
from lorax.models.decoder_families import FAMILIES, config_from_hf, hf_config, hf_tensors, unread

LEFT = np.array([[1] * 12, [0] * 3 + [1] * 9, [0] * 8 + [1] * 4], np.int32)
RIGHT = LEFT[:, ::-1].copy()


def as_ours(config, tensors):
    """{our path: array} of {transformers' name: torch tensor}, for two layers."""
    flat = {}
    for path, source in hf_tensors(config).items():
        source = source.other or source  # as in memory
        layers = (0, 1) if "{}" in source.name else (None,)
        parts = [tensors[source.name.format(i)].detach().numpy() for i in layers]
        parts = [part.transpose(source.axes) if source.axes else part for part in parts]
        flat[path] = np.stack(parts) if len(parts) == 2 else parts[0]
    return flat


@functools.cache
def loaded(name):
    return lorax.load(str(saved(name)))


def ours(name):
    return loaded(name).module, loaded(name).params


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_there_and_back(name, tmp_path):
    transformers, model = require("transformers"), reference(name)
    base = loaded(name)
    expected = decoders.logits(model)
    assert np.ptp(expected) > 5  # flat logits would agree with anything
    logits = jit(functools.partial(lorax.apply, base.module))(base.params, TOKENS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    models.save(tmp_path / "ours", base)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(back) is type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    np.testing.assert_array_equal(decoders.logits(back.eval()), expected)
    assert config_from_hf(hf_config(base.config)) == base.config


@pytest.mark.parametrize("name", CASES)
def test_every_target_word_means_one_weight_of_a_layer(name):
    base, words = loaded(name), CASES[name].words
    hits = {word: [*targets.resolve((word,), base.sites)] for word in words}
    assert all(len(paths) == 1 for paths in hits.values())
    assert {path for paths in hits.values() for path in paths} == {*base.sites}
    assert {path for path in base.sources if path.endswith("kernel")} < {*base.sites}


# ------------------------------------------------------------------------------- texts in one batch


@functools.cache
def run(name):
    module, params = ours(name)
    apply = jit(lambda tokens, segments: module.apply({"params": params}, tokens, segments))
    return lambda tokens, segments: np.asarray(apply(tokens, segments))


#: Cases with masks and rotations of several kinds.
KINDS = ["qwen2-mixed", "smollm3-windows", "olmo3-ropes"]


@pytest.mark.parametrize("name", few(["llama-3", *KINDS], KINDS[1:]))
def test_padding_on_either_side_is_not_seen(name):
    for segments in (LEFT, RIGHT):
        got, want = run(name)(TOKENS, segments), decoders.logits(reference(name), TOKENS, segments)
        real = segments > 0
        np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-4)


ROPED = ["llama-3", "llama-dynamic", "llama-longrope"]


@pytest.mark.parametrize("name", few([*ROPED, *KINDS], [*ROPED[1:], *KINDS[1:]]))
def test_packed_texts_are_texts_apart(name):
    """Also where one of them is so long that its own positions turn slower, and the other not."""
    segments = np.array([[0, *[5] * 9, 1, 1], [2] * 3 + [3] * 9, [1] * 6 + [2] * 6], np.int32)
    packed = run(name)(TOKENS, segments)
    for row, number in ((0, 5), (0, 1), (1, 2), (1, 3), (2, 2)):
        at = segments[row] == number
        decoders.logits(reference(name), TOKENS[:, :1])  # forgets the longest text it has seen
        alone = decoders.logits(reference(name), TOKENS[row : row + 1, at])[0]
        np.testing.assert_allclose(packed[row, at], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", few(["llama-3", *KINDS], KINDS[1:]))
def test_reading_in_parts_with_a_cache_is_one_pass(name):
    module, params = ours(name)

    @jit
    def read(tokens, segments, cache):
        apply = functools.partial(module.apply, {"params": params})
        hidden, cache = apply(tokens, segments, cache, method="hidden")
        return apply(hidden, method="logits"), cache

    cache, parts = module.empty_cache(3, 14), []
    c = module.config
    assert len(cache.k) == len(cache.v) == c.num_hidden_layers
    assert cache.k[0].shape == (3, c.num_key_value_heads, 14, c.head_dim)
    for part in (slice(0, 9), slice(9, 10), slice(10, 11), slice(11, 12)):
        logits, cache = read(TOKENS[:, part], LEFT[:, part], cache)
        parts.append(logits)
    got = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(got[LEFT > 0], run(name)(TOKENS, LEFT)[LEFT > 0], atol=1e-4)


#: With LongRoPE a cache has no room for the text (see below).
GREEDY = [*(OF_FAMILY | {"phi3": "phi3"}).values()]


@pytest.mark.parametrize(
    "name", few(GREEDY, KINDS[1:], ["llama-3", "ministral3", "gemma3-capped", "mixtral-window"])
)
def test_greedy_text_is_that_of_transformers(name):
    """Prompts of 6 to 12 tokens, padded on the left, and 10 more tokens."""
    torch, base = require("torch"), loaded(name)
    segments = np.array([[1] * 12, [0] * 3 + [1] * 9, [0] * 6 + [1] * 6], np.int32)
    variety = dict(no_repeat_ngram_size=2)  # or random models say one token for ever
    how = decode.DecodingOptions(max_new_tokens=10, ends=(), pad=0, **variety)
    got = decode.generate(base.module, base.params, TOKENS, segments, jax.random.key(0), how)
    want = reference(name).generate(
        torch.from_numpy(TOKENS).long(), attention_mask=torch.from_numpy(segments),
        max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0, **variety,
    )  # fmt: skip
    np.testing.assert_array_equal(got, want[:, 12:].numpy())
    assert len(np.unique(got)) >= 5


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope"])
def test_a_cache_beyond_the_length_where_all_keys_turn_anew_is_refused(name):
    module, params = ours(name)
    hidden = lambda room: jax.eval_shape(
        lambda: module.apply(
            {"params": params}, TOKENS[:, :4], None, module.empty_cache(3, room), method="hidden"
        )
    )
    hidden(8)
    with pytest.raises(ValueError, match="a cache of 9 tokens: .* that grows beyond 8 tokens"):
        hidden(9)


# ------------------------------------------------------------------------------ how layers are run


@functools.cache
def torch_gradients(name):
    torch, model = require("torch"), reference(name)
    model.zero_grad()
    logits = model(torch.from_numpy(TOKENS).long()).logits
    torch.logsumexp(logits, dim=-1).mean().backward()
    return {key: value.grad for key, value in model.named_parameters()}


RUNS = [("llama-biases", "none", 1), ("qwen3-mixed", "dots", 0), ("olmo3-ropes", "full", 2)]


@pytest.mark.parametrize(
    ("name", "remat", "unroll"),
    few([*RUNS, ("llama-biases", "full", 2), ("granite-multipliers", "none", 0)], RUNS),
)
def test_gradients_are_those_of_transformers(name, remat, unroll):
    module, params = ours(name)
    config = dataclasses.replace(module.config, remat=remat, unroll=unroll)
    loss = lambda params: jnp.mean(
        jax.nn.logsumexp(decoder.Decoder(config).apply({"params": params}, TOKENS), axis=-1)
    )
    grads = tree.flatten(jit(jax.grad(loss))(params))
    for path, want in as_ours(config, torch_gradients(name)).items():
        scale = np.abs(want).max()
        assert scale > 1e-4, path
        np.testing.assert_allclose(grads[path], want, rtol=1e-3, atol=1e-4 * scale, err_msg=path)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_computes_in_bfloat16_if_asked(name):
    """No float in a `Config` makes it wider; strict promotion raises where dtypes meet."""
    config = dataclasses.replace(loaded(name).config, dtype="bfloat16")
    module = decoder.Decoder(config)
    read = lambda method: jax.eval_shape(
        lambda params: module.apply({"params": params}, TOKENS, method=method), ours(name)[1]
    )
    assert (read("hidden").dtype, read("__call__").dtype) == (jnp.bfloat16, jnp.float32)


def test_rms_norm_has_the_values_and_gradients_of_flax():
    from flax import linen as nn

    rng = np.random.default_rng(0)
    x, scale, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 7), 7, (2, 3, 7)))

    @functools.partial(jit, static_argnums=0)
    def both(module, x, scale):
        y, pull = jax.vjp(lambda x, s: module.apply({"params": {"scale": s}}, x), x, scale)
        return y, *pull(dy)

    pairs = zip(both(layers.RMSNorm(0.1), x, scale), both(nn.RMSNorm(0.1), x, scale), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    half = layers.RMSNorm(0.1).apply({"params": {"scale": scale}}, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


# --------------------------------------------------------------------------------------- positions

D8 = [float(i) for i in range(1, 5)]
ROPES = {
    "default": {},
    "theta": dict(rope_theta=500000.0),
    "linear": dict(rope_type="linear", factor=2.5),
    "dynamic": dict(rope_type="dynamic", factor=3.0),
    "llama3": LLAMA3 | dict(rope_theta=500000.0),
    "yarn": YARN,
    "yarn-smooth": YARN | dict(truncate=False, beta_fast=4.0, beta_slow=0.5),
    "yarn-mscale": YARN | dict(mscale=0.7, mscale_all_dim=1.3),
    "yarn-scaled": YARN | dict(attention_factor=1.7),
    "yarn-by-length": dict(rope_type="yarn", factor=None, original_max_position_embeddings=16),
    "longrope": LONG | dict(short_factor=D8, long_factor=D8[::-1], factor=5.0),
    "longrope-by-length": LONG | dict(short_factor=D8, long_factor=D8[::-1]),
    "longrope-scaled": LONG | dict(short_factor=D8, long_factor=D8[::-1], attention_factor=0.5),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ROPES)
def test_positions_turn_as_in_transformers(name, old):
    """By the fields of transformers 5 and of those before it; texts of 50 and 99 of 64 tokens."""
    transformers, torch = require("transformers"), require("torch")
    fields = dict(hidden_size=32, num_attention_heads=4, max_position_embeddings=64)
    given = dict(ROPES[name])
    if old:
        fields["rope_theta"] = given.pop("rope_theta", 10000.0)
        given["type"] = given.pop("rope_type", "default")
        fields["rope_scaling"] = given if len(given) > 1 else None
    else:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0} | given
    config = config_from_hf(fields)
    theirs = transformers.LlamaConfig(**fields)
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    for length in (50, 99):
        at = np.arange(length)[None]
        want = embedding(torch.zeros(1), torch.from_numpy(at))
        lengths = None if length <= 64 and "longrope" not in name else jnp.full((1, length), length)
        turning = rope.frequencies(config.rope_parameters, 8, 64, lengths)
        got = rope.rope(jnp.asarray(at), *turning)
        for ours, their in zip(got, want, strict=True):
            np.testing.assert_allclose(ours[:, :, 0], their[..., :4].numpy(), rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------------ a real model


@functools.cache
def stories():
    """(tokens, segments) (40, 512): the first 40 stories, stripped, each with BOS."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data("models/stories-llama-260k") / "tokenizer.json"))
    text = data("tinystories/tinystories_sample.txt").read_text()
    tokens, segments = np.zeros((40, 512), np.int32), np.zeros((40, 512), np.int32)
    for i, story in enumerate(text.split("<|endoftext|>")[:40]):
        ids = tokenizer.encode(story.strip()).ids
        tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
    return tokens, segments


def nats(logits):
    """Mean negative log-likelihood of every token but the first of a story, for (B, T, V) logits
    of the first B stories' first T tokens."""
    tokens, segments = (x[: len(logits), : logits.shape[1]] for x in stories())
    likely = jax.nn.log_softmax(logits[:, :-1])
    each = jnp.take_along_axis(likely, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return -float(np.asarray(each)[segments[:, 1:] > 0].mean())


@functools.cache
def teller():
    """(the model, its logits on the stories)."""
    base = lorax.load(str(data("models/stories-llama-260k")))
    return base, jax.jit(functools.partial(lorax.apply, base.module))(base.params, *stories())


def test_a_model_that_learnt_stories_tells_them():
    base, logits = teller()
    tokens, segments = stories()
    assert tree.count(base.params) == 260032 and base.vocabulary.start == (1,)
    names = ["attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down"]
    assert {*base.sites} == {"embed/embedding", *(f"h/{name}/kernel" for name in names)}
    assert (segments[:, 1:] > 0).sum() == 12571
    assert abs(nats(logits) - 1.2451) < 1e-3
    model = require("transformers").AutoModelForCausalLM.from_pretrained(base.name)
    real = segments[:6] > 0
    expected = decoders.logits(model.eval(), tokens[:6])[real]
    np.testing.assert_allclose(np.asarray(logits)[:6][real], expected, rtol=0, atol=1e-4)


def test_weights_in_bfloat16_tell_nearly_the_same():
    exact, logits = teller()
    base = lorax.load(exact.name, param_dtype=jnp.bfloat16)
    for path, leaf in tree.flatten(base.params).items():
        np.testing.assert_array_equal(leaf, tree.flatten(exact.params)[path].astype(jnp.bfloat16))
    tokens, segments = (x[:4, :256] for x in stories())
    rounded = jit(functools.partial(lorax.apply, base.module))(base.params, tokens, segments)
    assert rounded.dtype == jnp.float32
    assert 1e-5 < abs(nats(rounded) - nats(logits[:4, :256])) < 5e-3


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type="mamba"), r"model_type 'mamba' is not one of .*'mistral'"),
        (dict(model_type="mistral", attention_bias=True), "attention_bias=true .* for mistral"),
        (dict(model_type="qwen2", mlp_bias=True), "mlp_bias=true is not supported for qwen2"),
        (dict(hidden_act="swish7"), "hidden_act: .swish7. given, must be one of .*silu"),
        (dict(hidden_size=18), "hidden_size 18 is not a multiple of num_attention_heads 4"),
        (dict(num_key_value_heads=3), "num_attention_heads 4 .* of num_key_value_heads 3"),
        (dict(head_dim=5), "head_dim 5 is odd"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
        (
            dict(rope_parameters={"llama_4_scaling_beta": 0.1}),
            "llama_4_scaling_beta=0.1 is not supported",
        ),
        (dict(rope_scaling={"type": "su"}), "rope_type 'su' is not one of .*'longrope'"),
        (dict(rope_parameters={"rope_type": "linear"}), "'linear' needs factor; given are"),
        (dict(rope_parameters=LLAMA3 | {"low_freq_factor": None}), "needs low_freq_factor"),
        (dict(rope_parameters=LONG | {"long_factor": [1.0]}), "long_factor has 1 numbers, .* 3"),
        (
            dict(rope_parameters={FULL: {"rope_theta": 2.0}}),
            "by layer type are not .*full_att",
        ),
        (dict(model_type="mistral", sliding_window=0), "sliding_window: 0 given, must be a whole"),
        (dict(model_type="mistral", layer_types=[FULL] * 2), "not supported for mistral"),
        (dict(model_type="qwen2", layer_types=[SLIDING] * 2), "sliding_window=None, where"),
        (
            dict(model_type="qwen2", layer_types=[FULL]),
            "layer_types: 1 given for num_h",
        ),
    ],
)
def test_what_the_module_does_not_compute_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(TINY | fields)


def test_the_page_on_bases_says_what_each_family_has():
    page = (Path(__file__).parents[2] / "docs" / "bases.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall("`(.*?)`", row)}
    assert named - {"model_type"} == {*FAMILIES}


def test_the_fields_that_no_family_reads_are_said():
    cohere = TINY | dict(
        model_type="cohere", logit_scale=0.0625, layer_norm_eps=1e-5, use_qk_norm=False,
        bos_token_id=5, attention_dropout=0.1, _name_or_path="x", rope_theta=1e4,
    )  # fmt: skip
    assert unread(cohere) == ["logit_scale", "layer_norm_eps"]


def test_fields_that_a_file_leaves_out_are_those_of_transformers():
    for family in FAMILIES:
        theirs = require("transformers").AutoConfig.for_model(family).to_dict()
        assert config_from_hf({"model_type": family}) == config_from_hf(theirs)
    assert config_from_hf({}) == decoder.Config()


def test_only_layers_from_max_window_layers_slide():
    hf = TINY | dict(model_type="qwen2", use_sliding_window=True, num_hidden_layers=3)
    config = config_from_hf(hf | dict(max_window_layers=2))
    assert config.layer_types == (FULL, FULL, SLIDING)
    assert config.sliding_window == 4096
    assert config_from_hf(hf).sliding_window is None  # 28 is beyond the last layer
    same = config_from_hf(hf | dict(max_window_layers=0, sliding_window=5))
    assert (same.layer_types, same.sliding_window) == (None, 5)
    assert hf_config(same)["layer_types"] == [SLIDING] * 3
    named = config_from_hf(hf | dict(layer_types=[SLIDING, FULL, FULL]))
    assert named.layer_types[0] == SLIDING
