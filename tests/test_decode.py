"""Decoding writes what transformers writes, token by token."""

import functools
import math

import jax
import numpy as np
import pytest
from small import noisy, three_layers
from support import data, require

import lorax
from lorax import decode, sharding
from lorax.train import stacks

END, NEW = 5, 12
ENDS = (END, 8, 13, 20)
OPTIONS = {
    "greedy": {},
    "greedy-no-repeats": dict(no_repeat_ngram_size=2),
    "beams": dict(num_beams=3),
    "beams-no-repeats": dict(num_beams=4, length_penalty=0.8, no_repeat_ngram_size=3),
    "beams-early": dict(num_beams=3, early_stopping=True, length_penalty=2.0),
    "beams-short": dict(num_beams=2, length_penalty=-1.0),
}


def their_options(how):
    found = dict(num_beams=how.num_beams, length_penalty=how.length_penalty)
    found |= dict(early_stopping=how.early_stopping, do_sample=False)
    return found | (
        dict(no_repeat_ngram_size=how.no_repeat_ngram_size) if how.no_repeat_ngram_size else {}
    )


@functools.cache
def model():
    """(transformers' GPT-2, ours): random, with an end that is likely enough to come up."""
    import tempfile

    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=24, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=END,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(5 * parameter + 0.1 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        return theirs, lorax.load(directory)


def prompts():
    """Six prompts of 3 to 8 tokens, padded on the left."""
    rng = np.random.default_rng(1)
    tokens, segments = rng.integers(6, 24, (6, 8)).astype(np.int32), np.ones((6, 8), np.int32)
    for row, pad in enumerate((0, 2, 5, 1, 3, 0)):
        tokens[row, :pad], segments[row, :pad] = END, 0
    return tokens, segments


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_and_beam_search_are_those_of_transformers(name):
    torch, (theirs, base) = require("torch"), model()
    tokens, segments = prompts()
    how = decode.DecodingOptions(max_new_tokens=NEW, ends=ENDS, pad=END, **OPTIONS[name])
    ours = decode.generate(base.module, base.params, tokens, segments, jax.random.key(0), how)
    want = theirs.generate(
        torch.tensor(tokens).long(), attention_mask=torch.tensor(segments), max_new_tokens=NEW,
        eos_token_id=list(ENDS), pad_token_id=END, **their_options(how),
    ).numpy()[:, 8:]  # fmt: skip
    want = np.pad(want, ((0, 0), (0, NEW - want.shape[1])), constant_values=END)
    np.testing.assert_array_equal(ours, want)
    assert len({tuple(row) for row in want}) > 3 and len({tuple(row == END) for row in want}) > 2


@pytest.mark.parametrize(
    "options",
    [dict(temperature=0.7), dict(temperature=2.0, top_k=3), dict(temperature=1.5, top_p=0.6)],
)
def test_samples_have_the_distribution_that_the_options_describe(options):
    """Of the first token, by 4,000 draws, against transformers' own warpers."""
    torch, transformers, (theirs, base) = require("torch"), require("transformers"), model()
    tokens, segments = (np.repeat(x[:1], 4000, axis=0) for x in prompts())
    how = decode.DecodingOptions(max_new_tokens=1, ends=(END,), pad=END, **options)
    drawn = decode.generate(base.module, base.params, tokens, segments, jax.random.key(3), how)
    logits = theirs(torch.tensor(tokens[:1]).long()).logits[:, -1].detach() / how.temperature
    warp = transformers.generation.logits_process
    if how.top_k:
        logits = warp.TopKLogitsWarper(how.top_k)(None, logits)
    if how.top_p < 1:
        logits = warp.TopPLogitsWarper(how.top_p)(None, logits)
    want = torch.softmax(logits, -1)[0].numpy()
    got = np.bincount(np.asarray(drawn)[:, 0], minlength=24) / 4000
    assert not got[want == 0].any() and (want > 0.02).sum() > 1
    np.testing.assert_allclose(got, want, rtol=0, atol=5 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.3), dict(temperature=1.0, top_k=5), dict(temperature=1.7, top_p=0.8),
        dict(temperature=1.0, top_k=20, top_p=0.5), dict(temperature=2.0, top_k=10**6, top_p=0.01),
    ],
)  # fmt: skip
def test_logits_are_warped_as_by_transformers(options):
    torch, transformers = require("torch"), require("transformers")
    logits = np.random.default_rng(0).normal(0, 3, (8, 97)).astype(np.float32)
    warpers = transformers.generation.logits_process
    theirs = warpers.LogitsProcessorList([warpers.TemperatureLogitsWarper(options["temperature"])])
    if "top_k" in options:
        theirs.append(warpers.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        theirs.append(warpers.TopPLogitsWarper(options["top_p"]))
    want = theirs(None, torch.tensor(logits)).numpy()
    got = np.asarray(decode.warp(logits, decode.DecodingOptions(**options)))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)


