"""List runs, newest first: state, members that are done, best setting, time and what was set.

    python -m lorax.runs              all runs below runs/
    python -m lorax.runs DIR...       these runs, or all below these folders
    python -m lorax.runs --json       the same as JSON, with more about each

The first line of a run is its directory. "interrupted" is a run that no process continues: repeat
its command. The best setting is that of analysis/answer.json or, before there is one, the member
with the lowest evaluation loss so far. What was set on the command line is shown where the
directory's name does not say it. Of a launched run (`lorax.launch`) that is not done, the state of
its parts is shown: waiting, running, trying again, done, failed.
"""

import argparse
import itertools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lorax import rundir
from lorax.errors import fail, reason
from lorax.files import read_json
from lorax.launching import state as launched

DEPTH = 3  # folders below a DIR in which runs are looked for
WIDTH = 80  # columns, if the output is no terminal
COLUMNS = "  {state:<11} {members:>7}  {took:>7}  {changed:<12}  {best}"
_HASHED = re.compile(r"-[0-9a-f]{8,10}$")


def main(arguments: Sequence[str]) -> int:
    """The command line. Exit code 0, or 2 for a folder that is not there."""
    parser = argparse.ArgumentParser(prog="python -m lorax.runs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directories", nargs="*", metavar="DIR", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    folders = given.directories or [rundir.RUNS]
    for folder in given.directories:
        if not folder.is_dir():
            why = f"{folder}: no such directory; expected a run or runs"
            return fail(FileNotFoundError(why))
    found = [describe(directory) for folder in folders for directory in below(folder)]
    found.sort(key=lambda run: run["changed"], reverse=True)
    if given.json:
        print(json.dumps(found, indent=2))
    elif found:
        width = shutil.get_terminal_size((WIDTH, 0)).columns if sys.stdout.isatty() else WIDTH
        print("\n".join(lines(found, width)))
    else:
        print(f"no runs in {', '.join(map(str, folders))}")
    return 0


def below(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run directories in a folder, or the folder itself if it is one."""
    if rundir.is_run(folder):
        yield folder
    elif depth and folder.is_dir():
        for child in sorted(folder.iterdir()):
            yield from below(child, depth - 1)


# ---------------------------------------------------------------------------------------- one run


def describe(directory: Path) -> dict[str, Any]:
    """A run in values that JSON has, from its small files alone: metrics are not read.

    Keys: directory; state, of status.json, "interrupted" instead of "running" if no process writes
    to it, or "damaged"; changed, when (ISO 8601, local time); problem, why it is damaged or has
    stopped; members, {"total", "done", "diverged", "stopped"}; seconds, wall clock of all starts;
    best, {"setting", "metric", "split", "value"} or None; set, {"train.lr": text} as on the command
    line; command; parts, of a launched run, each as `launching.state.read` says.
    """
    files = [path for name in rundir.FILES if (path := directory / name).exists()]
    changed = datetime.fromtimestamp(max(path.stat().st_mtime for path in files))
    found = {"directory": str(directory), "changed": changed.isoformat(timespec="seconds")}
    try:
        return found | _read(directory)
    except Exception as error:  # whatever a file has in it, the other runs are listed
        blank = {
            "members": {},
            "seconds": None,
            "best": None,
            "set": {},
            "command": "",
            "parts": [],
        }
        return found | blank | {"state": "damaged", "problem": reason(error)}


def _read(directory: Path) -> dict[str, Any]:
    """All of `describe` but where and when. Raises for a damaged file."""
    has_status = (directory / rundir.STATUS).exists()
    status = read_json(directory / rundir.STATUS) if has_status else {}
    members = rundir.read_members(directory)
    command = rundir.read_config(directory).get("command", "")
    state = status.get("state", "running")
    if state == "running" and not rundir.is_locked(directory):
        state = "interrupted"
    rows, parts = status.get("members", {}), launched.read_all(directory)
    if state in (*rundir.UNFINISHED, "interrupted"):  # what the parts have is not merged yet
        for part in parts:
            of = rundir.read_status(directory / rundir.PARTS / str(part["part"]))
            rows = rows | of.get("members", {})
    count = lambda word: sum(row.get("status") == word for row in rows.values())
    return {
        "state": state,
        "problem": status.get("reason"),
        "members": {"total": len(members), "done": len(rows)}
        | {word: count(word) for word in ("diverged", "stopped")},
        "seconds": status.get("wall_seconds"),
        "best": _best(directory, state, members, rows),
        "set": overrides(command),
        "command": command,
        "parts": parts,
    }


def _best(directory: Path, state: str, members: list[dict], rows: dict) -> dict[str, Any] | None:
    """The best setting: the answer's, or that of the member with the lowest evaluation loss."""
    answer = rundir.answer(directory)
    if state not in rundir.UNFINISHED and answer.exists():
        found = read_json(answer)
        if found["setting"] is None:
            return None
        setting = ",".join(f"{axis}={value}" for axis, value in found["setting"].items())
        return {"setting": setting} | {key: found[key] for key in ("metric", "split", "value")}
    losses = {key: row.get("eval_loss") for key, row in rows.items()}
    losses = {key: loss for key, loss in losses.items() if loss is not None}
    if not losses:
        return None
    best = min(losses, key=losses.get)
    setting = next(row["name"] for row in members if str(row["member"]) == best)
    tested = rows[best].get("test_loss")  # chosen on the evaluation rows, measured on the others
    value = {"split": "eval", "value": losses[best]}
    value = value if tested is None else {"split": "test", "value": tested}
    return {"setting": setting, "metric": "loss"} | value


def overrides(command: str) -> dict[str, str]:
    """{"train.lr": text} of what a command sets, {} for `lorax.run(config)`."""
    words = shlex.split(command) if command.startswith("python ") else []
    values = {}
    for word, following in itertools.pairwise([*words, ""]):
        if flag := re.match(r"--?(no)?config\.([\w.]+)(=?)(.*)", word, re.DOTALL):
            no, key, given, text = flag.groups()
            bare = "true" if following[:2] in ("", "--") else following
            values[key] = "false" if no else text if given else bare
    return values


# ----------------------------------------------------------------------------------------- as lines


def lines(found: list[dict[str, Any]], width: int) -> list[str]:
    """The list as text: lines of at most `width` columns, but for names of directories."""
    heading = {"state": "state", "members": "members", "took": "took", "changed": "changed"}
    shown = [COLUMNS.format(**heading, best="best")]
    for run in found:
        shown += [run["directory"], *(_cut(line, width) for line in _facts(run))]
    return shown


def _facts(run: dict[str, Any]) -> list[str]:
    """The lines below a directory's name."""
    count, best = run["members"], run["best"]
    members = f"{count['done']}/{count['total']}" if count else ""
    facts = [
        COLUMNS.format(
            state=run["state"],
            members=members,
            took="" if run["seconds"] is None else duration(run["seconds"]),
            changed=datetime.fromisoformat(run["changed"]).strftime("%d %b %H:%M"),
            best="" if best is None else "{split} {metric} {value:.4g}: {setting}".format(**best),
        ).rstrip()
    ]
    name = Path(run["directory"]).name
    if run["set"] and ("--workdir" in run["command"] or _HASHED.search(name)):
        facts.append("  " + " ".join(f"{key}={text}" for key, text in run["set"].items()))
    gone = [f"{n} {word}" for word in ("diverged", "stopped") if (n := count.get(word))]
    if gone:
        facts.append(f"  members: {', '.join(gone)}")
    facts += [f"  {run['problem']}"] * bool(run["problem"])
    return facts + (_parts(run["parts"]) if run["state"] not in ("trained", "finished") else [])


def _parts(parts: list[dict[str, Any]]) -> list[str]:
    """The lines of a launched run's parts: those that are done or wait together, the others one by
    one."""
    facts = []
    for state in ("done", "waiting"):
        if numbers := [part["part"] for part in parts if part["state"] == state]:
            facts.append(f"  part{'s' * (len(numbers) > 1)} {_ranges(numbers)}: {state}")
    for part in parts:
        where = f" on {part['host']}" if part["host"] else ""
        if part["state"] == "running":
            facts.append(f"  part {part['part']}: running{where}")
        elif part["state"] == "again":
            why = f": {part['reason']}" if part["reason"] else ""
            tries = part["tries"] + (not where)
            facts.append(f"  part {part['part']}: trying again{where}, worker {tries}{why}")
        elif part["state"] == "failed":
            facts.append(f"  part {part['part']}: failed: {part['reason']}")
    return facts


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in short: "0-3, 5"."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


def duration(seconds: float) -> str:
    """About how long: "42 s", "12 min", "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
