"""A launched run is the run of one machine, whatever happens to its workers."""

import json
import os
import random
import time

import pytest
from launching import forks, sweeps
from safetensors.numpy import load_file

from lorax import launch, resume, rundir
from lorax.launching import local, machines, parts, state

#: Of ml_collections, which reads the config's script.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.*:DeprecationWarning")

STUDY = """
from lorax.config import default

def get_config(arg=None):
    c = default()
    c.base, c.task.name, c.method.targets = "random:mlp-64-10", "digits", ("re:.*/kernel",)
    c.train.update(steps=8, batch_size=8, warmup=0, width=1)
    c.eval.update(every=2, examples=20, batch_size=20)
    c.analysis.report, c.track = False, ()
    c.sweep.rank = (1, 3)
    c.sweep.seed = tuple(range(4))
    if arg == "halving":
        c.train.parallel = "none"
        c.sweep.seed, c.sweep.lr, c.sweep.tune = (0, 1), (1e-3, 1e-2, 1e-1, 1e3), "lr"
        c.halving.rungs, c.halving.seeds = (0.25, 0.5), 1
    elif arg == "search":
        c.train.parallel, c.method.name, c.method.targets = "none", "subspace", ()
        c.sweep.rank, c.sweep.dim, c.sweep.seed, c.sweep.lr = (), (2, 40), (0,), (1e-2,)
        c.search.update(threshold=0.1, points=1)
        c.train.steps, c.eval.every = 20, 10
    elif arg:
        c.analysis.trajectory, c.eval.keep, c.sweep.full_lr = True, "best", (1e-3, 1e30)
    return c
"""


@pytest.fixture(scope="module")
def server():
    server = forks.Server()
    yield server
    server.close()


@pytest.fixture
def start(server, monkeypatch, tmp_path):
    """start(workdir, variant, *options): the exit code of lorax.launch with forked workers."""
    study = tmp_path / "study.py"
    study.write_text(STUDY)
    server.workers.clear()
    monkeypatch.setattr(local, "start", server.start)
    machine = machines.Machine("cpu", forks.DEVICES, forks.DEVICES)
    monkeypatch.setattr(machines, "cpu", lambda: machine)

    def started(workdir, variant, *options):
        words = [f"--config={study}:{variant}".rstrip(":"), f"--workdir={workdir}"]
        return launch.main(["lorax.launch", "--on=local", *words, *options])

    return started


@pytest.fixture(scope="module")
def alone(tmp_path_factory, server):
    """alone(variant): the directory of the run of one machine."""
    folder, made = tmp_path_factory.mktemp("alone"), {}
    (folder / "study.py").write_text(STUDY)

    def ran(variant):
        if variant not in made:
            made[variant] = folder / (variant or "plain")
            config = f"--config={folder}/study.py:{variant}".rstrip(":")
            arguments = [config, f"--workdir={made[variant]}"]
            assert server.fork("run", arguments, folder / "log").wait() == 0
        return made[variant]

    return ran


def assert_same(launched, alone):
    """All but times, places and checkpoints is the same, bit for bit."""
    folders = (rundir.ADAPTERS, rundir.ROWS, rundir.TEXTS, rundir.TRAJECTORY)
    files = lambda run: sorted(
        str(path.relative_to(run)) for name in folders for path in (run / name).rglob("*.*")
    )
    assert files(launched) == files(alone)
    for name in (rundir.MEMBERS, rundir.METRICS, *files(alone)):
        assert (launched / name).read_bytes() == (alone / name).read_bytes(), name
    ours, theirs = map(rundir.read_config, (launched, alone))
    differ = {"command": "", "device": "", "date": ""}
    assert ours | differ == theirs | differ
    ours, theirs = map(_without_times, (launched, alone))
    assert ours == theirs


def _without_times(directory):
    status = rundir.read_status(directory) | {"wall_seconds": 0}
    for row in status["members"].values():
        row["seconds"] = row["step_ms"] = 0
    return status


