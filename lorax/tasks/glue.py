"""GLUE: sentences, and pairs of sentences, to classify or to score.

Wang et al. 2018 (arXiv:1804.07461). Reads the benchmark's own TSV files, which are not shipped:
one example per line, tabs between fields, quotes without special meaning.
"""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lorax.errors import nearest
from lorax.files import read_text
from lorax.tasks import kinds, metrics, sentences, splits
from lorax.tasks.data import Data
from lorax.tasks.rows import Task, check_n_train, check_path, count
from lorax.tasks.sentences import Texts


class Subset(NamedTuple):
    """One of the benchmark's tasks.

    folder: its name in the benchmark. sentences, label: the columns that hold them.
    labels: the words of the label column, class 0 first, in the order of Hugging Face's `glue`;
        () for a real number from 0 to 5.
    columns: all of them, where the files have no header.
    files: pairs of names of a train and an evaluation file; the first pair that exists is read.
    torn: the published files have lines that are broken in two or lack a sentence; these are left
        out.
    """

    folder: str
    sentences: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    columns: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = (("train.tsv", "dev.tsv"),)
    torn: bool = False


NO_YES = ("0", "1")
ENTAILED = ("entailment", "not_entailment")
NATURAL = ("entailment", "neutral", "contradiction")
PAIR = ("sentence1", "sentence2")
MRPC = (("train.tsv", "dev.tsv"), ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"))
MNLI = (("train.tsv", "dev_matched.tsv"),)

SUBSETS = {
    "cola": Subset("CoLA", ("sentence",), "label", NO_YES, ("source", "label", "mark", "sentence")),
    "sst2": Subset("SST-2", ("sentence",), "label", NO_YES),
    "mrpc": Subset("MRPC", ("#1 String", "#2 String"), "Quality", NO_YES, files=MRPC),
    "qqp": Subset("QQP", ("question1", "question2"), "is_duplicate", NO_YES, torn=True),
    "stsb": Subset("STS-B", PAIR, "score", ()),
    "mnli": Subset("MNLI", PAIR, "gold_label", NATURAL, files=MNLI),
    "qnli": Subset("QNLI", ("question", "sentence"), "label", ENTAILED),
    "rte": Subset("RTE", PAIR, "label", ENTAILED),
}


def canonical(subset: str) -> str:
    """The key of `SUBSETS`: "SST-2" -> "sst2". Raises ValueError for an unknown name."""
    name = _plain(subset)
    if name not in SUBSETS:
        raise ValueError(
            f"task.subset: {subset!r} was given; task 'glue' has {', '.join(SUBSETS)}"
            f"{nearest(name, SUBSETS)}"
        )
    return name


def outputs(subset: str) -> int:
    """How many outputs a model needs: one per class, or one for a real number."""
    return len(SUBSETS[canonical(subset)].labels) or 1


def report(subset: str, scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """GLUE's metrics (`metrics.GLUE`) of a model's outputs (N, `outputs`) and the labels (N,).

    The prediction is the class with the largest score, or the score itself. Every metric is nan
    if a score is not finite: a model that has diverged does not predict class 0.
    Raises ValueError for other shapes.
    """
    name = canonical(subset)
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or scores.shape[1] != outputs(name):
        raise ValueError(
            f"scores: shape {scores.shape} was given; task {name!r} needs (N, {outputs(name)})"
        )
    if not np.isfinite(scores).all():
        return dict.fromkeys(metrics.GLUE[name], math.nan)
    predictions = scores.argmax(1) if SUBSETS[name].labels else scores[:, 0]
    return metrics.glue(name, predictions, labels)


def load(config: Mapping[str, Any]) -> Data:
    """Trains on train.tsv (its first n_train examples), evaluates on dev.tsv, for MNLI on
    dev_matched.tsv, and for MRPC in Microsoft's own files on the test set. Half of that set is for
    validation and half for test, as the labels of GLUE's own test files are not published; examples
    with the same first sentence stay together.

    config: `subset` is a key of `SUBSETS`, case and dashes ignored; `path` the folder of that
        task, or the folder with all of them.
    Rows are those of `sentences.encode`. Raises FileNotFoundError; ValueError naming the field, or
    the file and the line.
    """
    if not config.get("subset"):
        raise ValueError(
            f"task.subset: task 'glue' needs one of {', '.join(SUBSETS)}; none was given"
        )
    name = canonical(config["subset"])
    train_file, eval_file = _files(check_path(config, _expected(name)), name)
    whole = {"train": (train_file, *examples(train_file, name))}
    whole["eval"] = eval_file, *examples(eval_file, name)

    def build(config, vocabulary, seq_len, base, apart=False):
        rows, notes = {}, []
        for split, (file, texts, labels, left_out) in (
            _apart(whole, config) if apart else whole
        ).items():
            n = check_n_train(config.get("n_train") if split == "train" else None, len(texts))
            rows[split], cut = sentences.encode(texts[:n], labels[:n], vocabulary, seq_len)
            notes.append(_note(n, split, file, left_out, cut, seq_len))
        note = f"{SUBSETS[name].folder}, {', '.join(notes)}"
        scored = {"outputs": outputs(name), "scores": functools.partial(report, name)}
        return Task(config["name"], note=note, kind=kinds.LABELLED, **rows, **scored)

    return Data(kinds.LABELLED, build, shapes, ("group_by_length",), outputs(name))


def _apart(sets: dict[str, tuple], config) -> dict[str, tuple]:
    """The sets with half of "eval" as "test"."""
    file, texts, labels, left_out = sets["eval"]
    halves = splits.labelled(texts, labels, splits.first_text, splits.seed_of(config))
    parts = dict(zip(("eval", "test"), halves, strict=True))
    return sets | {split: (file, *part, left_out) for split, part in parts.items()}


def shapes(config, lead, seq_len, base):
    """Shapes of batches; only the label's dtype depends on the subset; see `Data`."""
    label = np.float32 if outputs(config["subset"]) == 1 else np.int32
    return kinds.token_shapes(kinds.LABELLED, lead, seq_len, label=label)


def examples(file: Path, subset: str) -> tuple[list[Texts], np.ndarray, int]:
    """(sentences of every example, their labels, how many lines were left out), in order.

    Sentences are unchanged, including blanks at their ends, as in Hugging Face's `glue`. labels:
    (N,) int32 classes, float32 for a real number. Raises ValueError naming the file and the line.
    """
    spec = SUBSETS[canonical(subset)]
    content = read_text(file)
    # not splitlines: a sentence may hold U+0085 or U+2028
    lines = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]
    columns, first = spec.columns, 0
    if not columns:
        columns, first = tuple(lines[0].split("\t")), 1
        wanted = (*spec.sentences, spec.label)
        if not set(wanted) <= set(columns):
            raise ValueError(
                f"{file}:1: the header is {lines[0]!r}; expected the columns {', '.join(wanted)}"
            )
    texts, labels, left_out = [], [], 0
    for number, line in enumerate(lines[first:], start=first + 1):
        fields = line.split("\t")
        row = dict(zip(columns, fields, strict=False))
        sentences = tuple(row.get(column, "") for column in spec.sentences)
        whole = len(fields) == len(columns) and all(text.strip() for text in sentences)
        if spec.torn and not whole:
            left_out += 1
            continue
        try:
            if len(fields) != len(columns):
                raise ValueError(
                    f"the line has {len(fields)} fields; expected {len(columns)}, "
                    f"{', '.join(columns)}"
                )
            if not whole:
                blank = next(column for column in spec.sentences if not row[column].strip())
                raise ValueError(f"field {blank!r} is empty; expected text")
            labels.append(_label(row[spec.label], spec))
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None
        texts.append(sentences)
    if not texts:
        raise ValueError(f"{file}:{len(lines)}: no examples; expected one per line")
    return texts, np.array(labels, np.int32 if spec.labels else np.float32), left_out


def _plain(name: str) -> str:
    return re.sub("[-_ ]", "", str(name).lower())


def _expected(name: str) -> str:
    folder, (train, evaluation) = SUBSETS[name].folder, SUBSETS[name].files[0]
    return f"GLUE's folder {folder!r} with {train} and {evaluation} in it, or the folder above it"


def _files(path: Path, name: str) -> tuple[Path, Path]:
    """The train and the evaluation file, in the folder or in its subfolder of that name."""
    folders = [path]
    if path.is_dir():
        folders += sorted(x for x in path.iterdir() if x.is_dir() and _plain(x.name) == name)
    for folder in folders:
        for train, evaluation in SUBSETS[name].files:
            if (folder / train).is_file() and (folder / evaluation).is_file():
                return folder / train, folder / evaluation
    train, evaluation = SUBSETS[name].files[0]
    raise FileNotFoundError(
        f"task.path: {str(path)!r} has no {train} and {evaluation}; expected {_expected(name)}"
    )


def _label(text: str, spec: Subset) -> int | float:
    if spec.labels:
        if text not in spec.labels:
            raise ValueError(
                f"field {spec.label!r} is {text!r}; expected one of {', '.join(spec.labels)}"
            )
        return spec.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise ValueError(f"field {spec.label!r} is {text!r}; expected a number from 0 to 5")
    return score


def _note(n: int, split: str, file: Path, left_out: int, cut: int, seq_len: int) -> str:
    remarks = [f"{count(left_out)} broken lines left out"] * bool(left_out)
    remarks += [f"{count(cut)} cut at {seq_len} tokens"] * bool(cut)
    return f"{count(n)} {split} examples of {file.name}" + (
        f" ({', '.join(remarks)})" if remarks else ""
    )
