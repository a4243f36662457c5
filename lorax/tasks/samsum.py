"""SAMSum: a messenger dialogue -> its summary.

Gliwa, Mochol, Biesek and Wawer, "SAMSum Corpus: A Human-annotated Dialogue Dataset for Abstractive
Summarization" (arXiv 1911.12237). Reads the corpus's own JSON files, which are not shipped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax.tasks import records
from lorax.tasks.data import Data, pairs
from lorax.tasks.rows import check_path, count

FILES = {"train": "train.json", "eval": "val.json", "test": "test.json"}
EXPECTED = "a folder with SAMSum's train.json and val.json in it"
REQUEST = "Summarize the dialogue above:"


def examples(path: str | Path, split: str) -> tuple[list[tuple[str, str]], int]:
    """(prompt, completion) of every record in order, and how many were left out as empty.

    The prompt is the dialogue, one turn per line, and `REQUEST` on a separate line.
    split: "train", "eval" or "test". Raises FileNotFoundError, or ValueError naming the file and
    the record.
    """
    dialogues = records.read(records.find(Path(path), FILES[split], EXPECTED))
    pairs = []
    for record in dialogues:
        dialogue, summary = record.get("dialogue").split("\n"), record.get("summary").split()
        lines = [line.strip() for line in dialogue if line.strip()]
        if lines and summary:  # the published train set has a dialogue without words
            pairs.append(("\n".join([*lines, REQUEST]), " ".join(summary)))
    return pairs, len(dialogues) - len(pairs)


def load(config: Mapping[str, Any]) -> Data:
    """Trains on train.json (its first n_train dialogues), validates on val.json, tests on
    test.json, whose dialogues are the prompts; if it is missing, half of val.json is for test."""
    path = check_path(config, EXPECTED)
    train, empty = examples(path, "train")
    evaluation, empty_eval = examples(path, "eval")
    try:
        test, _ = examples(path, "test")
    except FileNotFoundError:
        test = None
    left_out = empty + empty_eval
    note = f"; {count(left_out)} empty ones left out" * bool(left_out)
    return pairs(train, evaluation, prompts=test, note=note, test=test)
