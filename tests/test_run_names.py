"""Names of run directories: they say what was asked, and no two configs share one."""

import re

import pytest

from lorax import config, run_names

NAMES = {
    "study": {},
    "study-lr=0.003+0.01,rank=4": {"sweep.rank": (4,), "sweep.lr": (3e-3, 1e-2)},
    "study-method.rank=4": {"method.rank": 4},  # not the same as the axis
    "study-train.steps=50,warmup=0": {"train.warmup": 0, "train.steps": 50},
    "study-train.warmup=0+50": {"sweep.axes": {"train.warmup": (0, 50)}},
    "study-order_seed=0+1": {"sweep.axes": {"seeds.order": [0, 1]}},
    "study-targets=q+q.v+all-linear": {"sweep.targets": ("q", ("q", "v"), ("all-linear",))},
    "study-layers=none+0.1,packing=true": {"task.packing": True, "sweep.layers": (None, (0, 1))},
    "study-path=data.zip": {"task.path": "data.zip"},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_what_was_set(name):
    assert run_names.name("study", "", NAMES[name]) == name


def test_keys_that_may_change_in_a_run_are_not_in_its_name():
    every = {key: 8 for key in config.REVISABLE}
    assert run_names.name("study", "", every) == "study"
    assert run_names.name("study", "", every | {"seed": 1}) == run_names.name(
        "study", "", {"seed": 1}
    )


LONG = {
    "one value": {"sweep.rank": tuple(range(1, 60)), "train.clip": 0.5},
    "many": {f"train.{key}": 0.123456789 for key in config.default().train},
    "a path": {"task.path": "/home/Someone/a b/ä.zip", "base": "C:\\x\\y"},
    "capitals": {"base": "DIR"},
    "a dot at the end": {"task.path": "data."},
    "a function": {"task.name": "mine.py:sums"},
}


@pytest.mark.parametrize("what", LONG)
def test_a_hash_ends_a_name_that_leaves_something_out(what):
    name = run_names.name("study", "", LONG[what])
    assert re.fullmatch(r"study-[\w.,=+-]+-[0-9a-f]{8}", name, re.ASCII), name
    assert len(name) <= run_names.LONGEST
    key, value = next(iter(LONG[what].items()))
    other = LONG[what] | {key: (1, 2, 3) if isinstance(value, tuple) else f"{value}x"}
    assert run_names.name("study", "", other) != name == run_names.name("study", "", LONG[what])


def test_what_is_long_is_left_out_first_and_arguments_are_no_folders():
    name = run_names.name("study", "", LONG["one value"])
    assert name.startswith("study-clip=0.5,rank-")
    assert run_names.name("study", "stories", {}) == "study-stories"
    assert re.fullmatch(r"study-data-[0-9a-f]{8}", run_names.name("study", "/somewhere/data", {}))
    assert run_names.name("study", "a", {}) != run_names.name("study", "/a", {})


def test_a_run_under_a_former_name_is_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"train.steps": 5, "eval.generate": 8}
    named = lambda: run_names.workdir("study", "stories", values)
    assert str(named()) == "runs/study-stories-train.steps=5"
    without = config.digest({"train.steps": 5})
    for former in (f"study-stories-{without}", f"study-stories-{config.digest(values)}"):
        (tmp_path / "runs" / former).mkdir(parents=True)
        assert named().name != former  # no run is there
        (tmp_path / "runs" / former / "status.json").write_text("{}")
        assert named().name == former
    new = tmp_path / "runs/study-stories-train.steps=5"
    new.mkdir()
    (new / "status.json").write_text("{}")
    assert named().name == new.name
