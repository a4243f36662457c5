"""lorax's tasks and users' tasks: their properties before they are built, and building them.

A task is a function that returns `lorax.tasks.data.Data`. lorax's own are in `TASKS`; a user's is
named FILE.py:function in `config.task.name`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lorax import config as configs
from lorax import outside
from lorax.errors import nearest
from lorax.models import Base
from lorax.tasks import (
    e2e,
    glue,
    instruct,
    kinds,
    noisy_images,
    planted,
    random_strings,
    restaurants,
    samsum,
    text,
    vision,
    wikisql,
)
from lorax.tasks.data import PAIRS_USE, Data, DataError, shapes_of_texts
from lorax.tasks.kinds import Kind
from lorax.tasks.rows import Task, count
from lorax.tasks.subsets import drawn, size, spread
from lorax.vocabulary import Vocabulary


class Row(NamedTuple):
    """What is known about a task before its data is read; see `Data` for the other fields.

    load: returns `Data`; takes any of config (`config.task`), vocabulary and base.
    keys: the keys of `config.task` that it reads, among those that only some tasks use.
    """

    load: Callable[..., Data]
    kind: Kind
    shapes: Callable[..., dict[str, jax.ShapeDtypeStruct]]
    keys: tuple[str, ...] = ()
    outputs: Callable[[Mapping[str, Any]], int] = lambda config: 0


_PAIRS = kinds.TEXTS, shapes_of_texts, PAIRS_USE
_RECORDS = ("template", "split", "columns", "subset")
_PLANTED = ("rank", "spectrum", "strength", "noise", "inputs", "examples")

TASKS = {
    "restaurants": Row(restaurants.load, *_PAIRS),
    "e2e": Row(e2e.load, *_PAIRS),
    "wikisql": Row(wikisql.load, *_PAIRS),
    "samsum": Row(samsum.load, *_PAIRS),
    "instruct": Row(instruct.load, *_PAIRS[:2], (*_PAIRS[2], *_RECORDS)),
    "random_strings": Row(
        random_strings.load, kinds.STRINGS, shapes_of_texts, ("alphabet", "examples")
    ),
    "text": Row(text.load, kinds.TEXTS, shapes_of_texts),
    "glue": Row(
        glue.load,
        kinds.LABELLED,
        glue.shapes,
        ("group_by_length", "subset"),
        lambda config: glue.outputs(config["subset"]),
    ),
    "mnist": Row(vision.mnist, kinds.ARRAYS, vision.shapes, ("shuffle",)),
    "digits": Row(vision.digits, kinds.ARRAYS, vision.shapes, ("shuffle",)),
    "planted": Row(planted.load, kinds.ARRAYS, planted.shapes, _PLANTED),
    "diffusion": Row(noisy_images.load, kinds.NOISY, noisy_images.shapes, noisy_images.KEYS),
}
#: {key of `config.task`: tasks that use it}, for keys that not every task uses.
ONLY = {
    key: tuple(name for name, row in TASKS.items() if key in row.keys)
    for key in dict.fromkeys(key for row in TASKS.values() for key in row.keys)
}
_DEFAULTS = configs.default().task


def row(config: Mapping[str, Any]) -> Row:
    """The row of the task that `config` (`config.task`) names. Calls a user's function.

    Raises ValueError for an unknown name, and as `ask` does.
    """
    name = config["name"]
    if outside.is_name(name):
        data = ask(config)
        keys = (*data.uses, *outside.takes(outside.resolve(name, "task.name")))
        return Row(lambda: data, data.kind, data.shapes, keys, lambda config: data.outputs)
    if not isinstance(name, str) or name not in TASKS:
        hint = nearest(str(name), TASKS)
        raise ValueError(
            f"task.name: {name!r} is no task; known are {', '.join(TASKS)}, or your own as "
            f"FILE.py:function{hint}"
        )
    return TASKS[name]


def ask(config: Mapping[str, Any]) -> Data:
    """The `Data` of the user's function that `config` names, called with the keys of `config.task`
    that it takes; None in the config means the function's own default. Called once for the same
    values. Raises ValueError, with file and line, if it fails or returns something else."""
    name = config["name"]
    function = outside.resolve(name, "task.name")
    parameters, arguments = inspect.signature(function).parameters, {}
    needed = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    for key in outside.takes(function):
        if key not in _DEFAULTS:
            if key in needed:
                known = ", ".join(key for key in _DEFAULTS if key != "name")
                raise ValueError(
                    f"task.name: {name} takes {key!r}, which is no key of config.task "
                    f"({known}){nearest(key, _DEFAULTS)}; give it a default"
                )
            continue
        value = config.get(key, _DEFAULTS[key])
        if value is None and key == "path" and key in needed:
            raise ValueError(f"task.path: {name} reads one; none was given")
        if value is not None or key in needed:
            arguments[key] = tuple(value) if isinstance(value, list) else value
    return _ask(function, name, tuple(arguments.items()))


@functools.lru_cache(maxsize=4)
def _ask(function: Callable, name: str, arguments: tuple[tuple[str, Any], ...]) -> Data:
    data = outside.call(function, **dict(arguments), field="task.name")
    if not isinstance(data, Data):
        raise ValueError(
            f"task.name: {name} returns {type(data).__name__}; expected what lorax.tasks.pairs, "
            "texts, labelled or arrays returns"
        )
    return data


def build(
    config: Mapping[str, Any],
    vocabulary: Vocabulary | None,
    seq_len: int,
    eval_examples: int | None = None,
    base: Base | None = None,
    draw_seed: int | None = None,
    test: int | None = 0,
) -> Task:
    """Builds the rows of the task that `config` names.

    config: `name` (a key of `TASKS`, or FILE.py:function), and optionally: `path` (the file or
        folder that the task reads), `n_train` (None: all; else the first n train examples, not
        counting those that are dropped), `seed` (int, of the data itself), `packing` (True: several
        train examples per row), `group_by_length` (True: the task has `lengths`; not with packing,
        whose rows are all full), and other keys of `config.task`.
    vocabulary: needed for a text task.
    seq_len: the most tokens that a model reads; a row of a language model has one more. Longer
        examples are dropped, or truncated for a classifier and with `truncate`. Columns that no row
        needs are left out. Not used by array tasks.
    eval_examples: validation rows to keep, evenly spaced over the set (None: all). The prompts
        don't change.
    base: the base that an array task's rows must fit; not needed for a text task.
    draw_seed: `seeds.data`, which draws the n_train train rows at random among all instead of
        taking the first; the evaluation rows don't change.
    test: `eval.test`, the test rows to keep, evenly spaced as well (None: all; 0: the task has no
        test rows, and the whole evaluation set is for validation).

    Raises ValueError, or FileNotFoundError, naming the config field or the file and line at fault.
    """
    n_train = config.get("n_train")
    if draw_seed is not None:
        config = {**config, "n_train": None}  # `drawn` takes them, from all that there are
    name, known = config["name"], row(config)
    at_least_one = {"train.seq_len": seq_len, "eval.examples": eval_examples}
    at_least_one["task.n_train"] = n_train
    for field, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"{field}: {value} was given; it must be at least 1")
    _check_keys(config, known)
    if config.get("group_by_length") and config.get("packing"):
        raise ValueError(
            "task.group_by_length: True was given with task.packing, whose rows are all full; it "
            "must be False there"
        )
    available = {"config": config, "vocabulary": vocabulary, "base": base}
    data = known.load(**{key: available[key] for key in outside.takes(known.load)})
    try:
        task = data.build(config, vocabulary, seq_len, base, apart=test != 0)
    except DataError as error:
        raise ValueError(f"task.name: {name}: {error}") from error
    task = _kept(task, eval_examples, test)
    task = task._replace(note=f"{name}: {task.note}")
    if draw_seed is not None:
        task = drawn(task, n_train, draw_seed)
    if config.get("group_by_length"):
        task = task._replace(lengths=kinds.lengths(task.kind, task.train))
        share = task.lengths.mean() / kinds.columns(task.kind, task.train)
        task = task._replace(note=f"{task.note}; rows are {share:.0%} full, grouped by length")
    return task


def _kept(task: Task, eval_examples: int | None, test: int | None) -> Task:
    """The task with its rows trimmed, and with as many for evaluation as are asked for.
    Validation and test rows have the same number of columns: one program evaluates both."""
    if task.memorised:
        return task
    (train,) = kinds.trim(task.kind, task.train)
    asked = {"eval": (eval_examples, "evaluates on"), "test": (test, "tests on")}
    note, kept = task.note, {}
    for split, rows in task.evaluated.items():
        n, what = asked[split]
        kept[split] = spread(rows, n)
        if size(kept[split]) < size(rows):
            note += f"; {what} {count(size(kept[split]))} of these, evenly spaced"
    kept = dict(zip(kept, kinds.trim(task.kind, *kept.values()), strict=True))
    return task._replace(train=train, note=note, **kept)


def _check_keys(config: Mapping[str, Any], known: Row) -> None:
    """Raises ValueError if a key of `config.task` is set that the task does not read."""
    name, is_users = config["name"], outside.is_name(config["name"])
    for field in _DEFAULTS if is_users else ONLY:
        value = config.get(field)
        if isinstance(value, list):  # a tuple that was stored as JSON
            value = tuple(value)
        usual = field in ("name", "n_train", *known.keys) or value in (None, _DEFAULTS[field])
        if not usual:
            keys = known.keys if is_users else ONLY[field]
            able = ("it reads " if is_users else "only ") + (", ".join(keys) or "none")
            raise ValueError(
                f"task.{field}: {value!r} was given; task {name!r} has no use for it, {able}"
            )


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The kind of rows of the task that `config` names, which is not built."""
    return row(config).kind