REAL = ("Once upon a time", "Tom and Mia had a big", "The dog")


@pytest.fixture(scope="module")
def stories():
    transformers = require("transformers")
    where = str(data("models/stories-llama-260k"))
    model = transformers.AutoModelForCausalLM.from_pretrained(where).eval()
    return model, transformers.AutoTokenizer.from_pretrained(where), lorax.load(where)


@pytest.mark.parametrize(
    "options", [{}, dict(num_beams=4, no_repeat_ngram_size=4, length_penalty=0.8)]
)
def test_texts_of_the_real_model_are_those_of_transformers(stories, options):
    model, tokenizer, base = stories
    how = decode.DecodingOptions(max_new_tokens=80, **options)
    ours = decode.complete(base, REAL, options=how, batch_size=2)
    for prompt, text in zip(REAL, ours, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=80,
            eos_token_id=[2, 1], pad_token_id=2, **their_options(how),
        )  # fmt: skip
        assert prompt + text == tokenizer.decode(out[0], skip_special_tokens=True)
        assert len(text) > 100


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("One day, the", " little girl named"),  # SentencePiece takes the space off a first word
        ("Once upon a time", ", there was a"),
        ("Once upon a time ", "Anna and her mommy went"),
        ("The dog\n", "One day, a little"),
    ],
)
def test_the_first_word_keeps_its_space(stories, prompt, text):
    _, tokenizer, base = stories
    (written,) = decode.complete(base, [prompt], options=decode.DecodingOptions(max_new_tokens=12))
    assert written.startswith(text)
    assert tokenizer.decode(tokenizer(prompt + written).input_ids[1:]) == prompt + written


def test_a_story_of_the_real_model_stops_where_the_next_begins(stories):
    _, _, base = stories
    (text,) = decode.complete(
        base, ["Once upon a time"], options=decode.DecodingOptions(max_new_tokens=400)
    )
    assert 300 < len(base.vocabulary.encode(text)) < 400


# ----------------------------------------------------------------------------------------- members

#: Members that share a program: a method, and what differs.
PROGRAMS = {
    "lora": dict(rank=(1, 3), targets=(("q", "v"), ("up",))),
    "dora": dict(rank=(1, 2)),
    "prefix": dict(tokens=(2, 2)),
    "full": {},
    "bitfit": {},
}
HOW = {
    "greedy": {},
    "beams": dict(num_beams=3, no_repeat_ngram_size=2),
    "sampled": dict(temperature=1.5),
}


def program(name):
    """(a small model, the bound parameters of the members of a program, moved off the start)."""
    base, varied = three_layers(), PROGRAMS[name]
    hp = [dict(zip(varied, values, strict=True)) for values in zip(*varied.values(), strict=True)]
    hp = hp or [{}, {}]
    built = [lorax.method(name, **x) for x in hp]
    pad = stacks.padding(built, base)
    bound = []
    for i, method in enumerate(built):
        state = method.init(jax.random.key(i), base.params, base.sites, *pad)
        learned = noisy(state.trainable, 0.3, i)
        bound.append(method.bind(learned, state.constants, base.params, sites=base.sites))
    return base, bound


