"""From members to a report: train round after round, then analyse the updates.

A run without a search has one round. A failure after training loses nothing that was trained: it is
printed and recorded in errors.txt and status.json, and the same command tries it again.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lorax import gather, halving, hosts, report, rundir, search, track, tree, xla
from lorax.analysis import answer, runs, tables
from lorax.config import Member
from lorax.errors import reason
from lorax.files import remove, write_bytes
from lorax.models import Base, kernels
from lorax.report import bases, images
from lorax.terminal import Evaluations, Screen
from lorax.train import layouts, loop, prepare

PACKAGES = ("lorax-research", "jax", "jaxlib", "flax", "optax")  # config.json has their versions


def train(
    settings: ConfigDict,
    members: list[Member],
    workdir: Path,
    command: str,
    launcher=None,
) -> dict[str, str]:
    """Train all members of a run, export, analyse, report; {what failed after training: why}.

    command: the command that runs the same again, for config.json. launcher: has other processes
    train the groups of a round (`lorax.launching.launcher`); without it they are trained here. With
    several processes (`lorax.hosts`) all train, and the first one alone writes, analyses and knows
    what failed.
    """
    tables.read_statistics(settings.analysis.also)  # raises if one can't be read
    track.check(settings.track)
    with contextlib.suppress(RuntimeError):  # JAX has already started: its devices stay
        layouts.split_cpu()
    xla.keep_compiled()
    with Screen() as screen:
        log = Log(workdir, screen)
        with contextlib.closing(log):
            base = _train(settings, members, log, command, launcher)
            if not hosts.first():
                return {}
            log.write("trained")
            screen.end_bar()
            _analyse(settings, base, log)
        log.write("trained" if log.failed else "finished")
        log.attempt("table", lambda: screen.table(runs.load(workdir)))
        if settings.search.threshold:
            show = lambda: screen.dimensions(search.estimate(settings, workdir))
            log.attempt("dimensions", show)
    return log.failed


@dataclasses.dataclass
class Log:
    """The state of a run, as in status.json, and the screen that reports it.

    results: {member: its row of `lorax.train.loop.train`}. failed: {what failed after training:
    why}. seconds: wall clock of earlier starts of the run. began: when this one started. trackers:
    {name to print: what follows the run}.
    """

    workdir: Path
    screen: Screen
    trackers: dict = dataclasses.field(default_factory=dict)
    results: dict[int, dict] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self):
        self.seconds = rundir.read_status(self.workdir).get("wall_seconds", 0.0)

    def write(self, state: str) -> None:
        """Write status.json."""
        seconds = round(self.seconds + time.monotonic() - self.began, 1)
        rundir.write_status(self.workdir, state, self.results, seconds, self.failed)

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """The result of work that may fail without ending the run, None if it did; `what` names it
        in messages."""
        try:
            return work()
        except Exception as error:
            self.failed[what] = reason(error)
            self.screen.say(f"{what}: {rundir.keep_error(self.workdir, error)}")

    def close(self) -> None:
        """Leave the trackers, so that this process can continue the run."""
        for name, tracker in self.trackers.items():
            self.attempt(name, tracker.close)


# ---------------------------------------------------------------------------------------- training


def _train(settings, members: list[Member], log: Log, command: str, launcher) -> Base:
    """Train the sweep, then the rounds of a search; the base of the first group."""
    workdir, say, loaded = log.workdir, log.screen.say, prepare.Loaded({}, {})
    prepared = functools.partial(prepare.groups, say=say, loaded=loaded)
    train, groups = launcher.train if launcher else loop.train, prepared(members)
    if settings.search.threshold:
        prepare.check_metric(groups, settings.search.metric)
    base = groups[0].base
    race = halving.race(settings, prepare.members_of(groups))
    if race and any(member.config.train.epochs for member in members):
        say(halving.budget(race))
    if hosts.first():
        check_disk(workdir, groups, race)
    write_config(workdir, settings, base, command, launcher and launcher.device)
    if hosts.first():
        log.trackers = track.trackers(settings.track, workdir)
    evaluations = Evaluations(workdir)

    def progress(done, total):
        if not hosts.first():
            return
        log.screen.progress(done, total, evaluations.newest())
        for name, tracker in log.trackers.items():
            if name not in log.failed:
                log.attempt(name, tracker.update)

    members, lines, offset, before = list(members), [], 0, 0
    rounds, most = search.rounds(settings), search.most_members(settings, members)
    for number in range(1, rounds + 1):
        lines += [line for group in groups for line in prepare.describe(group)]
        rundir.write_members(workdir, lines)
        loop.write_rankings(workdir, groups)
        log.write("running")
        after = (rounds - number) * most * groups[0].config.train.steps
        terminal = log.screen.terminal(lines)._replace(progress=progress)
        results, offset = train(workdir, groups, terminal, offset, before, after, race)
        log.results |= results
        log.write("running")
        if number == rounds:
            break
        added = search.next_round(settings, members, workdir, say)
        if not added:
            say("search: nothing is left to try")
            break
        say(f"search: round {number} of {rounds - 1}, {len(added)} members")
        before += loop.member_steps(prepare.members_of(groups))
        groups = prepared(added, first=groups[-1].index + 1)
        members += added
    return base


def check_disk(
    workdir: Path, groups: list[prepare.Group], race: halving.Race | None = None
) -> None:
    """Raises ValueError if the disk has no room for the groups' checkpoints and adapters."""
    learned = [tree.nbytes(group.stack.state.trainable) for group in groups]
    kept = [size * (g.config.eval.keep == "best") for size, g in zip(learned, groups, strict=True)]
    states = [tree.nbytes(g.stack.state) + size for g, size in zip(groups, kept, strict=True)]
    # Two checkpoints of each group are kept while a third is written; after a rung, those of the
    # members that go on in addition.
    legs = halving.planned(race) if race else []
    again = sum(map(len, legs[1:])) / len(race.stops) if race else 0
    needs = sum(learned) + 2 * (1 + again) * sum(states) + max(states)
    present = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())
    free = shutil.disk_usage(workdir).free
    if needs > free + present:
        count = sum(len(group.members) for group in groups)
        raise ValueError(
            f"--workdir: {workdir} needs {needs / 1e9:.2f} GB for checkpoints and adapters of "
            f"{count} members, and {(free + present) / 1e9:.2f} GB are free there; name another "
            f"--workdir, or train fewer members in one run"
        )


