"""What a task function returns: texts, pairs, labelled texts or arrays, with the task's metric.

    pairs     prompts and completions; the loss is on the completions
    texts     plain texts, packed into full rows
    labelled  texts, or pairs of texts, each with a class or a value
    arrays    arrays, each with a class or with values

All of them take `train` and `eval`, which may be generators, optionally `test`, and `metric`, a
function of (outputs, labels) or, for pairs and texts, of (generated texts, references). It returns
a number, which is named after the function, or {name: number}. Without `test`, test rows are cut
from `eval` (`lorax.tasks.splits`). Rows are made later, once tokenizer and base are known.
"""

import inspect
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax import outside
from lorax.errors import reason
from lorax.tasks import kinds, metrics, rows, scores, sentences, splits
from lorax.tasks.kinds import Kind
from lorax.tasks.rows import Example, Task, check_n_train, count

Pair = tuple[str, str]
#: The settings of `config.task` that apply to prompts and completions.
PAIRS_USE = ("packing", "group_by_length", "truncate", "loss_on")


class DataError(ValueError):
    """The data of a task function is invalid; the message says where."""


class Data(NamedTuple):
    """The data of a task, before the tokenizer and the base are known.

    kind: of its rows. build(config, vocabulary, seq_len, base, apart=False) -> Task, config being
    `config.task`, apart: whether the task has test rows (`eval.test` is not 0).
    shapes(config, lead, seq_len, base) -> shapes of batches of its train rows, `lead` being the
    axes before those of a row. uses: the settings among `PAIRS_USE` that apply.
    outputs: number of outputs of the encoder's head for this task, 0 for none.
    """

    kind: Kind
    build: Callable[..., Task]
    shapes: Callable[..., dict[str, jax.ShapeDtypeStruct]]
    uses: tuple[str, ...] = ()
    outputs: int = 0


# -------------------------------------------------------------------------------------------- texts


def pairs(
    train: Iterable[Pair],
    eval: Iterable[Pair],
    prompts: Iterable[Pair] | None = None,
    metric: Callable | None = None,
    note: str = "",
    test: Iterable[Pair] | None = None,
) -> Data:
    """Prompts and completions, (prompt, completion) each, for a causal language model.

    The loss is on the completions and their end tokens (`task.loss_on`). Pairs of more than
    `train.seq_len` tokens are dropped (`task.truncate`); `task.n_train` counts the others. prompts:
    what `eval.generate` completes, each with its reference; a prompt given several times has
    several references; None: those of the test rows, or of `eval` without any. metric(texts,
    references): texts (N,) str as generated, references (N,) tuples of str; None: BLEU, NIST, ROUGE
    and METEOR. note: added to the line that the task prints. test: as `eval`; None: half of the
    prompts of `eval`, with their completions.
    """
    train, eval = _pairs(train, "train"), _pairs(eval, "eval")
    test = None if test is None else _pairs(test, "test")
    prompts = None if prompts is None else _pairs(prompts, "prompts")

    def build(config, vocabulary, seq_len, base, apart=False):
        validation, tested = eval, None
        if apart:
            prompt = lambda pair: pair[0]
            validation, tested = splits.parted(eval, test, prompt, splits.seed_of(config))
        asked = next(part for part in (prompts, tested, eval) if part is not None)
        sets = (part and map(lambda x: rows.pair(*x), part) for part in (train, validation, tested))
        task = rows.encode_sets(config, vocabulary, seq_len, *sets, rows.group(asked))
        return _scored_texts(task._replace(note=task.note + note), metric)

    return Data(kinds.TEXTS, build, shapes_of_texts, PAIRS_USE)


