import json
import math
import pkgutil
import types

import ml_collections
import numpy as np
import pytest
from support import require

from lorax import config, tasks
from lorax.tasks import batch_order, kinds

CONFIG = types.MappingProxyType({"name": "restaurants", "path": None, "n_train": 300, "seed": 0})


# ------------------------------------------------------------------------------ the batch order


def flat(n: int, batch_size: int, seed: int, steps: int) -> np.ndarray:
    return tasks.orders(n, batch_size, seed, range(steps)).reshape(-1)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 25])
def test_every_epoch_is_a_permutation_and_batches_span_epochs(batch_size):
    n, epochs = 10, 14  # 140 is a multiple of every batch size but 25
    visited = flat(n, batch_size, seed=3, steps=-(-n * epochs // batch_size))[: n * epochs]
    for epoch in visited.reshape(epochs, n):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))


def test_batch_size_does_not_change_the_order():
    np.testing.assert_array_equal(flat(10, 4, 3, 15), flat(10, 6, 3, 10))


def test_epochs_and_seeds_differ():
    first, second = flat(50, 10, 0, 10).reshape(2, 50)
    assert (first != second).any()
    other = flat(50, 10, 1, 5)
    assert (first != other).any()
    assert (second != other).any()  # seed 1 is not seed 0 one epoch late


def test_order_is_a_pure_function():
    batch = tasks.order(1000, 16, 5, 123_456_789)
    batch_order._order.cache_clear()
    batch_order._batches.cache_clear()
    np.testing.assert_array_equal(tasks.order(1000, 16, 5, 123_456_789), batch)
    np.testing.assert_array_equal(tasks.order(np.int64(1000), 16, np.int32(5), 123_456_789), batch)
    assert batch.dtype == np.int64 and batch.shape == (16,)
    with pytest.raises(ValueError, match="read-only"):
        batch[0] = 0


def test_orders_stacks_order():
    steps = [7, 2, 2, 900]
    batches = tasks.orders(100, 8, 1, steps)
    assert batches.shape == (4, 8) and batches.dtype == np.int64
    for batch, step in zip(batches, steps, strict=True):
        np.testing.assert_array_equal(batch, tasks.order(100, 8, 1, step))
    assert tasks.orders(100, 8, 1, []).shape == (0, 8)


@pytest.mark.parametrize("last", ["full", "short", "drop"])
def test_a_batch_of_all_rows_has_them_as_they_are_stored(last):
    rows = tasks.orders(6, 6, 3, [0, 5], last=last)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3, 4, 5]] * 2)
    assert tasks.orders(6, 6, 3, [], last=last).shape == (0, 6)


def test_one_row():
    np.testing.assert_array_equal(tasks.order(1, 3, 0, 5), [0, 0, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0, 0), "n is 0; it must be at least 1"),
        ((10, 0, 0, 0), "batch_size is 0; it must be at least 1"),
        ((10, 4, -1, 0), "seed is -1; it must be at least 0"),
        ((10, 4, 0, -1), "step is -1; it must be at least 0"),
    ],
)
def test_order_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tasks.order(*arguments)


def test_order_takes_whole_numbers_only():
    with pytest.raises(TypeError, match="float"):
        tasks.order(10, 4, 0, 1.5)


# --------------------------------------------------------------------------- grouped by length


def lengths_of(n):
    return np.random.default_rng(1).integers(1, 60, n)


