"""WikiSQL: a question about a table -> the SQL query that answers it.

Zhong, Xiong and Socher, "Seq2SQL" (arXiv 1709.00103), in the setting of the LoRA paper (arXiv
2106.09685, section 5.5 and appendix C): the table's columns and the question are the context, the
query is the target. Reads the data set's own JSON Lines, which are not shipped. The paper does not
give its format; lorax uses

    columns = Player | No. | Position ; question = Who wears number 42? =>
    SELECT Player FROM table WHERE No. = 42

The query is spelled as in the data set's human-readable form: names are not quoted, an aggregate
stands in front of its column (SELECT COUNT Player), and conditions are joined by AND.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax.tasks import records
from lorax.tasks.data import Data, pairs
from lorax.tasks.records import Record
from lorax.tasks.rows import check_path, linearise

SPLITS = {"train": "train", "eval": "dev", "test": "test"}
EXPECTED = (
    "a folder with WikiSQL's train.jsonl, train.tables.jsonl, dev.jsonl and dev.tables.jsonl in it"
)
AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<", "OP")


def examples(path: str | Path, split: str) -> list[tuple[str, str]]:
    """(prompt, completion) of every question, in the file's order; split is "train", "eval" or
    "test".

    Raises FileNotFoundError, or ValueError naming the file and the line.
    """
    folder, name = Path(path), SPLITS[split]
    headers = {
        table.get("id"): _header(table)
        for table in records.read(records.find(folder, f"{name}.tables.jsonl", EXPECTED))
    }
    pairs = []
    for record in records.read(records.find(folder, f"{name}.jsonl", EXPECTED)):
        table = record.get("table_id")
        if table not in headers:
            raise ValueError(f"{record.place}: {name}.tables.jsonl has no table {table!r}")
        question = " ".join(record.get("question").split())
        slots = ("columns", " | ".join(headers[table])), ("question", question)
        pairs.append((linearise(slots), _sql(record, headers[table])))
    return pairs


def load(config: Mapping[str, Any]) -> Data:
    """Trains on train.jsonl (its first n_train questions), validates on dev.jsonl, tests on
    test.jsonl; if that is missing, half of dev.jsonl is for test. The paper evaluates on dev.jsonl,
    as a run with `eval.test` 0 does."""
    path = check_path(config, EXPECTED)
    train, evaluation = examples(path, "train"), examples(path, "eval")
    try:
        test = examples(path, "test")
    except FileNotFoundError:
        test = None
    return pairs(train, evaluation, test=test)


def _header(table: Record) -> list[str]:
    header = table.get("header", list)
    if not header or not all(isinstance(column, str) for column in header):
        raise ValueError(f"{table.place}: field 'header' is {header}; expected names of columns")
    return [" ".join(column.split()) for column in header]


def _sql(record: Record, header: list[str]) -> str:
    """{"sel": 0, "agg": 3, "conds": [[1, 0, "42"]]} -> "SELECT COUNT Player FROM..."."""

    def pick(field: str, index: Any, among: tuple[str, ...] | list[str]) -> str:
        if type(index) is not int or not 0 <= index < len(among):
            raise ValueError(
                f"{record.place}: {field} is {index!r}; expected 0 to {len(among) - 1}"
            )
        return among[index]

    sql = Record(f"{record.place}: in 'sql'", record.get("sql", dict))
    aggregate = pick("sql.agg", sql.get("agg", int), AGGREGATES)
    column = pick("sql.sel", sql.get("sel", int), header)
    conditions = []
    for i, condition in enumerate(sql.get("conds", list)):
        if not isinstance(condition, list) or len(condition) != 3:
            raise ValueError(
                f"{record.place}: sql.conds[{i}] is {condition!r}; expected "
                "[column, operator, value]"
            )
        name = pick(f"the column of sql.conds[{i}]", condition[0], header)
        operator = pick(f"the operator of sql.conds[{i}]", condition[1], OPERATORS)
        conditions.append(f"{name} {operator} {condition[2]}")
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    return " ".join(f"SELECT {aggregate} {column} FROM table {where}".split())
