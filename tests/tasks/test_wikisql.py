import json
import re

import pytest

from lorax import tasks
from lorax.tasks import wikisql

# in the published format, fields that the task has no use for included
TABLES = [
    {
        "id": "1-10015132-11",
        "header": ["Player", "No.", "Years in  Toronto", "School/Club Team"],
        "types": ["text", "text", "text", "text"],
        "rows": [["Antonio Lang", "21", "1999-2000", "Duke"]],
        "name": "table_10015132_11",
    },
    {"id": "2-1", "header": ["Area (km 2 )", "Population"], "types": ["real", "real"], "rows": []},
]


def question(text, table, sel, agg, conds):
    sql = {"sel": sel, "conds": conds, "agg": agg}
    return {"phase": 1, "question": text, "table_id": table, "sql": sql}


QUESTIONS = [
    question(
        "What is terrence ross' nationality?", TABLES[0]["id"], 0, 0, [[3, 0, "Butler CC (KS)"]]
    ),
    question("How  many? ", TABLES[0]["id"], 1, 3, [[0, 0, "A"], [2, 0, "1996-97"]]),
    question("The smallest", "2-1", 0, 2, [[1, 1, 18.6], [1, 2, 1000]]),
    question("All", "2-1", 1, 0, []),
]
PLAYERS = "columns = Player | No. | Years in Toronto | School/Club Team ; question = "
AREAS = "columns = Area (km 2 ) | Population ; question = "
PAIRS = [
    (
        PLAYERS + "What is terrence ross' nationality? =>",
        "SELECT Player FROM table WHERE School/Club Team = Butler CC (KS)",
    ),
    (
        PLAYERS + "How many? =>",
        "SELECT COUNT No. FROM table WHERE Player = A AND Years in Toronto = 1996-97",
    ),
    (
        AREAS + "The smallest =>",
        "SELECT MIN Area (km 2 ) FROM table WHERE Population > 18.6 AND Population < 1000",
    ),
    (AREAS + "All =>", "SELECT Population FROM table"),
]


def write(folder, questions=QUESTIONS, tables=TABLES):
    for split in ("train", "dev"):
        for name, records in ((f"{split}.jsonl", questions), (f"{split}.tables.jsonl", tables)):
            (folder / name).write_text("".join(json.dumps(x) + "\n" for x in records))
    return folder


def build(path, vocabulary, **fields):
    return tasks.build({"name": "wikisql", "path": str(path), **fields}, vocabulary, 128)


def test_build(tmp_path, vocabulary):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    assert wikisql.examples(tmp_path, "train") == wikisql.examples(tmp_path, "eval") == PAIRS
    task = build(tmp_path, vocabulary, n_train=2)
    assert task.note == "wikisql: 2 train examples, 4 eval examples"
    for (prompt, sql), ids, mask in zip(PAIRS, *task.eval.values(), strict=True):
        assert vocabulary.decode(ids[: int(mask.argmax())]) == prompt
        assert vocabulary.decode(ids[mask == 1.0]) == " " + sql
    assert task.prompts == tuple(tasks.Prompt(prompt, (sql,)) for prompt, sql in PAIRS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"table_id": "9-9"}, "train.tables.jsonl has no table '9-9'"),
        ({"question": 3}, "field 'question' is 3; expected text"),
        ({"sql": "SELECT"}, "field 'sql' is \"SELECT\"; expected an object"),
        (
            {"sql": {"sel": 0, "agg": 0}},
            "in 'sql': field 'conds' is missing; the record has sel, agg",
        ),
        (
            {"sql": {"sel": True, "agg": 0}},
            "in 'sql': field 'sel' is true; expected a whole number",
        ),
        ({"sql": {"sel": 4, "agg": 0, "conds": []}}, "sql.sel is 4; expected 0 to 3"),
        ({"sql": {"sel": 0, "agg": 6, "conds": []}}, "sql.agg is 6; expected 0 to 5"),
        ({"sql": {"sel": 0, "agg": 0, "conds": [[0, 0]]}}, "sql.conds[0] is [0, 0]; expected [col"),
        (
            {"sql": {"sel": 0, "agg": 0, "conds": [[-1, 0, "x"]]}},
            "the column of sql.conds[0] is -1; expected 0 to 3",
        ),
        (
            {"sql": {"sel": 0, "agg": 0, "conds": [[0, "=", "x"]]}},
            "the operator of sql.conds[0] is '='; expected 0 to 3",
        ),
    ],
)
def test_malformed_questions_name_the_line(tmp_path, vocabulary, fields, message):
    write(tmp_path, [QUESTIONS[3], QUESTIONS[0] | fields])
    label = f"{tmp_path / 'train.jsonl'}:2: {message}"
    with pytest.raises(ValueError, match="^" + re.escape(label)):
        build(tmp_path, vocabulary)


@pytest.mark.parametrize("header", [[], ["A", 3]])
def test_malformed_tables_name_the_line(tmp_path, vocabulary, header):
    write(tmp_path, tables=[TABLES[0], TABLES[1] | {"header": header}])
    label = f"{tmp_path / 'train.tables.jsonl'}:2: field 'header' is {header}; expected names"
    with pytest.raises(ValueError, match="^" + re.escape(label)):
        build(tmp_path, vocabulary)


def test_missing_file(tmp_path, vocabulary):
    (write(tmp_path) / "dev.tables.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"^task\.path: .* has no dev\.tables\.jsonl; expe"):
        build(tmp_path, vocabulary)
