"""What TensorBoard reads, read back: every point once, hyperparameters beside it."""

import json
import resource
import struct

import numpy as np
import pytest
import synthetic
from matplotlib import image
from safetensors.numpy import save_file
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

from lorax.track import tensorboard


def events(folder):
    """All events below a folder, in the order of the files."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            body, check = data[12 : 12 + length], data[12 + length : 16 + length]
            assert struct.unpack("<I", check)[0] == masked_crc32c(body)
            found.append(Event.FromString(body))
            data = data[16 + length :]
    return found


def scalars(folder):
    """[(tag, step, value)] of all points."""
    return [
        (value.tag, event.step, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


@pytest.fixture
def run(tmp_path):
    directory = synthetic.make_run(tmp_path / "run", ranks=(1, 4), seeds=(0,))
    file = directory / "members.jsonl"
    rows = [json.loads(line) | {"steps": 100} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = json.loads((directory / "config.json").read_text())
    stored.setdefault("config", {}).setdefault("train", {}).update(schedule="linear", warmup=0)
    (directory / "config.json").write_text(json.dumps(stored))
    return directory


def lines(run):
    return (run / "metrics.jsonl").read_text().splitlines(keepends=True)


def expected(run, member):
    """What metrics.jsonl says of a member, and its learning rate: 2e-3, falling to 0."""
    points = []
    for row in map(json.loads, lines(run)):
        names = [name for name in row if name not in ("member", "step", "split")]
        if row["member"] == member:
            points += [(f"{row['split']}/{name}", row["step"], row[name]) for name in names]
            if row["split"] == "train":
                rate = 2e-3 * (1 - (row["step"] - 1) / 100)
                points.append(("train/learning_rate", row["step"], rate))
    return points


def same(found, points):
    assert sorted(p[:2] for p in found) == sorted(p[:2] for p in points)
    for a, b in zip(sorted(found), sorted(points), strict=True):
        assert a[2] == pytest.approx(b[2], rel=1e-6, abs=1e-9)  # 2e-3 times float32's rounding


def test_points_are_there_while_it_trains_and_none_comes_twice(run):
    """Also where a run that is continued has cut some off, and after a torn line."""
    whole = lines(run)
    names = ["rank=1,alpha=16,lr=0.002,seed=0", "rank=4,alpha=16,lr=0.002,seed=0"]
    (run / "metrics.jsonl").write_text("".join(whole[:3]) + whole[3][:9])
    follower = tensorboard.Tracker(run)
    follower.update()
    assert len(scalars(run / "tb" / names[0])) > 3
    (run / "metrics.jsonl").write_text("".join(whole[:4]))
    follower.update()
    follower.update()
    same(scalars(run / "tb" / names[0]), expected(run, 0))
    (run / "metrics.jsonl").write_text("".join(whole[:1]))
    follower.update()
    same(scalars(run / "tb" / names[0]), expected(run, 0))
    (run / "metrics.jsonl").write_text("".join(whole))
    again = tensorboard.Tracker(run)  # of the process that continues it
    again.update()
    for member, name in enumerate(names):
        same(scalars(run / "tb" / name), expected(run, member))
    assert events(run / "tb" / names[0])[0].file_version == "brain.Event:2"


def test_hyperparameters_are_in_the_file_that_is_read(run):
    """A second writer of tensorboardX on the same folder overwrote what was there, or itself."""
    tensorboard.Tracker(run).finish()
    for name, rank in (("rank=1,", 1), ("rank=4,", 4)):
        (folder,) = (run / "tb").glob(f"{name}*")
        found = {}
        for event in events(folder):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    content = value.metadata.plugin_data.content
                    found[value.tag] = HParamsPluginData.FromString(content)
        assert set(found) == {
            "_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"
        }  # fmt: skip
        given = found["_hparams_/session_start_info"].session_start_info.hparams
        assert given["rank"].number_value == rank and given["lr"].number_value == 2e-3
        assert given["targets"].string_value == "['q', 'v']"
        metrics = [m.name.tag for m in found["_hparams_/experiment"].experiment.metric_infos]
        finals = {tag: value for tag, _, value in scalars(folder) if tag.startswith("final/")}
        assert metrics == list(finals) == ["final/eval_loss"]
        assert finals["final/eval_loss"] == pytest.approx(synthetic.planted_loss(rank, 0))


def test_effective_ranks_of_a_trajectory_are_among_the_points(run):
    sigma = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], np.float32)
    arrays = {"members": np.array([0, 1]), "h/0/attn/q/sigma": sigma}
    arrays |= {"h/0/attn/q/directions": np.zeros((2, 24, 4), np.float32)}
    arrays |= {"h/0/attn/q/used": np.array([True, False])}
    (run / "trajectory/0-0").mkdir(parents=True)
    save_file(arrays, run / "trajectory/0-0/50.safetensors")
    follower = tensorboard.Tracker(run)
    follower.update()
    follower.update()
    first, second = sorted((run / "tb").iterdir())
    points = [p for p in scalars(first) if p[0].startswith("effective_rank")]
    assert points == [("effective_rank/h/0/attn/q", 50, pytest.approx(2, rel=1e-5))]
    assert not [p for p in scalars(second) if p[0].startswith("effective_rank")]


def test_figures_are_there_as_they_are(run):
    (run / "figures").mkdir()
    pixels = np.random.default_rng(0).random((5, 7, 3))
    image.imsave(run / "figures/curve.png", pixels)
    tensorboard.Tracker(run).finish()
    tensorboard.Tracker(run).finish()
    _, event = events(run / "tb/figures")
    (value,) = event.summary.value
    assert (value.tag, value.image.height, value.image.width) == ("curve", 5, 7)
    assert value.image.encoded_image_string == (run / "figures/curve.png").read_bytes()


def test_a_full_disk_is_an_error_and_no_hang(run):
    """A thread of tensorboardX's died of it, and the run waited for it for ever."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (run / "figures").mkdir()
    image.imsave(run / "figures/curve.png", np.random.default_rng(0).random((50, 70, 3)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError):
            tensorboard.Tracker(run).finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
