"""What ends a run early, or in part: said before it is trained, or kept and said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorax import config, resume, rounds, rundir
from lorax.files import write_json
from lorax.train import prepare

ROOT = Path(__file__).parents[1]
STUDY = """
from lorax.config import default

def get_config(arg=None):
    c = default()
    c.base, c.task.name, c.method.targets = "random:mlp-64-10", "digits", ("re:.*/kernel",)
    c.method.rank = 2
    c.train.update(steps=4, batch_size=8, warmup=0, parallel="none")
    c.eval.update(every=2, examples=50, batch_size=50)
    c.sweep.seed = (0, 1)
    return c
"""


@pytest.fixture
def go(tmp_path):
    """go(patch, *arguments): `python -m lorax.run` of the study in tmp_path / "run", after `patch`,
    which is Python."""
    study = tmp_path / "study.py"
    study.write_text(STUDY)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}

    def started(patch, *arguments):
        code = f"import sys; from lorax import run\n{patch}\nsys.exit(run.main(sys.argv))"
        return subprocess.run(
            [sys.executable, "-c", code, f"--config={study}", f"--workdir={tmp_path / 'run'}"]
            + [*arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return started


def status(workdir):
    return json.loads((workdir / "status.json").read_text())


# ----------------------------------------------------------------- after training: nothing is lost


def test_a_report_that_fails_fails_no_run(go, tmp_path):
    """Nor do TensorBoard's files; the same command then does what is left."""
    boom = "def boom(*_, **__): raise KeyError('x')\nfrom lorax import report\n"
    boom += "from lorax.track import tensorboard\n"
    done = go(boom + "report.write = tensorboard.Tracker.update = boom")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert "all members are trained, but TensorBoard, report failed; run the same command" in line
    assert "report: failed (KeyError: 'x'" in done.stdout
    workdir = tmp_path / "run"
    found = status(workdir)
    assert found["state"] == "trained" and found["failed"]["report"] == "KeyError: 'x'"
    assert "in boom" in (workdir / "errors.txt").read_text()
    assert sorted(p.name for p in (workdir / "adapters").iterdir()) == ["0", "1"]
    before = (workdir / "metrics.jsonl").read_bytes()
    again = go("")
    assert again.returncode == 0, again.stderr
    found = status(workdir)
    assert found["state"] == "finished" and "failed" not in found
    assert (workdir / "report.html").exists() and (workdir / "metrics.jsonl").read_bytes() == before


def test_a_section_that_fails_fails_no_run(go, tmp_path):
    """The page has the error in its place, the screen a line; the run is done."""
    boom = "def boom(*_, **__): raise KeyError('x')\nfrom lorax.report.sections import members\n"
    done = go(boom + "members.members = boom")
    assert done.returncode == 0 and done.stderr == ""
    assert "report: Members: failed (KeyError: 'x'" in done.stdout
    assert status(tmp_path / "run")["state"] == "finished"
    text = (tmp_path / "run" / "report.html").read_text()
    assert text.count("could not be made: KeyError: &#x27;x&#x27;") == 1
    assert "Learning curves" in text and "in boom" in (tmp_path / "run/errors.txt").read_text()


def test_a_full_disk_stops_a_run_in_one_line_and_the_same_command_goes_on(go, tmp_path):
    full = """
from lorax.train import checkpoint
before, calls = checkpoint.shutil.disk_usage, []
def usage(path):
    calls.append(path)  # the first is the check before training
    return before(path)._replace(free=10) if len(calls) > 2 else before(path)
checkpoint.shutil.disk_usage = usage
"""
    done = go(full)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("lorax: stopped: no space left on device: ")
    assert line.endswith("Fix that and run the same command to continue.")
    found = status(tmp_path / "run")
    assert found["state"] == "stopped" and found["reason"].startswith("no space left on device")
    assert not list((tmp_path / "run/checkpoints").rglob(".*.partial"))
    again = go("", "--config.analysis.report=False")
    assert again.returncode == 0, again.stderr
    assert status(tmp_path / "run")["state"] == "finished"
    assert "reason" not in status(tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "before", "state", "why"),
    [
        (OSError(28, "No space left on device"), "running", "stopped", "no space left on device"),
        (MemoryError("one member needs"), "running", "stopped", "one member needs"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), "running", "stopped", "RESOURCE_EXHAUSTED"),
        (KeyboardInterrupt(), "running", "stopped", "KeyboardInterrupt"),
        (ValueError("new_tokens: 400"), "running", "failed", "new_tokens: 400"),
        (KeyError("x"), "running", "failed", "KeyError: 'x'"),
        (OSError(28, "No space left on device"), "trained", "trained", "no space left on device"),
    ],
)
def test_a_run_that_an_error_ended_does_not_say_that_it_runs(tmp_path, error, before, state, why):
    write_json(tmp_path / "status.json", {"state": before, "members": {}})
    with pytest.raises(type(error)), rundir.recorded(tmp_path):
        raise error
    assert status(tmp_path)["state"] == state and status(tmp_path)["reason"].startswith(why)


