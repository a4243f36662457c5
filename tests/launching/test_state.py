"""What the small files of a part say of it, whatever became of its worker."""

import json
import os
import signal
import subprocess
import sys

import pytest

from lorax import rundir
from lorax.launching import state


@pytest.fixture
def part(tmp_path):
    directory = tmp_path / "parts" / "3"
    directory.mkdir(parents=True)
    return directory


def seen(part):
    found = state.read(part)
    assert found["part"] == 3
    return found["state"], found["tries"]


def test_a_part_that_is_trained(part):
    assert seen(part) == ("waiting", 0) and state.job(part) == ""
    state.launch(part)
    state.submitted(part, "slurm 12_3")
    assert seen(part) == ("waiting", 0) and state.job(part) == "slurm 12_3"
    with rundir.locked(part), state.recorded(part):
        assert seen(part) == ("running", 1) and state.read(part)["host"] == os.uname().nodename
    assert state.outcome(part) == (True, False, None)
    state.end(part, None)
    assert seen(part) == ("done", 1) and state.job(part) == ""


@pytest.mark.parametrize(
    ("error", "again", "why"),
    [
        (ValueError("lr: 0 given"), False, "lr: 0 given"),
        (FileNotFoundError(2, "No such file", "x.json"), False, "no such file: x.json"),
        (RuntimeError("device lost"), True, "device lost"),
        (OSError(28, "No space left on device"), True, "no space left on device"),
        (SystemExit(-1), True, "interrupted"),
    ],
)
def test_a_worker_that_ends_says_why_and_whether_another_may_do_better(part, error, again, why):
    state.launch(part)
    for tries in (1, 2):
        with pytest.raises(type(error)), rundir.locked(part), state.recorded(part):
            assert seen(part) == ("running" if tries == 1 else "again", tries)
            raise error
        assert state.outcome(part) == (False, again, f"{why}; see {part}/worker.log")
        assert seen(part) == ("again" if again else "failed", tries)
    assert state.read(part)["reason"] == why
    state.end(part, f"{why}; see the log")
    assert seen(part) == ("failed", 2) and state.read(part)["reason"] == f"{why}; see the log"
    state.launch(part)  # the command is repeated
    assert seen(part) == ("waiting", 0)


DIES = """
import os, sys, pathlib
from lorax import rundir
from lorax.launching import state
part = pathlib.Path(sys.argv[1])
with rundir.locked(part), state.recorded(part):
    os.kill(os.getpid(), 9)
"""


def test_a_worker_that_is_killed_is_told_from_one_that_runs(part):
    assert state.outcome(part).reason.startswith("its worker did not begin; see ")
    done = subprocess.run([sys.executable, "-c", DIES, str(part)])
    assert done.returncode == -signal.SIGKILL and seen(part) == ("again", 1)
    why = f"its worker on {os.uname().nodename} died; see {part}/worker.log"
    assert state.outcome(part) == (False, True, why)
    facts = json.loads((part / state.WORKER).read_text())
    (part / state.WORKER).write_text(json.dumps(facts | {"host": "elsewhere"}))
    assert seen(part) == ("running", 1) and state.read(part)["host"] == "elsewhere"
    assert "an earlier worker on elsewhere" in state.outcome(part).reason


PRINTS = """
import os, sys, pathlib
from lorax.launching import state
try:
    with state.logged(pathlib.Path(sys.argv[1])):
        print("from Python")
        os.system("echo from a library >&2")
        raise KeyError("x")
except KeyError:
    print("after")
"""


def test_all_that_a_worker_prints_is_in_its_log(part):
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for _ in range(2):
        words = [sys.executable, "-c", PRINTS, str(part)]
        done = subprocess.run(words, capture_output=True, env=usual)
        assert (done.stdout, done.stderr) == (b"after\n", b"")
    text = (part / state.LOG).read_text()
    assert text.count("from Python\nfrom a library\nTraceback") == text.count("KeyError: 'x'") == 2