@pytest.mark.parametrize(("n", "batch_size"), [(2000, 8), (1003, 4), (10, 4)])
def test_grouped_order_is_that_of_transformers(n, batch_size, monkeypatch):
    """`get_length_grouped_indices` with our shuffle in place of torch's, in every epoch."""
    torch = require("torch")
    utils = pytest.importorskip("transformers.trainer_pt_utils")
    lengths = lengths_of(n)
    steps = -(-3 * n // batch_size)
    ours = tasks.orders(n, batch_size, 5, range(steps), lengths).reshape(-1)
    for epoch, rows in enumerate(ours[: 3 * n].reshape(3, n)):
        shuffled = torch.from_numpy(tasks.order(n, n, 5, epoch).copy())
        monkeypatch.setattr(utils.torch, "randperm", lambda n, generator, s=shuffled: s)
        assert rows.tolist() == utils.get_length_grouped_indices(lengths.tolist(), batch_size)


def test_grouped_order_is_a_pure_function_and_pads_less():
    n, lengths = 4000, lengths_of(4000)
    rows = tasks.orders(n, 16, 3, range(500), lengths)  # two epochs
    batch_order._epoch.cache_clear()
    np.testing.assert_array_equal(tasks.orders(n, 16, 3, [7, 260], lengths), rows[[7, 260]])
    for epoch in rows.reshape(2, -1):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
    assert lengths[rows[0]].max() == lengths[rows[250]].max() == lengths.max()
    padded = lambda rows: 16 * lengths[rows].max(axis=1).sum() / lengths[rows].sum() - 1
    assert padded(rows) < 0.05 < 0.5 < padded(tasks.orders(n, 16, 3, range(500)))
    other = tasks.orders(n, 16, 4, range(500), lengths)
    assert (other != rows).any() and tasks.orders(n, 16, 3, [], lengths).shape == (0, 16)


def test_lengths_and_widths():
    mask = np.zeros((3, 33), np.float32)
    mask[0, 3:12] = mask[1, 5] = 1
    rows = {"tokens": np.zeros((3, 33), np.int32), "mask": mask}
    assert kinds.lengths(kinds.TEXTS, rows).tolist() == [12, 6, 1]
    task = tasks.Task("", rows, rows, "")
    assert tasks.widths(task) == (33,)
    assert tasks.widths(task._replace(lengths=kinds.lengths(kinds.TEXTS, rows))) == (9, 17, 25, 33)
    segments = (np.arange(24) < [[9], [24]]).astype(np.int32)
    classes = {"tokens": segments, "segments": segments, "label": np.arange(2)}
    lengths = kinds.lengths(kinds.LABELLED, classes)
    task = tasks.Task("", classes, classes, "", lengths=lengths, kind=kinds.LABELLED)
    assert task.lengths.tolist() == [9, 24] and tasks.widths(task) == (16, 24)


# ----------------------------------------------------------------------------------- the build


def test_a_task_has_lengths_where_they_are_asked_for(vocabulary):
    plain = tasks.build(CONFIG, vocabulary, 256, 64)
    grouped = tasks.build({**CONFIG, "group_by_length": True}, vocabulary, 256, 64)
    assert plain.lengths is None and 2 < len(tasks.widths(grouped)) <= 4
    np.testing.assert_array_equal(grouped.train["tokens"], plain.train["tokens"])
    for row, n in zip(grouped.train["mask"], grouped.lengths, strict=True):
        assert row[n - 1] == 1 and not row[n:].any()
    assert grouped.note.endswith("% full, grouped by length")
    with pytest.raises(ValueError, match="task.group_by_length: True was given with task.packing"):
        tasks.build({**CONFIG, "group_by_length": True, "packing": True}, vocabulary, 256, 64)


def test_build_takes_a_config_dict_and_is_deterministic(vocabulary):
    config = ml_collections.ConfigDict(dict(CONFIG)).lock()
    one = tasks.build(config, vocabulary, 256, 64)
    two = tasks.build(CONFIG, vocabulary, 256, 64)
    assert one.name == "restaurants" and one.note == two.note and one.prompts == two.prompts
    for split in ("train", "eval"):
        assert list(getattr(one, split)) == ["tokens", "mask"]
        for key in ("tokens", "mask"):
            np.testing.assert_array_equal(getattr(one, split)[key], getattr(two, split)[key])


def test_packing_is_for_train_rows_alone(vocabulary):
    packed = tasks.build({**CONFIG, "packing": True}, vocabulary, 512, 64)
    plain = tasks.build(CONFIG, vocabulary, 512, 64)
    assert list(packed.eval) == ["tokens", "mask"]
    np.testing.assert_array_equal(packed.eval["tokens"], plain.eval["tokens"])
    n = len(packed.train["tokens"])
    assert n < 150 and packed.train["segments"].shape == (n, 513)
    assert f"300 train examples packed into {n} rows, 512 eval examples" in packed.note


def test_evaluation_rows_are_evenly_spaced_and_as_wide_as_the_longest(vocabulary):
    whole = tasks.build(CONFIG, vocabulary, 256, None)
    part = tasks.build(CONFIG, vocabulary, 256, 5)
    index = [0, 102, 204, 307, 409]
    kept = whole.eval["mask"][index]
    longest = np.flatnonzero(kept.any(0)).max() + 1
    width = 1 + 8 * math.ceil((longest - 1) / 8)  # a model reads a multiple of 8 tokens
    assert width < kept.shape[1]
    np.testing.assert_array_equal(part.eval["tokens"], whole.eval["tokens"][index, :width])
    np.testing.assert_array_equal(part.eval["mask"], kept[:, :width])
    assert part.note.endswith("; evaluates on 5 of these, evenly spaced")
    assert part.prompts == whole.prompts
    assert len(tasks.build(CONFIG, vocabulary, 256, 10_000).eval["tokens"]) == 512


# -------------------------------------------------------------------------------------- errors


def test_registry_is_complete():
    modules = {x.name for x in pkgutil.iter_modules(tasks.__path__, "lorax.tasks.")}
    with_tasks = {row.load.__module__ for row in tasks.TASKS.values()}
    helpers = ("metrics", "records", "rows", "sentences", "rendering", "templates", "sources")
    helpers += ("tabular", "harness", "captioned_images")
    helpers += ("data", "table", "kinds", "scores", "subsets", "splits", "batch_order")
    assert modules == with_tasks | {f"lorax.tasks.{x}" for x in helpers}


def test_unknown_task(vocabulary):
    with pytest.raises(ValueError) as error:
        tasks.build({**CONFIG, "name": "restaurant"}, vocabulary, 64, 8)
    assert str(error.value) == (
        "task.name: 'restaurant' is no task; known are "
        f"{', '.join(tasks.TASKS)}, or your own as FILE.py:function; did you mean 'restaurants'?"
    )


@pytest.mark.parametrize(
    ("seq_len", "eval_examples", "message"),
    [
        (0, 8, r"^train\.seq_len: 0 was given; it must be at least 1"),
        (64, 0, r"^eval\.examples: 0 was given; it must be at least 1"),
    ],
)
def test_sizes_must_be_positive(vocabulary, seq_len, eval_examples, message):
    with pytest.raises(ValueError, match=message):
        tasks.build(CONFIG, vocabulary, seq_len, eval_examples)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("text", "packing", True),
        ("text", "group_by_length", True),
        ("restaurants", "template", "{{ messages }}"),
        ("e2e", "subset", "cola"),
        ("restaurants", "shuffle", True),
    ],
)
def test_settings_that_a_task_has_no_use_for(vocabulary, name, field, value):
    config = {**CONFIG, "name": name, field: value}
    with pytest.raises(ValueError, match=rf"^task\.{field}: .* task '{name}' has no use for it, o"):
        tasks.build(config, vocabulary, 64, 8)