def examples(
    train: Iterable[Example],
    eval: Iterable[Example],
    question: Callable[[Example], Pair],
    metric: Callable | None = None,
    note: str = "",
    test: Sequence[Example] | None = None,
) -> Data:
    """Like `pairs`, with more than two pieces: conversations. An example is a sequence of (text,
    whether it is a target), with `rows.END` for the end token. question(example) -> (prompt, its
    reference), for `eval.generate`. Examples with the same text before their first target belong
    together."""

    def build(config, vocabulary, seq_len, base, apart=False):
        validation, tested = eval, None
        if apart:
            opening = splits.opening
            validation, tested = splits.parted(eval, test, opening, splits.seed_of(config))
        prompts = rows.group(map(question, eval if tested is None else tested))
        sets = train, validation, tested
        task = rows.encode_sets(config, vocabulary, seq_len, *sets, prompts)
        return _scored_texts(task._replace(note=task.note + note), metric)

    return Data(kinds.TEXTS, build, shapes_of_texts, PAIRS_USE)


def texts(
    train: Iterable[str],
    eval: Iterable[str],
    prompts: Iterable[Pair] = (),
    metric: Callable | None = None,
    note: str = "",
    test: Iterable[str] | None = None,
) -> Data:
    """Plain texts for a causal language model, packed into rows of `train.seq_len` + 1 tokens.

    Each row begins with the last token of the previous row, so that every token is predicted once;
    an end token separates two texts, and tokens left over at the end are dropped. `task.n_train`
    counts rows. prompts, metric: as for `pairs`. test: as `eval`; None: the second half of the rows
    of `eval`.
    """
    sets = {name: _checked(part, name, _text) for name, part in _given(train, eval, test).items()}
    prompts = _pairs(prompts, "prompts")
    if metric is not None and not rows.group(prompts):
        raise DataError("metric: given without prompts; it scores the texts that complete them")

    def build(config, vocabulary, seq_len, base, apart=False):
        packed, words = {}, []
        for name in sets if apart else ("train", "eval"):
            tokens, mask, total = rows.pack(sets[name], vocabulary, seq_len)
            if not len(tokens):
                raise DataError(
                    f"{name}: {count(total)} tokens were given; a row of {seq_len} needs "
                    f"{count(seq_len + 1)}"
                )
            n = check_n_train(config.get("n_train"), len(tokens)) if name == "train" else None
            packed[name] = {"tokens": tokens[:n], "mask": mask[:n]}
            words.append(f"{count(len(tokens[:n]))} {name} rows of {count(total)} tokens")
        if apart and "test" not in packed:
            packed["eval"], packed["test"] = splits.halves(packed["eval"])
            words.append("of which the second half is for test")
        task = Task(config["name"], note=", ".join(words) + note, **packed)
        return _scored_texts(task._replace(prompts=rows.group(prompts)), metric)

    return Data(kinds.TEXTS, build, shapes_of_texts)


def shapes_of_texts(config, lead, seq_len, base) -> dict[str, jax.ShapeDtypeStruct]:
    """`Data.shapes` of texts of a language model."""
    return kinds.token_shapes(kinds.TEXTS, lead, seq_len, bool(config.get("packing")))


def _scored_texts(task: Task, metric: Callable | None) -> Task:
    """The task with its metric for texts, after a trial on the references and on the prompts."""
    if metric is None:
        return task
    tried = scores.tried(metric, scores.trials(task))
    return task._replace(text_scores=tried, note=f"{task.note}; {_names(tried)} of eval.generate")


