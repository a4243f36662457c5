"""Validation and test rows: nothing is in both, and the cut depends on data and seed alone."""

import csv
import json

import numpy as np
import pytest

from lorax import config, tasks
from lorax.models import load
from lorax.tasks import splits

PROMPTS = [f"prompt {i // 3}" for i in range(30)]  # three completions each
GLUE = "sentence\tlabel\n" + "".join(
    f"the {'abcdefghij'[i // 2]} place\t{i % 2}\n" for i in range(20)
)


def test_examples_with_one_key_stay_together():
    validation, test = splits.cut(PROMPTS, 0)
    assert sorted(validation + test) == list(range(30)) and len(validation) == len(test) == 15
    assert not {PROMPTS[i] for i in validation} & {PROMPTS[i] for i in test}


def test_the_cut_depends_on_keys_and_seed_alone():
    side = lambda keys, seed: {keys[i] for i in splits.cut(keys, seed)[1]}
    assert side(PROMPTS, 3) == side(PROMPTS[::-1], 3) == side(list(np.roll(PROMPTS, 3)), 3)
    assert len({frozenset(side(PROMPTS, seed)) for seed in range(5)}) > 1


def test_examples_that_nothing_tells_apart_are_cut_one_by_one():
    validation, test = splits.cut(["same"] * 6, 0)
    assert len(validation) == len(test) == 3
    with pytest.raises(ValueError, match="^eval.test: the evaluation set has one example"):
        splits.cut(["same"], 0)


# ------------------------------------------------------------------------------------- every task


def _lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def _e2e(folder):
    for n, name in enumerate(("trainset.csv", "devset.csv")):
        with open(folder / name, "w", newline="") as file:
            rows = [(f"name[N{n}{i // 2}]", f"words {i}") for i in range(20)]
            csv.writer(file).writerows([("mr", "ref"), *rows])


def _samsum(folder, names=("train", "val", "test")):
    for name in names:
        records = [{"dialogue": f"{name} {i}", "summary": f"words {i}"} for i in range(8)]
        (folder / f"{name}.json").write_text(json.dumps(records))


def _wikisql(folder, names=("train", "dev", "test")):
    for name in names:
        _lines(folder / f"{name}.tables.jsonl", [{"id": "t", "header": ["a", "b"]}])
        sql = {"sel": 0, "agg": 0, "conds": []}
        questions = [{"question": f"{name} {i}", "table_id": "t", "sql": sql} for i in range(8)]
        _lines(folder / f"{name}.jsonl", questions)


def _instruct(folder, names=("train", "eval")):
    for name in names:
        records = [{"prompt": f"{name} {i // 2}", "completion": f"{i}"} for i in range(20)]
        _lines(folder / f"{name}.jsonl", records)


def _glue(folder):
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(GLUE if name == "dev.tsv" else "sentence\tlabel\nno\t0\n")


def _mnist(folder):
    rng = np.random.default_rng(0)
    part = lambda n: (rng.integers(0, 255, (n, 28, 28)).astype(np.uint8), np.arange(n) % 10)
    names = ("x_train", "y_train", "x_test", "y_test")
    arrays = dict(zip(names, (*part(60), *part(20)), strict=True))
    np.savez(folder / "mnist.npz", **arrays)


def _dit(folder):
    """A small transformer that denoises the digits, as random weights."""
    sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
    described = {"_class_name": "DiTTransformer2DModel", "in_channels": 1, "out_channels": 2}
    (folder / "config.json").write_text(json.dumps(described | sizes))


def _text(folder):
    (folder / "text.txt").write_text("".join(f"the {i} of all. " for i in range(3000)))


# name: (writer of its files, the path below their folder, base, seq_len, other settings)
TASKS = {
    "restaurants": (None, None, None, 256, {}),
    "e2e": (_e2e, "", None, 64, {}),
    "samsum": (_samsum, "", None, 64, {}),
    "wikisql": (_wikisql, "", None, 64, {}),
    "instruct": (_instruct, "", None, 64, {}),
    "text": (_text, "text.txt", None, 16, {}),
    "glue": (_glue, "", None, 16, {"subset": "sst2"}),
    "mnist": (_mnist, "mnist.npz", "random:mnist-fc", 1, {}),
    "digits": (None, None, "random:mlp-64-10", 1, {}),
    "diffusion": (_dit, None, "random:{folder}", 1, {}),
    "planted": (None, None, "random:mlp-6-4", 1, {"rank": 1, "examples": 16}),
}


