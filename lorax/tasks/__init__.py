"""Tasks: rows to train and evaluate on.

A task is two sets of rows, built once and kept in memory: texts of a language model or texts with a
label, which are made with a base's vocabulary, or arrays that fit a base (`lorax.tasks.kinds`).
`lorax.tasks.batch_order` says in what order they are visited.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lorax import config as configs
from lorax.errors import nearest
from lorax.models import Base
from lorax.tasks import (
    e2e,
    glue,
    instruct,
    kinds,
    planted,
    restaurants,
    samsum,
    text,
    vision,
    wikisql,
)
from lorax.tasks.batch_order import order, orders
from lorax.tasks.kinds import Kind
from lorax.tasks.rows import Prompt, Rows, Task, check_n_train, count
from lorax.vocabulary import Vocabulary

__all__ = ["ARRAYS", "TASKS", "Prompt", "Task", "batch_shapes", "build", "check_base", "kind_of"]
__all__ += ["order", "orders", "outputs", "prompts", "size", "spread", "train_examples"]
__all__ += ["train_size", "widths"]

# name -> load(config, vocabulary, seq_len) -> Task, with all its evaluation rows
TASKS = {
    "restaurants": restaurants.load,
    "e2e": e2e.load,
    "wikisql": wikisql.load,
    "samsum": samsum.load,
    "instruct": instruct.load,
    "text": text.load,
    "glue": glue.load,
}
# name -> load(config, base) -> Task, with all its evaluation rows
ARRAYS = {
    "mnist": vision.mnist,
    "digits": vision.digits,
    "planted": planted.load,
}
QUARTERS = 4  # widths of batches of rows that are grouped by length
# settings that only some tasks have a use for
ONLY = {
    "packing": ("restaurants", "e2e", "wikisql", "samsum", "instruct"),
    "group_by_length": ("restaurants", "e2e", "wikisql", "samsum", "instruct", "glue"),
    "template": ("instruct",),
    "subset": ("glue",),
    "shuffle": ("mnist", "digits"),
    **dict.fromkeys(("rank", "spectrum", "strength", "noise", "inputs", "examples"), ("planted",)),
}
_DEFAULTS = configs.default().task


def build(
    config: Mapping[str, Any],
    vocabulary: Vocabulary | None,
    seq_len: int,
    eval_examples: int | None = None,
    base: Base | None = None,
) -> Task:
    """Makes the rows of the task that `config` names.

    config: `name` (a key of `TASKS` or `ARRAYS`), and where there is something to say: `path` (the
        file or folder that the task reads), `n_train` (None: all; else the first n train examples,
        not counting those that are dropped), `seed` (int, of the data itself), `packing` (True:
        several train examples a row), `template` (of instruct: a chat template), `subset` (of
        glue), `group_by_length` (True: the task has `lengths`; not with packing, whose rows are all
        full), `shuffle` (of images: True puts their pixels in a random order).
    vocabulary: of a text task, for which it is needed.
    seq_len: tokens that a model reads at most; a row of a language model has one more. Longer
        examples are dropped, or cut for a classifier. Columns that no row needs are left out.
        Without meaning for an array task.
    eval_examples: evaluation rows to keep, evenly spaced over the set (None: all). The prompts
        stay as they are.
    base: what an array task's rows must fit; a text task needs none.

    Raises ValueError, or FileNotFoundError, naming the config field or the file and line at fault.
    """
    name = _known(config)
    at_least_one = {"train.seq_len": seq_len, "eval.examples": eval_examples}
    at_least_one["task.n_train"] = config.get("n_train")
    for field, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"{field}: {value} was given; it must be at least 1")
    for field, names in ONLY.items():
        if config.get(field) not in (None, _DEFAULTS[field]) and name not in names:
            raise ValueError(
                f"task.{field}: {config.get(field)!r} was given; task {name!r} has no use for it, "
                f"only {', '.join(names)}"
            )
    if config.get("group_by_length") and config.get("packing"):
        raise ValueError(
            "task.group_by_length: True was given with task.packing, whose rows are all full; it "
            "must be False there"
        )
    if name in ARRAYS:
        task = ARRAYS[name](config, base)
    else:
        task = TASKS[name](config, vocabulary, seq_len)
        trimmed = (kinds.trim(task.kind, rows) for rows in (task.train, task.eval))
        task = task._replace(**dict(zip(("train", "eval"), trimmed, strict=True)))
    kept, note = spread(task.eval, eval_examples), task.note
    if size(kept) < size(task.eval):
        note += f"; evaluates on {count(size(kept))} of these, evenly spaced"
    task = task._replace(eval=kept, note=f"{name}: {note}")
    if config.get("group_by_length"):
        task = task._replace(lengths=kinds.lengths(task.kind, task.train))
        share = task.lengths.mean() / kinds.columns(task.kind, task.train)
        task = task._replace(note=f"{task.note}; rows are {share:.0%} full, grouped by length")
    return task


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The kind of rows of the task that `config` names, which is not built."""
    name = _known(config)
    if name in ARRAYS:
        return kinds.ARRAYS
    return kinds.LABELLED if name == "glue" else kinds.TEXTS


