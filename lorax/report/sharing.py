"""A page as one file to hand on: its files are in it, and no path of this machine is."""

import base64
import gzip
import html
import mimetypes
import pathlib
import re
import shlex
from collections.abc import Callable, Iterable, Mapping

LARGE = 30_000  # bytes; larger files are compressed
# A word with a slash in it: what may be a path. Not a tag's end, nor a part of a word.
WORD = re.compile(r"(?<![\w<~.\-/\\])(?!//)(?:[\w.~+@%-]*/)+[\w.+@%-]*")


def without_paths(known: Iterable[pathlib.Path]) -> Callable[[str], str]:
    """A function that replaces paths of this machine in a text by their names.

    Those are `known` ones, also where they have spaces and are quoted; absolute ones of at least
    two parts; and relative ones that exist.
    """
    names, folders = {}, set()
    for path in known:
        for form in {path, path.absolute(), path.resolve()} - {pathlib.Path(), pathlib.Path("/")}:
            for quoted in (str, shlex.quote):
                written, name = quoted(str(form)), quoted(path.absolute().name)
                names[written], names[html.escape(written)] = name, html.escape(name)
            # With a space in it, no word is a path; others beside it may be named, too.
            folders |= {f"{form.parent}/"} if " " in str(form.parent) else set()
    ordered = sorted(names, key=len, reverse=True)

    def replace(text: str) -> str:
        for written in ordered:
            text = re.sub(rf"(?<![\w./-]){re.escape(written)}(?![\w-])", names[written], text)
        for folder in sorted(folders, key=len, reverse=True):
            text = text.replace(folder, "")
        return WORD.sub(lambda match: _name(match[0]), text)

    return replace


def named_in(value: object) -> list[pathlib.Path]:
    """The absolute paths in config.json: of the base and the data, and in the command."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [path for part in parts for path in named_in(part)]
    if not isinstance(value, str):
        return []
    try:
        words = [value] if value.startswith("/") else shlex.split(value)
    except ValueError:  # not a command
        return []
    ends = (word.rpartition("=")[2] for word in words)
    return [pathlib.Path(end) for end in ends if end.startswith("/")]


def _name(word: str) -> str:
    """The last part of a path of this machine; any other word as it is."""
    path = pathlib.Path(word)
    absolute = path.is_absolute() and len(path.parts) > 2
    is_path = absolute or word.startswith(("~/", "./", "../")) or _exists(path)
    return path.name if is_path and path.name else word


def _exists(path: pathlib.Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def one_file(page: str, files: Mapping[str, bytes]) -> str:
    """The page with its links to `files` (by the path in them) as the files themselves, to be saved
    by a click. Other links to files beside the page become text."""

    def link(match: re.Match) -> str:
        address, words = match[1], match[2]
        if address not in files:
            return words
        saved_as, data = _saved_as(address, files), _data(address, files)
        return f'<a download="{saved_as}" href="{data}">{words}</a>'

    return re.sub(r'<a href="(?!#|[a-z]+:)([^"]*)">(.*?)</a>', link, page)


def _saved_as(address: str, files: Mapping[str, bytes]) -> str:
    return pathlib.PurePosixPath(address).name + ".gz" * _is_large(address, files)


def _is_large(address: str, files: Mapping[str, bytes]) -> bool:
    return len(files[address]) > LARGE


def _data(address: str, files: Mapping[str, bytes]) -> str:
    """A file as the target of a link."""
    data, kind = files[address], mimetypes.guess_type(address)[0]
    if _is_large(address, files):
        data, kind = gzip.compress(data, mtime=0), "application/gzip"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
