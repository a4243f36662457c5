"""Random strings: what is drawn, and the bits that a model stores of it."""

import json

import jax
import numpy as np
import pytest
from digits import trained
from quick import jit

import lorax
from lorax import config, losses, tasks
from lorax.analysis import runs
from lorax.models import gpt2
from lorax.planning import costs
from lorax.tasks import random_strings, subsets
from lorax.train import prepare


def build(vocabulary, seq_len=16, test=None, **fields):
    fields = {"examples": 200, "alphabet": 64, "seed": 0} | fields
    return tasks.build({"name": "random_strings", **fields}, vocabulary, seq_len, 8, test=test)


def test_strings_are_uniform_over_an_alphabet_without_special_tokens(vocabulary):
    task = build(vocabulary, alphabet=64)
    tokens = task.train["tokens"]
    assert tokens.shape == (200, 17) and (tokens[:, 0] == vocabulary.end).all()
    letters, counts = np.unique(tokens[:, 1:], return_counts=True)
    assert len(letters) == 64 and vocabulary.end not in letters
    expected = tokens[:, 1:].size / 64
    assert np.sum((counts - expected) ** 2 / expected) < 104  # chi^2 of 63, upper 0.1%
    assert not task.train["mask"][:, 0].any() and task.train["mask"][:, 1:].all()
    assert task.facts == {"string_bits": 16 * 6, "alphabet": 64}


def test_all_sets_are_the_strings_themselves(vocabulary):
    task = build(vocabulary)  # eval_examples is 8
    for rows in (task.eval, task.test):
        np.testing.assert_array_equal(rows["tokens"], task.train["tokens"])
    assert "validation and test rows are these strings themselves, all of them" in task.note
    assert build(vocabulary, test=0).test is None


def test_seed_and_number_of_strings(vocabulary):
    many, few = build(vocabulary), build(vocabulary, examples=20)
    np.testing.assert_array_equal(many.train["tokens"][:20], few.train["tokens"])
    other = build(vocabulary, seed=1)
    assert set(np.unique(other.train["tokens"])) != set(np.unique(many.train["tokens"]))


def test_a_small_vocabulary_is_the_alphabet(llama):
    task = build(llama, alphabet=2048)
    usable = task.facts["alphabet"]
    assert 500 < usable < 512 and f"drawn from {usable} (all that there are" in task.note
    assert (task.train["tokens"][:, 0] == llama.start[0]).all()
    assert not np.isin(task.train["tokens"][:, 1:], [*llama.start, *llama.ends, llama.pad]).any()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"alphabet": 1}, r"^task\.alphabet: 1 given, must be at least 2$"),
        ({"examples": 0}, r"^task\.examples: 0 given, must be at least 1$"),
        ({"n_train": 5}, r"^task\.n_train: 5 was given; task random_strings is measured on all"),
    ],
)
def test_refusals(vocabulary, fields, message):
    with pytest.raises(ValueError, match=message):
        build(vocabulary, **fields)


def test_no_part_of_the_strings_is_trained_on(vocabulary):
    task = build(vocabulary)
    for refused in (
        lambda: subsets.train_size({"n_train": 50, "packing": False}, task),
        lambda: subsets.drawn(task, 50, seed=0),
    ):
        with pytest.raises(ValueError, match=r"^task\.n_train: 50 was given; task random_strings"):
            refused()
    assert subsets.train_size({"n_train": None, "packing": False}, task) == 200


def test_bits_are_those_of_the_formula():
    """Against the probabilities of the whole logits; of two strings the model expects one."""
    c = gpt2.Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    module, tokens = gpt2.GPT2(c), np.zeros((2, 6), np.int32)
    params = jit(module.init)(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: 30 * x, params)
    predict = jit(lambda tokens: lorax.apply(module, params, tokens))
    for at in range(5):
        logits = predict(tokens)
        tokens[:, at + 1] = logits[0, at].argmax(), logits[1, at].argmin()
    batch = {"tokens": tokens, "mask": np.array([[0, 1, 1, 1, 1, 1]] * 2, np.float32)}
    logits = np.asarray(predict(tokens), np.float64)[:, :-1]
    p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    p = np.take_along_axis(p, tokens[:, 1:, None], -1)[..., 0]
    assert p[0].min() > 0.5 > p[1].max()
    total, weight, outputs = losses.string_loss(module, params, batch)
    np.testing.assert_allclose(total, -np.log(p).sum(), rtol=1e-5)
    assert weight == 10
    held = 5 * np.log2(10)
    want = np.maximum(0, held + np.log2(p).sum(1))
    assert want[0] > 10 and want[1] == 0
    stored = random_strings.stored(np.asarray(outputs), 5, held)
    assert stored == pytest.approx({"bits": want.sum(), "recalled": 0.5}, rel=1e-5)
    rows, plain = losses.string_rows(module, params, batch), losses.lm_rows(module, params, batch)
    for mine, theirs in zip(rows[:3], plain[:3], strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.fixture
def small(tmp_path, tokenizer):
    """The config of a run on six strings."""
    fields = dict(model_type="gpt2", vocab_size=512, n_positions=8, n_embd=16, n_layer=1, n_head=1)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    c = config.default()
    c.base, c.task.name, c.method.name = f"random:{tmp_path}", "random_strings", "full"
    c.task.update(examples=6, alphabet=16)
    c.train.update(steps=60, batch_size=6, seq_len=6, warmup=0, schedule="constant")
    c.eval.update(every=60, examples=2)
    return c


def test_a_run_reports_what_its_members_have_stored(small, tmp_path):
    c = small
    c.sweep.lr = (1e-4, 3e-2)
    run = trained(tmp_path / "run", c)
    stored, table = ["bits", "recalled", "bits_per_parameter"], runs.summary(run)
    assert set(runs.scores(run)) - {"token_accuracy"} == set(stored)
    for name in (*stored, *(f"test_{name}" for name in stored)):
        assert table[name][0] < table[name][1]
    each = table["bits"] / table["trainable_params"]
    np.testing.assert_allclose(table["bits_per_parameter"], each, rtol=1e-6)
    assert table["string_bits"].tolist() == [24, 24]
    assert 0.8 * 6 * 24 < table["bits"][1] <= 6 * 24 and table["recalled"][1] > 0.75
    before = run.metrics.query("step == 0")
    assert len(before) == 4 and not before[stored].any(axis=None)


def test_a_plan_counts_all_strings_at_every_evaluation(small):
    small.eval.also = (("others", {"name": "random_strings", "examples": 4, "seed": 1}),)
    assert costs.plan(config.members(small)).evaluated == (2 * (6 + 4), 6)
    small.eval.test = 0
    assert costs.plan(config.members(small)).evaluated == (2 * (6 + 4), 0)


def test_other_strings_can_be_measured_beside_them_and_texts_can_not(small, tmp_path):
    """`eval.also`."""
    small.eval.also = (("others", {"name": "random_strings", "examples": 4, "seed": 1}),)
    (group,) = prepare.groups(config.members(small), lambda line: None)
    assert tasks.size(group.also["others"].eval) == 4 and group.also["others"].test is None
    (tmp_path / "text.txt").write_text("one two")
    small.eval.also = (("text", {"name": "text", "path": str(tmp_path / "text.txt")}),)
    message = "eval.also: text: task 'text' is scored otherwise than 'random_strings': "
    with pytest.raises(ValueError, match=message):
        prepare.groups(config.members(small), lambda line: None)