def test_settings_that_a_run_has_stored(vocabulary):
    """As JSON, in which tuples are lists."""
    given = config.default().task
    given.n_train = 16
    stored = json.loads(given.to_json())
    assert isinstance(stored["classes"], list)
    ours, theirs = (tasks.build(each, vocabulary, 64, 8) for each in (given, stored))
    for rows, same in zip(ours.train.values(), theirs.train.values(), strict=True):
        np.testing.assert_array_equal(rows, same)


def test_columns_that_no_row_needs_are_left_out():
    rows = {"tokens": np.arange(66).reshape(2, 33), "mask": np.zeros((2, 33), np.float32)}
    rows["mask"][0, 3:12] = rows["mask"][1, 5] = 1
    (cut,) = kinds.trim(kinds.TEXTS, rows)
    assert {x.shape for x in cut.values()} == {(2, 17)}  # 11 predicted, 16 read
    np.testing.assert_array_equal(cut["tokens"], rows["tokens"][:, :17])
    classes = {"tokens": rows["tokens"], "label": np.arange(2)}
    classes["segments"] = (np.arange(33) < [[9], [2]]).astype(np.int32)
    (cut,) = kinds.trim(kinds.LABELLED, classes)
    assert cut["tokens"].shape == (2, 16) and len(cut["label"]) == 2
    full = rows | {"mask": np.ones((2, 33), np.float32)}
    assert kinds.trim(kinds.TEXTS, full)[0]["tokens"].shape == (2, 33)


# ------------------------------------------------------------------- rows that are dropped, n_train


LONG = "very " * 60