def keys(task, rows) -> list[bytes]:
    """What ties each row to others: its prompt, its first text, its array; of plain text itself."""
    if "inputs" in rows:
        return [x.tobytes() for x in rows["inputs"]]
    if "segments" in rows:
        return [x.tobytes() for x in rows["tokens"]]
    if task.name == "text":
        return [x[1:].tobytes() for x in rows["tokens"]]
    starts = rows["mask"].argmax(axis=1)
    return [x[:n].tobytes() for x, n in zip(rows["tokens"], starts, strict=True)]


def test_every_shipped_task_is_here():
    """But random strings, which are measured on what is trained on: no row is apart."""
    assert TASKS.keys() | {"random_strings"} == tasks.TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_no_row_of_a_split_is_in_another(name, tmp_path, vocabulary, bert):
    write, path, base, seq_len, settings = TASKS[name]
    if write:
        write(tmp_path)
    c = config.default().task.to_dict() | {"name": name} | settings
    c["path"] = None if path is None else str(tmp_path / path)
    base = base and base.format(folder=tmp_path)
    known = bert if name == "glue" else vocabulary
    build = lambda test: tasks.build(c, known, seq_len, None, base and load(base), test=test)
    task, whole = build(None), build(0)
    found = {split: keys(task, getattr(task, split)) for split in ("train", "eval", "test")}
    sets = {split: set(rows) for split, rows in found.items()}
    assert all(found.values())
    assert not sets["test"] & (sets["train"] | sets["eval"]) and not sets["eval"] & sets["train"]
    assert whole.test is None and task.eval.keys() == task.test.keys()
    if name in ("e2e", "instruct", "glue", "text", "digits", "diffusion", "planted"):  # cut in two
        assert sorted(found["eval"] + found["test"]) == sorted(keys(whole, whole.eval))
        assert abs(len(found["eval"]) - len(found["test"])) <= 2
    elif name == "mnist":
        assert found["test"] == keys(whole, whole.eval) and len(found["train"]) == 50
    else:  # the file's own
        assert found["eval"] == keys(whole, whole.eval)
    few = tasks.build(c, known, seq_len, None, base and load(base), test=3)
    assert tasks.size(few.test) == 3 and tasks.size(few.eval) == len(found["eval"])


@pytest.mark.parametrize("name", ["samsum", "wikisql", "instruct"])
def test_test_rows_are_of_the_test_file_or_cut_where_there_is_none(name, tmp_path, vocabulary):
    write, names = TASKS[name][0], {"samsum": "val", "wikisql": "dev", "instruct": "eval"}
    c = config.default().task.to_dict() | {"name": name, "path": str(tmp_path)}
    write(tmp_path, ("train", names[name]))
    cut = tasks.build(c, vocabulary, 64, test=None)
    write(tmp_path, ("test",))
    own = tasks.build(c, vocabulary, 64, test=None)
    assert tasks.size(own.eval) == tasks.size(cut.eval) + tasks.size(cut.test)
    assert all(b"test" in vocabulary.decode(list(x)).encode() for x in own.test["tokens"])
    texts = [prompt.text for prompt in own.prompts]
    assert texts and all("test" in text for text in texts)


def test_the_functions_of_users_take_test_rows_or_cut(vocabulary):
    pairs = [(f"p{i // 2} =", f"{i}") for i in range(12)]
    c = config.default().task.to_dict()
    given = tasks.pairs(pairs, pairs, test=[("only =", "this")]).build(
        c, vocabulary, 16, None, True
    )
    assert len(given.eval["tokens"]) == 12 and len(given.test["tokens"]) == 1
    assert [prompt.text for prompt in given.prompts] == ["only ="]
    cut = tasks.pairs(pairs, pairs).build(c, vocabulary, 16, None, apart=True)
    assert len(cut.eval["tokens"]) == len(cut.test["tokens"]) == 6 and len(cut.prompts) == 3
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    data = tasks.arrays((x, np.arange(6) % 2), (x, np.arange(6) % 2), test=(x[:1], np.arange(1)))
    task = data.build(c, None, 1, load("random:mlp-4-2"), apart=True)
    assert [tasks.size(rows) for rows in (task.eval, task.test)] == [6, 1]
    with pytest.raises(ValueError, match=r"x: train has float32 \(6, 4\), test float32 \(1, 3\)"):
        tasks.arrays((x, np.arange(6)), (x, np.arange(6)), test=(x[:1, :3], np.arange(1)))
