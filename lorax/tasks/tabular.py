"""Records of CSV, parquet and Arrow files: a row is a record, a column a field."""

import csv
import io
import sys
from pathlib import Path
from typing import Any

from lorax.files import pointer_hint, read_text
from lorax.tasks.records import Record

SEPARATORS = {".csv": ",", ".tsv": "\t"}
ARROW = (".parquet", ".arrow")
EXTRA = "pip install lorax-research[data]"


def read(path: Path) -> list[Record]:
    """Every row of a .csv, .tsv, .parquet or .arrow file. A field without a value (a null, a cell
    that a short row lacks) is left out of the record.

    Raises ValueError naming the file, and the line of a CSV, if it is damaged or has no rows.
    """
    found = _csv(path) if path.suffix in SEPARATORS else of_table(_arrow(path), str(path))
    if not found:
        raise ValueError(f"{path}: no records; expected at least one row")
    return found


def _csv(path: Path) -> list[Record]:
    """Rows of a file whose first row names the columns; all values are text."""
    lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=SEPARATORS[path.suffix])
    limit = csv.field_size_limit(sys.maxsize)
    try:
        head, found = next(lines, []), []
        line = lines.line_num
        if len(set(head)) < len(head):
            twice = next(name for name in head if head.count(name) > 1)
            raise ValueError(f"{path}:1: two columns are called {twice!r}")
        for cells in lines:
            place, line = f"{path}:{line + 1}", lines.line_num
            if len(cells) > len(head):
                raise ValueError(f"{place}: {len(cells)} cells; the first row has {len(head)}")
            if cells:
                found.append(Record(place, dict(zip(head, cells, strict=False))))
    except csv.Error as error:
        raise ValueError(f"{path}:{lines.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    return found


def _arrow(path: Path):
    """The table of a parquet file, or of an Arrow file in either of its formats."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"task.path: {str(path)!r} needs pyarrow: {EXTRA}") from None
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path)
        with pa.memory_map(str(path)) as file:
            try:
                return pa.ipc.open_file(file).read_all()
            except pa.ArrowInvalid:  # not the file format; `datasets` writes streams
                file.seek(0)
                return pa.ipc.open_stream(file).read_all()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        kind = path.suffix.removeprefix(".")
        raise ValueError(f"{path}: no {kind} file ({reason}){pointer_hint(path)}") from None


def of_table(table, place: str) -> list[Record]:
    """Rows of a `pyarrow.Table`, each at "PLACE[INDEX]"."""
    return [
        Record(f"{place}[{i}]", _without_nulls(fields))
        for i, fields in enumerate(table.to_pylist())
    ]


def _without_nulls(value: Any) -> Any:
    """Nulls stand for fields that are missing: all objects of a column have the same fields."""
    if isinstance(value, dict):
        return {name: _without_nulls(x) for name, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value
