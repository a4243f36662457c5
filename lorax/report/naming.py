"""Names of what a page is about, and of the page's directory."""

import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Sequence

MAX_LENGTH = 60  # of a directory's name


def names(directories: Sequence[str | os.PathLike]) -> list[str]:
    """Names for runs or adapters: as many last parts of their paths as make the names different.

    Raises ValueError if a directory is given twice.
    """
    parts = [pathlib.Path(directory).resolve().parts for directory in directories]
    if len(set(parts)) < len(parts):
        twice = next(directory for directory, path in zip(directories, parts, strict=True)
                     if parts.count(path) > 1)  # fmt: skip
        raise ValueError(f"{twice}: given twice; a comparison takes different directories")
    for length in itertools.count(1):
        candidates = ["/".join(path[-length:]) for path in parts]
        if len(set(candidates)) == len(candidates):
            return candidates


def default_name(sort: str, subjects: Sequence[str]) -> str:
    """The name of a report's directory: the kind of report and what it is about."""
    name = re.sub(r"[^\w.-]+", "_", f"{sort}-" + "-".join(subjects))
    if len(name) <= MAX_LENGTH:
        return name
    return name[: MAX_LENGTH - 9] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
