"""Parts as jobs of submitit: its local executor runs them here, SLURM itself is imitated."""

import os

import pytest
from support import require

submitit = require("submitit")
from launching import fakes, imitated_slurm, sweeps  # noqa: E402
from launching.fakes import preempt, runs, states, stop, then, until, worker  # noqa: E402

from lorax.launching import slurm, state  # noqa: E402


@pytest.fixture(autouse=True)
def _no_pickle_is_read_here(monkeypatch):
    def refuse(path):
        raise AssertionError(f"the launcher unpickles {path}")

    monkeypatch.setattr("submitit.core.utils.pickle_load", refuse)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with SLURM's commands, first in PATH."""
    folder = imitated_slurm.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "SQUEUE", 0.5)
    return folder


def options(*words, cluster="local"):
    return fakes.options(slurm, f"--cluster={cluster}", *words)


# ------------------------------------------------------------------------------ on this machine


def test_workers_that_die_are_tried_again_and_a_mistake_is_not(tmp_path, monkeypatch, capfd):
    plans = ["kill", "error", "ok"], ["kill", "kill", "kill"], ["mistake"]
    parts = fakes.make(tmp_path / "run", monkeypatch, *plans)
    found = dict(slurm.run(parts, options("--max-parallel=3")))
    assert found.keys() == set(parts) and found[parts[0]] is None
    died = f"its worker on {os.uname().nodename} died; see {parts[1]}/worker.log"
    assert found[parts[1]] == died
    assert found[parts[2]] == f"train.lr: 0 given; see {parts[2]}/worker.log"
    assert states(parts) == [("done", 3), ("failed", 3), ("failed", 1)]
    assert (parts[0] / state.LOG).read_text().count("RuntimeError: device lost") == 1
    assert f"part 1: {died}. It is tried again." in capfd.readouterr().out


def test_a_part_that_is_preempted_goes_on(tmp_path, monkeypatch):
    """submitit calls `checkpoint` on the signal that SLURM sends, and requeues the job."""
    (part,) = fakes.make(tmp_path / "run", monkeypatch, ["wait", "ok"])
    with then(lambda: preempt(part)):
        assert list(slurm.run([part], options("--retries=0"))) == [(part, None)]
    assert states([part]) == [("done", 2)]


def test_workers_here_end_with_the_launcher(tmp_path, monkeypatch):
    parts = fakes.make(tmp_path / "run", monkeypatch, ["wait"], ["wait"])
    started = slurm.run(parts, options("--max-parallel=1"))
    with pytest.raises(KeyboardInterrupt), then(lambda: stop(parts[0])):
        next(started)
    assert states(parts) == [("again", 1), ("waiting", 0)]
    assert not any(map(state.is_alive, parts))


# ------------------------------------------------------------------------------------ on a cluster


