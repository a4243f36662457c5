"""A task of the user's own: a function in a file, from its texts or arrays to its scores."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from strangers import small, trained

import lorax
from lorax import config, outside, tasks
from lorax.planning import costs
from lorax.tasks import kinds, scores
from lorax.train import loop, prepare

FILE = Path(__file__).parents[2] / "docs" / "examples" / "task.py"
SUMS = f"{FILE}:sums"
PAIRS = [(f"{i} + 1 =", str(i + 1)) for i in range(40)]


def written(folder, body: str) -> str:
    """The name of a function `make` in a file."""
    file = folder / "mine.py"
    file.write_text(f"import numpy as np\nfrom lorax import tasks\n\n{body}")
    return f"{file}:make"


def settings(name, **changes) -> dict:
    return config.default().task.to_dict() | {"name": name} | changes


@pytest.fixture
def given(monkeypatch):
    """A function that makes data a task by its name, without a file."""

    def name(made, **changes):
        monkeypatch.setattr(outside, "resolve", lambda *_: lambda: made)
        return settings("mine.py:make", **changes)

    return name


# ------------------------------------------------------------------------------ the example, whole


def sums_config(tmp_path):
    c = small("lora")
    c.task.name, c.task.n_train, c.task.examples = SUMS, None, 50
    c.train.seq_len, c.eval.generate, c.eval.new_tokens = 24, 2, 3
    c.sweep.rank, c.sweep.seed = (1, 2), (0, 1)
    return c


def test_the_example_is_trained_scored_and_planned(tmp_path):
    """docs/examples/task.py as another config's task: one group, its metric beside the loss."""
    members = config.members(sums_config(tmp_path))
    run = trained_with_status(members, tmp_path / "run")
    table = lorax.runs.summary(run)
    assert lorax.runs.scores(run) == ["token_accuracy", "correct", "digits"]
    assert len(table) == 4 and table["correct"].between(0, 1).all()
    lines = (tmp_path / "run/texts/3.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["prompt"].endswith(" =")
    p = costs.plan(members)
    assert p.members == 4 and p.name == "lora on gpt2-nano, 2 x 24 tokens a step"


def trained_with_status(members, folder):
    folder.mkdir()
    (group,) = prepare.groups(members, lambda line: None)
    rows, _ = loop.train(folder, [group], loop.Terminal(*[lambda *_: None] * 3))
    lines = [json.dumps(row) for row in prepare.describe(group)]
    (folder / "members.jsonl").write_text("\n".join(lines))
    (folder / "config.json").write_text("{}")
    (folder / "status.json").write_text(json.dumps({"members": rows}))
    prepare.check_metric([group], "digits")
    with pytest.raises(ValueError, match="measures loss, token_accuracy, correct, digits"):
        prepare.check_metric([group], "accuracy")
    return lorax.runs.load(folder)


def test_the_config_of_the_example_holds_the_function():
    module = outside.run_file(FILE)
    c = module.get_config()
    assert c.task.name is module.sums
    members = config.members(c)
    assert len(members) == 4 and {m.config.task.name.rpartition(":")[2] for m in members} == {
        "sums"
    }
    assert tasks.kind_of(members[0].config.task) is kinds.TEXTS


# --------------------------------------------------------------------------------- pairs and texts


def test_pairs_are_those_of_a_built_in_task(given, vocabulary):
    """Dropping, n_train, packing and grouping by length are the same."""
    long = ("x " * 60, "y")
    stream = (pair for pair in [long, *PAIRS, long])
    c = given(tasks.pairs(stream, PAIRS[:5]), n_train=30)
    task = tasks.build(c, vocabulary, 16, 4)
    assert tasks.size(task.train) == 30 and tasks.size(task.eval) == 4 and len(task.prompts) == 5
    assert task.note.startswith("mine.py:make: 30 train examples (1 of 31 dropped, longer than 17")
    again = tasks.build(c, vocabulary, 16, 4)  # of a generator that has been read
    np.testing.assert_array_equal(task.train["tokens"], again.train["tokens"])
    packed = tasks.build(c | {"packing": True}, vocabulary, 32, 4)
    assert "segments" in packed.train and tasks.size(packed.train) < 15
    grouped = tasks.build(c | {"group_by_length": True}, vocabulary, 16, 4)
    assert grouped.lengths.max() <= 17
    with pytest.raises(ValueError, match=r"^task.n_train: 50 was given; the train set has 40"):
        tasks.build(c | {"n_train": 50}, vocabulary, 16, 4)


def test_a_generator_without_an_end_is_read_as_far_as_n_train(given, vocabulary):
    def endless():
        while True:
            yield from PAIRS

    task = tasks.build(given(tasks.pairs(endless(), PAIRS), n_train=70), vocabulary, 16, 4)
    assert tasks.size(task.train) == 70


def test_texts_are_packed_and_parted_by_the_end_token(given, vocabulary):
    lines = [f"line {i} of some text" for i in range(30)]
    c = given(tasks.texts(iter(lines), lines[:5], prompts=[("line", "line 0")]))
    task = tasks.build(c, vocabulary, 16)
    ids = np.concatenate([task.train["tokens"][0], *task.train["tokens"][1:, 1:]])
    words = vocabulary.encode(lines[0])
    assert ids[: len(words)].tolist() == words and ids[len(words)] == vocabulary.end
    assert task.train["mask"][:, 1:].all() and not task.train["mask"][:, 0].any()
    assert task.prompts[0].references == ("line 0",)
    with pytest.raises(ValueError, match=r"task.packing: True was given; .* has no use for it"):
        tasks.build(c | {"packing": True}, vocabulary, 16)
    with pytest.raises(ValueError, match=r"^task.name: mine.py:make: train: \d+ tokens were given"):
        tasks.build(c, vocabulary, 500)


def test_keys_of_the_config_are_passed_by_their_names(tmp_path, vocabulary):
    name = written(
        tmp_path,
        "def make(path, seed, subset='a', n_train=None):\n"
        "    said = f'{path} {seed} {subset} {n_train}'\n"
        "    return tasks.pairs([(said, 'x')], [('a', 'b')])\n",
    )
    task = tasks.build(settings(name, path="here", seed=3), vocabulary, 64)
    said = vocabulary.decode(task.train["tokens"][0][: task.train["mask"][0].argmax()])
    assert said == "here 3 a None"
    for changes, message in (
        ({}, "task.path: .*make reads one; none was given"),
        ({"path": "x", "noise": 1.0}, "task.noise: 1.0 was given; .* it reads packing, gr.*, path"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.build(settings(name, **changes), vocabulary, 64)
    name = written(tmp_path, "def make(sead):\n    return 0\n")
    with pytest.raises(ValueError, match="takes 'sead', which is no key .* did you mean 'seed'"):
        tasks.build(settings(name), vocabulary, 64)


# ----------------------------------------------------------------------------------- labelled texts


def test_labelled_texts_make_a_classifier(given, bert):
    items = [("good film", "yes"), ("bad film", "no"), ("a film by the river", "maybe")]
    c = given(tasks.labelled(iter(items), items, classes=("no", "maybe", "yes")), n_train=2)
    assert tasks.kind_of(c) is kinds.LABELLED and tasks.outputs(c) == 3
    task = tasks.build(c, bert, 16)
    assert task.train["label"].tolist() == [2, 0] and task.train["label"].dtype == np.int32
    assert task.scores(np.eye(3, dtype=np.float32)[[2, 0, 0]], task.eval["label"]) == {
        "accuracy": pytest.approx(2 / 3)
    }
    shapes = tasks.batch_shapes(c, (4, 1, 2), 16, None)
    assert {name: s.dtype for name, s in shapes.items()} == {
        name: x.dtype for name, x in task.train.items()
    }
    assert shapes["types"].shape == (4, 1, 2, 16) and shapes["label"].shape == (4, 1, 2)
    grouped = tasks.build(c | {"group_by_length": True}, bert, 16)
    assert len(grouped.lengths) == 2


def test_labels_that_are_numbers_are_values(given, bert):
    pairs = [(("the mill", "the fox"), 0.5), (("a pub", "a bar"), 1), (("a", "b"), 2.0)]
    c = given(tasks.labelled(pairs, pairs))
    task = tasks.build(c, bert, 16)
    assert tasks.outputs(c) == 1 and task.train["label"].dtype == np.float32
    assert task.scores(task.eval["label"][:, None], task.eval["label"]) == {
        "pearson": pytest.approx(1)
    }


def test_labelled_texts_train_a_classifier_of_the_users_own(tmp_path, bert):
    """It reads its vocabulary from a directory, which has more ids than the model has classes."""
    bert.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 3, "pad_token_id": 0}')
    name = written(
        tmp_path,
        "from flax import linen as nn\n"
        "from lorax import models\n\n\n"
        "class Bag(nn.Module):\n"
        "    labels: int\n\n"
        "    @nn.compact\n"
        "    def __call__(self, tokens, segments, types):\n"
        "        x = nn.Embed(400, 8, name='words')(tokens)\n"
        "        x = x * segments[..., None].astype(x.dtype)\n"
        "        return nn.Dense(self.labels, name='q')(x.mean(axis=1))\n\n\n"
        "def bag(labels=2):\n"
        f"    return models.Model(Bag(labels), vocabulary={str(tmp_path)!r})\n\n\n"
        "def make():\n"
        "    items = [('good film', 'yes'), ('bad film', 'no'), ('a river', 'maybe')]\n"
        "    return tasks.labelled(items, items, classes=('no', 'maybe', 'yes'))\n",
    )
    c = small("lora")
    c.base, c.task.name, c.task.n_train = name.replace(":make", ":bag"), name, 3
    c.method.targets, c.method.rank, c.train.seq_len, c.eval.examples = ("q",), 1, 8, 3
    run = trained(c, tmp_path / "run")
    lines = run.metrics.query("split == 'eval'")
    assert len(lines) == 2 and lines["accuracy"].between(0, 1).all()


# ------------------------------------------------------------------------------------------ arrays


def numbers(n=12, k=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 6)), rng.integers(0, k, n)


def test_arrays_of_classes_and_of_values_on_a_network(given):
    base = lorax.load("random:mlp-6-4-3")
    x, y = numbers()
    task = tasks.build(given(tasks.arrays((x, y), (x[:5], y[:5])), n_train=7), None, 1, 4, base)
    assert task.train["inputs"].shape == (7, *base.input_shape) and task.kind.scored
    assert task.train["inputs"].dtype == np.float32 and task.train["label"].dtype == np.int32
    assert task.scores(np.eye(3)[y[:5]], y[:5]) == {"accuracy": 1.0}
    assert (
        task.note
        == "mine.py:make: 7 train and 5 eval arrays; evaluates on 4 of these, evenly spaced"
    )

    def error(outputs, labels):
        return np.abs(outputs - labels).mean()

    targets = x[:, :3]
    c = given(tasks.arrays((x, targets), (x, targets), metric=error))
    task = tasks.build(c, None, 1, None, base)
    assert task.scores(targets, targets) == {"error": 0.0}
    diverged = task.scores(np.full((12, 3), np.nan), targets)
    assert math.isnan(diverged["error"])
    shapes = tasks.batch_shapes(c, (2, 1, 4), 1, base)
    assert {name: (s.shape[3:], s.dtype) for name, s in shapes.items()} == {
        name: (x.shape[1:], x.dtype) for name, x in task.train.items()
    }
    unscored = tasks.build(given(tasks.arrays((x, targets), (x, targets))), None, 1, None, base)
    assert not unscored.kind.scored and unscored.scores is None


def test_a_sweep_of_tasks_on_arrays_has_their_metrics(tmp_path):
    """The second task has no metric, and shares no program with the first."""
    name = written(
        tmp_path,
        "def make(seed):\n"
        "    x = np.random.default_rng(seed).standard_normal((40, 6))\n"
        "    part = lambda i: (x[i], x[i, :3])\n"
        "    return tasks.arrays(part(slice(8, None)), part(slice(8)), metric=worst)\n\n\n"
        "def worst(outputs, labels):\n"
        "    return {'worst': np.abs(outputs - labels).max()}\n\n\n"
        "def unscored(seed):\n"
        "    x = np.ones((40, 6))\n"
        "    return tasks.arrays((x[8:], x[8:, :3]), (x[:8], x[:8, :3]))\n",
    )
    c = small("lora")
    c.base, c.task.name, c.task.n_train, c.eval.examples = "random:mlp-6-4-3", name, 16, 8
    c.method.targets, c.method.rank, c.sweep.seed = ("re:.*",), 1, (0, 1)
    c.sweep.axes = {"task.name": (name, name.replace(":make", ":unscored"))}
    run = trained(c, tmp_path / "run")
    lines = run.metrics.query("split == 'eval'")
    assert len(lines) == 8 and lines["worst"].notna().sum() == 4
    assert lines["worst"].nunique() > 1 and (lines["worst"].dropna() > 0).all()
    groups = prepare.grouped(config.members(c))
    assert [costs.plan(group).name for group in groups] == [
        "lora on random:mlp-6-4-3, 2 arrays a step"
    ] * 2


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("tasks.pairs([], [('a', 'b')])", "4: train: nothing was given; at least one item is"),
        ("tasks.pairs([('a', 3)], [('a', 'b')])", "4: train[0] is ('a', 3); expected (prompt,"),
        ("tasks.pairs([('a', ' ')], [('a', 'b')])", "4: train[0] is ('a', ' '); expected two"),
        ("tasks.pairs('abc', [('a', 'b')])", "4: train: 'abc' was given; expected a list or"),
        ("[('a', 'b')]", "returns list; expected what lorax.tasks.pairs, texts, labelled or"),
        ("{}['x']", "4: KeyError: 'x'"),
        ("tasks.texts(['a', 4], ['b'])", "make: train[1] is 4; expected a text"),
        ("tasks.texts(['a'], ['b'], metric=len)", "4: metric: given without prompts; it"),
        ("tasks.labelled([('a', -1)], [('b', 1)])", "4: labels: -1 to 1 were given; expected"),
        ("tasks.labelled([('a', 'x')], [('b', 1)])", "4: train[0]: label 'x'; expected a"),
        ("tasks.labelled([('a', 2)], [('b', 1)], classes=2)", "4: labels: 1 to 2 were given"),
        ("tasks.arrays((X, X[:3]), (X, X))", "4: train: x has shape (4, 6) and y (3, 6)"),
        ("tasks.arrays((X / 0, X), (X, X))", "4: train: x[0] has NaN or infinity in it, as"),
        ("tasks.arrays((X.astype(int), X), (X, X))", "4: train: x is int64; expected uint8,"),
        ("tasks.arrays(X, (X, X))", "4: train: array([["),
    ],
)
def test_a_mistake_is_one_line_with_its_place(body, message, tmp_path, vocabulary):
    name = written(tmp_path, f"make = lambda: {body}\nX = np.ones((4, 6))\n")
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=r"^task\.name: ") as caught:
        tasks.build(settings(name), vocabulary, 16)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path / "mine.py") in str(caught.value)


