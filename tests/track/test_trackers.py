"""Weights & Biases and trackio, offline: what they hold is read back from their own files."""

import collections
import json
import os
import struct
import subprocess
import sys

import pytest
import synthetic
from support import require

from lorax import config, track

NAMES = ["rank=1,alpha=16,lr=0.002,seed=0", "rank=4,alpha=16,lr=0.002,seed=0"]


def lines(file):
    return file.read_text().splitlines(keepends=True)


@pytest.fixture
def run(tmp_path):
    """A trained run with a report."""
    directory = synthetic.make_run(tmp_path / "run", ranks=(1, 4), seeds=(0,))
    rows = [json.loads(line) | {"steps": 100} for line in lines(directory / "members.jsonl")]
    (directory / "members.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = json.loads((directory / "config.json").read_text())
    whole = json.loads(config.default().to_json())
    whole["train"].update(schedule="linear", warmup=0)
    whole["sweep"]["rank"] = [1, 4]
    (directory / "config.json").write_text(json.dumps(stored | {"config": whole}))
    (directory / "report.html").write_text("<p>the report</p>")
    (directory / "figures").mkdir()
    (directory / "figures/curve.png").write_bytes(b"\x89PNG")
    return directory


def measured(run):
    """{member's number: {step: {name: value}}} of metrics.jsonl, as a tracker names them."""
    points = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in map(json.loads, lines(run / "metrics.jsonl")):
        names = [name for name in row if name not in ("member", "step", "split")]
        values = {f"{row['split']}/{name}": row[name] for name in names}
        points[row["member"]][row["step"]] |= values
    return points


def follow(run, make):
    """A run that is interrupted, cut back to its checkpoint, and continued by another process;
    `make` returns the tracker of a process."""
    whole = lines(run / "metrics.jsonl")
    (run / "metrics.jsonl").write_text("".join(whole[:3]))
    tracker = make()
    tracker.update()
    (run / "metrics.jsonl").write_text("".join(whole[:1]))
    tracker.update()
    tracker.close()
    (run / "metrics.jsonl").write_text("".join(whole))
    again = make()
    again.update()
    again.finish()
    return again


def records(file):
    """The records of a .wandb file: a log in blocks of 32 kB, after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            yield record.WhichOneof("record_type"), record


def item(entry):
    return entry.key or "/".join(entry.nested_key), json.loads(entry.value_json)


def test_wandb_has_members_as_runs_and_no_point_twice(run, monkeypatch):
    """One run is open at a time here: the second member comes after the first is done."""
    service = require("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    from lorax.track import wandb

    monkeypatch.setattr(wandb, "LIVE", 1)
    wandb.check()
    last = follow(run, lambda: wandb.Tracker(run))
    service.teardown()  # its process has then written everything
    assert last.where().startswith(f"wandb sync --append {run}/track/wandb/offline-run-")

    points, runs = collections.defaultdict(list), {}
    summaries, artefacts = collections.defaultdict(dict), []
    for file in sorted(run.glob("track/wandb/offline-run-*/*.wandb")):
        name = None
        for kind, record in records(file):
            if kind == "run":
                name, runs[record.run.display_name] = record.run.display_name, record.run
            elif kind == "history":
                values = dict(map(item, record.history.item))
                points[name].append((values["_step"], values))
            elif kind == "summary":
                summaries[name] |= dict(map(item, record.summary.update))
            elif kind == "artifact":
                artefacts.append(record.artifact)
    assert set(runs) == {*NAMES, "report"}
    assert len({record.run_group for record in runs.values()}) == 1
    token = json.loads((run / "track/wandb.json").read_text())["token"]
    for member, expected in measured(run).items():
        name = NAMES[member]
        assert runs[name].run_id == f"{token}-{member}" and runs[name].project == "lorax"
        assert [step for step, _ in points[name]] == sorted(expected)
        for step, values in points[name]:
            assert expected[step].items() <= values.items()
        final = synthetic.planted_loss((1, 4)[member], 0)
        assert summaries[name]["final/eval_loss"] == pytest.approx(final)
        given = dict(map(item, runs[name].config.update))
        assert given["axes"] == {"rank": (1, 4)[member]} and given["train"]["schedule"] == "linear"
        assert given["method"]["rank"] == (1, 4)[member] and given["member"]["name"] == name
    ((_, page),) = points["report"]
    assert page["report/_type"] == "html-file"
    (artefact,) = artefacts
    files = {entry.path for entry in artefact.manifest.contents}
    assert {"report.html", "figures/curve.png"} <= files


class FakeRun:
    """A run of wandb's that keeps what it is sent; `open` are those that are not finished."""

    open, offline = set(), True

    def __init__(self, **given):
        self.id, self.points, self.summary = given["id"], [], {}
        self.dir = f"offline-run-{self.id}/files"
        FakeRun.open.add(self.id)

    def log(self, values, step=None, commit=True):
        self.points.append(step)

    def log_artifact(self, artefact):
        pass

    def finish(self, exit_code=0):
        FakeRun.open.remove(self.id)


def test_wandb_has_few_runs_open_and_what_failed_is_sent_in_the_end(run, monkeypatch):
    """The first call to wandb fails, as without a network."""
    service = require("wandb")
    from lorax.track import wandb

    made, most = {}, []

    def init(**given):
        if not most:
            most.append(0)
            raise OSError("no network")
        made[given["id"]] = FakeRun(**given)
        most.append(len(FakeRun.open))
        return made[given["id"]]

    rows = [json.loads(line) for line in lines(run / "metrics.jsonl")]
    members = json.loads(lines(run / "members.jsonl")[0])
    many = [members | {"member": i, "name": f"m{i}"} for i in range(40)]
    (run / "members.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    rows = [row | {"member": i} for i in range(40) for row in rows if row["member"] == 0]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(service, "init", init)
    tracker = wandb.Tracker(run)
    with pytest.raises(OSError, match="no network"):
        tracker.update()
    tracker.follower.begin()
    tracker.update()
    assert len(FakeRun.open) == wandb.LIVE == 16
    tracker.finish()
    assert not FakeRun.open and len(made) == 41 and max(most) == 16
    steps = sorted(measured(run)[0])
    assert all(made[f"{tracker.sent.token}-{i}"].points == steps for i in range(40))


def test_what_a_killed_process_has_not_written_is_sent_again(run, monkeypatch):
    """Offline, wandb writes a run at its end; its folder is then of no use."""
    service = require("wandb")
    from lorax.track import wandb

    made = []

    def init(**given):
        made.append(FakeRun(**given))
        (run / "track/wandb" / made[-1].dir).mkdir(parents=True, exist_ok=True)
        return made[-1]

    monkeypatch.setattr(service, "init", init)
    whole = lines(run / "metrics.jsonl")
    (run / "metrics.jsonl").write_text("".join(whole[:3]))
    ended = wandb.Tracker(run)
    ended.update()
    ended.close()
    (run / "metrics.jsonl").write_text("".join(whole))
    wandb.Tracker(run).update()  # and killed
    killed = sorted((run / "track/wandb").iterdir())
    last = wandb.Tracker(run)
    assert killed and not [*(run / "track/wandb").iterdir()]
    FakeRun.open.clear()
    last.finish()
    steps = sorted(measured(run)[0])
    assert made[0].points and made[1].points == made[-3].points == steps[len(made[0].points) :]
    assert json.loads((run / "track/wandb.json").read_text())["begun"] == {}


def test_trackio_has_members_as_runs_and_no_point_twice(run, tmp_path):
    """In another process: trackio reads where its files are when it is imported."""
    require("trackio")
    code = """
import json, sys
sys.path.insert(0, "tests")
from pathlib import Path
from track.test_trackers import follow
from lorax.track import trackio as ours
import trackio
run = Path(sys.argv[1])
ours.check()
last = follow(run, lambda: ours.Tracker(run))
logs = {}
for found in trackio.Api().runs("lorax"):
    lines = trackio.SQLiteStorage.get_logs("lorax", found.name, run_id=found.id)
    logs[found.name] = [found.config, lines]
print("FOUND" + json.dumps([last.where(), logs], default=str))
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    environment.pop("TRACKIO_SPACE_ID", None)
    done = subprocess.run(
        [sys.executable, "-c", code, run], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    where, logs = json.loads(done.stdout.split("FOUND")[1])
    assert where == "trackio show --project lorax" and len(logs) == 3
    token = json.loads((run / "track/trackio.json").read_text())["token"]
    for member, expected in measured(run).items():
        settings, logged = logs[f"{NAMES[member]} {token}"]
        assert settings["axes"] == {"rank": (1, 4)[member]} and settings["seed"] == 0
        points = [line for line in logged if "final/eval_loss" not in line]
        assert [line["step"] for line in points] == sorted(expected)
        for line in points:
            assert expected[line["step"]].items() <= line.items()
        final = synthetic.planted_loss((1, 4)[member], 0)
        assert [x["final/eval_loss"] for x in logged if x not in points] == [pytest.approx(final)]
    assert logs[f"report {token}"][1][0]["report"]["_type"] == "trackio.html"


def test_what_is_missing_is_said_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "lorax.track.wandb", raising=False)
    with pytest.raises(ValueError, match=r"'wandb' needs a package: pip install lorax-research\["):
        track.check(("tensorboard", "wandb"))


def test_nobody_logged_in_is_said_before_anything_is_trained(monkeypatch, tmp_path):
    require("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    code = """
from lorax.track import wandb
try: wandb.check()
except ValueError as error: print("SAID", error)
"""
    environment = os.environ | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert "SAID track: wandb has no login on this machine; run wandb login" in done.stdout
