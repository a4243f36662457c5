"""Imports point one way, and what answers first does not wait for JAX."""

import ast
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import lorax

ROOT = pathlib.Path(lorax.__file__).parent
#: A module may import those to its left and its own package. What is not named here (the commands
#: and what they show) stands on top: it may import anything, and nothing below may import it.
LAYERS = (
    {
        "callable",
        "chat_files",
        "errors",
        "fields",
        "files",
        "hosts",
        "memory",
        "outside",
        "catalogue",
        "config",
        "rundir",
    }
    | {"calls", "devices", "divided", "halving", "meshes", "ranges", "scales", "tree", "vocabulary"}
    | {"diffusion", "factorization", "lanczos", "permutations", "progress", "spectrum", "xla"},
    {"grouped"},
    {"ops", "interop"},
    {"gather", "leaves"},
    {"intercept", "interpret"},
    {"losses"},
    {"denoising"},
    {"quant", "methods", "models", "sharding"},
    {"adapters", "decode", "generation_config", "sampling"},
    {"tasks"},
    {"train"},
)
NEVER = {
    "analysis": {"train", "tasks", "methods", "models", "ops", "leaves", "intercept", "quant"},
    "interop": {"train", "tasks", "methods", "models"},
}
TOP = len(LAYERS)


def level(part: str) -> int:
    return next((i for i, parts in enumerate(LAYERS) if part in parts), TOP)


def imported(file: pathlib.Path) -> set[str]:
    """First words below `lorax` of all that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    below = {name.split(".")[1] for name in names if name.startswith("lorax.")}
    return {part for part in below if (ROOT / part).is_dir() or (ROOT / f"{part}.py").exists()}


FILES = {
    str(file.relative_to(ROOT)): (
        file.relative_to(ROOT).parts[0].removesuffix(".py"),
        imported(file),
    )
    for file in sorted(ROOT.rglob("*.py"))
    if file.relative_to(ROOT).parts[0] not in ("__init__.py", "assets")
}


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file):
    part, others = FILES[file]
    others = others - {part}
    if level(part) < TOP:
        assert {other for other in others if level(other) > level(part)} == set()
    assert others & NEVER.get(part, set()) == set()


def test_the_rule_is_about_modules_that_exist():
    parts = {part for part, _ in FILES.values()}
    assert set().union(*LAYERS) | set(NEVER) <= parts
    assert FILES["train/step.py"][1] == {
        "leaves",
        "losses",
        "ops",
        "tasks",
        "train",
    }  # and the reader reads
    assert FILES["models/base.py"][1] >= {"ops", "tree", "interop", "models"}


def in_a_fresh_process(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    ).stdout.strip()


@pytest.mark.parametrize("module", ["lorax", "lorax.config", "lorax.run"])
def test_import_without_jax(module):
    heavy = ("jax", "flax", "optax", "pandas", "matplotlib", "torch")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    assert in_a_fresh_process(code) == "[]"


@pytest.mark.parametrize("module", ["lorax.xray.__main__", "lorax.convert"])
def test_help_without_numpy(module):
    code = f"import atexit, sys, {module} as command; heavy = 'numpy', 'rich', 'safetensors'; "
    code += "atexit.register(lambda: print([m for m in heavy if m in sys.modules])); "
    said = in_a_fresh_process(code + "command.main(['--help'])")
    assert said.startswith("usage: ") and said.splitlines()[-1] == "[]"


def test_a_run_is_read_without_what_takes_a_second_to_import():
    heavy = ("jax", "scipy.stats", "sklearn", "matplotlib")
    code = "import sys; from lorax.analysis import answer, figures, intrinsic, runs, tables; "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    assert in_a_fresh_process(code) == "[]"


def test_bfloat16_is_read_without_jax(tmp_path):
    """numpy has no such type of its own: safetensors know it only once ml_dtypes is there."""
    file = tmp_path / "adapter_model.safetensors"
    header = b'{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\x80\x3f\x00\xc0")
    code = f"import sys, pathlib; from lorax.interop import peft; f = pathlib.Path({str(file)!r}); "
    code += "print(peft.read_tensors(f)[0]['x'].tolist(), 'jax' in sys.modules)"
    assert in_a_fresh_process(code) == "[1.0, -2.0] False"


def test_every_name_of_the_python_face_is_there():
    for name in ("load", "method", "merge", "apply", "sites"):
        assert callable(getattr(lorax, name)) and name in dir(lorax)
    assert lorax.runs.__name__ == "lorax.analysis.runs"
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = lorax.laod


def test_beside_a_clone_that_is_called_lorax_the_package_is_found(tmp_path):
    """Installed with pip install -e; the clone's own folder is none, though Python might say so."""
    pytest.importorskip("setuptools", minversion="77")  # older ones need a package more
    clone, site = tmp_path / "lorax", tmp_path / "site"
    shutil.copytree(ROOT, clone / "lorax", ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT.parent / name, clone)
    code = "from setuptools.build_meta import build_editable as build; "
    code += f"print(build({str(site)!r}))"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(site / built.stdout.split()[-1]) as wheel:
        wheel.extractall(site)
    code = f"import importlib.util, site; site.addsitedir({str(site)!r}); "
    code += "print(importlib.util.find_spec('lorax').origin)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],  # without what else is installed
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(clone / "lorax/__init__.py"), found.stderr
