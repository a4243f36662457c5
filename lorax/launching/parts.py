"""Parts of a run: members that one worker trains by itself, in a run directory of their own.

Part I is in parts/I of the run directory. part.json says what it trains; the rest are the files of
a run directory, with the numbers that the members have in the whole run. Its status.json is that of
a run: the part is done when its state is "finished". Nothing here imports JAX.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax import config, rundir
from lorax.config import Member
from lorax.files import read_json, write_json

#: Files of machines with GPUs or TPUs.
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio")


class Part(NamedTuple):
    """What one worker trains.

    members: their numbers in the run, ascending. round: of a search, from 1. layout: {"platform",
    "devices"}, the devices of the one machine whose numbers the run has. groups: {number of a
    group: all its members, of this part or not, as {"member", "point", "steps"}}, for the groups
    that the part's members are of. flags: of the command line that began the run; folder: where it
    was given.
    """

    members: tuple[int, ...]
    round: int
    layout: dict[str, Any]
    groups: dict[int, list[dict[str, Any]]]
    flags: tuple[str, ...]
    folder: str


def directory(workdir: Path, number: int) -> Path:
    """The folder of a part."""
    return Path(workdir) / rundir.PARTS / str(number)


def directories(workdir: Path) -> list[Path]:
    """The folders of all parts of a run, in the order of their numbers."""
    found = (Path(workdir) / rundir.PARTS).glob(f"*/{rundir.PART}")
    return sorted((path.parent for path in found), key=lambda path: int(path.name))


def run_of(part: Path) -> Path:
    """The run directory that a part's folder is in."""
    return Path(part).parent.parent


def write(part: Path, value: Part) -> None:
    """Write part.json."""
    write_json(part / rundir.PART, value._asdict())


def read(part: Path) -> Part:
    """The content of part.json. Raises FileNotFoundError if it is missing, ValueError if it is
    damaged."""
    file = Path(part) / rundir.PART
    try:
        value = read_json(file)
        return Part(
            members=tuple(value["members"]),
            round=value["round"],
            layout=value["layout"],
            groups={int(number): of for number, of in value["groups"].items()},
            flags=tuple(value["flags"]),
            folder=value["folder"],
        )
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{file}: damaged; is {Path(part).parent} of a launched run?") from None


def is_done(part: Path) -> bool:
    """Whether all members of a part are trained."""
    return rundir.has_finished(part)


def failure(part: Path) -> str:
    """Why the last worker of a part stopped, as it said itself; "" if it could say nothing."""
    return rundir.read_status(part).get("reason", "")


def written(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Members as `Part.groups` has them; `members_of` reads them."""
    return [{"member": m.index, "point": m.point, "steps": m.config.train.steps} for m in members]


def members_of(settings, lines: Sequence[dict[str, Any]]) -> list[Member]:
    """The members of a group in part.json. settings: the run's config."""
    made = []
    for line in lines:
        point = {axis: _tuples(value) for axis, value in line["point"].items()}
        member = config.member(settings, line["member"], point)
        made.append(config.with_n_steps(member, line["steps"]))
    return made


def _tuples(value):
    """A value as a config has it: JSON has lists instead of tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------- engines


class Machine(NamedTuple):
    """The one machine whose numbers a run has: "cpu", "gpu" or "tpu", and how many devices."""

    platform: str
    devices: int


def here() -> Machine:
    """This machine, as `lorax.run` would use it."""
    cores = min(8, os.cpu_count() or 1)  # as `lorax.train.layouts.split_cpu` makes of a CPU
    forced = re.search(
        r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    cpu = Machine("cpu", int(forced[1]) if forced else cores)
    wanted = os.environ.get("JAX_PLATFORMS", "")
    others = [path for path in ACCELERATORS if Path(path).exists()]
    if wanted == "cpu" or not (wanted or others):
        return cpu
    # In a process of its own: the launcher must not hold the memory of the GPUs.
    ask = "import jax; x = jax.local_devices(); print(x[0].platform, len(x))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    platform, count = (done.stdout.split() or ["cpu", "1"])[-2:]
    return cpu if platform == "cpu" else Machine(platform, int(count))


class Attempts:
    """Decides whether a part whose worker has died is tried again: unless `most` workers in turn
    have died without a new checkpoint."""

    def __init__(self, most: int = 3):
        self.most, self.left, self.seen = most, {}, {}

    def again(self, part: Path) -> bool:
        """Whether to start another worker; called when one has died."""
        now = sorted(map(str, (part / rundir.CHECKPOINTS).glob("*/[0-9]*")))
        if self.seen.get(part) != now:
            self.seen[part], self.left[part] = now, self.most
        self.left[part] -= 1
        return self.left[part] > 0
