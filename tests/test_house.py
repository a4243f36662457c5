"""Functions are short, and what begins with an underscore stays in its module."""

import ast
import pathlib

import lorax

ROOT = pathlib.Path(lorax.__file__).parent
MOST = 60  # lines of a function without its docstring
LONGER = {"quant/mosaic.py:_product"}  # a GPU kernel
FILES = {str(file.relative_to(ROOT)): file for file in sorted(ROOT.rglob("*.py"))}


def parsed(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def lines_of(function) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        doc = function.body[0]
        lines -= doc.end_lineno - doc.lineno + 1
    return lines


def functions(tree) -> dict[str, int]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name: lines_of(node) for node in ast.walk(tree) if isinstance(node, kinds)}


def test_no_function_is_longer_than_a_screen():
    found = {
        f"{name}:{function}"
        for name, file in FILES.items()
        for function, lines in functions(parsed(file)).items()
        if lines > MOST
    }
    assert found == LONGER  # one that is short by now comes off the list


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def private(tree) -> set[str]:
    """`_names` of other modules of lorax that a module imports, or reads as attributes of them."""
    modules, found = {}, set()
    is_private = lambda name: name.startswith("_") and not name.startswith("__")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lorax":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if is_private(alias.name):
                    found.add(full)
                elif is_module(full):
                    modules[alias.asname or alias.name] = full
        elif isinstance(node, ast.Import):
            modules |= {a.asname: a.name for a in node.names if a.asname and "lorax" in a.name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules and is_private(node.attr):
                found.add(f"{modules[node.value.id]}.{node.attr}")
    return found


def test_no_module_uses_a_private_name_of_another():
    found = {name: private(parsed(file)) for name, file in FILES.items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_every_test_of_a_list_is_there(collected):
    """With its parameters, if the test was collected beside this one, as in a whole run."""
    here = pathlib.Path(__file__).parent
    listed = [set((here / f"{tier}.txt").read_text().splitlines()) for tier in ("slow", "soak")]
    assert not listed[0] & listed[1]
    listed, whole = listed[0] | listed[1], lambda name: name.partition("[")[0]
    for name in set(map(whole, listed)):
        file, _, function = name.partition("::")
        assert function in functions(parsed(here.parent / file)), name
    found = set(map(whole, collected))
    assert {name for name in listed if whole(name) in found} <= collected | found


def test_the_rules_find_what_they_forbid():
    text = "from lorax import tree\nfrom lorax.ops import _wide\ntree._join(1)\nx._replace(a=1)"
    assert private(ast.parse(text)) == {"lorax.ops._wide", "lorax.tree._join"}
    text = 'def f():\n    """Doc.\n\n    More.\n    """\n    return 1\n'
    assert functions(ast.parse(text)) == {"f": 2}