def test_a_launched_sweep_is_the_run_of_one_machine(start, alone, tmp_path, server, capsys):
    """Two groups in four parts, members that diverge, the best step, test rows, trajectories."""
    workdir = tmp_path / "run"
    assert start(workdir, "all", "--workers=4") == 0
    assert_same(workdir, alone("all"))
    members = [parts.read(part).members for part in parts.directories(workdir)]
    assert [len(of) for of in members] == [4] * 4 and sorted(sum(members, ())) == list(range(16))
    file = next((workdir / rundir.TRAJECTORY).rglob("8.safetensors"))
    assert len(load_file(file)["members"]) == 8
    (found,) = {found["state"] for found in state.read_all(workdir)}
    assert found == "done" and len(server.workers) == 4
    hidden = [path for path in workdir.rglob(".*") if path.name != rundir.LOCK]
    assert not hidden
    # The same command again: nothing is trained.
    assert start(workdir, "all", "--workers=4") == 0
    assert "is finished" in capsys.readouterr().out and len(server.workers) == 4


def test_rungs_of_a_halving_are_those_of_one_machine(start, alone, tmp_path):
    workdir = tmp_path / "run"
    assert start(workdir, "halving", "--workers=2") == 0
    assert_same(workdir, alone("halving"))
    assert len(parts.directories(workdir)) == 2
    statuses = {row["status"] for row in rundir.read_status(workdir)["members"].values()}
    assert statuses >= {"finished", "stopped"}


def test_a_search_has_rounds_of_parts(start, alone, tmp_path):
    """A part has several groups where there are fewer workers."""
    workdir = tmp_path / "run"
    assert start(workdir, "search", "--workers=1") == 0
    assert_same(workdir, alone("search"))
    assert [parts.read(part).round for part in parts.directories(workdir)] == [1, 2]


def kill_once(server, at):
    """A worker's poll kills it the first time that it has made `at` checkpoints."""
    killed = []

    def start(part, platform, slot):
        worker = server.start(part, platform, slot)
        poll = worker.poll

        def killing():
            steps = list((part / rundir.CHECKPOINTS).glob("*/[0-9]*"))
            if part not in killed and len(steps) >= at and worker.code is None:
                os.kill(worker.pid, 9)
                killed.append(part)
            return poll()

        worker.poll = killing
        return worker

    return start, killed


@pytest.mark.slow
def test_workers_that_are_killed_change_nothing(start, alone, tmp_path, server, monkeypatch):
    workdir = tmp_path / "run"
    starting, killed = kill_once(server, 1)
    monkeypatch.setattr(local, "start", starting)
    monkeypatch.setattr(local, "SECONDS", 0.01)
    assert start(workdir, "", "--workers=2") == 0
    assert len(killed) == 2 and len(server.workers) == 4
    assert_same(workdir, alone(""))


@pytest.mark.soak
def test_workers_killed_at_random_moments_change_nothing(
    start, alone, tmp_path, server, monkeypatch
):
    """Ten times of ten."""
    draw = random.Random(0)

    def starting(part, platform, slot):
        worker, due = server.start(part, platform, slot), time.monotonic() + draw.uniform(0.2, 6)
        poll, first = worker.poll, sum(p == part for p, _ in server.workers) == 1

        def killing():
            if first and time.monotonic() > due and worker.code is None:
                os.kill(worker.pid, 9)
            return poll()

        worker.poll = killing
        return worker

    monkeypatch.setattr(local, "start", starting)
    for i in range(10):
        server.workers.clear()
        workdir = tmp_path / f"run{i}"
        assert start(workdir, "", "--workers=2") == 0
        assert_same(workdir, alone(""))


