"""The user's own functions (a model, a task, an analysis), each named "FILE.py:function".

A config may hold the function itself. When lorax receives a config, `spell` replaces the function
by its name, so that the config is plain text, and remembers it. A function from a notebook or from
the config script itself is then known without running a file. Only names that the user gave, in a
config or on a command line, are ever resolved: no data file can make lorax run code.
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

#: {name: (function, time at which its file was written)}, from `resolve`, or from `spelled` with
#: None for the time, because no file was read.
_FUNCTIONS: dict[str, tuple[Callable, int | None]] = {}
_NAME = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")
_BASE = re.compile(rf"(?P<random>random:)?(?P<name>{_NAME.pattern})(?:@(?P<rest>.+))?")
NOTEBOOK = "notebook.py"  # in place of a file, for a function that has none


def is_name(text) -> bool:
    """Whether a value reads "FILE.py:function"."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


class BaseName(NamedTuple):
    """The parts of the name "random:FILE.py:function@rest" of a base that a function makes."""

    function: str
    rest: str | None
    random: bool


def base_name(name: str) -> BaseName | None:
    """The parts of a base's name, None if no function makes it."""
    parts = _BASE.fullmatch(name)
    return parts and BaseName(parts["name"], parts["rest"], parts["random"] is not None)


def spell(value, field: str = ""):
    """A config's value with every function in it, also in tuples and dictionaries, replaced by its
    name.

    Raises ValueError, which begins with `field`, for a function that can't be looked up by name in
    its file.
    """
    if isinstance(value, tuple | list):
        return type(value)(spell(item, field) for item in value)
    if isinstance(value, dict):
        return {key: spell(item, field) for key, item in value.items()}
    return spelled(value, field) if callable(value) else value


def spelled(function: Callable, field: str = "") -> str:
    """The name FILE.py:function of a function or class, which `resolve` turns back in this process.

    FILE is relative to the working directory if it is below it. Raises ValueError, which begins
    with `field`, for a lambda, a nested function or another callable that can't be looked up by
    name.
    """
    if is_nnx(function):
        return _of_module(function)
    name, where = getattr(function, "__qualname__", ""), f"{field}: " * bool(field)
    if not name.isidentifier():
        raise ValueError(
            f"{where}{name or reprlib.repr(function)} given; it must be a function that a def at "
            "the top level of a file or notebook defines, so that FILE.py:function finds it"
        )
    text = f"{_file_of(function)}:{name}"
    _FUNCTIONS[text] = function, None
    return text


def is_nnx(value) -> bool:
    """Whether a value is an NNX module. Nothing is imported: who made it has imported NNX."""
    return "flax.nnx" in sys.modules and isinstance(value, sys.modules["flax.nnx"].Module)


def _of_module(module) -> str:
    """The name of an NNX module that exists only in this process, as of a function of a notebook
    that returns it."""
    kind, number = type(module).__name__, 1
    name = f"{NOTEBOOK}:{kind}"
    while name in _FUNCTIONS and getattr(_FUNCTIONS[name][0], "module", None) is not module:
        number += 1
        name = f"{NOTEBOOK}:{kind}_{number}"

    def function():
        return module

    function.module = module
    function.__wrapped__ = type(module).__call__  # whose file `blame` names
    function.__signature__ = inspect.Signature()
    _FUNCTIONS.setdefault(name, (function, None))
    return name


def is_known(name: str) -> bool:
    """Whether this process has the function of a name: a config or a command gave it."""
    return name in _FUNCTIONS


def resolve(name: str, field: str = "") -> Callable:
    """The function that "FILE.py:function" names; its file is run unless the function is known.

    Errors begin with `field`. Raises FileNotFoundError for a missing file; ValueError for a
    malformed name, a file that fails (with the line) and a file without such a function.
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
        known = [key for key, value in functions.items() if inspect.isfunction(value)]
        raise ValueError(
            f"{where}{parts['file']} has no function {parts['function']!r}; it has "
            f"{', '.join(known) or 'none'}{nearest(parts['function'], known)}"
        )
    _FUNCTIONS[name] = function, written
    return function


def _written(file: str) -> int:
    """When a file was written, in nanoseconds; 0 if it does not exist."""
    return os.stat(file).st_mtime_ns if os.path.exists(file) else 0


def call(function: Callable, *args, field: str = "", **kwargs):
    """function(*args, **kwargs). Turns any error into a one-line ValueError with `field` and the
    line of the function's file that failed."""
    with blame(function, field):
        return function(*args, **kwargs)


@contextlib.contextmanager
def blame(function: Callable, field: str = ""):
    """Context that turns any error into a one-line ValueError with `field` and the line of the
    function's file that failed."""
    try:
        yield
    except Exception as error:
        where, file = f"{field}: " * bool(field), _file_of(function)
        raise ValueError(f"{where}{line_of(error, file) or file}: {reason(error)}") from error


def takes(function: Callable) -> tuple[str, ...]:
    """Names of the arguments that a function takes by keyword."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = inspect.signature(function).parameters
    return tuple(name for name, parameter in parameters.items() if parameter.kind in kinds)


# ------------------------------------------------------------------------------------------- files


def run_file(file: str | Path, field: str = ""):
    """Run a Python file as a module, which can import files next to it.

    Errors begin with `field`. Raises FileNotFoundError for a missing file, ValueError with the line
    if the file fails.
    """
    path, where = Path(file), f"{field}: " * bool(field)
    if not path.is_file() or path.suffix != ".py":
        hint = "; a notebook's functions are known in its own process" * (str(file) == NOTEBOOK)
        raise FileNotFoundError(f"{where}{str(file)!r} is no Python file; expected FILE.py{hint}")
    reach(path)
    spec = importlib.util.spec_from_file_location(f"lorax_outside_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up annotations here
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{where}{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        raise ValueError(f"{where}{line_of(error, str(file)) or file}: {reason(error)}") from error
    return module


def reach(file: str | Path) -> None:
    """Let a script import files next to it, as `python FILE` does."""
    folder = str(Path(file).absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def _file_of(function: Callable) -> str:
    """The file of a function or class, relative to the working directory if it is below it."""
    if inspect.isclass(function):
        file = getattr(sys.modules.get(function.__module__), "__file__", None)
    else:
        code = getattr(inspect.unwrap(function), "__code__", None)
        file = code and code.co_filename
    if not file or not os.path.isfile(file) or "ipykernel" in str(file):
        return NOTEBOOK
    path = Path(os.path.abspath(file))
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def line_of(error: BaseException, file: str) -> str:
    """FILE:LINE of the last call in `file` in an error's traceback, "" if there is none."""
    same = lambda frame: os.path.abspath(frame.filename) == os.path.abspath(file)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if same(frame)]
    return f"{file}:{frames[-1].lineno}" if frames else ""
