"""A run directory as TensorBoard events: scalars and hyperparameters of each member, and figures.

They are made from the run directory: tb/ has the contents of metrics.jsonl and trajectory/. If a
continued run has shortened metrics.jsonl, tb/ is rewritten, so that no point occurs twice.
"""

import shutil
import struct
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import hparams

from lorax import rundir
from lorax.track import follow


def check() -> None:
    """Nothing is missing: tensorboardX comes with lorax."""


class Tracker:
    """The events of a run in training: `update` adds new measurements, `finish` the rest."""

    def __init__(self, directory: Path):
        self.directory, self.target = Path(directory), Path(directory) / rundir.TENSORBOARD
        self.follower = follow.Follower(directory)
        self._begin()

    def _begin(self):
        shutil.rmtree(self.target, ignore_errors=True)
        self.follower.begin()
        self.file = f"events.out.tfevents.{int(time.time())}.lorax"

    def update(self) -> None:
        """Add new lines of metrics.jsonl and new spectra."""
        if self.follower.was_cut():
            self._begin()
        for member, points in self.follower.new().items():
            self._append(member, [(step, _summary(x)) for step, x in points.items()])

    def finish(self) -> None:
        """Add final values, hyperparameters and figures/*.png of a trained run."""
        self.update()
        for member, fields, final, step in follow.results(self.follower):
            self._append(member, [(step, _summary(final))] if final else [])
            self._append(member, [(0, summary) for summary in hparams(fields, final)])
        shutil.rmtree(self.target / rundir.FIGURES, ignore_errors=True)
        figures = sorted((self.directory / rundir.FIGURES).glob("*.png"))
        self._write(rundir.FIGURES, [(0, _image(file)) for file in figures])

    def close(self) -> None:
        """Nothing stays open."""

    def where(self) -> str:
        """The command that shows the run."""
        return f"tensorboard --logdir {self.target}"

    def _append(self, member: int, events: list[tuple[int, Summary]]) -> None:
        self._write(self.follower.member(member)["name"], events)

    def _write(self, folder: str, events: list[tuple[int, Summary]]) -> None:
        # Not tensorboardX's SummaryWriter: a full disk kills its thread, and it then hangs.
        file = self.target / folder / self.file
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab") as out:
            if not out.tell():
                out.write(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
            for step, summary in events:
                out.write(_record(Event(wall_time=time.time(), step=step, summary=summary)))


def _summary(values: dict[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()])


def _image(file: Path) -> Summary:
    """A PNG file as an image summary."""
    data = file.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    return Summary(value=[Summary.Value(tag=file.stem, image=image)])


def _record(event: Event) -> bytes:
    """An event as a TFRecord, with its length and both checksums."""
    data = event.SerializeToString()
    head = struct.pack("<Q", len(data))
    checked = lambda part: part + struct.pack("<I", masked_crc32c(part))
    return checked(head) + checked(data)
