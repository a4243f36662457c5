"""Run directories that lorax 0.1.0 left: they open, their report is drawn, and they continue."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import few

from lorax import outside, report, resume
from lorax.analysis import runs

HERE = Path(__file__).parent / "runs_of_0_1_0"
# The subspaces and texts take longer to compile.
STUDIES = few(["sweep", "methods", "text", "search"], [], ["methods", "search"])
TIMES = ("seconds", "step_ms", "tokens_per_second")


@pytest.fixture
def left(tmp_path):
    """(study, "finished" or "stopped") -> a copy of the run directory."""

    def unpack(study: str, state: str) -> Path:
        with zipfile.ZipFile(HERE / f"{study}.zip") as archive:
            names = [name for name in archive.namelist() if name.startswith(state + "/")]
            archive.extractall(tmp_path, names)
        return tmp_path / state

    return unpack


@pytest.mark.parametrize("study", ["sweep", "methods", "text", "search"])
def test_a_finished_run_opens_and_its_report_is_drawn(study, left):
    folder = left(study, "finished")
    run = runs.load(folder)
    assert run.status["state"] == "finished"
    assert set(run.metrics["member"]) == set(run.members["member"])
    tables = {file.name: file.read_text() for file in (folder / "analysis").glob("*.csv")}
    page = report.write(folder)  # a section that fails warns, which is an error here
    assert page.stat().st_size and list((folder / "figures").glob("*.csv"))
    if "members.csv" in tables:
        was, now = (
            text.splitlines() for text in (tables["members.csv"], _read(folder, "members.csv"))
        )
        assert len(was) == len(now) and set(was[0].split(",")) <= set(now[0].split(","))


def _read(folder: Path, name: str) -> str:
    return (folder / "analysis" / name).read_text()


@pytest.mark.parametrize("study", STUDIES)
def test_a_stopped_run_continues_to_what_it_would_have_been(study, left):
    workdir, whole = left(study, "stopped"), left(study, "finished")
    begun = _lines(workdir)
    done = _again(study, workdir, "--config.analysis.report=False")  # a key that may change
    assert done.returncode == 0, done.stderr
    assert "continues at step" in done.stdout
    got, expected = _lines(workdir), _lines(whole)
    assert got[: len(begun)] == begun  # what stood there was not touched
    assert len(got) == len(expected)
    for line, wanted in zip(got, expected, strict=True):
        assert line.keys() == wanted.keys()
        for key, value in wanted.items():
            # Another processor rounds otherwise.
            near = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert line[key] == near, (key, line, wanted)
    files = lambda folder: sorted(p.relative_to(folder) for p in folder.rglob("*.safetensors"))
    assert files(workdir / "adapters") == files(whole / "adapters")
    for file in files(whole / "adapters"):
        one, other = (load_file(folder / "adapters" / file) for folder in (workdir, whole))
        assert one.keys() == other.keys()
        for name in other:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_finished_run_is_left_alone(left):
    workdir = left("sweep", "finished")
    before = {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
    done = _again("sweep", workdir)
    assert done.returncode == 0 and "is finished" in done.stdout, done.stderr
    assert {f: f.read_bytes() for f in workdir.rglob("*") if f.is_file()} == before


def test_the_default_of_a_key_that_0_1_0_lacks_is_not_assumed(left):
    """Test rows would take away validation rows; the message names the flag that continues."""
    workdir = left("sweep", "stopped")
    config = outside.resolve(f"{HERE / 'study.py'}:get_config")()
    with pytest.raises(ValueError, match="began before .* eval.test; .* --config.eval.test=0,"):
        resume.check_same_config(workdir, config)
    with config.unlocked():
        config.eval.test = 0
    assert resume.check_same_config(workdir, config) == []
    config.eval.keep = "best"
    with pytest.raises(ValueError, match="continue it with --config.eval.keep=last,"):
        resume.check_same_config(workdir, config)


def _again(study: str, workdir: Path, *flags: str):
    """The command of the run once more, on as many devices as it was begun with."""
    words = [
        "-m",
        "lorax.run",
        f"--config={HERE / 'study.py'}:{study}",
        f"--workdir={workdir}",
        "--config.eval.test=0",  # 0.1.0 had no test rows
        *flags,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300
    )


def _lines(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock says."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
