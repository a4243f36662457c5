import re

import pytest

from lorax.tasks import records


def write(folder, content):
    path = folder / "x.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "places"),
    [
        ('{"a": 1}\n{"a": 2}\n', (":1", ":2")),
        ('\ufeff{"a": 1}\r\n\r\n  {"a": 2}', (":1", ":3")),
        ('\n[{"a": 1},\n {"a": 2}]\n', ("[0]", "[1]")),
    ],
)
def test_both_forms(tmp_path, content, places):
    path = write(tmp_path, content)
    assert records.read(path) == [
        records.Record(f"{path}{place}", {"a": i + 1}) for i, place in enumerate(places)
    ]


def test_only_line_feeds_end_a_line(tmp_path):
    found = records.read(write(tmp_path, '{"a": "x\u2028y\x85z"}\n{"a": ""}'))
    assert [record.get("a") for record in found] == ["x\u2028y\x85z", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": no records; expected one JSON object a line, or an array"),
        ("[ ]", ": no records; expected"),
        ('{"a": 1}\n\n{"a": }\n', ":3: not JSON (Expecting value at character 7)"),
        ('{\n"a": 1}', ":1: not JSON ("),
        ('[{"a": 1},\n{"a" 2}]', ":2: not JSON (Expecting ':' delimiter at character 6)"),
        ('{"a": 1}\n[1]\n', ":2: [1]; expected an object, {...}"),
        ("[{}, null]", "[1]: null; expected an object"),
        (b'{"a": "b"}\n{"a": "\xe9"}', ":2: bad byte 0xe9; expected UTF-8"),
    ],
)
def test_errors_name_the_place(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}{message}")):
        records.read(path)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("c", str, "field 'c' is missing; the record has a, b"),
        ("a", str, "field 'a' is 1; expected text"),
        ("b", int, "field 'b' is true; expected a whole number"),
        ("a", list, "field 'a' is 1; expected an array"),
        ("a", dict, "field 'a' is 1; expected an object"),
    ],
)
def test_fields(name, kind, message):
    record = records.Record("f:1", {"a": 1, "b": True})
    assert record.get("a", int) == 1
    with pytest.raises(ValueError, match="^" + re.escape(f"f:1: {message}")):
        record.get(name, kind)
