"""Damaged files: a reader may refuse one with a clear error, and nothing else."""

from pathlib import Path

import numpy as np


def mutations(data: bytes, n: int, seed: int = 0, header: int = 4096):
    """n damaged copies of a file: bytes replaced, most of them near its beginning, a piece removed
    or repeated, a count made huge, or the end cut off."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        copy = bytearray(data)
        where = int(rng.integers(min(header, len(copy)) if i % 4 else len(copy)))
        match i % 5:
            case 0:
                del copy[where:]
            case 1:
                del copy[where : where + int(rng.integers(1, 9))]
            case 2:
                copy[where : where + 8] = (2 ** int(rng.integers(8, 64)) - 1).to_bytes(8, "little")
            case 3:
                copy[where:where] = copy[where : where + int(rng.integers(1, 65))]
            case _:
                for at in rng.integers(where, min(where + 64, len(copy)), 4):
                    copy[at] = rng.integers(256)
        yield bytes(copy)


def survives(file: Path, read, n: int, header: int = 4096, name: str | None = None) -> int:
    """Damages a file n times, and reads it each time: how many readings succeeded.

    read(): must return, or raise ValueError or FileNotFoundError with one short line that has the
    name of the file (`name` of another part of its path). The file is as before at the end.
    """
    whole, good = file.read_bytes(), 0
    for i, data in enumerate(mutations(whole, n, header=header)):
        file.write_bytes(data)
        try:
            read()
            good += 1
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
            assert (name or file.name) in said and "\n" not in said and len(said) < 800, (i, said)
    file.write_bytes(whole)
    read()
    return good
