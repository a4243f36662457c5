"""Exchange with other programs' files: adapters and base models come and go unchanged."""

import os
import pathlib


def write_atomic(path: str | os.PathLike, data: bytes) -> pathlib.Path:
    """Write `data` to `path` so that a reader sees the old file or the whole new one.

    The folder is made where it is missing. Returns the path.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