def measured(config: Mapping[str, Any], asked: int | None) -> int | None:
    """How many validation or test rows of the task a run measures if `asked` are asked for and
    there are as many: random strings are all measured (`Task.memorised`). None: not known before
    the task is built, which it is not."""
    return config["examples"] if kind_of(config) is kinds.STRINGS and asked != 0 else asked


def batch_shapes(
    config: Mapping[str, Any], lead: tuple[int, ...], seq_len: int, base: Base
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of batches of the task's train rows, at their widest, `lead` being the axes before
    those of a row. The task is not built."""
    return row(config).shapes(config, lead, seq_len, base)


def outputs(config: Mapping[str, Any]) -> int:
    """Outputs of the head that an encoder is given for the task; 0 if the base needs no such head:
    for language-model tasks and array tasks."""
    return row(config).outputs(config)


def check_base(config: Mapping[str, Any], base: Base, seq_len: int) -> None:
    """Raises ValueError if a base is of the wrong kind for the task that `config` names."""
    name, kind, named = config["name"], row(config).kind, f"base: {base.name} ({base.family})"
    if kind.reads == "noisy arrays":
        noisy_images.check_base(base)
        return
    if base.traits.condition is not None:
        raise ValueError(f"{named} is a diffusion model: its task is 'diffusion', not {name!r}")
    if kind.reads == "arrays" and base.input_shape is None:
        raise ValueError(
            f"{named} reads tokens, but task {name!r} has arrays: it needs a base like "
            "random:mnist-fc, random:mnist-lenet or random:mlp-64-32-10"
        )
    if kind.reads == "arrays":
        return
    if base.input_shape is not None:
        raise ValueError(f"{named} reads images, but task {name!r} has texts: choose another base")
    if kind.causal and not base.causal:
        raise ValueError(f"{named} is no causal model: {name}")
    if config.get("packing") and not base.traits.packs:
        raise ValueError(
            f"task.packing: True given, but {named[6:]} takes no argument `segments`, which keeps "
            "the texts of a row apart"
        )
    most = base.positions or seq_len
    if seq_len > most:
        raise ValueError(f"train.seq_len: {seq_len} given, {base.name} has {most} positions")
