"""The notebooks: they run on a small run from top to bottom, and read well as committed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import quick
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN = (
    "--config=configs/gpt2_rank_sweep.py",
    "--config.sweep.rank=(2,8)",
    "--config.train.steps=4",
    "--config.train.batch_size=2",
    "--config.train.seq_len=64",
    "--config.train.warmup=0",
    "--config.eval.every=2",
    "--config.eval.examples=8",
    "--config.eval.test=8",
    "--config.task.n_train=64",
    "--config.analysis.report=False",
)
SEARCH = (
    "--config=configs/intrinsic_dimension_digits.py",
    "--config.base=random:mlp-64-16-10",
    "--config.train.steps=8",
    "--config.eval.every=8",
    "--config.sweep.dim=(8,64)",
    "--config.sweep.lr=(1e-1,)",
    "--config.search.baseline_lr=(1e-2,)",
    "--config.search.lora_ranks=()",
    "--config.search.seeds=(0,1)",
    "--config.search.rounds=1",
    "--config.search.points=1",
    "--config.analysis.report=False",
)
# What a notebook trains itself, made smaller.
SMALLER = {
    "config.train.steps = 60": "config.train.steps = 2",
    "config.eval.every = 20": "config.analysis.report = False",
}


def environment(**more):
    # The devices that a person has, not the tests' eight; compiled quickly.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    flags = " ".join(f"--{name}={value}" for name, value in quick.OPTIONS.items())
    here = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": flags}
    return os.environ | here | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | more


def made(arguments, workdir):
    command = [sys.executable, "-m", "lorax.run", *arguments, f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(workdir)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(RUN, tmp_path_factory.mktemp("notebooks") / "run")


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    return made(SEARCH, tmp_path_factory.mktemp("notebooks") / "search")


def code(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def pictures(notebook):
    outputs = [output for cell in code(notebook).values() for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_five():
    assert [file.stem[:2] for file in NOTEBOOKS] == [f"{n}_" for n in range(1, 6)]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_runs_from_top_to_bottom(file, request, monkeypatch):
    # The kernel of this interpreter, whatever kernels a person has installed.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    committed = nbformat.read(file, as_version=4)
    notebook = nbformat.read(file, as_version=4)
    text = "".join(cell.source for cell in code(notebook).values())
    where = {}
    for name, fixture in (("LORAX_RUN", "run"), ("LORAX_SEARCH", "search")):
        if name in text:
            where[name] = request.getfixturevalue(fixture)
    for cell in code(notebook).values():
        cell.outputs, cell.execution_count = [], None
        for large, small in SMALLER.items():
            cell.source = cell.source.replace(large, small)
    shorter = "".join(cell.source for cell in code(notebook).values()) != text
    assert bool(where) != shorter  # a notebook reads a run or trains one

    resources = {"metadata": {"path": str(file.parent)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    client.execute(env=environment(**where))  # raises where a cell does
    for name, cell in code(notebook).items():
        assert cell.execution_count, name
        given = code(committed)[name].outputs
        assert bool(cell.outputs) == bool(given), f"{name}: outputs are not committed"
    assert pictures(notebook) == pictures(committed) > 0


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_reads_well_as_it_is_committed(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert file.stat().st_size < 400_000
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert notebook.cells[0].source.startswith("# ")
    counts = [cell.execution_count for cell in code(notebook).values()]
    assert counts == list(range(1, len(counts) + 1))
    for cell in notebook.cells:
        assert re.fullmatch("[a-z0-9-]+", cell.id) and not cell.metadata
    for name, cell in code(notebook).items():
        assert len(cell.source.splitlines()) <= 30, name
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", name
            written = [output.get("text", "")]
            written += [x for kind, x in output.get("data", {}).items() if kind[:5] != "image"]
            assert not re.search(r"(?<![\w.<])(/\w+){2}|[A-Z]:\\", " ".join(written)), name