def test_parts_are_an_array_and_a_dead_one_is_a_job_more(tmp_path, monkeypatch, cluster):
    plans = ["ok"], ["wait", "ok"], ["kill", "ok"]
    parts = fakes.make(tmp_path / "run", monkeypatch, *plans)
    words = ["--partition=gpu", "--gpus=1", "--cpus=4", "--memory=16", "--time=1:30:00"]
    words += ["--account=me", "--constraint=h200", "--sbatch=qos=high", "--setup=export A=1"]
    given = options(*words, "--max-parallel=2", cluster="slurm")
    with then(lambda: preempt(parts[1])):
        assert dict(slurm.run(parts, given)) == dict.fromkeys(parts)
    assert states(parts) == [("done", 1), ("done", 2), ("done", 2)]
    array, again = [(cluster / name).read_text().splitlines() for name in ("11.sh", "12.sh")]
    for line in (
        "--partition=gpu", "--gpus-per-node=1", "--cpus-per-task=4", "--mem=16GB", "--time=90",
        "--account=me", "--constraint=h200", "--qos=high", "--requeue", "--job-name=lorax-run",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in array and f"#SBATCH {line}" in again
    assert "#SBATCH --array=0-2%2" in array and "export A=1" in array
    assert not any("--array" in line for line in again)


def test_jobs_go_on_without_the_launcher_and_the_next_one_follows_them(
    tmp_path, monkeypatch, cluster, capfd
):
    parts = fakes.make(tmp_path / "run", monkeypatch, ["wait", "ok"], ["ok"])
    given = options(cluster="slurm")
    with pytest.raises(KeyboardInterrupt), then(lambda: stop(parts[0])):
        list(slurm.run(parts, given))
    (line,) = capfd.readouterr().err.splitlines()
    assert "as jobs of SLURM" in line and "`scancel 11` stops them" in line
    assert state.is_alive(parts[0])
    with then(lambda: preempt(parts[0])):
        assert list(slurm.run(parts[:1], given)) == [(parts[0], None)]
    assert capfd.readouterr().out == "part 0: job 11_0 goes on\n"
    assert len(list(cluster.glob("*.sh"))) == 1 and states(parts) == [("done", 2), ("done", 1)]


def test_which_jobs_go_on_must_be_known(tmp_path, monkeypatch, cluster):
    """A part is never given to a second worker because SLURM did not answer."""
    (part,) = fakes.make(tmp_path / "run", monkeypatch, ["ok"])
    state.submitted(part, "slurm 11")
    (cluster / "squeue").write_text("#!/bin/sh\necho slurm_load_jobs error: timeout >&2; exit 1\n")
    with pytest.raises(ValueError, match="squeue fails, so it is unknown which parts run already"):
        list(slurm.run([part], options(cluster="slurm")))


def test_a_launcher_that_is_a_job_gives_its_parts_nothing_of_that(monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1000")
    inside = lambda: {name for name in os.environ if name.startswith("SLURM_")}
    with slurm.outside_of_jobs():
        assert inside() == {"SLURM_CONF", "SLURM_MEM_PER_NODE"}  # the user's own
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    with slurm.outside_of_jobs():
        assert inside() == {"SLURM_CONF"}
    assert inside() == {"SLURM_CONF", "SLURM_MEM_PER_NODE", "SLURM_JOB_ID"}


def test_jobs_that_somebody_ended_are_made_anew(tmp_path, monkeypatch, cluster):
    (part,) = fakes.make(tmp_path / "run", monkeypatch, ["wait"])
    given = options("--retries=0", cluster="slurm")
    with then(lambda: until(lambda: runs(part)) or os.system("scancel 11")):
        ((_, why),) = slurm.run([part], given)
    assert why.startswith("its worker on ") and states([part]) == [("failed", 1)]
    (part / "plan.json").write_text('["ok"]')
    assert list(slurm.run([part], given)) == [(part, None)] and (cluster / "12.sh").exists()


def test_what_sbatch_refuses_is_one_line(tmp_path, monkeypatch, cluster):
    (part,) = fakes.make(tmp_path / "run", monkeypatch, ["ok"])
    with pytest.raises(ValueError, match=r"^--on=slurm: sbatch refused .*: Invalid partition sp"):
        list(slurm.run([part], options("--partition=closed", cluster="slurm")))


# ----------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("1:30:00", 90), ("1-0", 1440), ("1-12:30", 2190), ("0:01", 1)],
)
def test_times_are_those_of_sbatch(text, minutes):
    assert slurm.minutes(text) == minutes


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--time=4h", "--time: '4h' given; expected minutes, H:MM:SS or D-HH:MM:SS"),
        ("--time=0", "--time: '0' given; must be longer"),
        ("--sbatch=qos", "--sbatch: 'qos' given; expected NAME=VALUE, e.g. qos=high"),
        ("--retries=-1", "--retries: -1 given, must be at least 0"),
        ("--max-parallel=0", "--max-parallel: 0 given, must be at least 1"),
        ("--partition=gpu", "--partition: only SLURM reads it, not --cluster=local"),
        ("--cluster=slurm", "--on=slurm: this machine has no sbatch; start it on a login node"),
    ],
)
def test_what_can_not_work_is_refused_before(words, why):
    with pytest.raises(ValueError) as refused:
        options(words)
    assert str(refused.value).startswith(why)


def test_without_submitit_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install lorax-research\[slurm\]"):
        options()


def test_debug_runs_them_in_this_process(tmp_path, monkeypatch):
    parts = fakes.make(tmp_path / "run", monkeypatch, ["ok"], ["mistake"])
    found = dict(slurm.run(parts, options(cluster="debug")))
    assert found[parts[0]] is None and found[parts[1]].startswith("train.lr: 0 given; see ")
    assert worker(parts[0])["pid"] == os.getpid()


# ------------------------------------------------------------------------------------ real training


@pytest.mark.slow
def test_a_sweep_that_is_preempted_is_that_of_one_machine(single, tmp_path):
    config, expected = single
    part = tmp_path / "run/parts/0"

    def when_there_is_a_checkpoint():
        until(lambda: any(part.glob("checkpoints/*/[1-9]*")))
        preempt(part)

    with then(when_there_is_a_checkpoint):
        sweeps.lorax("launch", config, tmp_path / "run", *sweeps.ENGINES["slurm"], "--retries=0")
    sweeps.same(expected, tmp_path / "run")
    assert state.read(part)["tries"] == 2 and "continues at step" in (part / state.LOG).read_text()
