"""The E2E NLG challenge: restaurant descriptions from meaning representations.

Novikova, Dusek and Rieser, "The E2E Dataset: New Challenges For End-to-End Generation"
(SIGDIAL 2017, arXiv 1706.09254). Reads the challenge's own CSV files, which are not shipped.
"""

import csv
import io
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lorax.files import as_text
from lorax.tasks.data import Data, pairs
from lorax.tasks.records import only
from lorax.tasks.rows import check_path, linearise

FILES = {"train": "trainset.csv", "eval": "devset.csv", "test": "testset_w_refs.csv"}
EXPECTED = "e2e-dataset.zip, or a folder, with trainset.csv and devset.csv in it"
SLOT = re.compile(r"\s*([^\[\],]+?)\s*\[\s*([^\[\]]*[^\[\]\s])\s*\]\s*")


def parse_mr(text: str) -> tuple[tuple[str, str], ...]:
    """'name[The Vaults], eatType[pub]' -> (("name", "The Vaults"), ("eatType", "pub")).

    Raises ValueError if anything is left over, empty or repeated.
    """
    slots, at = [], 0
    while True:
        match = SLOT.match(text, at)
        if match is None:
            raise ValueError(
                f"malformed meaning representation {text!r} at character {at}: expected "
                "'slot[value], slot[value], ...'"
            )
        slots.append((match[1], match[2]))
        at = match.end()
        if at == len(text):
            break
        if text[at] != ",":
            raise ValueError(
                f"malformed meaning representation {text!r} at character {at}: expected ',' or "
                f"the end, found {text[at]!r}"
            )
        at += 1
    names = [slot for slot, _ in slots]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"meaning representation {text!r} gives slot {name!r} twice")
    return tuple(slots)


def examples(path: str | Path, split: str) -> list[tuple[str, str]]:
    """(prompt, completion) of every row, in the file's order; split is "train", "eval" or "test".

    path: the archive, or a folder; the CSV files may be anywhere in it.
    Raises FileNotFoundError, or ValueError naming the file and the line.
    """
    data, label = _read(Path(path), FILES[split])
    reader = csv.reader(io.StringIO(as_text(data, label), newline=""), strict=True)
    pairs, line = [], 1  # the line that the row being read starts on
    try:
        header = next(reader, [])
        if header != ["mr", "ref"]:
            raise ValueError(f"the header is {','.join(header)!r}; expected 'mr,ref'")
        line = reader.line_num + 1
        for row in reader:
            pairs.append(_pair(row))
            line = reader.line_num + 1
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{label}:{line}: {error}") from None
    if not pairs:
        raise ValueError(f"{label}:{line}: no rows; expected a header 'mr,ref' and rows below it")
    return pairs


def load(config: Mapping[str, Any]) -> Data:
    """Trains on trainset.csv (its first n_train rows), validates on devset.csv, tests on
    testset_w_refs.csv. The prompts are the distinct meaning representations of that file with all
    their texts. If it is missing, half of the meaning representations of devset.csv are for
    test."""
    path = check_path(config, EXPECTED)
    train = examples(path, "train")
    evaluation = examples(path, "eval")
    try:
        test = examples(path, "test")
    except FileNotFoundError:
        test = None
    return pairs(train, evaluation, prompts=test, test=test)


def _pair(row: list[str]) -> tuple[str, str]:
    if len(row) != 2:
        raise ValueError(f"the row has {len(row)} fields; expected 2, 'mr,ref'")
    mr, ref = row[0], " ".join(row[1].split())
    for field, value in (("mr", mr.strip()), ("ref", ref)):
        if not value:
            raise ValueError(f"field {field!r} is empty; expected text")
    return linearise(parse_mr(mr)), ref


def _read(path: Path, name: str) -> tuple[bytes, str]:
    """Bytes of the only file called `name` in a folder or archive, and its name for messages."""
    if not path.exists():
        raise FileNotFoundError(f"task.path: {str(path)!r} does not exist; expected {EXPECTED}")
    if path.is_dir():
        file = only(sorted(path.rglob(name)), name, path, EXPECTED)
        return file.read_bytes(), str(file)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.namelist() if PurePosixPath(m).name == name]
            # macOS adds a resource fork of every file
            members = [m for m in members if not m.startswith("__MACOSX/")]
            member = only(members, name, path, EXPECTED)
            return archive.read(member), f"{path}/{member}"
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise ValueError(
            f"task.path: {str(path)!r} is not a zip archive that can be read ({error}); "
            f"expected {EXPECTED}"
        ) from None
