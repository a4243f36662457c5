"""Several processes that run one program, on this machine, equal one process with their devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorax import config, hosts, rundir, together, tree
from lorax.run import run
from lorax.train import checkpoint, prepare
from lorax.train.batches import train_batches
from lorax.train.programs import needed

ROOT = Path(__file__).parents[2]
STUDY = """
from lorax.config import default

def get_config(case="members"):
    c = default()
    c.base, c.task.name, c.method.targets = "random:mlp-64-10", "digits", ("re:.*/kernel",)
    c.method.rank = 2
    c.train.update(steps=8, batch_size=8, warmup=0, mesh="member=4")
    c.eval.update(every=2, examples=40, batch_size=40)
    c.analysis.report = False
    c.sweep.seed = (0, 1, 2)
    if case == "halving":
        c.sweep.lr, c.sweep.seed, c.sweep.tune = (1e-3, 1e-2, 1e-1, 1.0), (0,), "lr"
    if case in ("fsdp", "remeshed"):
        c.train.mesh = "fsdp=4"
    if case == "started":
        c.train.mesh = "member=2,fsdp=2"
    return c
"""
#: Runs each case of the study in a directory of its name.
CASES = """
coordinator, cases = hosts.flags(sys.argv)
hosts.start(coordinator)

def work():
    for case in cases[1:]:
        run.run(study.get_config(case), case)
    return together.End(0)

sys.exit(together.run(work).code)
"""
COMMAND = "sys.exit(run.main(sys.argv))"


def start(folder, n, devices, code, *arguments):
    """n processes of one program, with so many devices each, in `folder`."""
    (folder / "study.py").write_text(STUDY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = "import os, sys, study\nfrom lorax import hosts, run, together\n" + code
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{folder}:{ROOT}"}
    started = []
    for i in range(n):
        words = [sys.executable, "-c", code, *arguments]
        words += [f"--coordinator={address}", f"--processes={n}", f"--process={i}"] * (n > 1)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(
            subprocess.Popen(words, cwd=folder, env=environment | {"PROCESS": str(i)}, **pipes)
        )
    return started


def ends(started):
    """[(exit code, lines of lorax on stderr, all output)] of each process."""
    found = []
    for process in started:
        out, errors = process.communicate(timeout=300)
        lines = [line for line in errors.splitlines() if line.startswith("lorax: ")]
        found.append((process.returncode, lines, out + errors))
    return found


def study(case):
    namespace = {}
    exec(STUDY, namespace)
    return namespace["get_config"](case)


def lines(workdir):
    return [json.loads(line) for line in (workdir / rundir.METRICS).read_text().splitlines()]


def assert_equal(actual, expected):
    """The same metrics, members and adapters, bit for bit."""
    for name in (rundir.METRICS, rundir.MEMBERS):
        assert (actual / name).read_text() == (expected / name).read_text()
    files = [f for f in sorted((expected / rundir.ADAPTERS).rglob("*")) if f.is_file()]
    assert files
    for file in files:
        assert (actual / file.relative_to(expected)).read_bytes() == file.read_bytes()


def assert_close(actual, expected):
    """The same metrics, members and adapters, up to the order of sums."""
    assert (actual / rundir.MEMBERS).read_text() == (expected / rundir.MEMBERS).read_text()
    for x, y in zip(lines(actual), lines(expected), strict=True):
        numbers = [name for name in x if name in ("loss", "grad_norm")]
        assert {n: v for n, v in x.items() if n not in numbers} == {
            n: v for n, v in y.items() if n not in numbers
        }
        np.testing.assert_allclose([x[n] for n in numbers], [y[n] for n in numbers], atol=1e-5)
    for file in sorted((expected / rundir.ADAPTERS).rglob("*.safetensors")):
        there = load_file(actual / file.relative_to(expected))
        for name, x in load_file(file).items():
            np.testing.assert_allclose(there[name], x, atol=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """one(case): the run directory of a case, by this process with four devices."""
    folder, made = tmp_path_factory.mktemp("one"), {}

    def of(case):
        if case not in made:
            run(study(case), folder / case)
            made[case] = folder / case
        return made[case]

    return of


class StoppedError(Exception):
    pass


def stop_at(step):
    """Stops a run after the checkpoint of a step."""
    save = checkpoint.save

    def stopping(directory, at, *rest):
        save(directory, at, *rest)
        if at == step:
            raise StoppedError

    return stopping


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of all cases, by two processes with two devices each. "remeshed" was begun by this
    process, whose mesh fills up three members to four."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(checkpoint, "save", stop_at(4))
        run(study("started"), folder / "remeshed")
    started = start(folder, 2, 2, CASES, "members", "halving", "remeshed")
    (code, _, first), (other, _, second) = ends(started)
    assert (code, other) == (0, 0), first + second
    assert "members" in first and "group 0" not in second
    return folder


@pytest.mark.parametrize("case", ["members", "halving"])
def test_members_on_two_processes_are_those_of_one_bit_for_bit(one, two, case):
    assert_equal(two / case, one(case))


def test_a_run_goes_on_with_other_processes_and_another_mesh(one, two):
    """Three members of four places on member=2,fsdp=2, then three places on fsdp=4."""
    assert_close(two / "remeshed", one("fsdp"))
    assert rundir.read_status(two / "remeshed")["state"] == "finished"


def test_a_checkpoint_of_two_processes_is_restored_by_one(one, two):
    """Each process has written its part; one reads them all, and the numbers are those of one."""
    folders = [base / "checkpoints" / "0-0" for base in (one("members"), two / "members")]
    with checkpoint.ocp.StandardCheckpointer() as checkpointer:
        like = tree.shapes(checkpointer.restore(folders[0].absolute() / "8" / "state"))
    states = [checkpoint.restore(folder, like, pytest.fail) for folder in folders]
    (step, expected, meta), (same_step, state, same_meta) = states
    assert step == same_step == 8 and meta["offset"] == same_meta["offset"]
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_process_builds_the_rows_that_its_devices_need(monkeypatch):
    """Four of six places and half of every batch; the places after the third copy the last one."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("member", "fsdp"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("member", None, "fsdp"))
    every = place.addressable_devices_indices_map((6, 2, 8))
    mine = {device: every[device] for device in mesh.devices[1:, 0]}
    there = type("Sharding", (), {"addressable_devices_indices_map": lambda self, shape: mine})()
    assert hosts.part((6, 2, 8), there) == (slice(2, 6), slice(0, 2), slice(0, 4))
    monkeypatch.setattr(hosts, "are_many", lambda: True)
    assert needed(6, there, (5, 2, 8)) == (slice(2, 5), slice(0, 2), slice(0, 4))
    assert needed(6, there, (2, 2, 8)) == (slice(1, 2), slice(0, 2), slice(0, 4))
    monkeypatch.undo()
    assert needed(6, there, (5, 2, 8)) is None

    group = prepare.groups(config.members(study("members")), lambda line: None)[0]
    whole = train_batches(group.stack, group.task, 2, 2)
    part = (slice(1, 3), slice(0, 2), slice(0, 1), slice(2, 6))
    for name, x in train_batches(group.stack, group.task, 2, 2, part).items():
        np.testing.assert_array_equal(x[part], whole[name][part])
        assert not x[0].any() and not x[:, :, :, 6:].any()


