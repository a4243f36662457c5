"""The shipped model is a language model, and one worth adapting."""

import csv
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from support import data

import lorax
from lorax import config, tree
from lorax.train import loop, prepare

ROOT = Path(__file__).parents[1]


def test_it_is_as_small_as_it_says():
    base = lorax.load("gpt2-nano")
    assert tree.count(base.params) == 957_184 <= 1_500_000
    asset = ROOT / "lorax/assets/gpt2-nano"
    assert sum(p.stat().st_size for p in asset.iterdir()) <= 6_000_000
    random = tree.flatten(lorax.load("random:gpt2-nano").params)
    for name, leaf in tree.flatten(base.params).items():
        assert leaf.shape == random[name].shape
        assert np.isfinite(leaf).all()
    assert base.tokenizer.get_vocab_size() == base.config.vocab_size == 1024


def test_it_predicts_held_out_stories_far_better_than_unigrams():
    """The last stories of the sample were held out from pretraining."""
    text = data("tinystories/tinystories_sample.txt").read_text(encoding="utf-8")
    base = lorax.load("gpt2-nano")
    story = [s.strip() for s in text.split("<|endoftext|>")][-60:-2]
    rows = np.concatenate([[*base.tokenizer.encode(s).ids, 0] for s in story])
    rows = rows[: len(rows) // 257 * 257].reshape(-1, 257).astype(np.int32)
    logits = jax.jit(lambda p, x: base.module.apply({"params": p}, x))(base.params, rows[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()
    counts = np.bincount(rows.ravel(), minlength=1024) / rows.size
    # Even the unigram frequencies of this very text, which nobody knows beforehand, do worse.
    unigram = -np.sum(counts[counts > 0] * np.log(counts[counts > 0]))
    assert float(loss) < 2.6 < unigram - 2


def test_the_training_curve_ends_where_the_readme_says():
    with open(ROOT / "experiments/gpt2_nano/curve.csv") as file:
        last = list(csv.DictReader(file))[-1]
    readme = (ROOT / "experiments/gpt2_nano/README.md").read_text()
    assert f"**{float(last['held_out_nats_per_token']):.4f}**" in readme


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """LoRA of rank 8 from gpt2-nano and from random weights of its shape, 60 steps each."""
    c = config.default()
    c.sweep.base = ("gpt2-nano", "random:gpt2-nano")
    c.train.update(steps=60, batch_size=8, lr=1e-2, parallel="none")
    c.eval.update(every=60, examples=64, test=64)
    c.task.n_train = 1000
    workdir, said, finished = tmp_path_factory.mktemp("run"), [], []
    groups = prepare.groups(config.members(c), said.append)
    terminal = loop.Terminal(said.append, lambda done, total: None, finished.append)
    return workdir, loop.train(workdir, groups, terminal)[0], finished


def test_lora_from_it_beats_lora_from_random_weights(adapted):
    workdir, rows, finished = adapted
    assert [row["name"] for row in finished] == ["base=gpt2-nano", "base=random:gpt2-nano"]
    # Measured when the model was made: see experiments/gpt2_nano/README.md.
    assert rows[0]["eval_loss"] < rows[1]["eval_loss"] - 2.0
