"""`Task`, and how texts become its rows of tokens: padded or packed, with a loss mask."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from lorax.diffusion import Schedule
from lorax.tasks.kinds import TEXTS, Kind
from lorax.vocabulary import Vocabulary

Rows = dict[str, np.ndarray]  # see `Task`
Pairs = Sequence[tuple[str, str]]  # (prompt, completion)

END = None  # in place of a piece's text: the end token
Example = Sequence[tuple[str | None, bool]]  # pieces in order: (text, whether it is a target)


class Prompt(NamedTuple):
    """A text to complete, and its correct completions."""

    text: str
    references: tuple[str, ...]


class Pictures(NamedTuple):
    """Images that a diffusion model is asked for.

    asked: classes or captions of which it makes images. conditions: what the model reads for each
    of these, (len(asked), ...). none: the condition "none", for guidance; None: there is none.
    schedule: of the noise that they are made of. score(images (N, height, width, channels) uint8,
    asked (N,)) -> {metric: float}.
    """

    asked: tuple[int, ...] | tuple[str, ...]
    conditions: np.ndarray
    none: np.ndarray | None
    schedule: Schedule
    score: Callable


class Task(NamedTuple):
    """What to train and evaluate on. A language model reads `tokens[:, :-1]` and predicts
    `tokens[:, 1:]`, weighted by `mask[:, 1:]`. A model of arrays reads `inputs`, predicts `label`.

    train, eval, test: the rows to train on, to choose by (validation) and to report (None if no
        test rows are asked for): {"tokens": (N, seq_len + 1) int32, "mask": (N, seq_len + 1)
        float32}; the mask is 1 where a token is a target (a completion and its end token), 0 on
        prompts, on padding, on column 0 and on the first token of an example. Packed train rows
        have "segments" too: (N, seq_len + 1) int32, the examples of a row counted from 1, 0 on
        padding; a token sees its own segment alone, and its position counts from the segment's
        start. Rows of a text classifier are `sentences.encode`'s.
        Rows of an array task: {"inputs": (N, ...) uint8, pixels that the device scales to [0, 1],
        or float32 as they are; "label": (N,) int32, a class, or (N, k) float32, values; "weight":
        (N,) float32, ones, so that zero rows that fill up a batch have no weight}. Rows of images
        to be denoised: {"inputs": (N, height, width, channels) uint8, scaled to [-1, 1], or
        float32; "condition": (N, ...); "weight"; "t": (N,) int32 and "draw": (N,) uint32, timestep
        and number of the noise, which training draws anew}.
    note: one line for the terminal: counts, and what was dropped and why.
    prompts: to complete and score; () if the task generates no texts.
    outputs: number of outputs per row that are scored; 0 for texts.
    scores: (outputs (N, k) float, labels (N,)) -> {metric: float}, the scores of outputs.
    lengths: (N,) int64, the columns that each train row needs, if batches are grouped by length.
    text_scores: (texts (N,), references (N,)) -> {metric: float}, the scores of completions; None:
        `metrics.text_scores`.
    per_parameter: names of scores that are also reported per trainable parameter of a member.
    own_score: the user's score of outputs or of completions (`eval.score`), measured beside the
        task's.
    facts: {name: value}, the true properties of a planted task; written to the members' lines.
    kind: of the rows.
    pictures: what members make images of after training (`eval.samples`), and their score.
    memorised: whether the rows to evaluate are the train rows: then all of them are trained on.
    """

    name: str
    train: Rows
    eval: Rows
    note: str
    prompts: tuple[Prompt, ...] = ()
    outputs: int = 0
    scores: Callable | None = None
    lengths: np.ndarray | None = None
    facts: Mapping[str, Any] = MappingProxyType({})
    kind: Kind = TEXTS
    text_scores: Callable | None = None
    own_score: Callable | None = None
    test: Rows | None = None
    per_parameter: tuple[str, ...] = ()
    pictures: Pictures | None = None
    memorised: bool = False

    @property
    def evaluated(self) -> dict[str, Rows]:
        """{"eval": validation rows, "test": test rows}; without "test" if it has none."""
        return {"eval": self.eval} | ({} if self.test is None else {"test": self.test})


def count(n: int) -> str:
    """A number for a message: 12345 -> "12,345"."""
    return f"{n:,}"


def linearise(slots: Iterable[tuple[str, str]]) -> str:
    """(("name", "The Vaults"), ("food", "Thai")) -> "name = The Vaults ; food = Thai =>"."""
    return " ; ".join(f"{slot} = {value}" for slot, value in slots) + " =>"


def pair(prompt: str, completion: str) -> Example:
    """Prompt, completion and end token, with a space between the first two if they have none."""
    parted = prompt[-1:].isspace() or completion[:1].isspace()
    return (prompt, False), (completion if parted else " " + completion, True), (END, True)


def group(pairs: Iterable[tuple[str, str]]) -> tuple[Prompt, ...]:
    """The distinct prompts, in order, each with all its completions."""
    references: dict[str, list[str]] = {}
    for prompt, completion in pairs:
        references.setdefault(prompt, []).append(completion)
    return tuple(Prompt(prompt, tuple(texts)) for prompt, texts in references.items())


# -------------------------------------------------------------------------------------- settings


def check_path(config: Mapping[str, Any], expected: str) -> Path:
    """`task.path` of a task that reads a file. Raises ValueError, FileNotFoundError."""
    if not config.get("path"):
        raise ValueError(f"task.path: task {config['name']!r} needs {expected}; none was given")
    path = Path(config["path"]).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"task.path: {str(path)!r} does not exist; expected {expected}")
    return path


def check_n_train(n: int | None, available: int, fitting: str = "") -> int:
    """`task.n_train`, or all examples. Raises ValueError if there are too few.

    available: number of usable train examples. fitting: what makes them usable, for the message.
    """
    if n is None:
        return available
    if not 1 <= n <= available:
        raise ValueError(
            f"task.n_train: {n} was given; the train set has {count(available)} examples{fitting}, "
            f"so it must be 1 to {available} (None: all)"
        )
    return n


# ------------------------------------------------------------------------------------------ rows


def encode_texts(
    texts: Iterable[str], vocabulary: Vocabulary, inside: bool = False
) -> dict[str, list[int]]:
    """{text: ids}, nothing added. inside: for texts that follow others in a row.

    SentencePiece treats every text as the start of one and puts a space in front. A text inside a
    row is therefore tokenised after a line break, whose tokens are then removed: the concatenated
    ids decode to the concatenated texts.
    """
    texts = list(dict.fromkeys(texts))  # a prompt comes several times in most data
    lead = "\n" if inside and _adds_space(vocabulary) else ""
    encodings = vocabulary.tokenizer.encode_batch_fast(
        [lead + text for text in texts], add_special_tokens=False
    )
    cut = vocabulary.encode(lead) if lead else []
    for text, encoding in zip(texts, encodings, strict=True):
        if encoding.ids[: len(cut)] != cut:
            raise ValueError(
                f"tokenizer: it puts a space in front of every text and joins a line break to "
                f"what follows, so that {text!r} can't be tokenised as a part of a longer text"
            )
    return {
        text: vocabulary.check(e.ids[len(cut) :]) for text, e in zip(texts, encodings, strict=True)
    }


def _adds_space(vocabulary: Vocabulary) -> bool:
    """Whether texts tokenised separately don't decode to the concatenated texts."""
    first = vocabulary.encode("a")
    return any(
        vocabulary.decode(first + vocabulary.encode(text)) != vocabulary.decode(first) + text
        for text in ("a", " a", "\n")
    )


