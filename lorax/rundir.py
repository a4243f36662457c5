"""The run directory, which hands training's results to the analysis: names, writer and reader.

config.json           resolved config, package versions, device, git revision, hash of the base
members.jsonl         a line per member: its name, method, hyperparameters, size
metrics.jsonl         a line per measurement: member, step, split, loss in nats per completion token
status.json           state of the run, result of each member, what failed
adapters/MEMBER/      what a member has learned; LoRA factors in PEFT's format
rows/MEMBER.npz       losses and scores of a member's test rows, before and after training
texts/MEMBER.jsonl    the prompts that a member completed after training
texts/base.jsonl      the same prompts, completed by the base without an adapter
samples/MEMBER.npz    images that a diffusion model made, and their classes or captions
samples/base-GROUP.npz  the same of a group's base without an adapter
parts/I/              what one worker of `lorax.launch` has trained, as a run directory of its own
merged/MEMBER/        a member's model with its update added, where a sequence of tasks goes on
checkpoints/PART/     the last two checkpoints of the members trained in one program
trajectory/PART/      spectra of their updates, one file per evaluation
analysis/answer.json  the sweep's answer: which setting, and how sure that is
analysis/, figures/   tables and figures of the report; report.html shows them
tb/                   the same measurements for TensorBoard
track/                what other trackers have been sent (`config.track`)
errors.txt            traceback of everything that failed after training

The state is "running" until all members are trained, then "trained" until tables and report are
written, then "finished". It is "stopped" if the same command can continue the run, "failed" after
any other error. A member is "finished", "diverged" (a step was not finite) or "stopped":
`config.sweep.tune` has chosen other values. Its measurements end at "stopped_at" (0: it never
began), and it has no adapter. No other module spells these names.
"""

import contextlib
import fcntl
import io
import json
import os
import shutil
import traceback
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax import hosts
from lorax.errors import of_machine, reason
from lorax.files import DRAFTS, parse_json, read_json, write_bytes, write_json

CONFIG, MEMBERS, METRICS = "config.json", "members.jsonl", "metrics.jsonl"
STATUS, REPORT, ERRORS, LOCK = "status.json", "report.html", "errors.txt", ".lock"
ADAPTERS, ROWS, TEXTS, MERGED = "adapters", "rows", "texts", "merged"
SAMPLES = "samples"
SEQUENCE = "sequence.csv"  # beside the runs of a sequence of tasks: losses on every task after each
CHECKPOINTS, TRAJECTORY = "checkpoints", "trajectory"
PARTS, PART = "parts", "part.json"  # of a run that was launched; `lorax.launching.parts`
BASE = "base"  # in place of a member's number, for the texts of the base itself
ANALYSIS, FIGURES, TENSORBOARD, TRACK = "analysis", "figures", "tb", "track"
FILES = (LOCK, CONFIG, MEMBERS, METRICS, STATUS, REPORT)
FOLDERS = (
    ADAPTERS, ANALYSIS, CHECKPOINTS, FIGURES, MERGED, PARTS, ROWS, SAMPLES, TENSORBOARD, TEXTS,
    TRACK, TRAJECTORY,
)  # fmt: skip
ALSO = "also:"  # and a name: the split of a further task's measurements (`eval.also`)
RUNS = Path("runs")  # where run directories are, unless --workdir says otherwise
UNFINISHED = ("running", "stopped", "failed")  # states with members left to train


def adapter(directory: Path, member: int) -> Path:
    """The folder of what a member has learned."""
    return Path(directory) / ADAPTERS / str(member)


def merged(directory: Path, member: int) -> Path:
    """The folder of a member's merged model."""
    return Path(directory) / MERGED / str(member)


def rows(directory: Path, member: int) -> Path:
    """The file of a member's test rows: an .npz of arrays (N,) float32; see `analysis.runs.Run`."""
    return Path(directory) / ROWS / f"{member}.npz"


