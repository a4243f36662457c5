"""Records of people's files, folders and data sets, in the forms that they have."""

import csv
import json
import re
import sys
import types

import numpy as np
import pytest
from support import require

from lorax import tasks
from lorax.tasks import instruct, sources
from lorax.tasks.records import Record

PAIRS = [{"prompt": f"{i} + 1 =", "completion": f"{i + 1}"} for i in range(40)]
USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}


def read(path, **settings):
    return sources.read({"name": "instruct", "path": str(path), **settings})


def fields(found):
    return [record.fields for record in found]


def build(path, vocabulary, **settings):
    return tasks.build({"name": "instruct", "path": str(path), **settings}, vocabulary, 400)


def lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in records))
    return path


def write_csv(path, records, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)
    return path


# -------------------------------------------------------------------------------------------- files


def test_every_format_holds_the_same_records(tmp_path, vocabulary):
    pa, parquet = require("pyarrow"), require("pyarrow.parquet")
    table = pa.Table.from_pylist(PAIRS)
    parquet.write_table(table, tmp_path / "x.parquet")
    for name, writer in (("a.arrow", pa.ipc.new_file), ("b.arrow", pa.ipc.new_stream)):
        with writer(tmp_path / name, table.schema) as out:
            out.write_table(table)
    (tmp_path / "x.json").write_text(json.dumps(PAIRS))
    write_csv(tmp_path / "x.csv", PAIRS)
    write_csv(tmp_path / "x.tsv", PAIRS, "\t")
    one = build(lines(tmp_path / "x.jsonl", PAIRS), vocabulary)
    for name in ("x.parquet", "a.arrow", "b.arrow", "x.json", "x.csv", "x.tsv"):
        assert fields(read(tmp_path / name)["train"]) == PAIRS, name
        other = build(tmp_path / name, vocabulary)
        np.testing.assert_array_equal(one.train["tokens"], other.train["tokens"])


def test_a_csv_has_lines_and_lists_as_json(tmp_path, vocabulary):
    chat = {"messages": json.dumps(CHAT["messages"]), "source": 'by "hand",\nor so'}
    file = write_csv(tmp_path / "x.csv", [chat, chat, {**chat, "messages": "[{"}])
    assert [x.place for x in read(file)["train"]] == [f"{file}:{n}" for n in (2, 4, 6)]
    with pytest.raises(ValueError, match=re.escape(f"{file}:6: field 'messages':1: not JSON (")):
        build(file, vocabulary)
    write_csv(file, [chat] * 3)
    task = build(file, vocabulary)
    assert "; fields without a part in training: source" in task.note
    assert vocabulary.decode(task.train["tokens"][0]).startswith("System: Be brief.\nUser: 2 + 2?")


def test_a_table_has_nulls_where_a_record_lacks_a_field(tmp_path):
    pa = require("pyarrow")
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    records = [{"messages": [USER, called]}, {"prompt": "a", "completion": "b", "score": 1.5}]
    table = pa.Table.from_pylist(
        [{**dict.fromkeys(("messages", "prompt", "completion", "score")), **x} for x in records]
    )
    require("pyarrow.parquet").write_table(table, tmp_path / "x.parquet")
    assert fields(read(tmp_path / "x.parquet")["train"]) == records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "", "x.csv: no records; expected at least one row"),
        ("x.csv", "prompt,completion\n", "x.csv: no records; expected at least one row"),
        ("x.csv", "prompt,prompt\na,b\n", "x.csv:1: two columns are called 'prompt'"),
        ("x.csv", "prompt,completion\na,b\na,b,c\n", "x.csv:3: 3 cells; the first row has 2"),
        ("x.csv", b"prompt\n\xe9", "x.csv:2: bad byte 0xe9; expected UTF-8"),
        ("x.parquet", "PAR1", "x.parquet: no parquet file ("),
        ("x.arrow", "ARROW1", "x.arrow: no arrow file ("),
        ("x.parquet", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, name, content, message):
    require("pyarrow")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ folders