def first_fit(lengths: Sequence[int], width: int) -> np.ndarray:
    """Row of each example, (N,) int64, so that no row holds more than `width` tokens.

    First-fit decreasing: longest first, ties in order, each into the first row with room; needs at
    most 11/9 times the minimum number of rows, plus 6/9 (Dosa, ESCAPE 2007).
    """
    lengths = np.asarray(lengths)
    room = np.full(len(lengths), width)
    row_of = np.zeros(len(lengths), np.int64)
    used = 0
    for i in np.argsort(-lengths, kind="stable"):
        row = int(np.argmax(room[: used + 1] >= lengths[i]))
        room[row] -= lengths[i]
        row_of[i] = row
        used = max(used, row + 1)
    return row_of


class Fitting(NamedTuple):
    """The examples that fit into rows, (ids, whether each is a target) each; how many were looked
    at, how many of them were cut, and the width of a row."""

    examples: list[tuple[list[int], list[bool]]]
    seen: int
    cut: int
    width: int

    @property
    def left_out(self) -> str:
        """What happened to the others, for a note; "" if there are none."""
        dropped = self.seen - len(self.examples)
        parts = [f"{count(dropped)} of {count(self.seen)} dropped"] * bool(dropped)
        parts += [f"{count(self.cut)} of {count(self.seen)} cut"] * bool(self.cut)
        return f" ({', '.join(parts)}, longer than {self.width} tokens)" if parts else ""


