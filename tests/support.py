"""What tests share: where the real data is, and libraries that only some machines have."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(os.environ.get("LORAX_DATA", Path(__file__).parents[2] / "shared" / "data"))


def require(name: str):
    """A library to compare with. Skips where it is missing, fails if LORAX_REQUIRE_PARITY=1."""
    if os.environ.get("LORAX_REQUIRE_PARITY") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name)


def data(path: str) -> Path:
    """A file or folder of the real data. Skips where it is missing."""
    if not (DATA / path).exists():
        pytest.skip(f"no {path} in {DATA}")
    return DATA / path


def real_model(name: str) -> Path:
    """The directory of a real pretrained model, "minilm" or "smollm2", in the folder LORAX_MODELS,
    where the data's models/fetch.py puts it. Skips without that folder."""
    fetch, folder = data("models/fetch.py"), os.environ.get("LORAX_MODELS")
    if not folder:
        pytest.skip(f"LORAX_MODELS names no folder for what {fetch} makes")
    if not (Path(folder) / name / "complete").exists():
        subprocess.run([sys.executable, fetch, folder, name], check=True)
    return Path(folder) / name


def traced(monkeypatch, module, name: str) -> list:
    """A list that grows by one with every call of `module.name`; what JAX prints of a program is no
    witness, it may inline what was called."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(name) or function(*args))
    return calls


def few(values, keep, slow=None) -> list:
    """Parameters of a test: those in `keep` as they are, the others marked slow; with `slow` only
    those in it are, and the rest is marked soak."""

    def mark(value):
        if value in keep:
            return value
        tier = pytest.mark.slow if slow is None or value in slow else pytest.mark.soak
        return pytest.param(*_tuple(value), marks=tier)

    return [mark(value) for value in values]


def _tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)