def test_a_folder_has_sets_under_usual_names_or_those_of_task_split(tmp_path):
    lines(tmp_path / "a/train.jsonl", PAIRS[:3])
    write_csv(tmp_path / "a/validation.csv", PAIRS[3:5])
    sizes = lambda sets: {name: len(found) for name, found in sets.items()}
    assert sizes(read(tmp_path / "a")) == {"train": 3, "eval": 2}
    assert sizes(read(tmp_path / "a", split="validation,train")) == {"train": 2, "eval": 3}
    assert sizes(read(tmp_path / "a", split="validation")) == {"train": 2}
    with pytest.raises(FileNotFoundError, match=r"^task.split: 'train_sft': .* has no train_sft\."):
        read(tmp_path / "a", split="train_sft")
    lines(tmp_path / "b/train.jsonl", PAIRS)
    with pytest.raises(FileNotFoundError, match=r"^task.path: .* has no eval.jsonl or test.jsonl;"):
        read(tmp_path / "b")


def test_shards_of_parquet_are_one_set(tmp_path):
    pa, parquet = require("pyarrow"), require("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    for i, part in enumerate((PAIRS[:3], PAIRS[3:5])):
        name = f"train-{i:05d}-of-00002.parquet"
        parquet.write_table(pa.Table.from_pylist(part), tmp_path / "data" / name)
    parquet.write_table(
        pa.Table.from_pylist(PAIRS[5:6]), tmp_path / "data/test-00000-of-00001.parquet"
    )
    sets = read(tmp_path)
    assert fields(sets["train"]) == PAIRS[:5] and fields(sets["test"]) == PAIRS[5:6]


def test_what_datasets_saved_is_read(tmp_path):
    datasets = require("datasets")
    whole = datasets.Dataset.from_list(PAIRS)
    whole.save_to_disk(tmp_path / "one")
    assert fields(read(tmp_path / "one")["train"]) == PAIRS
    parts = {"train_sft": whole.select(range(5)), "test_sft": whole.select([7])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    sets = read(tmp_path / "two", split="train_sft,test_sft")
    assert fields(sets["train"]) == PAIRS[:5] and fields(sets["eval"]) == PAIRS[7:8]
    with pytest.raises(ValueError, match="^task.split: .* has no set 'train', it has train_sft, t"):
        read(tmp_path / "two")
    with pytest.raises(ValueError, match="has no set 'train_stf', it has .*; did you mean 'train_"):
        read(tmp_path / "two", split="train_stf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "task.path: task 'instruct' needs a file (.jsonl, .json, .csv, "),
        ({"path": "nowhere.jsonl"}, "task.path: 'nowhere.jsonl' does not exist; expected a file"),
        ({"path": "nowhere/x.parquet"}, "task.path: 'nowhere/x.parquet' does not exist; expected"),
        ({"path": "nowhere"}, "task.path: 'nowhere' does not exist; expected a file ("),
        ({"split": "a"}, "task.split: 'a' given, but "),
        ({"split": "a,b,c,d"}, "task.split: 'a,b,c,d' given; expected the names of the train, eva"),
        ({"split": "a,,b"}, "task.split: 'a,,b' given; expected the names"),
        ({"subset": "a"}, "task.subset: 'a' given, but "),
        ({"columns": "prompt"}, "task.columns: 'prompt' given; expected YOURS=OURS for each col"),
        ({"columns": "q=prompt"}, "task.columns: no train record has a field 'q', they have prom"),
        ({"columns": "prompt=completion"}, "task.columns renames a field to 'completion', which"),
    ],
)
def test_a_setting_that_fits_nothing_is_one_line(tmp_path, settings, message):
    file = str(lines(tmp_path / "x.jsonl", PAIRS))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        sources.read({"name": "instruct", "path": file} | settings)


def test_columns_are_renamed_and_left_out(tmp_path, vocabulary):
    records = [{"q": x["prompt"], "a": x["completion"], "chosen": "x"} for x in PAIRS]
    file = lines(tmp_path / "x.jsonl", records)
    task = build(file, vocabulary, columns="q=prompt, a=completion, chosen=")
    one = build(lines(tmp_path / "y.jsonl", PAIRS), vocabulary)
    assert task.note == one.note
    np.testing.assert_array_equal(one.train["tokens"], task.train["tokens"])
    with pytest.raises(ValueError, match="x.jsonl:1: field 'chosen' has no part in a record with"):
        build(file, vocabulary, columns="q=prompt,a=completion")


def test_examples_on_both_sides_of_the_cut_are_warned_of(tmp_path, vocabulary):
    file = lines(tmp_path / "x.jsonl", PAIRS)
    assert "warning" not in build(file, vocabulary).note
    lines(file, [*PAIRS[:-1], PAIRS[0]])
    assert "; warning: 1 of 2 held-out examples are trained on, too" in build(file, vocabulary).note
    lines(tmp_path / "f/train.jsonl", PAIRS)
    lines(tmp_path / "f/test.jsonl", [*PAIRS[:2], {**PAIRS[2], "completion": "other"}])
    assert "; warning: 2 of 3 held-out ex" in build(tmp_path / "f", vocabulary).note


# -------------------------------------------------------------------------------------------- forms


def form(record):
    return instruct.read(Record("f:1", record))


def test_conversations_of_other_forms_are_messages():
    said = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2 + 2?"},
        {"from": "gpt", "value": "4", "weight": 1},
    ]
    want = form(CHAT)
    assert form({"conversations": said, "id": "7"}).chat == want.chat
    assert form({"conversations": said[1:], "system": "Be brief."}).chat == want.chat
    assert form({"conversations": CHAT["messages"]}).chat == want.chat
    assert form({"conversations": json.dumps(said)}).chat == want.chat
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT["messages"]]
    assert form({"messages": parts}).chat == want.chat
    assert form({"messages": [{**USER, "content": ["2 ", {"type": "text", "text": "+ 2?"}]}, ANSWER]
                 }).chat.messages[0] == USER  # fmt: skip
    asked = {"prompt": CHAT["messages"][:2], "completion": [ANSWER]}
    assert form(asked).chat == want.chat
    earlier = form({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}).chat
    assert earlier.learnt == [3] and form({"messages": earlier.messages}).chat.learnt == [1, 3]
    assert form({"prompt": "[1, 2]", "completion": "[3]"}).plain[0] == ("[1, 2]", False)