@pytest.mark.parametrize(
    ("name", "how"),
    [*(("lora", how) for how in HOW), *((name, "beams") for name in list(PROGRAMS)[1:])],
)
def test_members_write_together_what_each_writes_alone(name, how):
    """Greedily, by beams and sampled, with ranks and targets of their own, also over devices."""
    base, bound = program(name)
    rng = np.random.default_rng(0)
    tokens, segments = rng.integers(2, 20, (5, 3)).astype(np.int32), np.ones((5, 3), np.int32)
    segments[1, :2] = 0
    options = decode.DecodingOptions(
        max_new_tokens=5 - 2 * (name == "prefix"), ends=(1,), **HOW[how]
    )
    write = lambda params, **more: np.asarray(
        decode.generate(base.module, params, tokens, segments, jax.random.key(4), options, **more)
    )
    alone = [write(params) for params in bound]
    several = decode.Several.of(bound)
    np.testing.assert_array_equal(write(several), np.concatenate(alone))
    assert len({x.tobytes() for x in alone}) == len(alone)
    if how == "greedy":
        over = sharding.mesh(sharding.Shape(member=2), jax.devices()[:2])
        np.testing.assert_array_equal(write(several, over=over), np.concatenate(alone))
        np.testing.assert_array_equal(write(several, apart=False), np.concatenate(alone))


def test_only_what_differs_is_stacked():
    base, bound = program("lora")
    several = decode.Several.of(bound)
    assert several.members == 2
    shared = {id(x) for x in jax.tree.leaves(base.params)}
    pairs = zip(jax.tree.leaves(several.params), several.own, strict=True)
    assert all(own != (id(x) in shared) for x, own in pairs)
    assert decode.Several.of(bound[:1] * 2).members == 2


def test_samples_do_not_depend_on_the_batch():
    base = lorax.load("gpt2-nano")
    how = decode.DecodingOptions(max_new_tokens=4, temperature=2.0)
    few, many = (
        decode.complete(base, REAL, options=how, batch_size=size, seed=5) for size in (2, 3)
    )
    assert few == many


# ------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens: 0 given, must be at least 1"),
        (dict(temperature=-1.0), "temperature: -1.0 given"),
        (dict(top_p=0.0), r"top_p: 0.0 given, must be in \(0, 1\]"),
        (
            dict(num_beams=2, temperature=1.0),
            r"num_beams: 2 given, must be 1 where tokens are sampled \(temperature above 0\)",
        ),
        (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size: -1 given"),
        (dict(temperature=math.nan), "temperature: nan given, must be 0"),
        (dict(temperature=math.inf), "temperature: inf given, must be 0"),
        (dict(temperature=1e-40), "temperature: 1e-40 given, must be 0"),
        (dict(top_p=math.nan), "top_p: nan given"),
        (dict(length_penalty=math.nan), "length_penalty: nan given, must be from -10 to 10"),
        (dict(length_penalty=-math.inf), "length_penalty: -inf given, must be from -10 to 10"),
        (dict(top_k=-1), "top_k: -1 given"),
        (dict(num_beams=-1), "num_beams: -1 given"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        decode.check(decode.DecodingOptions(**options))


def test_what_can_not_be_completed_says_why():
    base = lorax.load("gpt2-nano")
    with pytest.raises(
        ValueError, match="prompts: one of 1 tokens and 100000 new ones need more than the 256 p"
    ):
        decode.complete(base, ["a"], options=decode.DecodingOptions(max_new_tokens=100_000))
    with pytest.raises(ValueError, match="prompt 1: is empty, and gpt2-nano has no start token"):
        decode.complete(base, ["a", ""])
    with pytest.raises(ValueError, match="prompt 1: 3 given, must be text"):
        decode.complete(base, ["a", 3])
    with pytest.raises(ValueError, match=r"prompt 0: \\ud83d is half of a character"):
        decode.complete(base, ["a\ud83d"])
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        decode.complete(base.replace(vocabulary=None), ["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seed=99999999999999999999), "seed: 99999999999999999999 given, must be from 0 to 42"),
        (dict(seed=-1), "seed: -1 given, must be from 0 to 4294967295"),
        (dict(batch_size=0), "batch_size: 0 given, must be at least 1"),
    ],
)
def test_a_seed_or_batch_size_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        decode.complete(lorax.load("gpt2-nano"), ["a"], **options)


def test_no_prompts_are_no_texts():
    assert decode.complete(lorax.load("gpt2-nano"), []) == []


def test_the_largest_seed_and_repeats_longer_than_any_text_are_fine():
    base = lorax.load("gpt2-nano")
    how = decode.DecodingOptions(max_new_tokens=2, no_repeat_ngram_size=1000)
    plain = decode.complete(base, ["a"], options=how._replace(no_repeat_ngram_size=0))
    assert decode.complete(base, ["a"], options=how, seed=2**32 - 1) == plain
