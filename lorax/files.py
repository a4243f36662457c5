"""Files that are whole or not there, and JSON that says which file is wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path


def atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """Call `write(temporary path)`, get it onto the disk, and only then give it its name.

    A reader sees the old file or the whole new one. The folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.chmod(temporary, 0o644)  # safetensors makes its files for the owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_bytes(path: str | os.PathLike, data: bytes) -> Path:
    """Write bytes atomically; the path."""
    return atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: str | os.PathLike, value) -> Path:
    """Write JSON atomically, indented, with sorted keys."""
    return write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises ValueError that names the file where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, not a {type(value).__name__}")
    return value