def texts(directory: Path, member: int | str) -> Path:
    """The file of the completions of a member, or of the base (`BASE`)."""
    return Path(directory) / TEXTS / f"{member}.jsonl"


def samples(directory: Path, member: int) -> Path:
    """The file of a member's images: an .npz of "images" (N, height, width, channels) uint8 and
    "classes" (N,) int32."""
    return Path(directory) / SAMPLES / f"{member}.npz"


def base_samples(directory: Path, group: int) -> Path:
    """The same of the images of a group's base."""
    return Path(directory) / SAMPLES / f"{BASE}-{group}.npz"


def writer(base: str, quant: str | None, decoding: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a line of the base's completions that say which base wrote it, and how.
    decoding: the config's `eval` section."""
    keys = ("new_tokens", "beams", "length_penalty", "no_repeat_ngram")
    return {"base": base, "quant": quant} | {key: decoding.get(key) for key in keys}


def tracked(directory: Path) -> Path:
    """The folder of what trackers have been sent."""
    return Path(directory) / TRACK


def table(directory: Path, name: str) -> Path:
    """The file of an analysis table: "trajectory", "cka", "intrinsic"..."""
    return Path(directory) / ANALYSIS / f"{name}.csv"


def answer(directory: Path) -> Path:
    """The file of a sweep's answer; see `lorax.analysis.answer`."""
    return Path(directory) / ANALYSIS / "answer.json"


def part(group: int, number: int, parts: int, leg: int = 0) -> str:
    """The name of part `number` of a group's members in checkpoints/ and trajectory/. leg: how many
    rungs of a halving (`config.sweep.tune`) it has behind it. If the group is divided differently
    (less memory is free than last time), the names differ."""
    of = f"of{parts}" if parts > 1 else ""
    return f"{group}" + (f".{leg}" if leg else "") + f"-{number}{of}"


def checkpoints(directory: Path, name: str) -> Path:
    """The folder of a part's checkpoints. name: as `part` returns it."""
    return Path(directory) / CHECKPOINTS / name


def spectra(directory: Path, name: str, step: int) -> Path:
    """The file of the spectra of a part's updates at a step; `spectra_files` lists them all."""
    return Path(directory) / TRAJECTORY / name / f"{step}.safetensors"


def spectra_files(directory: Path) -> list[Path]:
    """All existing files of `spectra`; a file's stem is its step."""
    return sorted((Path(directory) / TRAJECTORY).glob("*/*.safetensors"))


def is_run(directory: Path) -> bool:
    """Whether a directory holds a run, complete or not."""
    return any((Path(directory) / name).exists() for name in (MEMBERS, METRICS, STATUS))


def has_begun(directory: Path) -> bool:
    """Whether anything was trained or measured there; if not, it counts as empty."""
    return (Path(directory) / CONFIG).exists() and metrics_size(directory) > 0


def has_finished(directory: Path) -> bool:
    """Whether status.json says that the run is done."""
    return read_status(directory).get("state") == "finished"


# ----------------------------------------------------------------------------------------- writing


def check_paths(directory: Path) -> None:
    """Raises ValueError if the run directory, or something in it, can't be written."""
    for path, is_folder in (
        *((parent, True) for parent in reversed(directory.parents)),
        (directory, True),
        *((directory / name, False) for name in FILES),
        *((directory / name, True) for name in FOLDERS),
    ):
        if not path.exists():
            continue
        if path.is_dir() != is_folder:
            right, actual = ("a folder", "a file") if is_folder else ("a file", "a folder")
            raise ValueError(
                f"--workdir: {path} is {actual} and should be {right}; move it away or name "
                f"another --workdir"
            )
        if path.parent == directory and not os.access(path, os.W_OK):
            raise ValueError(f"--workdir: {path} can't be written to; name another --workdir")


@contextlib.contextmanager
def locked(directory: Path):
    """Context in which no other process writes to the run directory. Of a program's processes, the
    first one has it.

    Removes what a killed process had half written, and the directory if it stayed empty. Raises
    BlockingIOError if another process writes to it, ValueError if it can't be written to.
    """
    if not hosts.first():
        _check_shared(directory)
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / LOCK, "w")
    except OSError as error:
        raise ValueError(f"--workdir: {reason(error)}; name another") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"workdir: another process writes to {directory}") from None
        if hosts.are_many():
            file.write(str(os.getpid()))
            file.flush()
            os.fsync(file.fileno())
            _check_shared(directory)
        _remove_drafts(directory)
        try:
            yield
        finally:
            if [path.name for path in directory.iterdir()] == [LOCK]:
                shutil.rmtree(directory)


