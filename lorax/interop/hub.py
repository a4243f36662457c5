"""Files of a repository of the Hub, from the cache or downloaded."""

from collections.abc import Sequence
from pathlib import Path


def snapshot(name: str, files: Sequence[str], without: Sequence[str] = ()) -> Path:
    """The directory of the files of a repository ("owner/name") that match one of the patterns
    `files` and none of `without`.

    Raises FileNotFoundError that only says why it failed: the error's type and first line.
    """
    from huggingface_hub import snapshot_download  # a slow import that local files do not need

    try:
        return Path(snapshot_download(name, allow_patterns=[*files], ignore_patterns=[*without]))
    except Exception as error:  # of the Hub, the network or the cache: none has it
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(f"{type(error).__name__}: {why[:120]}") from None
