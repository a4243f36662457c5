"""What trackers read of a run directory: points, each once, and the results of its members."""

import functools
import json
import math
import secrets
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from lorax import config, rundir, spectrum
from lorax.analysis import runs
from lorax.files import write_json
from lorax.train import optim

SCHEDULE = ("schedule", "warmup", "warmup_ratio")  # keys of config.train


class Follower:
    """Reads metrics.jsonl and trajectory/ as they grow. Measurements of one member at one step are
    written together, so `new` returns them together."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.begin()

    def begin(self) -> None:
        """Forget what was read: `new` then returns everything."""
        self.read, self.seen, self.members = 0, set(), {}

    def was_cut(self) -> bool:
        """Whether metrics.jsonl is shorter than what was read: a run that continues has cut it."""
        return rundir.metrics_size(self.directory) < self.read

    def new(self) -> dict[int, dict[int, dict[str, float]]]:
        """{member: {step: {name: value}}} of new lines of metrics.jsonl and new spectra."""
        rows, self.read = rundir.metrics_after(self.directory, self.read)
        points = {}
        for row in rows:
            self._add(points, row["member"], row["step"], self._scalars(row))
        for file in rundir.spectra_files(self.directory):
            if file not in self.seen:
                self.seen.add(file)
                for member, values in _effective_ranks(load_file(file)).items():
                    self._add(points, member, int(file.stem), values)
        return points

    def member(self, member: int) -> dict:
        """The member's line of members.jsonl, which is read again when a search has added some."""
        if member not in self.members:
            self.members = {row["member"]: row for row in rundir.read_members(self.directory)}
            self.config = rundir.read_config(self.directory)["config"]
        return self.members[member]

    def settings(self, member: int) -> dict:
        """The run's config, with the member's values of the axes that were swept: also under
        "axes"; its line of members.jsonl under "member"."""
        row = self.member(member)
        settings = json.loads(json.dumps(self.config))
        axes = {axis: row.get(axis) for axis in config.swept(settings.pop("sweep", {}))}
        for axis, value in axes.items():
            section, _, name = config.key_of(axis).rpartition(".")
            (settings.setdefault(section, {}) if section else settings)[name] = value
        return settings | {"axes": axes, "member": row}

    @staticmethod
    def _add(points: dict, member: int, step: int, values: dict[str, float]) -> None:
        if values:
            points.setdefault(member, {}).setdefault(step, {}).update(values)

    def _scalars(self, point: dict) -> dict[str, float]:
        numbers = {
            f"{point['split']}/{name}": value
            for name, value in point.items()
            if name not in ("member", "step", "split") and value is not None
        }
        if point["split"] == "train":
            member, train = self.member(point["member"]), self.config["train"]
            schedule = (member.get(f"train.{key}", train.get(key, 0)) for key in SCHEDULE)
            factors = _factors(*schedule, member["steps"])
            numbers["train/learning_rate"] = member["lr"] * factors[point["step"] - 1]
        return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


class Result(NamedTuple):
    """A trained member. fields: of its line of members.jsonl, as numbers and strings. final:
    {"final/NAME": value} of the last evaluation, at `step`."""

    member: int
    fields: dict
    final: dict[str, float]
    step: int


def results(follower: Follower) -> Iterator[Result]:
    """The results of all members of a run that is trained."""
    run = runs.load(follower.directory)
    for member, row in runs.summary(run).iterrows():
        fields = {
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in follower.member(member).items()
            if name not in ("member", "group", "name") and value is not None
        }
        final = {"final/eval_loss": row["final_loss"]}
        final |= {f"final/{name}": row[name] for name in runs.scores(run)}
        final = {name: float(x) for name, x in final.items() if np.isfinite(x)}
        yield Result(member, fields, final, int(row["final_step"]))


class Sent:
    """What a tracker outside the run directory has been sent: track/NAME.json.

    token: names the run there, for as long as the directory lives. last: {member: step up to which
    its points were sent}. A run that continues repeats the measurements after its checkpoint bit
    for bit, so these are sent once.
    done: members whose results were sent as points, and "report". begun: {member: (step before it,
    folder)} of what a tracker writes at its end: a process that was killed has lost it.
    """

    def __init__(self, directory: Path, name: str):
        self.file = rundir.tracked(directory) / f"{name}.json"
        state = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.token = state.get("token") or secrets.token_hex(4)
        self.last = {int(member): step for member, step in state.get("last", {}).items()}
        self.done = set(state.get("done", ()))
        self.begun = {int(member): tuple(x) for member, x in state.get("begun", {}).items()}

    def fresh(self, member: int, points: dict[int, dict]) -> list[tuple[int, dict]]:
        """The points of a member that were not sent, by step. Whoever sends them sets `last`."""
        return [(s, x) for s, x in sorted(points.items()) if s > self.last.get(member, -1)]

    def write(self) -> None:
        """Remember it."""
        self.file.parent.mkdir(exist_ok=True)
        state = {"token": self.token, "last": self.last, "done": sorted(self.done)}
        write_json(self.file, state | {"begun": self.begun})


def artefacts(directory: Path) -> list[Path]:
    """The report, and the figures and tables beside it."""
    folders = [directory / name for name in (rundir.FIGURES, rundir.ANALYSIS)]
    files = [directory / rundir.REPORT, *(file for x in folders for file in sorted(x.rglob("*")))]
    return [file for file in files if file.is_file()]


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