def test_a_part_that_fails_for_good_is_named_and_the_rest_is_kept(
    start, alone, tmp_path, monkeypatch, server, capsys
):
    workdir = tmp_path / "run"
    monkeypatch.setattr(local, "SECONDS", 0.01)

    def starting(part, platform, slot):
        worker = server.start(part, platform, slot)
        if part.name == "1":
            os.kill(worker.pid, 9)
        return worker

    monkeypatch.setattr(local, "start", starting)
    assert start(workdir, "", "--workers=2", "--retries=1") == 1
    members = ", ".join(map(str, parts.read(parts.directory(workdir, 1)).members))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"lorax: stopped: part 1 (members {members}) failed: its worker did not "
    )
    assert line.endswith("run the same command to continue.")
    assert [found["state"] for found in state.read_all(workdir)] == ["done", "failed"]
    status = rundir.read_status(workdir)
    assert status["state"] == "stopped" and len(status["members"]) == 4
    kept = sorted(int(path.name) for path in (workdir / rundir.ADAPTERS).iterdir())
    assert kept == list(parts.read(parts.directory(workdir, 0)).members)
    with pytest.raises(
        ValueError, match="that python -m lorax.launch began; continue it with that"
    ):
        resume.check_same_config(workdir, None)
    # The same command tries the failed part alone.
    monkeypatch.setattr(local, "start", server.start)
    server.workers.clear()
    assert start(workdir, "", "--workers=2") == 0
    assert [part.name for part, _ in server.workers] == ["1"]
    assert_same(workdir, alone(""))


def test_a_directory_of_lorax_run_is_refused(start, alone, capsys, tmp_path):
    workdir = tmp_path / "begun"
    workdir.mkdir()
    (workdir / rundir.CONFIG).write_text(json.dumps({"config": {}}))
    (workdir / rundir.METRICS).write_text("{}\n")
    assert start(workdir, "") == 2
    assert "that python -m lorax.run began; continue it with that" in capsys.readouterr().err


def test_two_launchers_of_one_directory_are_refused(start, tmp_path, capsys):
    workdir = tmp_path / "run"
    with rundir.locked(workdir):
        assert start(workdir, "") == 2
    assert f"another process writes to {workdir}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--on=slrm"],
            "--on: 'slrm' given; expected local, slurm, ray, elsewhere; did you mean 'slurm'?",
        ),
        ([], "--on is missing; expected --on=local, --on=slurm, --on=ray, --on=els"),
        (
            ["--on=local", "--worker=2"],
            "--worker: no option of --on=local; did you mean 'workers'?",
        ),
        (["--on=local", "--workers=two"], "--workers: invalid int value: 'two'"),
        (["--on=local", "--workers=0"], "--workers: 0 given, must be at least 1"),
    ],
)
def test_mistakes_are_one_line(words, line, capsys):
    assert launch.main(["lorax.launch", *words]) == 2
    assert capsys.readouterr().err.startswith(f"lorax: {line}")


@pytest.mark.parametrize("engine", launch.ENGINES)
def test_help_lists_the_options_of_an_engine(engine, capsys):
    assert launch.main(["lorax.launch", "--help", f"--on={engine}"]) == 0
    said = capsys.readouterr().out
    assert "--workers" in said and "--retries" in said and f"--on={engine}:" in said


@pytest.mark.slow
def test_a_launcher_that_is_killed_goes_on(start, alone, tmp_path, server):
    """Its workers end with it; another one uses what they have left."""
    workdir, study = tmp_path / "run", tmp_path / "study.py"
    study.write_text(STUDY)
    words = ["--on=local", "--workers=2", f"--config={study}", f"--workdir={workdir}"]
    launcher = server.fork("launch", words, tmp_path / "log")
    while not list(workdir.glob("parts/*/checkpoints/*/[1-9]*")):
        assert launcher.poll() is None
        time.sleep(0.02)
    os.kill(launcher.pid, 9)
    while any(map(rundir.is_locked, parts.directories(workdir))):
        time.sleep(0.02)
    assert start(workdir, "", "--workers=2") == 0
    assert_same(workdir, alone(""))


@pytest.mark.slow
def test_workers_as_a_person_starts_them_are_one_machine(tmp_path):
    """In processes, compiled as theirs are; the only member of full fine-tuning divides its batches
    over the devices. The default study goes through the other engines."""
    config, words = sweeps.study(tmp_path), ["--config.sweep.seed=(0,)"]
    words += ["--config.analysis.trajectory=True"]
    sweeps.lorax("run", config, tmp_path / "alone", *words)
    sweeps.lorax("launch", config, tmp_path / "run", "--on=local", "--workers=2", *words)
    assert len(parts.directories(tmp_path / "run")) == 2
    assert_same(tmp_path / "run", tmp_path / "alone")
