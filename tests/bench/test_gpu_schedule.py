"""`lorax.bench gpu`: what hangs, dies or fails costs its own numbers alone; time is kept."""

import copy
import sys
import time

import pytest

from lorax.bench import __main__ as bench
from lorax.bench.gpu import command, schedule
from lorax.bench.gpu.measurements import Measurement

WORKER = """
import json, os, sys, time
say = lambda **line: print(json.dumps(line), flush=True)
if "no device" in sys.argv[1]:
    sys.exit("Traceback\\nRuntimeError: no device found")
say(machine={"name": "X1", "versions": {"jax": "0"}, "pid": os.getpid()}, small="small" in sys.argv)
for line in sys.stdin:
    name = line.strip()
    say(row={"case": name, "path": f"{sys.argv[1]} {os.getpid()}", "ms": 2.0, "phases": []})
    if "hangs" in name: time.sleep(60)
    if "dies" in name: print("CUDA_ERROR: lost", file=sys.stderr, flush=True); os._exit(7)
    if "breaks" in name: say(end="failed", why="no memory", broken=True)
    elif "skips" in name: say(end="skipped", why="not here", broken=False)
    else: say(end="done", why="", broken=False)
"""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """(minutes, measurements (name, side, seconds)) -> (results, what was kept, lines said)."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(schedule, "WORKER", (sys.executable, str(script)))
    monkeypatch.setattr(schedule, "PATIENCE", (1, 0))
    monkeypatch.setattr(schedule, "START", 1)

    def run(minutes, *named, small=False, only=""):
        listed = [Measurement(*each, None) for each in named]
        monkeypatch.setattr(schedule, "measurements", lambda sizes: listed)
        kept, said = [], []
        keep = lambda results: kept.append(copy.deepcopy(results))
        return schedule.run(minutes, small, only, keep, said.append), kept, said

    return run


def test_what_hangs_dies_or_breaks_costs_itself_alone(measure):
    names = ("first", "hangs", "second", "dies", "third", "breaks", "fourth", "skips", "fifth")
    results, kept, said = measure(1, *((name, "jax", 0) for name in names))
    found = {m["name"]: (m["status"], m["why"]) for m in results["measurements"]}
    ended = found.pop("hangs")
    assert ended[0] == "failed" and ended[1].startswith("ended after 1 s")
    died = "the process ended with exit code 7: CUDA_ERROR: lost"
    assert found.pop("dies") == ("failed", died)
    assert found.pop("breaks") == ("failed", "no memory")
    assert found.pop("skips") == ("skipped", "not here")
    assert set(found.values()) == {("done", "")} and len(found) == 5
    # each row was kept, also of what failed; a new process after each of the three
    assert [len(m["rows"]) for m in results["measurements"]] == [1] * 9
    paths = [m["rows"][0]["path"] for m in results["measurements"]]
    assert len(set(paths)) == 4 and paths[6] == paths[8]
    rows = [sum(len(m["rows"]) for m in each["measurements"]) for each in kept]
    assert set(rows) == set(range(10)) and rows == sorted(rows)
    assert sum("left: first: jax" in line for line in said) == 1
    assert schedule.exit_code(results) == 1


def test_a_side_has_a_process_of_its_own(measure):
    results, _, _ = measure(1, ("a", "jax", 0), ("b", "torch", 0), ("c", "torch", 0))
    paths = [m["rows"][0]["path"].split() for m in results["measurements"]]
    assert [side for side, _ in paths] == ["jax", "torch", "torch"]
    assert paths[0][1] != paths[1][1] == paths[2][1]
    assert schedule.exit_code(results) == 0


def test_time_is_kept(measure):
    """Too long an estimate is skipped, what is shorter still runs, and the end is the end."""
    begin = time.monotonic()
    results, _, _ = measure(0.05, ("long", "jax", 50), ("short", "jax", 0), ("hangs", "jax", 0))
    assert time.monotonic() - begin < 10
    long, short, hangs = results["measurements"]
    assert long["status"] == "no time" and long["why"].startswith("takes about 50 s, ")
    assert short["status"] == "done"
    assert hangs["status"] in ("failed", "no time") and len(hangs["rows"]) == 1
    results["measurements"].pop()
    assert schedule.exit_code(results) == 3


def test_on_a_cpu_estimates_do_not_count(measure):
    results, _, _ = measure(0.5, ("long", "jax", 500), small=True)
    assert results["measurements"][0]["status"] == "done"


def test_only_some_are_measured_or_the_names_are_said(measure):
    results, _, _ = measure(1, ("product", "jax", 0), ("step", "jax", 0), only="st")
    assert [m["name"] for m in results["measurements"]] == ["step"]
    with pytest.raises(ValueError, match="--only: 'x' is in no name; there is product, step$"):
        measure(1, ("product", "jax", 0), ("step", "jax", 0), only="x")


def test_ctrl_c_ends_the_process_and_is_one_line(measure, tmp_path, monkeypatch, capsys):
    ended, close = [], schedule.Worker.close
    monkeypatch.setattr(schedule.Worker, "close", lambda self: ended.append(self) or close(self))

    def interrupt(self, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(schedule.Worker, "ask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(1, ("a", "jax", 0))
    assert len(ended) == 1
    for file in (None, str(tmp_path / "x.json")):
        assert command.main(1, file, True, "") == 130
        said = f"; what was measured is in {file}" if file else ""
        assert capsys.readouterr().err == f"lorax: stopped{said}\n"
    assert (tmp_path / "x.json").exists()

    monkeypatch.setattr(schedule.Worker, "line", interrupt)  # while the process starts
    with pytest.raises(KeyboardInterrupt):
        measure(1, ("a", "jax", 0))
    assert ended[-1].process.returncode is not None and len(ended) == 4


def test_no_device_is_one_line(measure, monkeypatch):
    monkeypatch.setattr(schedule, "JAX", "no device")
    with pytest.raises(RuntimeError, match="exit code 1: RuntimeError: no device found$"):
        measure(1, ("a", "jax", 0))


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["gpu", "sweep"], "gpu: must be alone"),
        (["gpu", "--rounds=3"], "--rounds: not for gpu"),
        (["gpu", "--minutes=0"], "--minutes: 0 given, must be above 0"),
        (["sweep", "--minutes=3"], "--minutes: only for gpu"),
        (["sweep", "--only=x"], "--only: only for gpu"),
        (["sweep", "--rounds=0"], "--rounds: 0 given, must be at least 1"),
        (["gpu", f"--json={__file__}/x"], "--json: "),
        (["sweep", "--json=/dev/null"], "--json: '/dev/null' is not a regular file"),
    ],
)
def test_an_option_that_does_not_belong_is_refused(arguments, why, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.parametrize(
    "ms, text", [(0.00204, "2.04 us"), (0.9996, "1000 us"), (87, "87 ms"), (1234, "1.23 s")]
)
def test_durations(ms, text):
    assert schedule.duration(ms) == text