def labelled(
    train: Iterable[tuple],
    eval: Iterable[tuple],
    classes: int | Sequence[str] | None = None,
    metric: Callable | None = None,
    note: str = "",
    test: Iterable[tuple] | None = None,
) -> Data:
    """Texts with a label for an encoder: (text, label) or ((text, text), label) each.

    A label is a class, an int from 0 on or one of the words in `classes`, or a value, a float.
    Examples longer than `train.seq_len` tokens are truncated. classes: their number or names; None:
    inferred from the largest label. metric(outputs, labels): outputs (N, classes) float, or (N, 1)
    of values; labels (N,); None: the accuracy of classes, the Pearson correlation of values. test:
    as `eval`; None: half of `eval`. Items with the same first text belong together.
    """
    names = () if classes is None or isinstance(classes, int) else tuple(classes)
    given = _given(train, eval, test)
    sets = {name: _labelled(part, name, names) for name, part in given.items()}
    every = [label for _, labels in sets.values() for label in labels]
    values = any(isinstance(label, float) for label in every)
    dtype = np.float32 if values else np.int32
    known = len(names) or classes or (1 if values else max(2, max(every) + 1))
    outputs = 1 if values else known
    if not values and not 0 <= min(every) <= max(every) < outputs:
        raise DataError(
            f"labels: {min(every)} to {max(every)} were given; expected classes 0 to {outputs - 1}"
        )
    metric = metric or (pearson if values else accuracy)

    def build(config, vocabulary, seq_len, base, apart=False):
        n = check_n_train(config.get("n_train"), len(sets["train"][0]))
        encoded, words = {}, []
        for name, (texts, labels) in _apart(sets, apart, config, splits.first_text).items():
            m = n if name == "train" else None
            encoded[name], cut = sentences.encode(
                texts[:m], np.array(labels[:m], dtype), vocabulary, seq_len
            )
            words.append(f"{count(len(texts[:m]))} {name} examples")
            words[-1] += f" ({count(cut)} cut at {seq_len} tokens)" * bool(cut)
        task = Task(config["name"], note=", ".join(words) + note, kind=kinds.LABELLED, **encoded)
        return _scored_outputs(task, metric, outputs)

    def shapes(config, lead, seq_len, base):
        return kinds.token_shapes(kinds.LABELLED, lead, seq_len, label=dtype)

    return Data(kinds.LABELLED, build, shapes, ("group_by_length",), outputs)


# ------------------------------------------------------------------------------------------- arrays


def arrays(
    train: tuple,
    eval: tuple,
    classes: int | None = None,
    metric: Callable | None = None,
    note: str = "",
    what: str = "arrays",
    test: tuple | None = None,
) -> Data:
    """Arrays (x, y) for a base that reads arrays.

    x: (N, ...) uint8, scaled to [0, 1] on the device, or float, as they are; a row must have the
    shape that the base reads, or as many values where it reads a flat row. y: (N,) integers,
    classes from 0 on, or float (N,) or (N, k), values. classes: their number; None: the number of
    outputs of the base. metric(outputs, labels): outputs (N, k) float, labels as in y, values (N,
    k); None: the accuracy of classes, nothing for values. what: a word for the arrays in messages.
    test: as `eval`; None: half of `eval`. Equal rows of x belong together.
    """
    sets = {name: _arrays(part, name) for name, part in _given(train, eval, test).items()}
    x, y = sets["train"]
    for name, others in sets.items():
        for letter, first, other in zip("xy", (x, y), others, strict=True):
            if first.shape[1:] != other.shape[1:] or first.dtype != other.dtype:
                raise DataError(
                    f"{letter}: train has {first.dtype} {first.shape}, {name} {other.dtype} "
                    f"{other.shape}; all but the first axis must be the same"
                )
    values = y.dtype == np.float32
    metric = metric or (None if values else accuracy)

    def build(config, vocabulary, seq_len, base, apart=False):
        n = check_n_train(config.get("n_train"), len(x))
        shape = _row_shape(base, x.shape[1:], config["name"], what)
        _check_outputs(base, sets, None if values else classes, config["name"])
        made = {}
        for name, (inputs, label) in _apart(sets, apart, config, np.ndarray.tobytes).items():
            m = n if name == "train" else None
            made[name] = {
                "inputs": inputs[:m].reshape(-1, *shape),
                "label": label[:m],
                "weight": np.ones(len(label[:m]), np.float32),
            }
        sizes = [f"{count(len(part['label']))} {name}" for name, part in made.items()]
        line = f"{', '.join(sizes[:-1])} and {sizes[-1]} {what}{note}"
        kind = kinds.ARRAYS._replace(scored=metric is not None)
        task = Task(config["name"], note=line, kind=kind, **made)
        return _scored_outputs(task, metric, base.traits.outputs)

    def shapes(config, lead, seq_len, base):
        row = lambda array, shape: jax.ShapeDtypeStruct(shape, array.dtype)
        shape = _row_shape(base, x.shape[1:], config["name"], what)
        return kinds.array_shapes(lead, row(x, shape), row(y, y.shape[1:]))

    return Data(kinds.ARRAYS, build, shapes)