def test_calls_of_tools_have_their_arguments_as_objects():
    call = {"name": "add", "arguments": {"a": 2}}
    want = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": call, "type": "function"}],
    }
    text = {**call, "arguments": json.dumps(call["arguments"])}
    told = {"role": "tool", "content": "4", "tool_call_id": "c1"}
    given = {**want, "tool_calls": [{"function": text, "type": "function"}], "content": None}
    chat = form({"messages": [USER, given, told, ANSWER], "tools": '[{"name": "add"}]'}).chat
    assert chat.messages[1] == want and chat.learnt == [1, 3]
    assert chat.extra == {"tools": [{"name": "add"}]} and chat.carried == ["tool_calls"]
    said = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": json.dumps(text)},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4"},
    ]
    chat = form({"conversations": said, "tools": "[]"}).chat
    assert chat.messages == [USER, want, {"role": "tool", "content": "4"}, ANSWER]
    assert chat.learnt == [1, 3]  # as in LLaMA-Factory
    legacy = form({"messages": [USER, {"role": "assistant", "function_call": text}]}).chat
    assert legacy.messages[1]["function_call"] == call and legacy.learnt == [1]


# ----------------------------------------------------------------------------- what may be missing


def test_an_optional_library_that_is_missing_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text("{}")
    install = r"pip install lorax-research\[data\]$"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=f"^task.path: '.*x.parquet' needs pyarrow: {install}"):
        read(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"^task.path: '.*saved' needs datasets: {install}"):
        read(tmp_path / "saved")
    with pytest.raises(ValueError, match="^task.path: 'me/chats' is no file or folder; as a data "):
        read("me/chats")
    older = types.SimpleNamespace(__version__="3.6.0")
    monkeypatch.setitem(sys.modules, "datasets", older)  # ran the code of a data set
    with pytest.raises(ValueError, match="needs datasets 4 or later, which runs no code .* 3.6.0"):
        read("me/chats")
