"""Any UTF-8 text file, packed into full rows: plain language modelling.

An end-of-text marker in the file ("<|endoftext|>", as TinyStories has between stories) becomes
the end token, whatever that is called in the tokenizer.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax.files import read_text
from lorax.tasks.rows import Task, check_n_train, check_path, count, encode_texts
from lorax.vocabulary import END_OF_TEXT, Vocabulary


def load(config: Mapping[str, Any], vocabulary: Vocabulary, seq_len: int) -> Task:
    """Rows of seq_len + 1 tokens, each beginning with the last token of the one before, so that
    every token but the file's first is predicted once. The last 5% of the rows (at least one) are
    the evaluation set; the tokens left over at the end are dropped. What end-of-text markers part
    are texts of their own, each led by the vocabulary's start, which is no target.

    Raises FileNotFoundError; ValueError where the file is not UTF-8 (with the line) or
    holds less than two rows.
    """
    path = check_path(config, "a UTF-8 text file")
    if not path.is_file():
        raise ValueError(f"task.path: {str(path)!r} is no file; expected a UTF-8 text file")
    content = read_text(path)
    texts = content.split(END_OF_TEXT) if content else []
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
    rows = (len(ids) - 1) // seq_len
    if rows < 2:
        raise ValueError(
            f"task.path: {str(path)!r} is too short: it has {count(len(ids))} tokens, and a train "
            f"and an evaluation row of {seq_len} need {count(2 * seq_len + 1)}"
        )
    at = np.arange(rows)[:, None] * seq_len + np.arange(seq_len + 1)[None, :]
    tokens, mask = np.array(ids, np.int32)[at], np.array(targets, np.float32)[at]
    mask[:, 0] = 0.0
    held_out = max(1, rows * 5 // 100)
    n_train = check_n_train(config.get("n_train"), rows - held_out)
    train = {"tokens": tokens[:n_train], "mask": mask[:n_train]}
    evaluation = {"tokens": tokens[-held_out:], "mask": mask[-held_out:]}
    left_over = len(ids) - 1 - rows * seq_len
    note = (
        f"{count(n_train)} train rows, {count(held_out)} eval rows (the end of the file) of "
        f"{count(len(ids))} tokens in all; {count(left_over)} left over at the end dropped"
    )
    return Task(config["name"], train, evaluation, note)
