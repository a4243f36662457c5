"""Atomic file writing, reading of text and JSON with errors that name the file, and the folder for
what can be made again.

Of a program's processes (`lorax.hosts`), only the first one writes.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorax import hosts
from lorax.errors import of_machine

DRAFTS = ".*.[0-9]*.tmp"  # glob of the files that `draft` names
LFS = b"version https://git-lfs"  # how a pointer begins


def atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """Call `write(temporary path)`, sync it to the disk, then rename it to `path`.

    A reader sees either the old file or the complete new one. A missing folder is created.
    Raises OSError (a full disk), also if a library reports it with another type.
    """
    path = Path(path)
    if not hosts.first():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = draft(path)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)  # safetensors makes files that only the owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        cause = of_machine(error)
        if isinstance(cause, OSError) and cause.errno:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return path


def draft(path: Path) -> Path:
    """Where a process writes what it then renames to `path`; it stays if the process is killed."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def cache_folder() -> Path:
    """Where lorax keeps what it can make again: $XDG_CACHE_HOME/lorax or ~/.cache/lorax."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lorax"


def remove(path: str | os.PathLike) -> None:
    """Remove a file if it is there; like `atomically`, by the first process."""
    if hosts.first():
        Path(path).unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> Path:
    """Write bytes atomically; the path."""
    return atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: str | os.PathLike, value) -> Path:
    """Write JSON atomically, indented, with sorted keys."""
    return write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def check_can_write(file: str, option: str) -> None:
    """Raises ValueError if no file can be written to that path. option: that it was given for, for
    messages."""
    path = Path(file).absolute()
    if path.exists() and not path.is_file():
        raise ValueError(f"{option}: {file!r} is not a regular file; expected a file's path")
    folder = next(folder for folder in path.parents if folder.exists())
    if not folder.is_dir():
        raise ValueError(f"{option}: {str(folder)!r} is not a folder, so {file!r} can't be in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: {file!r} can't be written: no write access to {str(folder)!r}")


def read_text(path: str | os.PathLike) -> str:
    """A text file's content without a byte order mark.

    Raises ValueError that names file and line if it is not UTF-8, OSError if it can't be read.
    """
    return as_text(Path(path).read_bytes(), path)


def as_text(data: bytes, path: str | os.PathLike) -> str:
    """`read_text` of a file whose bytes are already read, e.g. from an archive."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: bad byte 0x{data[error.start]:02x}; expected UTF-8"
        ) from None


def parse_json(text: str, path: str | os.PathLike, line: int = 1) -> Any:
    """JSON from outside as Python objects. path, line: where `text` begins.

    Raises ValueError that names file and line for invalid JSON, for nesting too deep and numbers
    too long for Python, and for half of a surrogate pair ("\\ud83d"), which is not text.
    """
    place = path if "\n" in text.strip() else f"{path}:{line}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{line + error.lineno - 1}: not JSON ({error.msg} at character {error.colno})"
        ) from None
    except RecursionError:
        raise ValueError(f"{place}: JSON nested too deep to be read") from None
    except ValueError:  # more digits than `sys.get_int_max_str_digits()`
        raise ValueError(f"{place}: a number with too many digits to be read") from None
    if "\\u" in text:
        check_unicode(json.dumps(value, ensure_ascii=False), place)
    return value


def check_unicode(text: str, place: str | os.PathLike) -> None:
    """Raises ValueError for a text with half of a surrogate pair in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{place}: {half} is half of a character; expected both halves") from None


def read_json(path: str | os.PathLike) -> dict:
    """A JSON object from a file. Raises ValueError that names the file if it is not one."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, not a {type(value).__name__}")
    return value


def pointer_hint(path: str | os.PathLike) -> str:
    """What to add to an error if the file is only a Git LFS pointer, else ""."""
    try:
        with open(path, "rb") as file:
            pointer = file.read(len(LFS)) == LFS
    except OSError:  # the error itself names it
        return ""
    return "; it is a Git LFS pointer: fetch the file itself with `git lfs pull`" * pointer