def _remove_drafts(directory: Path) -> None:
    """Remove what writers that were killed left. A part has a lock of its own: its worker may be
    writing there."""
    for draft in directory.rglob(DRAFTS):
        if directory / PARTS not in draft.parents:
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def _check_shared(directory: Path) -> None:
    """Raises ValueError in a process that does not see the lock file of the first one."""
    file = directory / LOCK
    mine = file.read_text() if hosts.first() else ""
    written = hosts.agreed(mine)
    if not file.exists() or file.read_text() != written:
        raise ValueError(
            f"--workdir: process {hosts.process()} does not see what process 0 writes to "
            f"{directory}; name a directory on a filesystem that all hosts share"
        )


def is_locked(directory: Path) -> bool:
    """Whether a process writes to the run directory."""
    try:
        with open(directory / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextlib.contextmanager
def recorded(directory: Path):
    """Context in which an error that ends the run is written to status.json with its reason.

    The state becomes "stopped" if the same command can continue the run, "failed" otherwise; once
    all members are trained it stays as it was.
    """
    try:
        yield
    except BaseException as error:
        machine = of_machine(error)
        stopped = machine is not None or isinstance(error, KeyboardInterrupt)
        record(directory, reason(machine or error), stopped)
        raise


def record(directory: Path, why: str, stopped: bool, over: Iterable[str] = ("running",)) -> None:
    """Write to status.json, if there is one, why a run has ended, and that it is "stopped" or
    "failed" in place of a state in `over`."""
    status = read_status(directory)
    if not status:
        return
    if status.get("state") in over:
        status["state"] = "stopped" if stopped else "failed"
    with contextlib.suppress(OSError):  # the disk may be full
        write_json(directory / STATUS, status | {"reason": why})


def write_status(
    directory: Path, state: str, results: dict[int, dict], seconds: float, failed: dict[str, str]
) -> None:
    """Write status.json. results: {member: its row of `lorax.train.loop.train`}. seconds: wall
    clock over all starts of the run. failed: {what failed after training: why}."""
    status = {
        "state": state,
        "members": {str(member): results[member] for member in sorted(results)},
        "wall_seconds": seconds,
    }
    write_json(directory / STATUS, status | ({"failed": failed} if failed else {}))


def write_config(directory: Path, value: dict[str, Any]) -> None:
    """Write config.json."""
    write_json(directory / CONFIG, value)


def write_members(directory: Path, rows: Iterable[dict]) -> None:
    """Write members.jsonl, in the order of the members' numbers."""
    rows = sorted(rows, key=lambda row: row["member"])
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_bytes(directory / MEMBERS, text.encode())


def append_metrics(directory: Path, rows: Iterable[dict]) -> int:
    """Append to metrics.jsonl and sync it to the disk; the file's new length in bytes, which only
    the first of a program's processes knows."""
    if not hosts.first():
        return 0
    with open(directory / METRICS, "ab") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def cut_metrics(directory: Path, length: int) -> None:
    """Shorten metrics.jsonl to `length` bytes: measurements after a checkpoint are repeated."""
    if hosts.first():
        with open(directory / METRICS, "ab") as file:
            file.truncate(length)


def metrics_size(directory: Path) -> int:
    """Bytes of metrics.jsonl, 0 where it does not exist."""
    file = Path(directory) / METRICS
    return file.stat().st_size if file.exists() else 0


def write_samples(file: Path, images: np.ndarray, asked: np.ndarray) -> None:
    """Write a file of `samples`. asked: of each image, integers, its class, or its caption."""
    arrays = {"captions": asked} if asked.dtype.kind == "U" else {"classes": np.int32(asked)}
    arrays["images"] = np.asarray(images, np.uint8)
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_bytes(file, packed.getvalue())


def keep_error(directory: Path, error: BaseException) -> str:
    """Append an error's traceback to errors.txt; a one-line message about it."""
    file = Path(directory) / ERRORS
    if hosts.first():
        with open(file, "a") as out:
            out.write("".join(traceback.format_exception(error)) + "\n")
    return f"failed ({reason(error)}; traceback in {file})"


# ----------------------------------------------------------------------------------------- reading


class Contents(NamedTuple):
    """The contents of a run directory: config.json, the rows of members.jsonl and metrics.jsonl,
    status.json."""

    config: dict[str, Any]
    members: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    status: dict[str, Any]


def read(directory: Path) -> Contents:
    """Read a run directory, finished or not.

    Raises FileNotFoundError that names the missing directory or file, ValueError that names the
    file and line of a damaged one. An incomplete last line of a .jsonl is ignored with a warning: a
    run that is being written, or was killed, can end like that.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such run directory")
    members = _read_rows(directory / MEMBERS, {"member", "name", "method"})
    metrics = _read_rows(directory / METRICS, {"member", "step", "split", "loss"})
    if not members:
        raise ValueError(f"{directory / MEMBERS}: no members")
    if len({row["member"] for row in members}) < len(members):
        raise ValueError(f"{directory / MEMBERS}: a member is listed twice")
    config, status = _there(directory / CONFIG), _there(directory / STATUS)
    return Contents(read_json(config), members, metrics, read_json(status))


def read_config(directory: Path) -> dict[str, Any]:
    """config.json; the resolved config itself is under its key "config"."""
    return read_json(_there(Path(directory) / CONFIG))


def read_members(directory: Path) -> list[dict[str, Any]]:
    """The rows of members.jsonl."""
    return _read_rows(Path(directory) / MEMBERS, {"member", "name", "method"})


def read_status(directory: Path) -> dict[str, Any]:
    """status.json, {} if it is missing or damaged."""
    try:
        return read_json(Path(directory) / STATUS)
    except (FileNotFoundError, ValueError):
        return {}


def read_texts(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of completions, {"prompt", "text", "references"}; [] if there is none."""
    return _read_rows(file, {"prompt", "text", "references"}) if file.exists() else []


def metrics_after(directory: Path, offset: int) -> tuple[list[dict], int]:
    """The complete lines of metrics.jsonl that begin at byte `offset` or after it, and the offset
    after them."""
    with open(Path(directory) / METRICS, "rb") as file:
        file.seek(max(offset - 1, 0))
        if offset:
            file.readline()  # ends there, unless the file was cut and went on with other lines
        begin, data = file.tell(), file.read()
    data = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in data.splitlines()], begin + len(data)


def _there(file: Path) -> Path:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; is {file.parent} a run directory?")
    return file


def _read_rows(file: Path, required: set[str]) -> list[dict[str, Any]]:
    text = _there(file).read_text(encoding="utf-8", errors="replace")
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            row = parse_json(line, file, number)
        except ValueError:
            if number == lines[-1][0]:
                warnings.warn(f"{file}:{number}: incomplete last line ignored", stacklevel=4)
                continue
            raise
        if not isinstance(row, dict) or not required <= set(row):
            raise ValueError(
                f"{file}:{number}: need the fields {sorted(required)}, got {line[:80]}"
            )
        rows.append(row)
    return rows
