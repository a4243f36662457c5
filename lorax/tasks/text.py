"""Any UTF-8 text file, packed into full rows: plain language modelling.

An end-of-text marker in the file ("<|endoftext|>", as TinyStories has between stories) becomes
the end token, whatever its name in the tokenizer.
"""

from collections.abc import Mapping
from typing import Any

from lorax.files import read_text
from lorax.tasks import kinds, rows, splits
from lorax.tasks.data import Data, shapes_of_texts
from lorax.tasks.rows import Task, check_n_train, check_path, count
from lorax.vocabulary import END_OF_TEXT


def load(config: Mapping[str, Any]) -> Data:
    """Rows of `rows.pack`; end-of-text markers separate the texts. The last 5% of the rows (at
    least one) are the evaluation set; with test rows at least two, the second half of them for
    test.

    Raises FileNotFoundError; ValueError if the file is not UTF-8 (with the line) or holds less than
    two rows.
    """
    path = check_path(config, "a UTF-8 text file")
    if not path.is_file():
        raise ValueError(f"task.path: {str(path)!r} is no file; expected a UTF-8 text file")
    content = read_text(path)
    parts = content.split(END_OF_TEXT) if content else []

    def build(config, vocabulary, seq_len, base, apart=False):
        tokens, mask, total = rows.pack(parts, vocabulary, seq_len)
        least = 1 + apart  # of rows to evaluate
        if len(tokens) < 1 + least:
            needed = "a train, a validation and a test row" if apart else "a train and an eval row"
            raise ValueError(
                f"task.path: {str(path)!r} is too short: it has {count(total)} tokens, and "
                f"{needed} of {seq_len} need {count((1 + least) * seq_len + 1)}"
            )
        held_out = max(least, len(tokens) * 5 // 100)
        n_train = check_n_train(config.get("n_train"), len(tokens) - held_out)
        train = {"tokens": tokens[:n_train], "mask": mask[:n_train]}
        evaluation = {"tokens": tokens[-held_out:], "mask": mask[-held_out:]}
        left_over = total - 1 - len(tokens) * seq_len
        note = (
            f"{count(n_train)} train rows, {count(held_out)} eval rows (the end of the file) of "
            f"{count(total)} tokens in all; {count(left_over)} left over at the end dropped"
        )
        if not apart:
            return Task(config["name"], train, evaluation, note)
        validation, test = splits.halves(evaluation)
        note += f"; {count(len(test['tokens']))} of the eval rows are for test"
        return Task(config["name"], train, validation, note, test=test)

    return Data(kinds.TEXTS, build, shapes_of_texts)
