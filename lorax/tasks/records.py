"""Records of JSON Lines and JSON array files, each with the place that an error names."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from lorax.files import parse_json, read_text


class Record(NamedTuple):
    """One JSON object. place: "FILE:LINE", or "FILE[INDEX]" (from 0) in an array."""

    place: str
    fields: dict[str, Any]

    def get(self, name: str, kind: type = str) -> Any:
        """A field's value. Raises ValueError if it is missing or of another kind."""
        if name not in self.fields:
            has = ", ".join(self.fields) or "no field"
            raise ValueError(f"{self.place}: field {name!r} is missing; the record has {has}")
        value = self.fields[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(
                f"{self.place}: field {name!r} is {shown(value)}; expected {KINDS[kind]}"
            )
        return value


KINDS = {str: "text", int: "a whole number", list: "an array", dict: "an object"}


def read(path: Path) -> list[Record]:
    """Every record of a file, in order: an array of objects, or one object per line.

    Raises ValueError naming the file and the line or index if it is not UTF-8, not JSON, not
    an object, or empty.
    """
    content = read_text(path)
    if content.lstrip().startswith("["):
        values = [(f"{path}[{i}]", value) for i, value in enumerate(parse_json(content, path))]
    else:
        # str.splitlines would cut at U+2028 too, which JSON allows within a string
        lines = enumerate(content.split("\n"), start=1)
        values = [
            (f"{path}:{line}", parse_json(text, path, line)) for line, text in lines if text.strip()
        ]
    for place, value in values:
        if not isinstance(value, dict):
            raise ValueError(f"{place}: {shown(value)}; expected an object, {{...}}")
    if not values:
        raise ValueError(f"{path}: no records; expected one JSON object a line, or an array")
    return [Record(place, value) for place, value in values]


def only(matches: list, name: str, path: Path, expected: str) -> Any:
    """The only match. Raises FileNotFoundError or ValueError naming `task.path` otherwise."""
    if not matches:
        raise FileNotFoundError(f"task.path: {str(path)!r} has no {name}; expected {expected}")
    if len(matches) > 1:
        raise ValueError(
            f"task.path: {str(path)!r} has {len(matches)} files called {name} "
            f"({', '.join(map(str, matches))}); expected one"
        )
    return matches[0]


def find(folder: Path, name: str, expected: str) -> Path:
    """The only file of that name anywhere in a folder. Raises as `only` does."""
    if not folder.is_dir():
        raise ValueError(f"task.path: {str(folder)!r} is no folder; expected {expected}")
    return only(sorted(folder.rglob(name)), name, folder, expected)


def shown(value: Any) -> str:
    """A JSON value, shortened for an error message."""
    text = json.dumps(value, ensure_ascii=False, default=str)  # a table has dates and bytes, too
    return text if len(text) <= 40 else text[:37] + "..."
