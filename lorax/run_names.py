"""The names of run directories, which say what was asked: "gpt2_rank_sweep-lr=0.003+0.01,rank=4".

A name has the study and, in alphabetical order, the keys that were set with their values. It is a
file name on every system. A hash ends it only if something was left out: a value that is long, or
has other characters than digits, small letters and ".+_-".
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lorax import config, rundir

LONGEST = 80  # characters of a name
LONGEST_VALUE = 32
HASH = 8  # digits
_EXACT = re.compile(r"[a-z0-9.+_-]*[a-z0-9+_-]")  # Windows drops a dot at the end


def workdir(study: str, argument: str, values: Mapping[str, Any]) -> Path:
    """runs/NAME, or the directory of a run that was begun under one of the names that earlier
    versions gave it. The arguments are those of `name`."""
    given = study, argument, values
    folders = [rundir.RUNS / each for each in (name(*given), *_former(*given))]
    return next(filter(rundir.is_run, folders), folders[0])


def name(study: str, argument: str, values: Mapping[str, Any]) -> str:
    """The name of a run's directory, a function of its arguments alone.

    study: the stem of its config's file. argument: what follows the file's colon, or "". values:
    {"train.lr": value} of the keys that were set; those of `config.REVISABLE` don't count, so that
    a run that is repeated with other ones goes on where it was.
    """
    values = {key: value for key, value in values.items() if key not in config.REVISABLE}
    parts = dict(sorted(_parts(values).items()))
    texts = {label: _text(value) for label, value in parts.items()}
    whole = _joined(study, argument, texts)
    given = ([argument] if argument else []) + [*parts.values()]
    if all(map(_is_exact, given)) and len(whole) <= LONGEST:
        return whole
    room = LONGEST - HASH - 1
    while len(whole) > room and any(texts.values()):
        texts[max(texts, key=lambda label: len(texts[label]))] = ""
        whole = _joined(study, argument, texts)
    cut = whole[: max(room, len(study))].rstrip(".,=+-")
    return f"{cut}-{config.digest({'argument': argument, 'values': values})[:HASH]}"


def _former(study: str, argument: str, values: Mapping[str, Any]) -> list[str]:
    """The names that versions before this one gave to the same run."""
    stem = study + (f"-{argument}" if argument else "")
    kept = {key: value for key, value in values.items() if key not in config.REVISABLE}
    return [f"{stem}-{config.digest(given)}" if given else stem for given in (values, kept)]


def _parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """{label: value}. An axis of the sweep has its own name; another key has its last part as
    label, or all of it where an axis or another key has the same."""
    sections = config.flat(config.default())
    last = Counter(key.rpartition(".")[2] for key in sections if not key.startswith("sweep."))
    axes = {f"sweep.{axis}": axis for axis in config.axes()}
    parts = {}
    for key, value in values.items():
        short = key.rpartition(".")[2]
        if key == "sweep.axes" and isinstance(value, Mapping):
            parts |= {config.axis_of(of): tuple(v) for of, v in value.items()}
        elif key in axes:
            parts[axes[key]] = value
        else:
            parts[short if last[short] < 2 and short not in config.axes() else key] = value
    return parts


def _joined(study: str, argument: str, texts: Mapping[str, str]) -> str:
    """All in one: "study-argument-label=text,label"."""
    labelled = [label + (f"={text}" if text else "") for label, text in texts.items()]
    return "-".join(filter(None, (study, _text(argument), ",".join(labelled))))


def _text(value: Any) -> str:
    """A value in a name; "" if it is long. A path has only its last part."""
    text = re.sub(r"[^\w.+-]+", "_", _plain(value, last_part=True), flags=re.ASCII).strip("_.")
    return text if len(text) <= LONGEST_VALUE else ""


def _is_exact(value: Any) -> bool:
    """Whether no other value has the same text in a name."""
    return _plain(value) == _text(value) and bool(_EXACT.fullmatch(_plain(value)))


def _plain(value: Any, last_part: bool = False, between: str = "+") -> str:
    if isinstance(value, tuple | list):
        return between.join(_plain(item, last_part, between=".") for item in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return PurePosixPath(value).name if last_part and isinstance(value, str) else str(value)
