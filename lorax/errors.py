"""Error messages of the commands: one line, and the nearest name for a wrong one."""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean "x"?' for the closest of `names`, or '' if none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def optional(module: str, package: str, missing: str):
    """A module that imports an optional package. Raises ValueError, with the text `missing`, if the
    package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ValueError(missing) from None


def fail(error: Exception) -> int:
    """Print an input error as one line to stderr; 2, its exit code."""
    print(f"lorax: {reason(error)}", file=sys.stderr)
    return 2


def of_machine(error: BaseException) -> OSError | MemoryError | None:
    """The OSError or MemoryError of the machine (a full disk, no memory) that caused an error.

    None if there is none. Orbax, safetensors and XLA report it as text in errors of other types.
    """
    if isinstance(error, OSError | MemoryError):
        return error
    code = re.search(r"os[ _]error(?:_code)?[ ='\"]*(\d+)", str(error))
    if code:
        return OSError(int(code[1]), os.strerror(int(code[1])))
    if "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
        return MemoryError(str(error).splitlines()[0])
    return None


def reason(error: BaseException) -> str:
    """An error as part of a line: its message, or else its type."""
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f": {error.filename}"
        return f"{error.strerror[0].lower()}{error.strerror[1:]}{place}"
    text = " ".join(str(error).split())
    plain = isinstance(error, ValueError | OSError | MemoryError | RuntimeError)
    if text and (plain or type(error).__module__ != "builtins"):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
