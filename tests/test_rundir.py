"""The run directory: one owner of its names, and what is written is read back."""

import json
import re

import pytest

import lorax
from lorax import files, rundir

ROOT = rundir.Path(lorax.__file__).parent
SPELLED = r'"(members\.jsonl|metrics\.jsonl|status\.json|report\.html|errors\.txt|\.lock)"'


def test_nobody_else_spells_the_names():
    spelled = {
        str(file.relative_to(ROOT)): found
        for file in ROOT.rglob("*.py")
        if (found := re.findall(SPELLED, file.read_text(encoding="utf-8")))
    }
    assert set(spelled) == {"rundir.py"}


def test_what_is_written_is_read_back(tmp_path):
    members = [{"member": i, "name": f"seed={i}", "method": "lora"} for i in (1, 0)]
    rows = [{"member": 0, "step": step, "split": "eval", "loss": 1 / (1 + step)} for step in (0, 1)]
    rundir.write_config(tmp_path, {"config": {"seed": 0}})
    rundir.write_members(tmp_path, members)
    first = rundir.append_metrics(tmp_path, rows[:1])
    rundir.append_metrics(tmp_path, rows[1:])
    rundir.write_status(tmp_path, "trained", {0: {"status": "finished"}}, 1.5, {"report": "why"})
    read = rundir.read(tmp_path)
    assert read.config == rundir.read_config(tmp_path) == {"config": {"seed": 0}}
    assert read.members == rundir.read_members(tmp_path) == members[::-1]
    assert read.metrics == rows
    assert read.status == {
        "state": "trained", "wall_seconds": 1.5, "failed": {"report": "why"},
        "members": {"0": {"status": "finished"}},
    }  # fmt: skip
    assert rundir.has_begun(tmp_path) and not rundir.has_finished(tmp_path)
    rundir.cut_metrics(tmp_path, first)
    assert rundir.metrics_after(tmp_path, 0) == (rows[:1], first)


def test_a_line_that_is_being_written_waits_for_its_end(tmp_path):
    whole = rundir.append_metrics(tmp_path, [{"member": 0}])
    with open(tmp_path / rundir.METRICS, "a") as file:
        file.write('{"member": 1')
    assert rundir.metrics_after(tmp_path, 0) == ([{"member": 0}], whole)
    with open(tmp_path / rundir.METRICS, "a") as file:
        file.write("}\n")
    rows, end = rundir.metrics_after(tmp_path, whole)
    assert rows == [{"member": 1}] and end == rundir.metrics_size(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        (rundir.MEMBERS, "", "members.jsonl: no members"),
        (rundir.MEMBERS, '{"member": 0}\n', "members.jsonl:1: need the fields .*name"),
        (rundir.METRICS, "{\n{}\n", "metrics.jsonl:1: not JSON"),
        (rundir.STATUS, "[]", "status.json: a JSON object is expected"),
        (rundir.CONFIG, None, "config.json: no such file; is .* a run directory"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, name, text, why):
    rundir.write_config(tmp_path, {})
    rundir.write_members(tmp_path, [{"member": 0, "name": "only", "method": "lora"}])
    rundir.append_metrics(tmp_path, [])
    rundir.write_status(tmp_path, "running", {}, 0.0, {})
    file = tmp_path / name
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=why):
        rundir.read(tmp_path)


def test_status_of_what_is_no_run_is_empty(tmp_path):
    assert rundir.read_status(tmp_path) == {} and not rundir.is_run(tmp_path)
    (tmp_path / rundir.STATUS).write_text(json.dumps({"state": "running"})[:-3])
    assert rundir.read_status(tmp_path) == {} and rundir.is_run(tmp_path)


def test_what_a_killed_writer_left_goes_and_what_a_worker_writes_stays(tmp_path):
    drafts = [
        ".status.json.7.tmp",
        "adapters/0/.adapter_model.safetensors.7.tmp",
        "adapters/.1.7.tmp/a",
    ]
    others = ["parts/0/.status.json.8.tmp", "metrics.jsonl", "adapters/0/adapter_model.safetensors"]
    for name in (*drafts, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert files.draft(tmp_path / "status.json").match(files.DRAFTS)
    with rundir.locked(tmp_path):
        left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {*others, rundir.LOCK}
