"""`eval.score`: a score of the user's own, beside the task's; and the base's own texts."""

import json

import numpy as np
import pytest
from strangers import small, trained

import lorax
from lorax import config
from lorax.tasks import metrics
from lorax.train import loop, prepare

pytestmark = pytest.mark.usefixtures("unoptimised")
BODY = """
def lengths(texts, references):
    return {"words": sum(len(t.split()) for t in texts) / len(texts), "texts": len(texts)}

def certain(outputs, labels):
    return float((outputs.max(1) - outputs.min(1)).mean())

def accuracy(outputs, labels):
    return 0.5

def fails(predicted, right):
    return 1 / 0

def wrong(predicted, right):
    return "good"
"""


@pytest.fixture
def score(tmp_path):
    """The name of a function of BODY's file."""
    (tmp_path / "mine.py").write_text(BODY)
    return lambda name: f"{tmp_path}/mine.py:{name}"


def run_of(c, folder):
    """The run of a config, with its config.json."""
    trained(c, folder)
    (folder / "config.json").write_text(json.dumps({"config": json.loads(c.to_json())}))
    return lorax.runs.load(folder)


def digits():
    c = small("lora")
    c.base, c.task.name, c.method.targets, c.method.rank = (
        "random:mlp-64-10",
        "digits",
        ("re:.*/kernel",),
        2,
    )
    c.eval.examples = 20
    return c


def test_texts_are_scored_beside_the_tasks_metric_and_the_bases_own(tmp_path, score):
    c = small("lora")
    c.eval.generate, c.eval.new_tokens, c.eval.score = 2, 3, score("lengths")
    c.sweep.rank = (1, 2)
    run = run_of(c, tmp_path / "run")
    base = run.base_texts(1)
    texts = run.texts(1)
    assert [line["prompt"] for line in texts] == list(base) and len(base) == 2
    lines = (tmp_path / "run/texts/base.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["base"] == "gpt2-nano"
    (group,) = prepare.groups(config.members(c), lambda line: None)
    quiet = loop.Terminal(*[lambda *_: None] * 3)
    rows, _ = loop.train(run.directory, [group], quiet)  # from its last checkpoint: no step
    words = np.mean([len(text.split()) for text in base.values()])
    assert rows[0]["base_scores"]["words"] == pytest.approx(words, abs=1e-4)
    assert rows[0]["scores"]["texts"] == 2 and "nist" in rows[0]["scores"]
    again = (tmp_path / "run/texts/base.jsonl").read_text().splitlines()
    assert again == lines  # not generated again
    prepare.check_metric([group], "words")


def test_another_decoding_is_another_text_of_the_base(tmp_path):
    c = small("lora")
    c.eval.generate, c.sweep.axes = 1, {"eval.new_tokens": (1, 6)}
    run = run_of(c, tmp_path / "run")
    (short,), (long,) = (run.base_texts(member).values() for member in (0, 1))
    assert len(short) < len(long)


def test_outputs_are_scored_at_every_evaluation(tmp_path, score):
    c = digits()
    c.eval.score = score("certain")
    run = trained(c, tmp_path / "run")
    measured = run.metrics[run.metrics["split"] == "eval"]
    assert (measured["certain"] > 0).all() and measured["accuracy"].between(0, 1).all()


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("fails", "digits", r"^eval.score: metric fails: .*mine.py:\d+: ZeroDivisionError"),
        ("wrong", "digits", r"^eval.score: metric wrong: returns 'good'; expected a number"),
        ("accuracy", "digits", r"^eval.score: .* gives accuracy, which task digits measures"),
        ("lengths", "restaurants", r"^eval.score: .*; set eval.generate to how many prompts"),
        ("none", "digits", r"^eval.score: .*mine.py has no function 'none'; it has lengths"),
        ("lengths", "digits", r"^eval.score: metric lengths: .*has no attribute 'split'"),
    ],
)
def test_a_score_that_can_not_be_is_refused_before_training(score, name, task, message):
    c = digits() if task == "digits" else small("lora")
    c.eval.score = score(name)
    with pytest.raises(ValueError, match=message) as error:
        prepare.groups(config.members(c), lambda line: None)
    assert "\n" not in str(error.value)


def test_a_score_that_is_no_function_is_refused_at_once():
    c = config.default()
    c.eval.score = "length"
    with pytest.raises(ValueError, match="eval.score: 'length' given, must be a function of"):
        config.members(c)
    c.eval.score = metrics.accuracy  # a function itself is spelled
    assert config.members(c)[0].config.eval.score.endswith("metrics.py:accuracy")