def test_a_generator_that_fails_names_its_line_again_and_again(tmp_path, vocabulary):
    name = written(
        tmp_path,
        "def make():\n    return tasks.pairs(some(), [('a', 'b')])\n\n\n"
        "def some():\n    yield 'a', 'b'\n    yield int('x'), 'b'\n",
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=r"make: .*mine\.py:10: invalid literal for int"):
            tasks.build(settings(name), vocabulary, 16)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 2, 3]), "has labels from 0 to 3 in train; expected classes 0 to 2"),
        (np.array([0, 1, 2, -1]), "has labels from -1 to 2 in train; expected classes 0 to 2"),
        (np.ones((4, 2)), "has 3 outputs; task 'mine.py:make' has 2 values a row"),
    ],
)
def test_arrays_that_do_not_fit_the_base(labels, message, given):
    base, x = lorax.load("random:mlp-6-4-3"), np.ones((4, 6))
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.build(given(tasks.arrays((x, labels), (x, labels))), None, 1, None, base)
    wide = np.ones((4, 7))
    with pytest.raises(ValueError, match="reads 6 values; task 'mine.py:make' has arrays of 7, 7"):
        tasks.build(given(tasks.arrays((wide, labels), (wide, labels))), None, 1, None, base)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", "mine.py:8: ZeroDivisionError: division by zero"),
        ("return 'good'", "returns 'good'; expected a number or {name: number}"),
        ("return {'loss': 1}", "'loss' can't be the name of a score"),
        ("return [1.0, 2.0]", "returns [1.0, 2.0]; expected a number or {name: number}"),
        ("return {'a': None}", "returns {'a': None}; expected a number or {name: number}"),
        ("return sum(map(int, texts))", "mine.py:8: invalid literal for int() with base 10: '1 ='"),
    ],
)
def test_a_metric_is_tried_before_training(body, message, tmp_path, vocabulary):
    name = written(
        tmp_path,
        "def make():\n    return tasks.pairs([('1 =', '1')], [('1 =', '1')], metric=score)\n\n"
        f"def score(texts, references):\n    {body}\n",
    )
    with pytest.raises(ValueError, match="metric score: ") as caught:
        tasks.build(settings(name), vocabulary, 16)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_metric_gives_the_same_names_every_time():
    names = iter("aab")
    metric = scores.tried(lambda given, right: {next(names): 1}, [(["x"], [("x",)])])
    assert metric(["x"], [("x",)]) == {"a": 1.0}
    with pytest.raises(ValueError, match="gives b now and a before"):
        metric(["x"], [("x",)])
    assert scores.tried(lambda given, right: np.float32(2), [(["x"], [("x",)])]).names == (
        "lambda",
    )
