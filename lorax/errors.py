"""What a command says of a mistake: one line, and the nearest name where a name is wrong."""

import difflib
import sys
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean "x"?' for the closest of `names`, or '' where none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def fail(error: Exception) -> int:
    """Print an error of the input as one line to stderr; 2, the exit code for it."""
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"lorax: {text}", file=sys.stderr)
    return 2