def batch_shapes(
    config: Mapping[str, Any], lead: tuple[int, ...], seq_len: int, base: Base
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of batches of the task's train rows, `lead` being the axes in front of a row's; rows
    of tokens at their widest. Nothing is read or built."""
    kind, n = kind_of(config), outputs(config)
    if kind.reads == "tokens":
        label = np.float32 if n == 1 else np.int32
        return kinds.token_shapes(kind, lead, seq_len, bool(config.get("packing")), label)
    values = config["name"] == "planted"  # and not pixels and classes
    inputs = jax.ShapeDtypeStruct(base.input_shape, np.float32 if values else np.uint8)
    label = (base.traits.outputs,) if values else ()
    label = jax.ShapeDtypeStruct(label, np.float32 if values else np.int32)
    return kinds.array_shapes(lead, inputs, label)


def outputs(config: Mapping[str, Any]) -> int:
    """Outputs of the head that an encoder is given for the task; 0 where a base is taken as it is:
    for a task that needs a language model, and for array tasks."""
    return glue.outputs(config["subset"]) if config["name"] == "glue" else 0


def check_base(config: Mapping[str, Any], base: Base, seq_len: int) -> None:
    """Raises ValueError where a base is not of the kind that the task `config` names needs."""
    name, kind, what = config["name"], kind_of(config), f"base: {base.name} ({base.family})"
    if kind.reads == "arrays" and base.input_shape is None:
        raise ValueError(
            f"{what} reads tokens, and task {name!r} has arrays: it needs a base like "
            "random:mnist-fc, random:mnist-lenet or random:mlp-64-32-10"
        )
    if kind.reads == "arrays":
        return
    if base.input_shape is not None:
        raise ValueError(f"{what} reads images, and task {name!r} has texts: it needs another base")
    if kind.causal and not base.causal:
        raise ValueError(f"{what} is no causal model: {name}")
    most = base.positions or seq_len
    if seq_len > most:
        raise ValueError(f"train.seq_len: {seq_len} given, {base.name} has {most} positions")


def _known(config: Mapping[str, Any]) -> str:
    """The name of the task. Raises ValueError for one that there is not."""
    name, names = config["name"], [*TASKS, *ARRAYS]
    if name not in names:
        hint = nearest(str(name), names)
        raise ValueError(f"task.name: {name!r} is no task; there is {', '.join(names)}{hint}")
    return name


def size(rows: Rows) -> int:
    """How many rows there are."""
    return len(next(iter(rows.values())))


def spread(rows: Rows, n: int | None) -> Rows:
    """At most n rows, evenly spaced from the first on: the same rows whatever the seed."""
    index = _spaced(size(rows), n)
    return {key: value[index] for key, value in rows.items()}


def prompts(task: Task, n: int) -> tuple[Prompt, ...]:
    """At most n of a task's prompts, evenly spaced as `spread` spaces rows: E2E's are sorted by
    restaurant, and the first 64 of its 630 are about 5 of its 18."""
    return tuple(task.prompts[i] for i in _spaced(len(task.prompts), n))


def _spaced(total: int, n: int | None) -> np.ndarray:
    n = total if n is None else min(n, total)
    return np.arange(n) * total // max(n, 1)


def train_size(settings: Mapping[str, Any], task: Task) -> int:
    """How many train rows, from the first on, a member with `settings` as its config.task visits.

    A task may hold more: the members of a sweep over n_train share it. Rows that are packed hold
    the examples that n_train counts already. Raises ValueError where the task has fewer.
    """
    total = size(task.train)
    return total if settings["packing"] else check_n_train(settings["n_train"], total)


def train_examples(settings: Mapping[str, Any], task: Task) -> int:
    """How many examples are in the rows of `train_size`: as many, but for rows that are packed."""
    if "segments" in task.train and settings["packing"]:
        return int(task.train["segments"].max(axis=1).sum())
    return train_size(settings, task)


def widths(task: Task) -> tuple[int | None, ...]:
    """Columns that a batch of train rows may be cut to, ascending: all of them, and where rows are
    grouped by length about three, two and one quarter, as far as any row is so short. A program is
    compiled for each. (None,) for an array task."""
    kind, whole = task.kind, kinds.columns(task.kind, task.train)
    if task.lengths is None:
        return (whole,)
    cut = lambda part: kinds.eights((whole - kind.ahead) * part / QUARTERS) + kind.ahead
    quarters = {cut(part) for part in range(1, QUARTERS)}
    shortest = task.lengths.min()
    return (*sorted(width for width in quarters if shortest <= width < whole), whole)
