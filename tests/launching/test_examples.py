"""docs/examples/*.yaml: their structure, and the commands in them, read by lorax's own parsers."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lorax import command_line, hosts

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
    assert settings(words[1:]).train.mesh == f"fsdp={4 * gpus}"
    assert spec["backoffLimit"] == 0  # a program that has lost a process can't go on
