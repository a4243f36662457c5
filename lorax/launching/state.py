"""How a part of a launched run is doing: small files in its directory, which anybody may read.

worker.json   of the newest worker: state, host, process, how many there were, why it ended
launch.json   of the launcher: the job that an engine made of the part, and how that ended
log.txt       what all workers of the part have printed

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

from lorax.errors import reason
from lorax.files import read_json, write_json

WORKER, LAUNCH, LOG = "worker.json", "launch.json", "log.txt"
#: Mistakes in the input, which another try repeats.
MISTAKES = (ValueError, FileNotFoundError)


# ----------------------------------------------------------------------------------- in the worker


@contextlib.contextmanager
def recorded(part: Path):
    """Context in which a worker trains a part: worker.json says that it does, then how it ended."""
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
    """Context in which all that the process prints, its libraries too, is appended to log.txt, with
    the traceback of an error at the end. For processes that an engine began."""
    kept = [os.dup(1), os.dup(2)]
    with open(part / LOG, "ab") as log:
        try:
            _flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            yield
        except Exception:
            traceback.print_exc()
            raise
        finally:
            _flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


# --------------------------------------------------------------------------------- in the launcher


def launch(part: Path, job: str) -> None:
    """A launcher gives the part to an engine: workers are counted from here. job: what finds it
    again ("slurm 123_4")."""
    (part / WORKER).unlink(missing_ok=True)
    write_json(part / LAUNCH, {"state": "waiting", "job": job})


def relaunch(part: Path, job: str) -> None:
    """The part is tried again by another job, as its worker has died."""
    write_json(part / LAUNCH, {"state": "waiting", "job": job})


def end(part: Path, why: str | None) -> None:
    """The part is done, or has failed for good: why."""
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
    elif is_alive(worker):
        why = f"an earlier worker on {worker['host']} (process {worker['pid']}) still trains it"
    else:
        why = worker.get("reason", f"its worker on {worker['host']} died")
    return Outcome(False, worker.get("state") != "failed", f"{why}; see {part / LOG}")


# ----------------------------------------------------------------------------------- for listings


def read(part: Path) -> dict[str, Any]:
    """The state of a part: {"part": its number, "state", "host", "tries", "reason"}.

    state: "waiting" for a machine, "running", "again" (its worker ended and another one goes on, or
    will), "done" or "failed". host: where a worker runs, else None. tries: workers so far.
    """
    launched, worker = _read(part / LAUNCH), _read(part / WORKER)
    alive, tries = is_alive(worker), worker.get("tries", 0)
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


def is_alive(worker: dict[str, Any]) -> bool:
    """Whether a worker runs, as far as this machine can know: one on another host that is killed is
    missed by its launcher alone."""
    if worker.get("state") != "running":
        return False
    if worker["host"] != socket.gethostname():
        return True
    try:
        os.kill(worker["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, and somebody else's
        pass
    return True


def _read(file: Path) -> dict[str, Any]:
    """A file of JSON, {} if it is missing or damaged."""
    try:
        return read_json(file)
    except (FileNotFoundError, ValueError):
        return {}
