"""docs/examples/*.yaml: their structure, and the commands in them, read by lorax's own parsers."""

import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from lorax import command_line, hosts, launch, rundir, sharding
from lorax.launching import state

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs/examples"


def read(name):
    return yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())


def jobs(name):
    """{replicated job: (the spec of its Job, the only container of its pods)}."""
    made = read(name)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    found = {}
    for job in made["spec"]["replicatedJobs"]:
        assert job["replicas"] == 1
        spec = job["template"]["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        found[job["name"]] = spec, container
    return made["metadata"]["name"], found


def command(text, module):
    """The words behind `python -m lorax.MODULE` in a line of shell."""
    (line,) = re.findall(rf"python -m lorax\.{re.escape(module)} (.*)", text)
    return shlex.split(line)


@pytest.fixture
def settings(monkeypatch):
    """settings(words): the config of a command, as `lorax.run` reads it."""
    monkeypatch.chdir(ROOT)

    def read(words):
        monkeypatch.setattr("sys.argv", ["lorax", *words])  # where ml_collections looks
        found, _, workdir = command_line.read(["lorax", *words])
        assert str(workdir).startswith("/runs/")
        return found

    return read


@pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")
def test_a_jobset_runs_one_program_on_all_its_pods(settings):
    name, found = jobs("jobset_mesh")
    ((job, (spec, container)),) = found.items()
    shell, _, text = container["command"]
    coordinator, words = hosts.flags(
        ["lorax", *command(text.replace("$JOB_COMPLETION_INDEX", "3"), "run")]
    )
    assert shell == "sh" and spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == coordinator.processes == 4
    host, _, port = coordinator.address.partition(":")
    assert coordinator.process == 3 and host == f"{name}-{job}-0-0.{name}"
    assert int(port) == container["ports"][0]["containerPort"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    mesh = sharding.parse(settings(words[1:]).train.mesh)
    assert math.prod(mesh) == 4 * gpus and mesh.fsdp == gpus  # the base on the links of a host
    assert spec["backoffLimit"] == 0  # a program that has lost a process can't go on


def engine(words, settings):
    """(the engine's options, the config) of a command of `lorax.launch`, as it reads them."""
    _, options, flags = launch.read(words)
    return options, settings(flags)


@pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")
def test_a_jobset_trains_a_part_in_each_pod_by_its_index(settings):
    _, found = jobs("jobset_parts")
    text = found["launcher"][1]["command"][2]
    options, _ = engine(command(text, "launch"), settings)
    spec, container = found["worker"]
    assert options.on == "elsewhere" and spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == options.workers
    assert spec["backoffLimitPerIndex"] == options.retries
    assert read("jobset_parts")["spec"]["successPolicy"]["targetReplicatedJobs"] == ["launcher"]
    assert options.gpus == container["resources"]["limits"]["nvidia.com/gpu"]
    (workdir,) = re.findall(r"--workdir=(\S+)", text)
    part = re.search(r"part=(\S+)", container["command"][2])[1]
    assert part == f"{workdir}/{rundir.PARTS}/$JOB_COMPLETION_INDEX"
    assert f"$part/{state.LAUNCH}" in container["command"][2]
    assert command(container["command"][2], "launching.worker") == ["$part"]
    for job, _ in found.values():
        pod = job["template"]["spec"]
        assert [v["name"] for v in pod["volumes"]] == ["runs"]
        assert pod["containers"][0]["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]


@pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")
def test_skypilot_makes_a_cluster_of_ray_and_launches_on_it(settings):
    task = read("skypilot")
    fields = {"name", "num_nodes", "resources", "workdir", "volumes", "setup", "run"}
    assert set(task) == fields and task["num_nodes"] > 1 and "/runs" in task["volumes"]
    assert '".[cuda,ray]"' in task["setup"]
    head = re.search(r"^head=(.*?)  #", task["run"], re.M)[1]
    assert head.endswith(":6380") and "ray start --head --port=6380" in task["run"]
    options, _ = engine(command(task["run"], "launch"), settings)
    assert (options.on, options.address, options.gpus) == ("ray", "$head", 1)
    checked = subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