# ------------------------------------------------------------------------------- ending together


DIE = """
from lorax.train import part
advance = part.advance

def die(current, at, k):
    if at.step == 4 and os.environ["PROCESS"] == "1":
        os.kill(os.getpid(), 9)
    return advance(current, at, k)

part.advance = die
together.LIMIT = 10
"""


def test_a_killed_process_ends_the_others_and_the_command_goes_on(one, tmp_path):
    command = ["--config=study.py", "--workdir=run"]
    (code, said, _), (killed, last, _) = ends(start(tmp_path, 2, 2, DIE + COMMAND, *command))
    assert (code, killed) == (1, -9)
    assert said == [
        "lorax: process 1 has died or does not answer; run the same command to continue"
    ]
    assert len(last) == 1 and "process 1 was killed" in last[0]
    assert rundir.read_status(tmp_path / "run")["state"] == "stopped"
    assert [code for code, *_ in ends(start(tmp_path, 2, 2, COMMAND, *command))] == [0, 0]
    assert_equal(tmp_path / "run", one("members"))


def test_without_process_0_the_others_end_at_once(tmp_path):
    """JAX aborts them; a line below its message says what to do."""
    code = DIE.replace('== "1"', '== "0"') + COMMAND
    command = ["--config=study.py", "--workdir=run"]
    (killed, said, _), (code, last, _) = ends(start(tmp_path, 2, 2, code, *command))
    assert killed == -9 and code != 0
    assert said == ["lorax: process 0 was killed; run the same command to continue"]
    assert last == [
        "lorax: process 1 was killed, or process 0 was, which ends all; run the same command to "
        "continue"
    ]


