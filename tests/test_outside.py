"""Functions of the user's own by name: found, remembered, and every mistake one line."""

import functools
import re
import sys

import pytest

from lorax import outside

SOURCE = """
import neighbour

def build(width=4):
    return neighbour.double(width)

def fails():
    return 1 / 0

VALUE = 3
"""


class Thing:
    """A class at the top level is a function as well."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "neighbour.py").write_text("def double(x):\n    return 2 * x\n")
    return tmp_path


def test_a_name_gives_the_function_of_its_file(folder):
    function = outside.resolve("mine.py:build")
    assert function(3) == 6 and outside.takes(function) == ("width",)
    assert outside.resolve("mine.py:build") is function  # the file is run once
    assert outside.spelled(function) == "mine.py:build"
    (folder / "mine.py").write_text(SOURCE.replace("double(width)", "double(width) + 1"))
    assert outside.resolve(f"{folder}/mine.py:build")(3) == 7
    assert outside.is_name("a/b.py:c") and not outside.is_name("gpt2-nano")


def test_a_function_in_a_config_becomes_its_name_and_stays_known(folder):
    given = (test_a_name_gives_the_function_of_its_file, "gpt2-nano", Thing)
    names = outside.spell(given)
    assert names[1] == "gpt2-nano" and re.fullmatch(r".*test_outside\.py:Thing", names[2])
    assert [outside.resolve(name) for name in (names[0], names[2])] == [given[0], Thing]
    assert outside.spell(None) is None and outside.spell(3) == 3


def test_a_function_of_a_notebook_is_known_in_its_process(folder):
    scope = {}
    exec(compile("def build(): return 5", "<cell>", "exec"), scope)
    assert outside.spelled(scope["build"]) == "notebook.py:build"
    assert outside.resolve("notebook.py:build")() == 5
    with pytest.raises(FileNotFoundError, match="known in its own process"):
        outside.resolve("notebook.py:other")


@pytest.mark.parametrize("value", [lambda: 1, functools.partial(print, "a")])
def test_what_has_no_name_in_a_file_is_refused(value):
    with pytest.raises(ValueError, match="^base: .* given; it must be a function that a def"):
        outside.spell((value,), "base")


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("nowhere.py:build", FileNotFoundError, "base: 'nowhere.py' is no Python file"),
        ("mine.py:bulid", ValueError, "base: mine.py has no function 'bulid'.*did you mean 'build"),
        ("mine.py:VALUE", ValueError, "mine.py has no function 'VALUE'; it has build, fails"),
        ("mine.py", ValueError, "base: 'mine.py' given, must be FILE.py:function"),
        ("bad.py:f", ValueError, "base: .*bad.py:2: "),
        ("worse.py:f", ValueError, "base: worse.py:3: NameError: name 'x' is not defined"),
    ],
)
def test_mistakes_are_one_line(folder, name, error, message):
    (folder / "bad.py").write_text("\ndef f(:\n")
    (folder / "worse.py").write_text("def g():\n    pass\nx\n")
    with pytest.raises(error, match=message):
        outside.resolve(name, "base")


def test_a_function_that_fails_is_told_by_its_line(folder):
    function = outside.resolve("mine.py:fails")
    with pytest.raises(ValueError, match="^base: mine.py:8: ZeroDivisionError: division by zero$"):
        outside.call(function, field="base")
    with pytest.raises(ValueError, match="mine.py: TypeError: .*takes 0 positional"):
        outside.call(function, 3)
