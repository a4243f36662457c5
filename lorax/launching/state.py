"""How a part of a launched run is doing: small files in its directory, which anybody may read.

worker.json   of the newest worker: state, host, process, how many there were, why it ended
launch.json   of the launcher: the job that an engine made of the part, and how that ended
worker.log    what all its workers have printed

A worker is "running", "done", "stopped" (it died of an error, or was preempted: the next one goes
on from the checkpoint) or "failed" (the input is wrong: no other worker will do better). One that
is killed leaves "running". Nothing here imports JAX.
"""

import contextlib
import datetime
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from lorax import rundir
from lorax.errors import reason
from lorax.files import read_json, write_json

WORKER, LAUNCH, LOG = "worker.json", "launch.json", "worker.log"
#: Mistakes in the input, which another try repeats.
MISTAKES = (ValueError, FileNotFoundError)


# ----------------------------------------------------------------------------------- in the worker


@contextlib.contextmanager
def recorded(part: Path):
    """Context in which a worker trains a part that it has locked: worker.json says that it does,
    then how it ended."""
    facts = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "tries": _read(part / WORKER).get("tries", 0) + 1,
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    say = lambda state, why=None: write_json(
        part / WORKER, facts | {"state": state} | ({"reason": why} if why else {})
    )
    say("running")
    try:
        yield
    except MISTAKES as error:
        say("failed", reason(error))
        raise
    except (SystemExit, KeyboardInterrupt):
        say("stopped", "interrupted")
        raise
    except BaseException as error:
        say("stopped", reason(error))
        raise
    say("done")


@contextlib.contextmanager
def logged(part: Path):
    """Context in which all that the process prints, its libraries too, is appended to worker.log,
    and an error's traceback. For processes that an engine began."""
    kept, by_line = [os.dup(1), os.dup(2)], sys.stdout.line_buffering
    with open(part / LOG, "ab") as log:
        try:
            # Else a library's lines would come before those that Python still has.
            sys.stdout.reconfigure(line_buffering=True)
            _flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            yield
        except Exception:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.reconfigure(line_buffering=by_line)
            _flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


# --------------------------------------------------------------------------------- in the launcher


def launch(part: Path) -> None:
    """A launcher takes the part on: its workers are counted from here."""
    (part / WORKER).unlink(missing_ok=True)
    write_json(part / LAUNCH, {"state": "waiting"})


def submitted(part: Path, job: str) -> None:
    """An engine has made a job of the part, which `job` returns to a later launcher."""
    write_json(part / LAUNCH, {"state": "waiting", "job": job})


def end(part: Path, why: str | None) -> None:
    """The part is done, or it failed for good: why."""
    failed = {"state": "failed", "reason": why} if why else {"state": "done"}
    write_json(part / LAUNCH, _read(part / LAUNCH) | failed)


def job(part: Path) -> str:
    """The job that a launcher made of the part, "" without one that has not ended."""
    found = _read(part / LAUNCH)
    return found.get("job", "") if found.get("state") == "waiting" else ""


class Outcome(NamedTuple):
    """How a worker ended. done: the part is trained. again: another worker may do better. reason:
    one line, None if it is done."""

    done: bool
    again: bool
    reason: str | None


def outcome(part: Path) -> Outcome:
    """How the newest worker of a part ended."""
    worker = _read(part / WORKER)
    if worker.get("state") == "done":
        return Outcome(True, False, None)
    if not worker:
        why = "its worker did not begin"
    elif is_alive(part):
        why = f"an earlier worker on {worker['host']} (process {worker['pid']}) still trains it"
    else:
        why = worker.get("reason", f"its worker on {worker['host']} died")
    return Outcome(False, worker.get("state") != "failed", f"{why}; see {part / LOG}")


def tries_again(part: Path, ended: Outcome, retries: dict[Path, int], most: int) -> bool:
    """Whether an engine has another worker try a part, and says so. retries: {part: how often
    already}, counted here; most: at most so often."""
    if not ended.again or retries.get(part, 0) >= most:
        return False
    retries[part] = retries.get(part, 0) + 1
    print(f"part {part.name}: {ended.reason}. It is tried again.", flush=True)
    return True


# ----------------------------------------------------------------------------------- for listings


def read_all(run: Path) -> list[dict[str, Any]]:
    """`read` of all parts of a run, in the order of their numbers; [] if it was not launched."""
    numbers = [path.name for path in (run / rundir.PARTS).glob("*") if path.name.isdecimal()]
    return [read(run / rundir.PARTS / number) for number in sorted(numbers, key=int)]


def read(part: Path) -> dict[str, Any]:
    """The state of a part: {"part": its number, "state", "host", "tries", "reason"}.

    state: "waiting" for a machine, "running", "again" (its worker ended and another one goes on, or
    will), "done" or "failed". host: where a worker runs, else None. tries: workers so far.
    """
    launched, worker = _read(part / LAUNCH), _read(part / WORKER)
    alive, tries = is_alive(part), worker.get("tries", 0)
    if worker.get("state") == "done":
        state = "done"
    elif alive:
        state = "running" if tries == 1 else "again"
    elif launched.get("state") == "failed" or worker.get("state") == "failed":
        state = "failed"
    else:
        state = "again" if tries else "waiting"
    why = launched.get("reason") or worker.get("reason")
    return {
        "part": int(part.name),
        "state": state,
        "host": worker["host"] if alive else None,
        "tries": tries,
        "reason": why if state in ("again", "failed") else None,
    }


def is_alive(part: Path) -> bool:
    """Whether a worker trains the part, as far as this machine can know: of one that was killed on
    another host only its launcher hears."""
    worker = _read(part / WORKER)
    if worker.get("state") != "running":
        return False
    return worker["host"] != socket.gethostname() or rundir.is_locked(part)


def _read(file: Path) -> dict[str, Any]:
    """A file of JSON, {} if it is missing or damaged."""
    try:
        return read_json(file)
    except (FileNotFoundError, ValueError):
        return {}
