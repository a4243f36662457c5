"""A run directory in trackio: its members are runs of one group, its report one more.

trackio keeps one run open, so those with new points are continued one after another, as often as
takes a twentieth of the time. The environment has its usual say: without TRACKIO_SPACE_ID or
TRACKIO_SERVER_URL everything stays in TRACKIO_DIR on this machine. The project is "lorax", unless
TRACKIO_PROJECT names another.
"""

import contextlib
import io
import os
import time
from pathlib import Path

import huggingface_hub
import trackio

from lorax import rundir
from lorax.track import follow

PROJECT = "lorax"
SHARE = 1 / 20  # of the time that updates may take


def check() -> None:
    """Raises ValueError if a Space is named and nobody is logged in at the Hub."""
    space = os.environ.get("TRACKIO_SPACE_ID")
    if space and not huggingface_hub.get_token():
        raise ValueError(
            f"track: trackio has no login for the Space {space}; run hf auth login, or unset "
            f"TRACKIO_SPACE_ID to stay on this machine"
        )


class Tracker:
    """The runs of a run directory: `update` sends new points, `finish` the rest and the report."""

    def __init__(self, directory: Path):
        self.directory, self.follower = Path(directory), follow.Follower(directory)
        self.sent, self.next = follow.Sent(directory, "trackio"), 0.0

    def update(self) -> None:
        """Send new points, unless the last update was too short a time ago."""
        began = time.monotonic()
        if began < self.next:
            return
        if self.follower.was_cut():
            self.follower.begin()
        for member, points in self.follower.new().items():
            self._send(member, self.sent.fresh(member, points))
        self.sent.write()
        self.next = time.monotonic() + (time.monotonic() - began) / SHARE

    def finish(self) -> None:
        """Send what is missing of every member of a trained run, its final values, and the
        report."""
        self.follower.begin()
        points = self.follower.new()
        for member, _, final, step in follow.results(self.follower):
            fresh = self.sent.fresh(member, points.get(member, {}))
            if final and str(member) not in self.sent.done:
                fresh.append((step, final))
            self._send(member, fresh)
            self.sent.done.add(str(member))
            self.sent.write()
        if files := follow.artefacts(self.directory):
            self._send_report(files)

    def close(self) -> None:
        """Nothing stays open."""

    def where(self) -> str:
        """The command that shows the runs."""
        return f"trackio show --project {_project()}"

    def _send(self, member: int, points: list[tuple[int, dict[str, float]]]) -> None:
        if points:
            name = self.follower.member(member)["name"]
            with self._run(name, self.follower.settings(member)):
                for step, values in points:
                    trackio.log(values, step=step)
            steps = [step for step, _ in points]  # the final values may be of an earlier one
            self.sent.last[member] = max(self.sent.last.get(member, 0), *steps)

    @contextlib.contextmanager
    def _run(self, name: str, settings: dict):
        """Context in which a run, continued if it was begun before, is the current one."""
        with contextlib.redirect_stdout(io.StringIO()):  # four lines for every run
            trackio.init(
                project=_project(),
                name=f"{name} {self.sent.token}",
                group=f"{self.directory.resolve().name} {self.sent.token}",
                config=settings,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            try:
                yield
            finally:
                trackio.finish()

    def _send_report(self, files: list[Path]) -> None:
        """The report with its figures and tables as an artefact, and as a page the first time."""
        with self._run("report", {}):
            page = self.directory / rundir.REPORT
            if page in files and "report" not in self.sent.done:
                trackio.log({"report": trackio.Html(page)})
                self.sent.done.add("report")
            artefact = trackio.Artifact(f"report-{self.sent.token}", "report")
            for file in files:
                artefact.add_file(str(file), str(file.relative_to(self.directory)))
            trackio.log_artifact(artefact)
        self.sent.write()


def _project() -> str:
    return os.environ.get("TRACKIO_PROJECT", PROJECT)
