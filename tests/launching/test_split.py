"""How members are split into parts, and parts merged: nothing runs."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from lorax import config, devices, halving, rundir
from lorax.launching import machines, merge, parts, split


def group(index, members, steps=10):
    c = config.default()
    c.train.update(steps=steps, width=2)
    made = tuple(config.Member(i, str(i), {}, c) for i in members)
    base = SimpleNamespace(params={"w": np.zeros((4, 4), np.float32)}, input_shape=None)
    return SimpleNamespace(index=index, members=made, config=c, base=base)


@pytest.fixture
def machine():
    return machines.Machine("cpu", 2, 2)


def test_a_part_has_multiples_of_what_devices_compute_at_a_time(machine):
    """Width 2 on two devices: four members at a time."""
    found = split.split([group(0, range(16))], None, machine, 3)
    assert sorted(map(len, found)) == [4, 4, 8]
    assert sorted(sum(found, ())) == list(range(16)) and len(found[0]) == 8
    assert all(list(part) == list(range(part[0], part[0] + len(part))) for part in found)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_a_process_counts_the_cores_that_it_may_use(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert devices.cores() == 1
        assert machines.cpu().devices == machines.most_here(machines.cpu()) == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert devices.cores() == len(allowed)


def test_small_groups_share_parts_and_large_ones_are_divided(machine):
    groups = [group(0, range(8)), *(group(i, (7 + i,)) for i in range(1, 5))]
    found = split.split(groups, None, machine, 2)
    assert found == [tuple(range(8)), (8, 9, 10, 11)]
    long = [group(0, range(8), 100), group(1, range(8, 12), 1)]
    assert split.split(long, None, machine, 3) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]


def test_a_mesh_is_that_of_a_workers_devices_whatever_the_launcher_has():
    """Width 2 on both parts of the member axis; four GPUs a worker."""
    some, gpus = group(0, range(8)), machines.Machine("gpu", 8, 4)
    some.config.train.mesh = "member=2,fsdp=2"
    assert sorted(map(len, split.split([some], None, gpus, 2))) == [4, 4]
    some.config.train.mesh = "fsdp=8"
    with pytest.raises(ValueError, match="train.mesh: fsdp=8 needs 8 devices, and there are 4"):
        split.split([some], None, gpus, 2)


def test_members_that_compete_are_in_one_part(machine):
    candidate = lambda *of: halving.Candidate(of[0], of[:1], of[1:])
    points = tuple((candidate(4 * i, 4 * i + 1), candidate(4 * i + 2, 4 * i + 3)) for i in range(3))
    race = halving.Race("lr", (0.5,), 0.5, points, {i: (5, 10) for i in range(12)})
    found = split.split([group(0, range(12))], race, machine, 2)
    assert found == [tuple(range(4, 12)), (0, 1, 2, 3)]


def test_lines_are_merged_in_the_order_of_one_machine(tmp_path):
    """Three members, two in a program; their parts have measured them in another order."""
    lines = [{"member": i, "point": {}, "steps": 2, "legs": [[0, 2]]} for i in range(3)]
    parts.write_round(tmp_path, 1, parts.Round({0: lines}, {0: 2}, {0: ""}, (), "/"))
    further = ("eval", "also:old", "also:a")  # in the order of the config, not of the alphabet
    order = [(0, kind) for kind in further] + [(2, "train")] + [(2, kind) for kind in further]
    row = lambda member, step, kind: {"member": member, "step": step, "split": kind, "loss": 0.5}
    for number, members in enumerate([(1, 2), (0,)]):
        here = parts.directory(tmp_path, number)
        parts.write(here, parts.Part(members, 1, {}))
        rows = [row(i, step, kind) for i in members for step, kind in order[:4]]
        rundir.append_metrics(here, [*rows, *(row(i, *at) for at in order[4:] for i in members)])
    with open(here / rundir.METRICS, "a") as file:
        file.write('{"member": 0, "st')  # of a worker that is writing, or was killed
    merge.metrics(tmp_path, parts.directories(tmp_path))
    found = [json.loads(line) for line in (tmp_path / rundir.METRICS).read_text().splitlines()]
    programs = [(0, 1), (2,)]
    assert [tuple(x.values())[:3] for x in found] == [
        (i, step, kind) for members in programs for step, kind in order for i in members
    ]


def test_texts_of_the_bases_are_merged_in_the_order_of_the_members(tmp_path):
    """The bases alternate over two parts, and both parts have texts of the second base."""
    line = lambda base, prompt: {"base": base, "quant": None, "prompt": prompt, "text": "", "of": 1}
    of = {0: ((0, 3), ("a", "c")), 1: ((1, 2), ("b", "c"))}
    for number, (members, bases) in of.items():
        here = parts.directory(tmp_path, number)
        parts.write(here, parts.Part(members, 1, {}))
        rows = zip(members, bases, strict=True)
        more = {"group": 0, "name": "", "method": "lora", "quant": None}
        rundir.write_members(here, [{"member": i, "base": base} | more for i, base in rows])
        rundir.write_status(here, "finished", {}, 0.0, {})
        texts = [line(base, prompt) for base in bases for prompt in "xy"]
        file = rundir.texts(here, rundir.BASE)
        file.parent.mkdir()
        file.write_text("".join(json.dumps(text) + "\n" for text in texts))
    parts.write_round(tmp_path, 1, parts.Round({}, {}, {}, (), "/"))
    assert merge.merge(tmp_path, parts.directories(tmp_path)) == {}
    found = [json.loads(x) for x in rundir.texts(tmp_path, rundir.BASE).read_text().splitlines()]
    assert [x["base"] + x["prompt"] for x in found] == ["ax", "ay", "bx", "by", "cx", "cy"]
