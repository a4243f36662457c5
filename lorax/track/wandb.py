"""A run directory at Weights & Biases: its members are runs of one group, its report one more.

All runs share one service process of wandb's. `LIVE` of them are open at once: the first members
that have points are shown while they train, the others when training is over, one after another.
The environment has its usual say: WANDB_MODE=offline writes to track/wandb/ of the run directory,
WANDB_PROJECT names another project than "lorax".
"""

import os
import shutil
from pathlib import Path

import wandb

from lorax import rundir
from lorax.track import follow

LIVE = 16
PROJECT = "lorax"


def check() -> None:
    """Raises ValueError if nobody is logged in and W&B is not offline."""
    offline = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
    if not offline and not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "track: wandb has no login on this machine; run wandb login, or set WANDB_MODE=offline"
        )


class Tracker:
    """The runs of a run directory: `update` sends new points, `finish` the rest and the report."""

    def __init__(self, directory: Path):
        self.directory, self.follower = Path(directory), follow.Follower(directory)
        self.sent, self.open, self.url = follow.Sent(directory, "wandb"), {}, None
        for member, (step, folder) in self.sent.begun.items():
            # Offline, wandb writes most of a run at its end, so one that was killed is sent again;
            # online, it ignores the steps that it has.
            self.sent.last[member] = step
            if folder.startswith("offline-run-"):
                shutil.rmtree(self._folder() / "wandb" / folder, ignore_errors=True)
        self.sent.begun = {}

    def update(self) -> None:
        """Send the new points of members that are live."""
        if self.follower.was_cut():
            self.follower.begin()
        for member, points in self.follower.new().items():
            if member in self.open or len(self.open) < LIVE:
                self._send(member, points)
        self.sent.write()

    def finish(self) -> None:
        """Send what is missing of every member of a trained run, its final values, and the
        report."""
        self.follower.begin()
        points = self.follower.new()
        for member, _, final, _ in follow.results(self.follower):
            self._send(member, points.get(member, {}))
            self._run(member).summary.update(final)
            self._end(member)
        if files := follow.artefacts(self.directory):
            self._send_report(files)

    def close(self) -> None:
        """Finish the runs that are still open, as those of a run that has not ended well."""
        for member in [*self.open]:
            self._end(member, exit_code=1)

    def where(self) -> str:
        """Where the runs are, or the command that uploads them."""
        return self.url or f"wandb sync --append {self._folder()}/wandb/offline-run-*"

    def _folder(self) -> Path:
        return rundir.tracked(self.directory)

    def _send(self, member: int, points: dict[int, dict[str, float]]) -> None:
        for step, values in self.sent.fresh(member, points):
            self._run(member).log(values, step=step, commit=True)
            self.sent.last[member] = step

    def _run(self, member: int):
        if member not in self.open:
            settings = self.follower.settings(member)
            name = self.follower.member(member)["name"]
            self.open[member] = run = self._begin(str(member), name, "member", settings)
            self.sent.begun[member] = self.sent.last.get(member, -1), Path(run.dir).parent.name
            self.sent.write()
        return self.open[member]

    def _end(self, member: int, exit_code: int = 0) -> None:
        self.open.pop(member).finish(exit_code=exit_code)
        del self.sent.begun[member]
        self.sent.write()

    def _begin(self, last: str, name: str, kind: str, settings: dict):
        """A run that is continued if it was begun before. last: of its id."""
        self._folder().mkdir(exist_ok=True)
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=f"{self.directory.resolve().name} {self.sent.token}",
            id=f"{self.sent.token}-{last}",
            name=name,
            job_type=kind,
            config=settings,
            dir=self._folder(),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self.url = None if run.offline else run.project_url
        return run

    def _send_report(self, files: list[Path]) -> None:
        """The report as a page and, with its figures and tables, as an artefact."""
        run = self._begin("report", "report", "report", {})
        if (page := self.directory / rundir.REPORT) in files:
            run.log({"report": wandb.Html(str(page), inject=False)})
        artefact = wandb.Artifact(f"report-{self.sent.token}", "report")
        for file in files:
            artefact.add_file(str(file), str(file.relative_to(self.directory)))
        run.log_artifact(artefact)
        run.finish()
