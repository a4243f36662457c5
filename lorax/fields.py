"""What the fields of someone else's JSON object must be: declared once, checked before any use.

A reader lists the fields that it reads, each with a `Kind`, and sees no others:

    FIELDS = {"hidden_size": SIZE, "rope_theta": POSITIVE, "head_dim": optional(SIZE)}
    hf = fields.read(hf, FIELDS)
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

TINY = 1e-37  # less is zero in float32, more than its inverse infinite


class Kind(NamedTuple):
    """right: what a value must be, in words. fits(value): whether it is; read(value): the same as
    who computes with it wants it."""

    right: str
    fits: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda x: x


def whole(least: int, most: int = 2**31 - 1) -> Kind:
    """Integers from `least` to `most`."""
    fits = lambda x: type(x) is int and least <= x <= most  # a bool is an int to isinstance
    return Kind(f"a whole number from {least} to {most}", fits)


def above(limit: float) -> Kind:
    """Numbers above a limit, in float32: not below it by rounding, and not infinite."""
    fits = lambda x: type(x) in (int, float) and TINY <= x - limit and x <= 1 / TINY
    return Kind(f"a number above {limit}", fits, float)


def one_of(names: Collection[str]) -> Kind:
    """Strings of a list."""
    right = f"one of {', '.join(map(repr, names))}"
    return Kind(right, lambda x: isinstance(x, str) and x in names)


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


#: Axes of a weight, heads and layers: the largest model known has less than a tenth of it.
SIZE = whole(1, 2**20)
#: Rows of an embedding, positions: more of these is no mistake.
ROWS = whole(1)
COUNT = whole(0)
ID = whole(0)
POSITIVE = above(0)
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a string", lambda x: isinstance(x, str))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))
TEXTS = each(TEXT)


def read(given: Mapping, kinds: Mapping[str, Kind], place: str | Path = "") -> dict:
    """{field: value} of those fields of `given` that `kinds` lists.

    place: the file, or the field that holds them, for messages. Raises ValueError that names the
    field, what was given and what would be right.
    """
    found = {}
    for name, kind in kinds.items():
        if name not in given:
            continue
        if not kind.fits(given[name]):
            raise ValueError(
                f"{place}{': ' * bool(place)}{name}: {shown(given[name])} given, must be "
                f"{kind.right}"
            )
        found[name] = kind.read(given[name])
    return found


def shown(value) -> str:
    """A value as JSON, cut to what a line of an error has room for."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # of Python, not of a file; an integer of too many digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"
