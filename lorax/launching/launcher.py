"""Trains the rounds of a run by workers: splits, runs, follows and merges their parts."""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from lorax import halving, rundir
from lorax.halving import Race
from lorax.launching import merge, parts, split, state
from lorax.launching.machines import Machine
from lorax.train import prepare
from lorax.train.loop import Terminal
from lorax.train.prepare import Group

SECONDS = 0.5  # between two looks at what the parts have measured


class Launcher:
    """In place of `lorax.train.loop`: `train` has workers train the groups of a round.

    engine: see `lorax.launching.local`. options: its own. machine: whose numbers the run has.
    workers: about how many parts a round has. flags: of the command line that workers read.
    revised: whether keys of `config.REVISABLE` have changed since the parts were trained.
    """

    def __init__(
        self,
        engine: ModuleType,
        options,
        machine: Machine,
        workers: int,
        flags: list[str],
        revised: bool,
    ):
        self.engine, self.options, self.machine = engine, options, machine
        self.workers, self.flags, self.revised = workers, flags, revised
        self.round = 0

    @property
    def device(self) -> str | None:
        """What trains, for config.json; None for a CPU like the launcher's."""
        of = self.machine
        return None if of.platform == "cpu" else f"{of.devices} x {of.platform} of workers"

    def train(
        self,
        workdir: Path,
        groups: list[Group],
        terminal: Terminal,
        offset: int = 0,
        before: float = 0,
        after: float = 0,
        race: Race | None = None,
    ) -> tuple[dict[int, dict], int]:
        """As `loop.train`. Raises ChildProcessError if parts fail for good."""
        self.round += 1
        mine = self._parts(workdir, groups, race)
        # A run that is continued may have parts of later rounds.
        every = [p for p in parts.directories(workdir) if parts.read(p).round <= self.round]
        merge.metrics(workdir, every)
        race_of = race or halving.without(prepare.members_of(groups))
        total = before + halving.all_steps(race_of) + after
        tell = lambda done: terminal.progress(min(before + done, total), total)
        waiting = [part for part in mine if not parts.is_done(part)]
        terminal.say(f"{len(mine)} parts, {len(mine) - len(waiting)} of them trained before")
        failed = {}
        with _following(workdir, mine, tell):
            for part, why in self.engine.run(waiting, self.options) if waiting else ():
                if why:
                    failed[_name(part)] = why
                    terminal.say(f"{_name(part)} failed for good: {why}")
                else:
                    _tell(part, terminal)
        results = merge.merge(workdir, every)
        if failed:
            self._fail(workdir, results, failed)
        return results, rundir.metrics_size(workdir)

    def _parts(self, workdir: Path, groups: list[Group], race: Race | None) -> list[Path]:
        """The folders of this round's parts; those of an earlier start if the round is the same."""
        planned = parts.Round(
            groups={g.index: parts.written(g.members, race) for g in groups},
            sizes={g.index: split.size(g, race, self.machine) for g in groups},
            bases={g.index: g.base.sha256 for g in groups},
            flags=tuple(self.flags),
            folder=os.getcwd(),
        )
        begun = parts.read_round(workdir, self.round)
        if begun and not _is_same(begun, planned):
            if rundir.has_begun(workdir):
                raise ValueError(
                    f"workdir: {workdir / rundir.PARTS} was made for other devices or members; "
                    "continue it on a machine like the first, or name another --workdir"
                )
            shutil.rmtree(workdir / rundir.PARTS)
            begun = None
        of_round = lambda: [
            part for part in parts.directories(workdir) if parts.read(part).round == self.round
        ]
        if begun is None:
            for part in of_round():  # left by a launcher that was killed before it had written all
                shutil.rmtree(part)
            found = split.split(groups, race, self.machine, self.workers)
            for number, members in enumerate(found, len(parts.directories(workdir))):
                value = parts.Part(members, self.round, self.machine._asdict())
                parts.write(parts.directory(workdir, number), value)
        parts.write_round(workdir, self.round, planned)
        mine = of_round()
        for part in mine:
            if self.revised or _has_failed(part):
                _reopen(part)
        return mine

    def _fail(self, workdir: Path, results: dict[int, dict], failed: dict[str, str]) -> None:
        """Keep what is trained in status.json, and raise."""
        seconds = rundir.read_status(workdir).get("wall_seconds", 0.0)
        rundir.write_status(workdir, "running", results, seconds, failed)
        line = "; ".join(f"{name} failed: {why}" for name, why in failed.items())
        raise ChildProcessError(f"{line}. The others are merged into {workdir}")


def _is_same(begun: parts.Round, planned: parts.Round) -> bool:
    """Whether two rounds train the same, wherever and by whatever flags they were begun."""
    plain = lambda value: json.dumps(value[:3], sort_keys=True)
    return plain(begun) == plain(planned)


def _name(part: Path) -> str:
    """A part and its members: "part 3 (members 4, 5)"."""
    members = parts.read(part).members
    shown = ", ".join(map(str, members[:8])) + ", ..." * (len(members) > 8)
    return f"part {part.name} (member{'s' * (len(members) > 1)} {shown})"


def _tell(part: Path, terminal: Terminal) -> None:
    """Report the members of a part that is done."""
    names = {row["member"]: row["name"] for row in rundir.read_members(part)}
    for member, row in rundir.read_status(part)["members"].items():
        if row["status"] != "stopped":
            terminal.finished({"member": int(member), "name": names[int(member)]} | row)


def _has_failed(part: Path) -> bool:
    """Whether something failed after the part's members were trained."""
    return any(row.get("failed") for row in rundir.read_status(part).get("members", {}).values())


def _reopen(part: Path) -> None:
    """Have a worker measure the part's members again, from the last checkpoint."""
    status = rundir.read_status(part)
    if status.get("state") == "finished":
        rundir.write_status(part, "running", {}, status["wall_seconds"], {})
        state.launch(part)


# ------------------------------------------------------------------------------------- following


@contextlib.contextmanager
def _following(workdir: Path, directories: list[Path], tell: Callable[[float], None]):
    """Context in which new measurements of the parts are appended to the run's metrics.jsonl, so
    that trackers see them, and tell(steps of all members so far) is called."""
    ended, steps = threading.Event(), {}
    offsets = {part: _read_on(part, 0, steps)[1] for part in directories}

    def follow():
        while not ended.wait(SECONDS):
            new = []
            for part, offset in offsets.items():
                rows, offsets[part] = _read_on(part, offset, steps)
                new += rows
            if new:
                rundir.append_metrics(workdir, new)
            tell(sum(steps.values()))

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        try:
            yield
        finally:
            ended.set()
        following.result()  # raises what the thread has raised


def _read_on(part: Path, offset: int, steps: dict[int, int]) -> tuple[list[dict], int]:
    """The new lines of a part's metrics.jsonl and the offset after them; adds the steps of its
    members. A worker that was killed may have cut the file, and writes the same lines again."""
    if rundir.metrics_size(part) <= offset:
        return [], offset
    rows, offset = rundir.metrics_after(part, offset)
    for row in rows:
        steps[row["member"]] = max(steps.get(row["member"], 0), row["step"])
    return rows, offset