def test_an_error_before_there_is_a_run_leaves_no_status(tmp_path):
    with pytest.raises(ValueError), rundir.recorded(tmp_path):
        raise ValueError("task.path")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- before training


def test_a_short_ulimit_is_one_line_and_no_crash_of_a_library(go, tmp_path):
    """XLA's threads would end the process with a stack of C++."""
    done = go("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1_500_000_000,) * 2)")
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("lorax: stopped: JAX needs at least 2.2 GB and 1.")
    assert "GB are left by ulimit -v" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("run/config.json", True), ("run/status.json", True), ("run/metrics.jsonl", True),
        ("run/report.html", True), ("run/.lock", True), ("run/adapters", False),
        ("run/checkpoints", False), ("run/tb", False), ("run", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_said_before_anything_is_trained(tmp_path, name, folder):
    path = tmp_path / "there" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if folder else path.write_text("")
    with pytest.raises(ValueError, match=f"--workdir: {path} is a fil|--workdir: {path} is a fol"):
        rundir.check_paths(tmp_path / "there" / "run")


def test_a_path_that_can_not_be_made_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="--workdir: .*; name another"):
        with rundir.locked(Path("/proc/none/run")):
            pass


def test_a_disk_without_room_is_refused_before_training(tmp_path, monkeypatch):
    scope = {}
    exec(STUDY, scope)
    groups = prepare.groups(config.members(scope["get_config"]()), lambda line: None)
    rounds.check_disk(tmp_path, groups)
    free = rounds.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(rounds.shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match=r"needs 0.00 GB for checkpoints and adapters of 2 memb"):
        rounds.check_disk(tmp_path, groups)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/x").write_bytes(b"0" * 100_000)  # what is there is not written again
    rounds.check_disk(tmp_path, groups)


def revised(tmp_path, state="finished", begun=True, **changes):
    """What `check_same_config` says of a run that began with the default config."""
    write_json(tmp_path / "config.json", {"config": json.loads(config.default().to_json())})
    write_json(tmp_path / "status.json", {"state": state})
    (tmp_path / "metrics.jsonl").write_text("{}\n" * begun)
    c = config.default()
    for key, value in changes.items():
        *section, name = key.split("__")
        (c[section[0]] if section else c)[name] = value
    return resume.check_same_config(tmp_path, c)


@pytest.mark.parametrize("key", config.REVISABLE)
def test_keys_that_only_evaluate_or_draw_may_change(tmp_path, key):
    (tmp_path / "checkpoints").mkdir()
    value = config.flat(config.default())[key]
    another = {
        bool: lambda: not value,
        str: lambda: "accuracy",
        tuple: lambda: ("FILE.py:statistic",),
    }
    other = another.get(type(value), lambda: (value or 0) + 1)()
    argument = key.replace(".", "__")
    assert revised(tmp_path, **{argument: value}) == []
    assert revised(tmp_path, **{argument: other}) == [key]


def test_other_keys_may_not_and_nothing_is_trained_anew(tmp_path):
    with pytest.raises(ValueError, match=r"another config \(it differs in train.steps\)"):
        revised(tmp_path, "running", train__steps=7, eval__beams=2)
    with pytest.raises(ValueError, match="finished run with other eval.beams, and its checkpoints"):
        revised(tmp_path, eval__beams=2)
    assert revised(tmp_path, "running", eval__beams=2) == ["eval.beams"]


def test_a_run_that_trained_nothing_yet_may_get_any_config(tmp_path):
    """Such as what would fit, where memory was short."""
    assert revised(tmp_path, "stopped", False, train__accumulate=4) == ["train.accumulate"]
