"""What the fields of someone else's JSON object must be: declared once, checked before any use.

A reader lists the fields that it reads, each with a `Kind`, and sees no others:

    FIELDS = {"hidden_size": SIZE, "rope_theta": POSITIVE, "head_dim": optional(SIZE)}
    hf = fields.read(hf, FIELDS)
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """fits(value): whether a value is of this kind; right: what it must be, in words."""

    right: str
    fits: Callable[[Any], bool]


def whole(least: int, most: int = 2**31 - 1) -> Kind:
    """Integers from `least` to `most`."""
    fits = lambda x: type(x) is int and least <= x <= most  # a bool is an int to isinstance
    return Kind(f"a whole number from {least} to {most}", fits)


def number(right: str, fits: Callable[[float], bool]) -> Kind:
    """Finite numbers that fit, whole ones among them."""
    within = lambda x: abs(x) < 1e38 if type(x) is int else math.isfinite(x)
    return Kind(right, lambda x: type(x) in (int, float) and within(x) and fits(x))


def one_of(names: Collection[str]) -> Kind:
    """Strings of a list."""
    right = f"one of {', '.join(map(repr, names))}"
    return Kind(right, lambda x: isinstance(x, str) and x in names)


def optional(kind: Kind) -> Kind:
    """`kind`, or null."""
    return Kind(f"{kind.right}, or null", lambda x: x is None or kind.fits(x))


def either(one: Kind, other: Kind) -> Kind:
    """Values of two kinds."""
    return Kind(f"{one.right}, or {other.right}", lambda x: one.fits(x) or other.fits(x))


def each(kind: Kind, least: int = 0, most: int = 2**20) -> Kind:
    """Lists of `least` to `most` values of a kind."""
    many = f"{least}" if least == most else f"{least} or more" * bool(least)
    right = " ".join(filter(None, ("a list of", many, f"values, each {kind.right}")))
    sized = lambda x: isinstance(x, list | tuple) and least <= len(x) <= most
    return Kind(right, lambda x: sized(x) and all(map(kind.fits, x)))


#: Axes of a weight, heads and layers: the largest model known has less than a tenth of it.
SIZE = whole(1, 2**20)
#: Rows of an embedding, positions: more of these is no mistake.
ROWS = whole(1)
COUNT = whole(0)
ID = whole(0)
POSITIVE = number("a number above 0", lambda x: x > 0)
NUMBER = number("a number", lambda x: True)
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a string", lambda x: isinstance(x, str))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))
TEXTS = each(TEXT)


def read(given: Mapping, kinds: Mapping[str, Kind], place: str | Path = "") -> dict:
    """{field: value} of those fields of `given` that `kinds` lists.

    place: the file, or the field that holds them, for messages. Raises ValueError that names the
    field, what was given and what would be right.
    """
    found = {name: given[name] for name in kinds if name in given}
    for name, value in found.items():
        if not kinds[name].fits(value):
            raise ValueError(
                f"{place}{': ' * bool(place)}{name}: {shown(value)} given, must be "
                f"{kinds[name].right}"
            )
    return found


def shown(value) -> str:
    """A value as JSON, cut to what a line of an error has room for."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # of Python, not of a file; an integer of too many digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"
