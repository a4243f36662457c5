"""Checks of the fields of JSON objects from outside, declared once and done before any use.

A reader lists the fields that it reads, each with a `Kind`; other fields are ignored, unless
`refuse_others` looks at them:

    FIELDS = {"hidden_size": SIZE, "rope_theta": POSITIVE, "head_dim": optional(SIZE)}
    hf = fields.read(hf, FIELDS)
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

TINY = 1e-37  # smaller values are zero in float32, values above its inverse infinite


class Kind(NamedTuple):
    """right: what a value must be, in words. fits(value): whether it is. read(value): the value
    converted for use."""

    right: str
    fits: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda x: x


def whole(least: int, most: int = 2**31 - 1) -> Kind:
    """Integers from `least` to `most`."""
    fits = lambda x: type(x) is int and least <= x <= most  # a bool is an int to isinstance
    return Kind(f"a whole number from {least} to {most}", fits)


def above(limit: float) -> Kind:
    """Numbers above a limit, which float32 neither rounds to it nor makes infinite."""
    fits = lambda x: type(x) in (int, float) and TINY <= x - limit and x <= 1 / TINY
    return Kind(f"a number above {limit}", fits, float)


def one_of(names: Collection[str]) -> Kind:
    """Strings from a list."""
    right = f"one of {', '.join(map(repr, names))}"
    return Kind(right, lambda x: isinstance(x, str) and x in names)


def only(*values) -> Kind:
    """The values of an option that is not computed with others."""
    right = f"{' or '.join(map(json.dumps, values))}, which alone is computed here"
    same = lambda x, y: x == y and isinstance(x, bool) == isinstance(y, bool)
    return Kind(right, lambda x: any(same(x, y) for y in values))


def optional(kind: Kind) -> Kind:
    """`kind`, or null."""
    return either(kind, Kind("null", lambda x: x is None))


def either(one: Kind, other: Kind) -> Kind:
    """Values of two kinds."""
    fits = lambda x: one.fits(x) or other.fits(x)
    read = lambda x: (one if one.fits(x) else other).read(x)
    return Kind(f"{one.right}, or {other.right}", fits, read)


def each(kind: Kind, least: int = 0, most: int = 2**20) -> Kind:
    """Lists of `least` to `most` values of a kind, read as tuples."""
    many = f"{least}" if least == most else f"{least} or more" * bool(least)
    right = " ".join(filter(None, ("a list of", many, f"values, each {kind.right}")))
    sized = lambda x: isinstance(x, list | tuple) and least <= len(x) <= most
    return Kind(
        right, lambda x: sized(x) and all(map(kind.fits, x)), lambda x: tuple(map(kind.read, x))
    )


#: Axes of a weight, heads and layers: no known model has a tenth of this.
SIZE = whole(1, 2**20)
#: Rows of an embedding, positions: these may be larger.
ROWS = whole(1)
COUNT = whole(0)
ID = whole(0)
POSITIVE = above(0)
NOT_NEGATIVE = either(POSITIVE, Kind("0", lambda x: type(x) in (int, float) and x == 0))
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a string", lambda x: isinstance(x, str))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))
TEXTS = each(TEXT)


def read(given: Mapping, kinds: Mapping[str, Kind], place: str | Path = "") -> dict:
    """{field: value} of the fields of `given` that `kinds` lists.

    place: for messages, the file or the field that holds the object. Raises ValueError that names
    the field, what was given and what would be right.
    """
    values = {}
    for name, kind in kinds.items():
        if name not in given:
            continue
        if not kind.fits(given[name]):
            raise ValueError(
                f"{place}{': ' * bool(place)}{name}: {shown(given[name])} given, must be "
                f"{kind.right}"
            )
        values[name] = kind.read(given[name])
    return values


def refuse_others(given: Mapping, kinds: Mapping[str, Kind]) -> None:
    """Raises ValueError for a field that `kinds` does not list and that is neither null nor false,
    for a model whose further options would change what it computes. diffusers' own notes (_...) and
    `model_type` are none."""
    for name, value in given.items():
        known = name in kinds or name.startswith("_") or name == "model_type"
        if not known and value is not None and value is not False:
            raise ValueError(
                f"{name}: {shown(value)} given, but this option is computed only if it is null or "
                "false"
            )


def shown(value) -> str:
    """A value as JSON, shortened to fit in a line of an error."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # not JSON, or an integer with too many digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"