def encode(
    examples: Iterable[Example],
    vocabulary: Vocabulary,
    seq_len: int,
    what: str,
    packing: bool = False,
    n: int | None = None,
    truncate: bool = False,
    loss_on: str = "completions",
) -> tuple[Rows, str]:
    """Rows of start + pieces, filled up with `vocabulary.pad`, and a note of what was dropped.

    Pieces are tokenised separately, as when a model completes a prompt. packing: as many examples
    per row as fit, otherwise one. n: use the first n examples that fit and read no further; None:
    all. what: "train" or "eval", for messages. truncate: examples of more than seq_len + 1 tokens
    are cut to that, unless no target is left; otherwise they are dropped. loss_on: as
    `task.loss_on`. Raises ValueError if none fits, or fewer than n.
    """
    fitted = _fitting(examples, vocabulary, seq_len, what, n, truncate)
    fitting, width = fitted.examples, fitted.width
    lengths = [len(ids) for ids, _ in fitting]
    row_of = first_fit(lengths, width) if packing else np.arange(len(fitting))
    shape = (int(row_of.max()) + 1, width)
    tokens = np.full(shape, vocabulary.pad, np.int32)
    mask, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    filled = np.zeros(len(tokens), np.int64)
    for row, (ids, targets) in zip(row_of, fitting, strict=True):
        at = slice(filled[row], filled[row] + len(ids))
        tokens[row, at], mask[row, at] = ids, targets if loss_on == "completions" else 1.0
        mask[row, at.start] = 0.0  # nothing before it to predict it from
        segments[row, at] = segments[row, at.start - 1] + 1 if at.start else 1
        filled[row] = at.stop

    note = f"{count(len(fitting))} {what} examples"
    if packing:
        note += f" packed into {count(len(tokens))} rows"
    note += fitted.left_out
    rows = {"tokens": tokens, "mask": mask} | ({"segments": segments} if packing else {})
    return rows, note


def _fitting(examples, vocabulary, seq_len: int, what: str, n, truncate: bool) -> Fitting:
    """The first n examples that fit; arguments as for `encode`."""
    width, fitting, lengths, cut, examples = seq_len + 1, [], [], 0, iter(examples)
    while part := list(itertools.islice(examples, None if n is None else n - len(fitting))):
        for ids, targets in _tokens(part, vocabulary):
            lengths.append(len(ids) - 1)
            if truncate and len(ids) > width and any(targets[1:width]):
                ids, targets, cut = ids[:width], targets[:width], cut + 1
            if len(ids) <= width:
                fitting.append((ids, targets))
    if not fitting:
        raise ValueError(
            f"train.seq_len: none of the {count(len(lengths))} {what} examples fits {seq_len}; "
            f"the shortest needs {min(lengths)}, all of them {max(lengths)}"
        )
    dropped = len(lengths) - len(fitting)
    check_n_train(n, len(fitting), f" of at most {width} tokens" * (dropped > 0))
    return Fitting(fitting, len(lengths), cut, width)


def _tokens(
    examples: Sequence[Example], vocabulary: Vocabulary
) -> Iterator[tuple[list[int], list[bool]]]:
    """(ids, whether each is a target) of every example, the start in front."""
    firsts = encode_texts((example[0][0] for example in examples), vocabulary)
    others = (text for example in examples for text, _ in example[1:] if text is not END)
    others = encode_texts(others, vocabulary, inside=True)
    for example in examples:
        ids, targets = list(vocabulary.start), [False] * len(vocabulary.start)
        for i, (text, target) in enumerate(example):
            piece = [vocabulary.end] if text is END else others[text] if i else firsts[text]
            ids += piece
            targets += [target] * len(piece)
        yield ids, targets


def pack(
    texts: Iterable[str], vocabulary: Vocabulary, seq_len: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens, mask), each (N, seq_len + 1), of concatenated texts, and the total of tokens.

    Each row begins with the last token of the previous row, so that every token except the very
    first is predicted once; tokens left over at the end are dropped. The end token separates the
    texts, each of which begins with the vocabulary's start, which is not a target.
    """
    texts = list(texts)
    encoded = encode_texts(texts, vocabulary)
    ids, targets = [], []
    for i, text in enumerate(texts):
        for piece, target in (
            ([vocabulary.end] * (i > 0), 1.0),
            (vocabulary.start, 0.0),
            (encoded[text], 1.0),
        ):
            ids += piece
            targets += [target] * len(piece)
    rows = max(len(ids) - 1, 0) // seq_len
    at = np.arange(rows)[:, None] * seq_len + np.arange(seq_len + 1)[None, :]
    tokens, mask = np.array(ids, np.int32)[at], np.array(targets, np.float32)[at]
    mask[:, 0] = 0.0
    return tokens, mask, len(ids)


def encode_sets(
    config: Mapping[str, Any],
    vocabulary: Vocabulary,
    seq_len: int,
    train: Iterable[Example],
    evaluation: Iterable[Example],
    test: Iterable[Example] | None,
    prompts: tuple[Prompt, ...],
) -> Task:
    """The task of a train set, which `task.packing` packs, and validation and test sets, which are
    never packed. test: None for no test rows.

    Trains on the first `task.n_train` examples that fit. Raises ValueError if fewer do.
    """
    packing, n = bool(config.get("packing")), config.get("n_train")
    truncate, loss_on = bool(config.get("truncate")), config.get("loss_on", "completions")
    given = packing, n, truncate, loss_on
    train_rows, note = encode(train, vocabulary, seq_len, "train", *given)
    sets = {"eval": evaluation} | ({} if test is None else {"test": test})
    encoded = {}
    for name, part in sets.items():
        encoded[name], words = encode(part, vocabulary, seq_len, name, truncate=truncate)
        note += f", {words}"
    return Task(config["name"], train_rows, note=note, prompts=prompts, **encoded)