def test_a_mistake_on_one_host_ends_all_with_its_line(tmp_path):
    missing = """
from lorax import tasks

def build(*_, **__):
    raise FileNotFoundError(2, "No such file or directory", "/data/e2e")

if os.environ["PROCESS"] == "1":
    tasks.build = build
"""
    command = ["--config=study.py", "--workdir=run"]
    for code, said, _ in ends(start(tmp_path, 2, 2, missing + COMMAND, *command)):
        assert code == 2
        assert said == ["lorax: process 1: no such file or directory: /data/e2e"]


def test_four_processes_equal_one(one, tmp_path):
    """Also with the base divided over them."""
    started = start(tmp_path, 4, 1, CASES, "members", "fsdp")
    assert [code for code, *_ in ends(started)] == [0] * 4
    assert_equal(tmp_path / "members", one("members"))
    assert_close(tmp_path / "fsdp", one("fsdp"))


def test_four_processes_hand_over_to_one(one, tmp_path):
    """Stopped by an interrupt; one process with all devices goes on from their checkpoint."""
    command = ["--config=study.py", "--workdir=run"]
    stop = """
from lorax.train import checkpoint
save = checkpoint.save

def stopping(directory, at, *rest):
    save(directory, at, *rest)
    if at == 4:
        raise KeyboardInterrupt

if len(sys.argv) > 5:
    checkpoint.save = stopping
"""
    for code, said, _ in ends(start(tmp_path, 4, 1, stop + COMMAND, *command)):
        assert code == 130 and said[0].endswith("stopped. Run the same command to continue.")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints" / "0-0")[-1] == 4
    assert ends(start(tmp_path, 1, 4, COMMAND, *command))[0][0] == 0
    assert_equal(tmp_path / "run", one("members"))


# ------------------------------------------------------------------------------ who starts together


@pytest.fixture
def asked(monkeypatch):
    """What JAX is asked to initialise, outside of any cluster."""
    calls = []
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_", "JAX_COORD", "CUDA_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    preempted = jax.config.jax_enable_preemption_service
    yield calls
    jax.config.update("jax_enable_preemption_service", preempted)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}
ALONE = {
    "no cluster": {},
    "a login node of SLURM": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
    "one task": SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
    "one of Open MPI": {"OMPI_COMM_WORLD_SIZE": "1"},
    "a pod": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
}


@pytest.mark.parametrize("where", ALONE)
def test_a_single_process_waits_for_nobody(asked, monkeypatch, where):
    for name, value in ALONE[where].items():
        monkeypatch.setenv(name, value)
    hosts.start()
    assert not asked and hosts.first() and hosts.count() == 1


def test_processes_of_a_cluster_start_together_unless_told_not_to(asked, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    hosts.start(hosts.Coordinator(processes=1))
    assert not asked
    hosts.start()
    (arguments, options), *_ = asked
    assert arguments == (None, None, None) and options["local_device_ids"] is None
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x4)")  # a process has its machine's devices
    hosts.start()
    assert asked[1][1]["local_device_ids"] == []


def test_open_mpi_needs_only_the_coordinator(asked, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    hosts.start(hosts.Coordinator("node1:1234"))
    assert asked[0][0] == ("node1:1234", 4, 2)


def test_flags_are_read_and_taken_off():
    argv = ["run", "--coordinator=a:1", "--config=x", "--processes", "2", "--process=1"]
    assert hosts.flags(argv) == (hosts.Coordinator("a:1", 2, 1), ["run", "--config=x"])
    with pytest.raises(ValueError, match="--coordinator: 'a' given, must be HOST:PORT"):
        hosts.flags(["run", "--coordinator=a"])
    with pytest.raises(ValueError, match="--processes: invalid int value: 'x'"):
        hosts.flags(["run", "--processes=x"])


def test_alone_everything_is_the_identity():
    arrays = {"a": np.arange(3), "b": 1.5}
    assert hosts.whole(arrays)["a"] is arrays["a"] and hosts.agreed(arrays) is arrays
    assert hosts.least(1 << 40) == 1 << 40
    hosts.meet("nobody")
    assert together.run(lambda: together.End(3)) == together.End(3)