def _arrays(part, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) as uint8 or float32, and as int32 (N,) or float32 (N, k)."""
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise DataError(f"{name}: {_shown(part)} was given; expected (x, y), two arrays")
    x, y = (np.asarray(array) for array in part)
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise DataError(
            f"{name}: x is {x.dtype}; expected uint8, which is scaled to [0, 1], or float"
        )
    whole = np.issubdtype(y.dtype, np.integer)
    if not whole and not np.issubdtype(y.dtype, np.floating):
        raise DataError(f"{name}: y is {y.dtype}; expected integers (classes) or float (values)")
    if x.ndim < 2 or y.ndim not in ((1,) if whole else (1, 2)) or len(x) != len(y) or not len(x):
        right = "(N,)" if whole else "(N,) or (N, k)"
        raise DataError(
            f"{name}: x has shape {x.shape} and y {y.shape}; expected (N, ...) and {right} of one "
            "N, at least 1"
        )
    for letter, array in (("x", x), ("y", y)):
        bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
        if len(bad):
            raise DataError(
                f"{name}: {letter}[{bad[0]}] has NaN or infinity in it, as {count(len(bad))} of "
                f"{count(len(array))} rows have; expected finite numbers"
            )
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    return x, (y.astype(np.int32) if whole else y.astype(np.float32).reshape(len(y), -1))


def _row_shape(base, shape: tuple[int, ...], name: str, word: str) -> tuple[int, ...]:
    """The shape in which the base reads rows of `shape`: its own or, if it flattens rows, any shape
    of three axes. Raises ValueError if they don't fit."""
    reads, size = base.input_shape, int(np.prod(shape))
    if base.traits.flat and size == int(np.prod(reads)):
        return shape if len(shape) == 3 else reads
    if reads in (shape, (*shape, 1)):
        return reads
    expected = f"{np.prod(reads)} values" if base.traits.flat else f"{word} of {_times(reads)}"
    raise ValueError(
        f"base: {base.name} ({base.family}) reads {expected}; task {name!r} has {word} of "
        f"{_times(shape)}, {size} values"
    )


def _check_outputs(base, sets, classes: int | None, name: str) -> None:
    """Raises ValueError if the base's number of outputs doesn't match the labels."""
    outputs, (_, y) = base.traits.outputs or 0, sets["train"]
    has = f"base: {base.name} ({base.family}) has {outputs} outputs; task {name!r} has"
    if y.ndim == 2 and y.shape[1] != outputs:
        raise ValueError(f"{has} {y.shape[1]} values a row")
    if classes is not None and classes != outputs:
        raise ValueError(f"{has} {classes} classes")
    for part, (_, label) in sets.items():
        if label.ndim == 1 and not 0 <= label.min() <= label.max() < (classes or outputs):
            raise ValueError(
                f"{has} labels from {label.min()} to {label.max()} in {part}; expected classes 0 "
                f"to {(classes or outputs) - 1}"
            )


def _scored_outputs(task: Task, metric: Callable | None, outputs: int) -> Task:
    """The task with its metric for outputs, after a trial on random outputs."""
    if metric is None:
        return task._replace(outputs=outputs)
    task = task._replace(outputs=outputs)
    return task._replace(scores=scores.tried(metric, scores.trials(task)))


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose largest output is that of the right class."""
    return metrics.accuracy(outputs.argmax(axis=1), labels)


def pearson(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation of the values."""
    return metrics.pearson(outputs[:, 0], labels)


def _given(train, eval, test) -> dict[str, Any]:
    """{name of a set: what was given for it}; without "test" if that is None."""
    sets = {"train": train, "eval": eval, "test": test}
    return {name: part for name, part in sets.items() if part is not None}


def _apart(sets: dict[str, tuple], apart: bool, config, key: Callable) -> dict[str, tuple]:
    """The sets that a task has, each (inputs, labels): with test rows if `apart`, without if not.
    key: of an input; see `splits.parted`."""
    three = {"train": sets["train"], "eval": sets["eval"]}
    if apart and "test" in sets:
        three["test"] = sets["test"]
    elif apart:
        three["eval"], three["test"] = splits.labelled(*sets["eval"], key, splits.seed_of(config))
    return three


