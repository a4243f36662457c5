"""What a command says of a mistake: one line, and the nearest name where a name is wrong."""

import difflib
import os
import re
import sys
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean "x"?' for the closest of `names`, or '' where none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def fail(error: Exception) -> int:
    """Print an error of the input as one line to stderr; 2, the exit code for it."""
    print(f"lorax: {reason(error)}", file=sys.stderr)
    return 2


def of_machine(error: BaseException) -> OSError | MemoryError | None:
    """What the machine has refused (room on the disk, memory), where that is behind an error.

    None where it is not. Orbax, safetensors and XLA tell of it in the words of errors of their own.
    """
    if isinstance(error, OSError | MemoryError):
        return error
    found = re.search(r"os[ _]error(?:_code)?[ ='\"]*(\d+)", str(error))
    if found:
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
        return MemoryError(str(error).splitlines()[0])
    return None


def reason(error: BaseException) -> str:
    """An error as a part of a line: what it says, or else what it is."""
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f": {error.filename}"
        return f"{error.strerror[0].lower()}{error.strerror[1:]}{place}"
    text = " ".join(str(error).split())
    plain = isinstance(error, ValueError | OSError | MemoryError | RuntimeError)
    if text and (plain or type(error).__module__ != "builtins"):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
