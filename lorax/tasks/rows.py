"""Prompt and completion pairs -> padded token rows with a loss mask."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"

Rows = dict[str, np.ndarray]  # {"tokens": (N, seq_len + 1) int32, "mask": (N, seq_len + 1) float32}
Pairs = Sequence[tuple[str, str]]  # (prompt, completion)


def count(n: int) -> str:
    return f"{n:,}"


def linearise(slots: Iterable[tuple[str, str]]) -> str:
    """(("name", "The Vaults"), ("food", "Thai")) -> "name = The Vaults ; food = Thai =>"."""
    return " ; ".join(f"{slot} = {value}" for slot, value in slots) + " =>"


def end_of_text(tokenizer: Tokenizer) -> int:
    """Id of the end-of-text token. Raises ValueError where the tokenizer can't serve a task."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    if token is None:
        raise ValueError(
            f"tokenizer: it has no {END_OF_TEXT!r} token, which ends every example and pads it; "
            f"add it with tokenizer.add_special_tokens([{END_OF_TEXT!r}])"
        )
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        raise ValueError(
            "tokenizer: it truncates or pads, and tasks do that themselves; call "
            "tokenizer.no_truncation() and tokenizer.no_padding() first"
        )
    return token


def check_path(config: Mapping[str, Any], expected: str) -> Path:
    """`task.path` of a task that reads a file. Raises ValueError, FileNotFoundError."""
    if not config.get("path"):
        raise ValueError(f"task.path: task {config['name']!r} needs {expected}; none was given")
    path = Path(config["path"]).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"task.path: {str(path)!r} does not exist; expected {expected}")
    return path


def check_n_train(config: Mapping[str, Any], available: int) -> int:
    """`task.n_train`, or all there is. Raises ValueError where there are not so many."""
    n = config.get("n_train")
    if n is None:
        return available
    if not 1 <= n <= available:
        raise ValueError(
            f"task.n_train: {n} was given; the train set of task {config['name']!r} has "
            f"{count(available)} examples, so it must lie in 1 to {available} (None: all)"
        )
    return n


def encode_pairs(pairs: Pairs, tokenizer: Tokenizer, seq_len: int, what: str) -> tuple[Rows, str]:
    """Rows of prompt + " " + completion + end-of-text, and a note of what was dropped.

    Prompt and completion are tokenised apart, as they are when a model is given a prompt to
    complete. Examples of more than seq_len + 1 tokens are dropped, never cut.
    what: "train" or "eval", for messages. Raises ValueError where no example fits.
    """
    end = end_of_text(tokenizer)
    encode = tokenizer.encode_batch_fast  # no offsets
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))  # most come several times
    ids = [encoding.ids for encoding in encode(prompts, add_special_tokens=False)]
    prompt_ids = dict(zip(prompts, ids, strict=True))
    completions = encode([" " + completion for _, completion in pairs], add_special_tokens=False)
    encoded = [
        (prompt_ids[prompt], completion.ids + [end])
        for (prompt, _), completion in zip(pairs, completions, strict=True)
    ]
    lengths = [len(p) + len(c) for p, c in encoded]
    width = seq_len + 1
    fitting = [pair for pair, length in zip(encoded, lengths, strict=True) if length <= width]
    if not fitting:
        raise ValueError(
            f"train.seq_len: none of the {count(len(pairs))} {what} examples fits {seq_len}; "
            f"the shortest needs {min(lengths) - 1}, all of them {max(lengths) - 1}"
        )
    tokens = np.full((len(fitting), width), end, np.int32)
    mask = np.zeros((len(fitting), width), np.float32)
    for row, (prompt, completion) in enumerate(fitting):
        stop = len(prompt) + len(completion)
        tokens[row, :stop] = prompt + completion
        mask[row, len(prompt) : stop] = 1.0
    note = f"{count(len(fitting))} {what} examples"
    if len(fitting) < len(pairs):
        dropped = len(pairs) - len(fitting)
        note += f" ({count(dropped)} of {count(len(pairs))} dropped, longer than {width} tokens)"
    return {"tokens": tokens, "mask": mask}, note


def encode_sets(
    train: Pairs, evaluation: Pairs, tokenizer: Tokenizer, seq_len: int
) -> tuple[Rows, Rows, str]:
    """`encode_pairs` of a train and an evaluation set, their notes joined."""
    train_rows, train_note = encode_pairs(train, tokenizer, seq_len, "train")
    eval_rows, eval_note = encode_pairs(evaluation, tokenizer, seq_len, "eval")
    return train_rows, eval_rows, f"{train_note}, {eval_note}"
