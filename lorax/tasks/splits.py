"""Validation and test examples: choices are made on the first, what is reported stands on the
second.

A task whose files hold a test set takes it from there. The evaluation set of any other task is cut
in two. Examples that belong together, such as several texts for one prompt, stay on one side. The
cut depends only on the examples and on `task.seed`, not on a base or on the order of the examples,
so that members of a sweep over bases are measured on the same texts.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lorax.tasks.rows import END, Example, Rows
from lorax.tasks.subsets import size
from lorax.vocabulary import END_OF_TEXT

Item = TypeVar("Item")


def parted(
    evaluation: Iterable[Item],
    test: Iterable[Item] | None,
    key: Callable[[Item], str | bytes],
    seed: int,
) -> tuple[Iterable[Item], Iterable[Item]]:
    """(validation examples, test examples): those that are given, or, if `test` is None, the two
    halves of the evaluation examples by `cut`. key: of an example."""
    if test is not None:
        return evaluation, test
    items = list(evaluation)
    validation, test = cut([key(item) for item in items], seed)
    return [items[i] for i in validation], [items[i] for i in test]


def labelled(
    inputs: Sequence, labels: Sequence, key: Callable[[Any], str | bytes], seed: int
) -> tuple[tuple[Sequence, Sequence], tuple[Sequence, Sequence]]:
    """((inputs, labels) for validation, (inputs, labels) for test) by `cut`; lists or arrays, as
    they are given. key: of an input."""
    take = lambda part, side: (
        part[side] if isinstance(part, np.ndarray) else [part[i] for i in side]
    )
    sides = cut([key(x) for x in inputs], seed)
    validation, test = ((take(inputs, side), take(labels, side)) for side in sides)
    return validation, test


def halves(rows: Rows) -> tuple[Rows, Rows]:
    """The first half of packed rows for validation, the second for test: rows that follow each
    other may be of one text. Raises ValueError for a single row."""
    middle = size(rows) // 2
    if not middle:
        raise _too_few("row")
    return {k: x[:middle] for k, x in rows.items()}, {k: x[middle:] for k, x in rows.items()}


def cut(keys: Sequence[str | bytes], seed: int) -> tuple[list[int], list[int]]:
    """Indices, ascending, of the validation and of the test examples, about half each.

    keys: of the examples, e.g. their prompts. Examples with equal keys stay together, unless all
    are equal: then each stands alone. Keys are dealt out in the order of a hash of key and seed,
    always to the side with fewer examples. Raises ValueError for fewer than two examples.
    """
    if len(keys) < 2:
        raise _too_few("example")
    groups: dict[bytes, list[int]] = {}
    alone = len(set(keys)) == 1
    for i, key in enumerate(keys):
        name = str(i) if alone else key
        groups.setdefault(name.encode() if isinstance(name, str) else name, []).append(i)
    mixed = lambda name: hashlib.blake2b(name, digest_size=16, salt=seed.to_bytes(8)).digest()
    sides: tuple[list[int], list[int]] = [], []
    for name in sorted(groups, key=mixed):
        min(sides, key=len).extend(groups[name])
    return sorted(sides[0]), sorted(sides[1])


def _too_few(what: str) -> ValueError:
    return ValueError(
        f"eval.test: the evaluation set has one {what}, which can't be for validation and for "
        "test; give more, or set eval.test to 0"
    )


def first_text(texts: tuple[str, ...]) -> str:
    """The key of a classifier's example: its first text, e.g. the premise of several hypotheses."""
    return texts[0]


def opening(example: Example) -> str:
    """The key of a conversation: its text before the first target."""
    first = next(i for i, (_, target) in enumerate(example) if target)
    return "".join(END_OF_TEXT if text is END else text for text, _ in example[:first])


def seed_of(config: Mapping[str, Any]) -> int:
    """The seed of the cut: `task.seed`, 0 where a config has none."""
    return config.get("seed") or 0
