"""Parts of a run: members that one worker trains by itself, in a run directory of their own.

Part I is in parts/I of the run directory. part.json says what it trains; the rest are the files of
a run directory, with the numbers that the members have in the whole run, and those of
`lorax.launching.state`. Its status.json is that of a run: the part is done when its state is
"finished". Nothing here imports JAX.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax import config, rundir
from lorax.config import Member
from lorax.files import read_json, write_json
from lorax.halving import Race


class Part(NamedTuple):
    """What one worker trains: part.json.

    members: their numbers in the run, ascending. round: of a search, from 1. layout: the
    `machines.Machine` whose numbers the run has, as a dictionary.
    """

    members: tuple[int, ...]
    round: int
    layout: dict[str, Any]


class Round(NamedTuple):
    """What the parts of a round share: parts/round-N.json.

    groups: {number of a group: all its members as `written` has them}. sizes: {number of a group:
    how many of its members the one machine trains in a program}, 0 for all. bases: {number of a
    group: hash of its base's weights}. flags: of the command line; folder: where it was given.
    """

    groups: dict[int, list[dict[str, Any]]]
    sizes: dict[int, int]
    bases: dict[int, str]
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
    value = _read(part / rundir.PART, Part)
    return value._replace(members=tuple(value.members))


def write_round(workdir: Path, number: int, value: Round) -> None:
    """Write the file of a round."""
    write_json(_round_file(workdir, number), value._asdict())


def read_round(workdir: Path, number: int) -> Round | None:
    """The content of a round's file, None without one. Raises ValueError if it is damaged."""
    if not _round_file(workdir, number).exists():
        return None
    value = _read(_round_file(workdir, number), Round)
    numbered = ({int(key): x for key, x in of.items()} for of in value[:3])
    return Round(*numbered, tuple(value.flags), value.folder)


def _round_file(workdir: Path, number: int) -> Path:
    return Path(workdir) / rundir.PARTS / f"round-{number}.json"


def _read(file: Path, kind: type):
    """A file of JSON as a NamedTuple."""
    value = read_json(file)
    if not isinstance(value, dict) or set(value) != set(kind._fields):
        raise ValueError(f"{file}: damaged; its keys should be {', '.join(kind._fields)}")
    return kind(**value)


def is_done(part: Path) -> bool:
    """Whether all members of a part are trained."""
    return rundir.has_finished(part)


def written(members: Sequence[Member], race: Race | None) -> list[dict[str, Any]]:
    """Members as `Round.groups` has them: {"member": number, "point", "steps", "legs": [[leg, its
    last step]] of those that the member may train}. `members_of` reads them."""
    return [
        {"member": m.index, "point": m.point, "steps": m.config.train.steps}
        | {"legs": _legs(m, race)}
        for m in members
    ]


def _legs(member: Member, race: Race | None) -> list[list[int]]:
    if race is None:
        return [[0, member.config.train.steps]]
    if member.index in race.starters:
        return [[leg, step] for leg, step in enumerate(race.stops[member.index])]
    return [[len(race.rungs) + 1, member.config.train.steps]]


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
