import json
import re

import pytest

from lorax import tasks
from lorax.tasks import samsum

RECORDS = [  # in the published format
    {"id": "1", "summary": "Ann bakes\r\n cookies. ", "dialogue": "Ann: I bake.\r\nBob:  Yes! "},
    {"id": "2", "summary": "Nothing.", "dialogue": ""},
    {"id": "3", "summary": "Zoë waits.", "dialogue": "Zoë: I wait\n\nTom: ok"},
]
PAIRS = [
    ("Ann: I bake.\nBob:  Yes!\nSummarize the dialogue above:", "Ann bakes cookies."),
    ("Zoë: I wait\nTom: ok\nSummarize the dialogue above:", "Zoë waits."),
]


def write(folder, **splits):
    for name in ("train", "val"):
        splits.setdefault(name, RECORDS)
    for name, records in splits.items():
        content = records if isinstance(records, str) else json.dumps(records)
        (folder / f"{name}.json").write_text(content, encoding="utf-8")
    return folder


def build(path, vocabulary, **fields):
    return tasks.build({"name": "samsum", "path": str(path), **fields}, vocabulary, 64)


def test_build(tmp_path, vocabulary):
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus", val=RECORDS[2:], test=RECORDS[:1] * 2)
    assert samsum.examples(tmp_path, "train") == (PAIRS, 1)
    task = build(tmp_path, vocabulary)
    assert task.note == "samsum: 2 train examples, 1 eval examples; 1 empty ones left out"
    ids, mask = task.eval["tokens"][0], task.eval["mask"][0]
    assert vocabulary.decode(ids[: int(mask.argmax())]) == PAIRS[1][0]
    assert vocabulary.decode(ids[mask == 1.0]) == " Zoë waits."
    assert task.prompts == (tasks.Prompt(PAIRS[0][0], (PAIRS[0][1],) * 2),)
    assert len(build(tmp_path, vocabulary, n_train=1).train["tokens"]) == 1


def test_prompts_of_the_validation_set_without_a_test_set(tmp_path, vocabulary):
    task = build(write(tmp_path), vocabulary)
    assert task.prompts == tuple(tasks.Prompt(prompt, (text,)) for prompt, text in PAIRS)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([RECORDS[0], {"id": "x", "summary": "s"}], "[1]: field 'dialogue' is missing; the record"),
        ([{"summary": None, "dialogue": "d"}], "[0]: field 'summary' is null; expected text"),
        ([RECORDS[0], "x"], '[1]: "x"; expected an object, {...}'),
        ("[{}\n, {]", ":2: not JSON ("),
        ("[]", ": no records; expected one JSON object a line, or an array"),
    ],
)
def test_errors_name_the_file_and_the_record(tmp_path, vocabulary, train, message):
    write(tmp_path, train=train)
    label = f"{tmp_path / 'train.json'}{message}"
    with pytest.raises(ValueError, match="^" + re.escape(label)):
        build(tmp_path, vocabulary)


def test_path_errors(tmp_path, vocabulary):
    write(tmp_path)
    with pytest.raises(
        ValueError, match=r"^task\.path: .* is no folder; expected a folder with SA"
    ):
        build(tmp_path / "train.json", vocabulary)
    (tmp_path / "val.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^task\.path: .* has no val\.json; expected a fol"
    ):
        build(tmp_path, vocabulary)
    with pytest.raises(ValueError, match=r"^task\.n_train: 3 was given; .* has 2 examples"):
        build(write(tmp_path), vocabulary, n_train=3)