def _instruct(folder):
    records = [{"prompt": f"{i}", "completion": LONG * (i < 6) + str(i)} for i in range(60)]
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _e2e(folder):
    rows = [f"name[Mill {i}],{LONG * (i < 6)}{i}" for i in range(60)]
    for name in ("trainset.csv", "devset.csv"):
        (folder / name).write_text("\n".join(["mr,ref", *rows]))
    return folder


def _samsum(folder):
    records = [{"dialogue": f"A: {i}", "summary": LONG * (i < 6) + str(i)} for i in range(60)]
    for name in ("train.json", "val.json"):
        (folder / name).write_text(json.dumps(records))
    return folder


def _wikisql(folder):
    for name in ("train", "dev"):
        table = {"id": "t", "header": ["a", "b"]}
        (folder / f"{name}.tables.jsonl").write_text(json.dumps(table))
        lines = [
            {"question": LONG * (i < 6) + str(i), "table_id": "t"}
            | {"sql": {"sel": 0, "agg": 0, "conds": []}}
            for i in range(60)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


DROPPING = {"instruct": _instruct, "e2e": _e2e, "samsum": _samsum, "wikisql": _wikisql}
DROPPING |= {"restaurants": lambda folder: None}  # whose own texts are of many lengths
SEQ_LEN = {"restaurants": 48}


@pytest.mark.parametrize("name", DROPPING)
def test_n_train_counts_the_rows_that_are_trained_on(name, tmp_path, vocabulary):
    """Alone a member sees the rows that it sees in a sweep over n_train."""
    path, seq_len = DROPPING[name](tmp_path), SEQ_LEN.get(name, 40)
    build = lambda n: tasks.build(
        {"name": name, "path": path and str(path), "n_train": n, "seed": 0}, vocabulary, seq_len
    )
    alone, swept = build(8), build(40)
    assert "dropped, longer than" in alone.note  # else nothing is tested
    assert tasks.size(alone.train) == 8 and tasks.size(swept.train) == 40
    width = kinds.columns(alone.kind, alone.train)
    np.testing.assert_array_equal(alone.train["tokens"], swept.train["tokens"][:8, :width])
    np.testing.assert_array_equal(alone.train["mask"], swept.train["mask"][:8, :width])
    assert not swept.train["mask"][:8, width:].any()
    all_, settings = build(None), {"n_train": 8, "packing": False}
    assert tasks.train_size(settings, all_) == tasks.train_examples(settings, all_) == 8
    if path:
        assert tasks.size(all_.train) == 54 - 3 * (name == "instruct")  # its last 5% are for eval
        with pytest.raises(ValueError, match=r"^task\.n_train: 55 was given; the train set has 5"):
            build(55)


@pytest.mark.parametrize("name", DROPPING)
def test_n_train_counts_examples_that_are_packed(name, tmp_path, vocabulary):
    path, seq_len = DROPPING[name](tmp_path), SEQ_LEN.get(name, 40)
    config = {"name": name, "path": path and str(path), "seed": 0, "packing": True}
    task = tasks.build(config | {"n_train": 8}, vocabulary, seq_len)
    assert tasks.train_examples({"n_train": 8, "packing": True}, task) == 8
    assert task.note.startswith(f"{name}: 8 train examples packed into ")


def test_a_member_of_a_sweep_with_all_rows_is_refused_more_than_there_are(tmp_path, vocabulary):
    task = tasks.build({"name": "e2e", "path": str(_e2e(tmp_path))}, vocabulary, 40)
    with pytest.raises(ValueError, match=r"^task\.n_train: 60 was given; .* 54 examples, so"):
        tasks.train_size({"n_train": 60, "packing": False}, task)


def test_prompts_are_evenly_spaced(vocabulary, e2e_zip):
    """E2E's are sorted by restaurant."""
    config = {"name": "e2e", "path": str(e2e_zip), "n_train": 1}
    task = tasks.build(config, vocabulary, 512, 1)
    names = lambda found: {prompt.text.partition(" ;")[0] for prompt in found}
    assert (len(names(task.prompts[:64])), len(names(task.prompts))) == (5, 18)
    assert len(names(tasks.prompts(task, 64))) == 15
    assert tasks.prompts(task, 10_000) == task.prompts
    assert tasks.prompts(task, 1) == task.prompts[:1]
