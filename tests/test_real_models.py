"""Real pretrained models, SmolLM2-135M-Instruct and all-MiniLM-L6-v2, do here what they do in
transformers and PEFT, and learn.

    python DATA/models/fetch.py FOLDER minilm smollm2
    LORAX_MODELS=FOLDER pytest -m slow tests/test_real_models.py
"""

import functools

import jax
import numpy as np
import pytest
from support import data, real_model, require

import lorax
from lorax import adapters, config, decode
from lorax.tasks import templates

pytestmark = pytest.mark.slow
MESSAGES = [{"role": "user", "content": "Name three planets and say which one is the largest."}]


@functools.cache
def smollm():
    """(transformers' model, its tokenizer, ours)."""
    transformers, directory = require("transformers"), real_model("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return model, tokenizer, lorax.load(str(directory))


@functools.cache
def minilm():
    transformers, directory = require("transformers"), real_model("minilm")
    model = transformers.AutoModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return model, tokenizer, lorax.load(str(directory))


def logits_of(model, ids) -> np.ndarray:
    torch = require("torch")
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def test_a_chat_has_the_tokens_and_logits_of_transformers_and_is_continued_alike():
    torch = require("torch")
    model, tokenizer, base = smollm()
    (prompt,) = templates.prompts(
        templates.chosen(None, base.vocabulary), templates.spelling(base.vocabulary), [MESSAGES]
    )
    assert prompt == tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert base.vocabulary.encode(prompt) == ids
    expected = logits_of(model, [ids])
    got = jax.jit(functools.partial(lorax.apply, base.module))(
        base.params, np.asarray([ids], np.int32)
    )
    assert np.ptp(expected) > 20
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3)  # of 30 layers, in float32
    with torch.no_grad():
        written = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)
    text = tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)
    (ours,) = decode.complete(base, [prompt], options=decode.DecodingOptions(max_new_tokens=32))
    assert ours == text and len(text) > 40


def test_sentences_have_the_hidden_states_of_transformers():
    torch = require("torch")
    model, tokenizer, base = minilm()
    assert base.config.head == "none" and base.fresh == ()
    sentences = [
        "A moving and important film.",
        "It is dull.",
        "Two hours that feel like four, at least",
    ]
    batch = tokenizer(sentences, padding=True)
    tokens, mask = (np.asarray(batch[name], np.int32) for name in ("input_ids", "attention_mask"))
    for row, sentence in zip(tokens, sentences, strict=True):
        ids = base.vocabulary.tokenizer.encode(sentence).ids
        assert ids == row[: len(ids)].tolist()
    with torch.no_grad():
        expected = model(torch.tensor(tokens), torch.tensor(mask)).last_hidden_state.numpy()
    got = jax.jit(functools.partial(lorax.apply, base.module))(base.params, tokens, mask)
    np.testing.assert_allclose(np.asarray(got)[mask > 0], expected[mask > 0], rtol=0, atol=1e-4)


def settings(model: str, **train):
    c = config.default()
    c.base = str(real_model(model))
    c.train.update(dict(schedule="constant", warmup=0) | train)
    c.eval.update(every=train["steps"], test=0)
    c.analysis.report = False
    return c


def losses(run, member: int) -> np.ndarray:
    """Before and after training, on the rows of the evaluation."""
    rows = run.metrics.query(f"split == 'eval' and member == {member}").sort_values("step")
    return rows["loss"].to_numpy()


def test_minilm_learns_sentiments_at_several_ranks(tmp_path):
    c = settings("minilm", steps=40, batch_size=16, seq_len=32, lr=1e-3)
    c.task.update(name="glue", subset="sst2", path=str(data("glue/SST-2")))
    c.method.targets, c.sweep.rank = ("all-linear",), (1, 8)
    c.eval.update(examples=128, batch_size=32)
    run = lorax.run(c, tmp_path)
    for member in (0, 1):
        before, after = losses(run, member)[[0, -1]]
        assert after < 0.95 * before
    last = run.metrics.query("split == 'eval' and step == 40")
    assert (last["accuracy"] > 0.6).all()


@pytest.mark.filterwarnings("ignore")  # what PEFT and transformers warn about is not ours
def test_smollm2_learns_restaurants_and_peft_opens_what_it_learnt(tmp_path):
    peft = require("peft")
    model, tokenizer, base = smollm()
    c = settings("smollm2", steps=4, batch_size=2, seq_len=64, lr=2e-3)
    c.task.update(name="e2e", path=str(data("e2e/e2e-dataset.zip")))
    c.method.targets, c.method.rank = ("q", "v"), 4
    c.eval.update(examples=8, batch_size=4)
    run = lorax.run(c, tmp_path)
    before, after = losses(run, 0)[[0, -1]]
    assert after < 0.9 * before
    directory = run.directory / "adapters" / "0"
    ids = tokenizer("name : Blue Spice | food : Chinese\n")["input_ids"]
    theirs = peft.PeftModel.from_pretrained(model, directory).eval()
    got, plain = logits_of(theirs, [ids]), logits_of(theirs.unload(), [ids])
    bound = adapters.load(directory, base).bind()
    ours = jax.jit(functools.partial(lorax.apply, base.module))(bound, np.asarray([ids], np.int32))
    assert np.abs(got - plain).max() > 0.5
    np.testing.assert_allclose(ours, got, rtol=0, atol=2e-3)