def write_config(
    workdir: Path, settings: ConfigDict, base: Base, command: str, device: str | None = None
) -> None:
    """Write config.json. If the run has begun, only its config and command are updated.

    device: what trains, if that is not this machine. Raises ValueError if the weights of the base
    differ from those that the run began with.
    """
    devices, cores = jax.devices(), f"{platform.machine()}, {os.cpu_count()} cores"
    now = {
        "config": json.loads(settings.to_json()),
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "device": device or f"{len(devices)} x {devices[0].device_kind} ({cores})",
        "git": _git_revision(),
        "base_sha256": base.sha256,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if not hosts.first():  # the base's hash takes all processes
        return
    if not rundir.has_begun(workdir):
        rundir.write_config(workdir, now)
        return
    begun = rundir.read_config(workdir)
    if begun["base_sha256"] != now["base_sha256"]:
        raise ValueError(
            f"base: the weights of {base.name} differ from those that {workdir} began with; "
            f"name another --workdir"
        )
    if begun["config"] != now["config"]:
        changed = {key: now[key] for key in ("config", "command")}
        rundir.write_config(workdir, begun | changed)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the source tree that lorax runs from, with "+" if it has uncommitted changes."""
    here = Path(__file__).parent
    ask = lambda *words: subprocess.run(
        ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()
    try:
        return ask("rev-parse", "HEAD") + "+" * bool(ask("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None


# --------------------------------------------------------------------------------------- analysing


def _analyse(settings: ConfigDict, base: Base, log: Log) -> None:
    """Write the tables and the report of a trained run, and send the rest to the trackers."""
    workdir, say = log.workdir, log.screen.say
    for member, result in log.results.items():
        failed = result.get("failed", {}).items()
        log.failed |= {f"{key} of member {member}": why for key, why in failed}
    log.attempt("tables", lambda: _write_tables(workdir))
    found = None
    if not settings.search.threshold:  # a search has dimensions
        found = log.attempt("answer", lambda: answer.write(runs.load(workdir)))
    if settings.analysis.report:
        say("analysing the updates and drawing the report")
        log.attempt("report", lambda: _report(workdir, base, settings.analysis, found, say))
    for name, tracker in log.trackers.items():
        log.failed.pop(name, None)  # everything is sent now
        log.attempt(name, tracker.finish)
        if name not in log.failed:
            say(f"{name}: {tracker.where()}")


def _write_tables(workdir: Path) -> None:
    """Write trajectory.csv, cka.csv and kept_rank.csv in analysis/ from what training has
    recorded."""
    run = runs.load(workdir)
    for name in ("trajectory", "cka", "kept_rank"):
        table = getattr(tables, name)(run)
        file = rundir.table(workdir, name)
        if table is None:
            remove(file)  # left by an analysis that is no longer asked for
        else:
            write_bytes(file, table.to_csv(index=False).encode())


def _report(
    workdir: Path, base: Base, asked: ConfigDict, found: dict | None, say: Callable[[str], None]
) -> None:
    """Draw the report. A section that fails is replaced by a line, also printed on the screen, and
    does not fail the run. asked: the config's `analysis` section. found: the run's answer;
    None if that failed."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"report: {message}")
        # Other processes hold parts of the base and no longer take part: its files have all of it.
        alone = gather.is_here(base.params)
        read = (kernels(base), "") if alone else bases.of_config(rundir.read_config(workdir))
        written = report.write(workdir, *read, also=asked.also, answer=found)
        if asked.figures:
            images.add(written, asked.figures)
