"""Names of what a page is about, and of the page's directory."""

import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Sequence

MAX_LENGTH = 60  # of a directory's name
SHOWN = 32  # characters of a name on a page


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


def shortened(names: Sequence[str], most: int = SHOWN) -> list[str]:
    """Names of at most `most` characters that can be told apart. If one is longer, the beginning
    and the end that all have in common are replaced by "…", word by word."""
    if all(len(name) <= most for name in names):
        return list(names)
    parts = [re.split(r"(?<=[-,/ ])", name) for name in names]
    if len(names) > 1:
        start = len(os.path.commonprefix(parts))
        end = len(os.path.commonprefix([part[start:][::-1] for part in parts]))
        cut = ["".join(part[start : len(part) - end]) for part in parts]
        if all(cut):
            names = ["…" * (start > 0) + name.strip("-,/ ") + "…" * (end > 0) for name in cut]
    half = (most - 1) // 2
    fit = [x if len(x) <= most else f"{x[:half]}…{x[-half:]}" for x in names]
    same = {name for name in fit if fit.count(name) > 1}
    return [f"{n} {name}" if name in same else name for n, name in enumerate(fit, 1)]


def default_name(sort: str, subjects: Sequence[str]) -> str:
    """The name of a report's directory: the kind of report and what it is about."""
    name = re.sub(r"[^\w.-]+", "_", f"{sort}-" + "-".join(subjects))
    if len(name) <= MAX_LENGTH:
        return name
    return name[: MAX_LENGTH - 9] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
