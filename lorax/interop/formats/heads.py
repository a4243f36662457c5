"""The attention heads of a base, and two ways to store the rows of its q and k.

Rotary embeddings turn pairs of the numbers of a head. Hugging Face pairs number i of a head of d
with i + d / 2; Meta's code, torchtune and llama.cpp pair 2 i with 2 i + 1. Their converters move
the rows of q and k, and so those of B, from one order to the other:

    Hugging Face's (heads, 2, d / 2)  <->  the others' (heads, d / 2, 2)

The rows' order changes nothing in the singular values, but dW can be compared with another file, or
with a base, only in one order.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lorax.interop.formats.contract import Update
from lorax.interop.formats.pairs import Side, columns

_ORDER = "rotary order"


class Heads(NamedTuple):
    """Numbers of heads of q, and of k and v."""

    q: int
    kv: int


def language_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the language model in a config.json of a model that may have more parts."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def heads(config: Mapping[str, Any]) -> Heads | None:
    """From the fields of a base's config.json, None if they don't say it."""
    config = language_part(config)
    q = config.get("num_attention_heads")
    kv = config.get("num_key_value_heads") or q  # null: as many
    fits = all(type(n) is int and n > 0 for n in (q, kv))
    return Heads(q, kv) if fits and q % kv == 0 else None


def to_hugging_face(n: int, rows: int) -> np.ndarray:
    """(rows,) the places, in a file with neighbours paired, of the rows in Hugging Face's order.
    n: heads, of which each has an even number of rows."""
    return np.arange(rows).reshape(n, rows // n // 2, 2).swapaxes(1, 2).reshape(-1)


def from_hugging_face(n: int, rows: int) -> np.ndarray:
    """(rows,) the places, in Hugging Face's order, of the rows of such a file."""
    return np.arange(rows).reshape(n, 2, rows // n // 2).swapaxes(1, 2).reshape(-1)


def in_order(b: Side, n: int | None, whose: str) -> tuple[Side, tuple[str, ...]]:
    """(B of q or k in Hugging Face's order, warnings). n: heads; None: not known, B stays as it is.
    whose: the program whose order the file has."""
    if n is None:
        said = f"rows of B are in {whose}'s {_ORDER}, which singular values don't show"
        return b, (
            f"{said}; with the base's config.json beside the file they are put in Hugging Face's",
        )
    rows = b.shape[1]
    if rows % (2 * n):
        said = f"{rows} rows of B are not those of the base's {n} heads: left in {whose}'s {_ORDER}"
        return b, (said,)
    return columns(b, to_hugging_face(n, rows)), ()


def is_unordered(update: Update) -> bool:
    """Whether the rows of an update's B are in another order than Hugging Face's."""
    return any(_ORDER in warning for warning in update.warnings)