# ------------------------------------------------------------------------------- checking the input


class Replayed:
    """Makes an iterable, e.g. a generator, repeatable; `check` is called once per item.

    If the generator fails, raises DataError with its line, also on every later attempt.
    """

    def __init__(self, items: Iterable, check: Callable[[Any, int], Any]):
        self.source, self.check = items, check
        self.iterator: Iterator = iter(items)
        self.seen: list = []
        self.failed: Exception | None = None

    def __iter__(self):
        for i in itertools.count():
            if i == len(self.seen):
                if self.failed:
                    raise self.failed
                try:
                    item = next(self.iterator)
                except StopIteration:
                    return
                except Exception as error:
                    self.failed = DataError(_line(self.source, error) + reason(error))
                    raise self.failed from error
                self.seen.append(self.check(item, i))
            yield self.seen[i]


def _line(source, error: Exception) -> str:
    """ "FILE:LINE: " where a generator raised; "" for other iterables."""
    if not inspect.isgenerator(source):
        return ""
    line = outside.line_of(error, source.gi_code.co_filename)
    return f"{line}: " if line else ""


def _checked(items: Iterable, name: str, check: Callable[[Any, str], Any]) -> Replayed:
    """The items, checked lazily after the first. Raises DataError if there are none."""
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise DataError(f"{name}: {_shown(items)} was given; expected a list or a generator")
    replayed = Replayed(items, lambda item, i: check(item, f"{name}[{i}]"))
    if name != "prompts" and next(iter(replayed), None) is None:
        raise DataError(f"{name}: nothing was given; at least one item is needed")
    return replayed


def _pairs(items: Iterable[Pair], name: str) -> Replayed:
    return _checked(items, name, _pair)


def _pair(item, place: str) -> Pair:
    fine = isinstance(item, tuple | list) and len(item) == 2
    if not fine or not all(isinstance(text, str) for text in item):
        raise DataError(f"{place} is {_shown(item)}; expected (prompt, completion), two texts")
    if not all(text.strip() for text in item):
        raise DataError(f"{place} is {_shown(item)}; expected two texts that are not blank")
    return tuple(item)


def _text(item, place: str) -> str:
    if not isinstance(item, str) or not item:
        raise DataError(f"{place} is {_shown(item)}; expected a text")
    return item


def _labelled(items: Iterable, name: str, words: tuple[str, ...]) -> tuple[list, list]:
    """(texts, labels): for each item a tuple of one or two texts, and an int or float."""

    def check(item, place):
        fine = isinstance(item, tuple | list) and len(item) == 2
        raw_texts = (item[0],) if fine and isinstance(item[0], str) else item[0] if fine else ()
        texts = tuple(raw_texts) if isinstance(raw_texts, tuple | list) else ()
        if len(texts) not in (1, 2) or not all(isinstance(x, str) and x.strip() for x in texts):
            raise DataError(
                f"{place} is {_shown(item)}; expected (text, label) or ((text, text), label)"
            )
        return texts, _label(item[1], place, words)

    checked = list(_checked(items, name, check))
    texts, labels = ([item[i] for item in checked] for i in (0, 1))
    if len({len(x) for x in texts}) > 1:
        raise DataError(f"{name}: some items have one text and some have two")
    kinds_of = {type(label) for label in labels}
    return texts, [float(label) for label in labels] if float in kinds_of else labels


def _label(label, place: str, words: tuple[str, ...]) -> int | float:
    if words:
        if label not in words:
            raise DataError(f"{place}: label {label!r}; expected one of {', '.join(words)}")
        return words.index(label)
    if isinstance(label, numbers.Integral) and not isinstance(label, bool | np.bool_):
        return int(label)
    if not isinstance(label, numbers.Real) or isinstance(label, bool) or not np.isfinite(label):
        raise DataError(f"{place}: label {label!r}; expected a class (int) or a value (float)")
    return float(label)


def _names(metric: Callable) -> str:
    return ", ".join(metric.names)


def _times(shape) -> str:
    return " x ".join(map(str, shape))


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
