"""Functions of the user's own: a model, a task, an analysis, each named "FILE.py:function".

A config may hold the function itself. Where a config enters, `spell` puts the name in its place, so
that a config stays text, and remembers the function: one that was defined in a notebook, or in the
config script itself, is then known without running a file. Only names that the user gave, in a
config or on a command line, are ever resolved: no file of data makes lorax run code.
"""

import contextlib
import importlib.util
import inspect
import os
import re
import reprlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lorax.errors import nearest, reason

#: Functions by their names, as `spelled` met them or `resolve` read them from their files, with the
#: time at which that file was written (None: it wasn't read).
_FUNCTIONS: dict[str, tuple[Callable, int | None]] = {}
_NAME = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")
NOTEBOOK = "notebook.py"  # in place of a file, for a function that has none


def is_name(text) -> bool:
    """Whether a value reads "FILE.py:function"."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


class BaseName(NamedTuple):
    """The name of a base that a function makes, "random:FILE.py:function@rest" in its parts."""

    function: str
    rest: str | None
    random: bool


def base_name(name: str) -> BaseName | None:
    """The parts of a base's name, None for one that no function makes."""
    parts = re.fullmatch(r"(random:)?(.+\.py:[A-Za-z_]\w*)(?:@(.+))?", name)
    return parts and BaseName(parts[2], parts[3], parts[1] is not None)


def spell(value, field: str = ""):
    """A value of a config with every function in it, also in tuples, replaced by its name.

    Raises ValueError, which begins with `field`, for a function without a name that its file could
    be asked for.
    """
    if isinstance(value, tuple | list):
        return type(value)(spell(item, field) for item in value)
    return spelled(value, field) if callable(value) else value


def spelled(function: Callable, field: str = "") -> str:
    """The name FILE.py:function of a function or class, which `resolve` gives back in this process.

    FILE is relative to the working directory where it lies below it. Raises ValueError, which
    begins with `field`, for a lambda, a nested function or another callable: nothing in a file has
    its name.
    """
    name, where = getattr(function, "__qualname__", ""), f"{field}: " * bool(field)
    if not name.isidentifier():
        raise ValueError(
            f"{where}{name or reprlib.repr(function)} given; it must be a function that a def at "
            "the top level of a file or notebook defines, so that FILE.py:function finds it"
        )
    text = f"{_file_of(function)}:{name}"
    _FUNCTIONS[text] = function, None
    return text


def is_known(name: str) -> bool:
    """Whether this process has the function of a name: a config or a command gave it."""
    return name in _FUNCTIONS


def resolve(name: str, field: str = "") -> Callable:
    """The function that "FILE.py:function" names; its file is run unless the function is known.

    Raises, with `field` in front: FileNotFoundError for a missing file; ValueError for another
    spelling, for a file that fails (with the line) and for one without such a function.
    """
    where, parts = f"{field}: " * bool(field), _NAME.fullmatch(name)
    if parts is None:
        raise ValueError(f"{where}{name!r} given, must be FILE.py:function")
    function, written = _FUNCTIONS.get(name, (None, None))
    if function is not None and written in (None, _written(parts["file"])):
        return function
    written = _written(parts["file"])
    functions = vars(run_file(parts["file"], field))
    function = functions.get(parts["function"])
    if not callable(function):
        own = [key for key, value in functions.items() if inspect.isfunction(value)]
        raise ValueError(
            f"{where}{parts['file']} has no function {parts['function']!r}; it has "
            f"{', '.join(own) or 'none'}{nearest(parts['function'], own)}"
        )
    _FUNCTIONS[name] = function, written
    return function


def _written(file: str) -> int:
    """When a file was written, in nanoseconds; 0 for one that is not there."""
    return os.stat(file).st_mtime_ns if os.path.exists(file) else 0


def call(function: Callable, *args, field: str = "", **kwargs):
    """function(*args, **kwargs). Raises ValueError, one line with `field` and the line of the
    function's file that failed, for whatever it raises."""
    with blame(function, field):
        return function(*args, **kwargs)


@contextlib.contextmanager
def blame(function: Callable, field: str = ""):
    """Context in which an error is one line with `field` and the line of the function's file that
    the call had reached, as a ValueError."""
    try:
        yield
    except Exception as error:
        where, file = f"{field}: " * bool(field), _file_of(function)
        raise ValueError(f"{where}{_line(error, file) or file}: {reason(error)}") from error


def takes(function: Callable) -> tuple[str, ...]:
    """Names of the arguments that a function can be given by keyword."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = inspect.signature(function).parameters
    return tuple(name for name, parameter in parameters.items() if parameter.kind in kinds)


# ------------------------------------------------------------------------------------------- files


def run_file(file: str | Path, field: str = ""):
    """Run a Python file as a module of its own, which can import what lies beside it.

    Raises, with `field` in front, FileNotFoundError for a missing file, and ValueError with the
    line where it fails.
    """
    path, where = Path(file), f"{field}: " * bool(field)
    if not path.is_file() or path.suffix != ".py":
        kept = "; a notebook's functions are known in its own process" * (str(file) == NOTEBOOK)
        raise FileNotFoundError(f"{where}{str(file)!r} is no Python file; expected FILE.py{kept}")
    reach(path)
    spec = importlib.util.spec_from_file_location(f"lorax_outside_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for what annotations name
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{where}{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        raise ValueError(f"{where}{_line(error, str(file)) or file}: {reason(error)}") from error
    return module


def reach(file: str | Path) -> None:
    """Let a script import what lies beside it, as `python FILE` does."""
    folder = str(Path(file).absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def _file_of(function: Callable) -> str:
    """The file of a function or class, relative to the working directory where it lies below it."""
    if inspect.isclass(function):
        file = getattr(sys.modules.get(function.__module__), "__file__", None)
    else:
        code = getattr(inspect.unwrap(function), "__code__", None)
        file = code and code.co_filename
    if not file or not os.path.isfile(file) or "ipykernel" in str(file):
        return NOTEBOOK
    path = Path(os.path.abspath(file))
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _line(error: BaseException, file: str) -> str:
    """FILE:LINE of the last call in `file` on the way to an error, "" without one."""
    same = lambda frame: os.path.abspath(frame.filename) == os.path.abspath(file)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if same(frame)]
    return f"{file}:{frames[-1].lineno}" if frames else ""
