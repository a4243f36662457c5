"""A run directory as TensorBoard events: scalars and hyperparameters of each member, and figures.

They are made from the run directory: tb/ has the contents of metrics.jsonl and trajectory/. If a
continued run has shortened metrics.jsonl, tb/ is rewritten, so that no point occurs twice.
"""

import functools
import math
import shutil
import struct
import time
import types
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import hparams

from lorax import rundir
from lorax.analysis import runs
from lorax.analysis.measures import spectrum
from lorax.train import optim

SCHEDULE = ("schedule", "warmup", "warmup_ratio")  # keys of config.train


class Events:
    """The events of a run in training: `update` adds new measurements, `finish` the rest."""

    def __init__(self, directory: Path):
        self.directory, self.target = Path(directory), Path(directory) / rundir.TENSORBOARD
        self._begin()

    def _begin(self):
        shutil.rmtree(self.target, ignore_errors=True)
        self.read, self.seen, self.members = 0, set(), {}
        self.file = f"events.out.tfevents.{int(time.time())}.lorax"

    def update(self) -> None:
        """Add new lines of metrics.jsonl and new spectra."""
        if rundir.metrics_size(self.directory) < self.read:
            self._begin()
        rows, self.read = rundir.metrics_after(self.directory, self.read)
        points = {}
        for row in rows:
            points.setdefault(row["member"], []).append((row["step"], self._scalars(row)))
        for file in rundir.spectra_files(self.directory):
            if file not in self.seen:
                self.seen.add(file)
                for member, values in _effective_ranks(load_file(file)).items():
                    points.setdefault(member, []).append((int(file.stem), values))
        for member, of_member in points.items():
            self._append(member, [(step, _summary(x)) for step, x in of_member if x])

    def finish(self) -> Path:
        """Add final values, hyperparameters and figures/*.png of a finished run; the folder."""
        self.update()
        run = runs.load(self.directory)
        for member, row in runs.summary(run).iterrows():
            fields = self._member(member)
            hyper = {
                name: value if isinstance(value, int | float | str | bool) else str(value)
                for name, value in fields.items()
                if name not in ("member", "group", "name") and value is not None
            }
            final = {"final/eval_loss": row["final_loss"]}
            final |= {f"final/{name}": row[name] for name in runs.scores(run)}
            final = {name: float(x) for name, x in final.items() if np.isfinite(x)}
            step = int(row["final_step"])
            self._append(member, [(step, _summary(final))] if final else [])
            self._append(member, [(0, summary) for summary in hparams(hyper, final)])
        shutil.rmtree(self.target / rundir.FIGURES, ignore_errors=True)
        figures = sorted((self.directory / rundir.FIGURES).glob("*.png"))
        self._write(rundir.FIGURES, [(0, _image(file)) for file in figures])
        return self.target

    def _scalars(self, point: dict) -> dict[str, float]:
        numbers = {
            f"{point['split']}/{name}": value
            for name, value in point.items()
            if name not in ("member", "step", "split") and value is not None
        }
        if point["split"] == "train":
            member = self._member(point["member"])
            schedule = (member.get(f"train.{key}", self.train.get(key, 0)) for key in SCHEDULE)
            factors = _factors(*schedule, member["steps"])
            numbers["train/learning_rate"] = member["lr"] * factors[point["step"] - 1]
        return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}

    def _member(self, member: int) -> dict:
        """The member's line of members.jsonl, which is read again when a search has added some."""
        if member not in self.members:
            self.members = {row["member"]: row for row in rundir.read_members(self.directory)}
            self.train = rundir.read_config(self.directory)["config"]["train"]
        return self.members[member]

    def _append(self, member: int, events: list[tuple[int, Summary]]) -> None:
        self._write(self._member(member)["name"], events)

    def _write(self, folder: str, events: list[tuple[int, Summary]]) -> None:
        # Not tensorboardX's SummaryWriter: a full disk kills its thread, and it then hangs.
        file = self.target / folder / self.file
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab") as out:
            if not out.tell():
                out.write(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
            for step, summary in events:
                out.write(_record(Event(wall_time=time.time(), step=step, summary=summary)))


def _effective_ranks(arrays: dict) -> dict[int, dict[str, float]]:
    """{member: {"effective_rank/PATH": value}} from a file of `lorax.train.trajectory`."""
    members, ranks_of = arrays["members"].tolist(), {}
    for path in [key.removesuffix("/used") for key in arrays if key.endswith("/used")]:
        ranks = spectrum.effective_rank(arrays[f"{path}/sigma"])
        for i in np.flatnonzero(arrays[f"{path}/used"]):
            ranks_of.setdefault(members[i], {})[f"effective_rank/{path}"] = float(ranks[i])
    return ranks_of


@functools.cache
def _factors(schedule: str, warmup: int, warmup_ratio: float, steps: int) -> np.ndarray:
    """The factors (steps,) on the learning rate."""
    values = schedule, warmup, warmup_ratio
    train = types.SimpleNamespace(**dict(zip(SCHEDULE, values, strict=True)), steps=steps)
    return np.broadcast_to(np.asarray(optim.schedule(train)(np.arange(steps))), (steps,))


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
