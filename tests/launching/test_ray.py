"""Parts as tasks of Ray, on a Ray of this machine."""

import functools
import os
import sys

import pytest
from support import require

ray = require("ray")
from launching import fakes  # noqa: E402
from launching.fakes import states, stop, then, until  # noqa: E402

from lorax.launching import ray as engine  # noqa: E402
from lorax.launching import state  # noqa: E402

options = functools.partial(fakes.options, engine, "--address=local")


def test_workers_that_die_are_tried_again_and_a_mistake_is_not(tmp_path, monkeypatch):
    plans = ["kill", "error", "ok"], ["kill", "kill", "kill"], ["mistake"], ["ok"]
    parts = fakes.make(tmp_path / "run", monkeypatch, *plans)
    assert dict(engine.run(parts, options("--workers=2"))) == {
        parts[0]: None,
        parts[1]: f"its worker on {os.uname().nodename} died; see {parts[1]}/worker.log",
        parts[2]: f"train.lr: 0 given; see {parts[2]}/worker.log",
        parts[3]: None,
    }
    assert states(parts) == [("done", 3), ("failed", 3), ("failed", 1), ("done", 1)]
    assert (parts[3] / state.LOG).read_text() == f"try 1: ok in {os.getcwd()}\n"
    assert not ray.is_initialized()


def test_tasks_end_with_the_launcher(tmp_path, monkeypatch):
    parts = fakes.make(tmp_path / "run", monkeypatch, ["wait"], ["wait"])
    with pytest.raises(KeyboardInterrupt), then(lambda: stop(parts[0])):
        list(engine.run(parts, options("--workers=1")))
    assert not ray.is_initialized()
    until(lambda: not state.is_alive(parts[0]))
    assert states(parts) == [("again", 1), ("waiting", 0)]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--workers=0", "--workers: 0 given, must be at least 1"),
        ("--retries=-1", "--retries: -1 given, must be at least 0"),
    ],
)
def test_what_can_not_work_is_refused_before(words, why):
    with pytest.raises(ValueError, match=why):
        options(words)


def test_more_than_this_machine_has_is_refused(monkeypatch):
    """In one line, before a part waits for ever."""
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "memory": 8e9}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert engine.resources(options("--cpus=2")) == {"num_cpus": 2, "num_gpus": 0}
    for words, why in (("--gpus=1", "gpus: 1 given, this machine has 0"), ("--cpus=5", "has 4")):
        with pytest.raises(ValueError, match=why):
            engine.resources(options(words))
    nodes[0]["Resources"]["GPU"] = 8.0
    asked = engine.resources(options("--memory=2", "--gpus=0.5"))
    assert asked == {"num_cpus": 1, "num_gpus": 0.5, "memory": 2e9}


def test_gpus_of_a_cluster_are_asked_for_and_it_may_grow(monkeypatch, capsys):
    monkeypatch.setattr(ray, "nodes", lambda: [])
    assert engine.resources(options("--gpus=8", "--address=auto"))["num_gpus"] == 8
    line = "lorax: --gpus: no node of the cluster has 8 yet; parts wait for one"
    assert line in capsys.readouterr().err
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"GPU": 8, "CPU": 9}}])
    with pytest.raises(ValueError, match=r"^--gpus: not given, and there are some; --gpus=0 trai"):
        engine.resources(options("--address=auto"))


def test_no_cluster_at_the_address_is_one_line(tmp_path, monkeypatch):
    def init(address, **_):
        raise ConnectionError(f"Could not find any running Ray instance.\n  {address}")

    parts = fakes.make(tmp_path / "run", monkeypatch, ["ok"])
    monkeypatch.setattr(ray, "init", init)
    why = (
        r"^--address: 'auto' given, no Ray there \(Could not find any running Ray instance. auto\)"
    )
    with pytest.raises(ValueError, match=why):
        list(engine.run(parts, options("--address=auto")))


def test_without_ray_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install lorax-research\[ray\]"):
        options()
