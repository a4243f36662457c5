"""Measure what fits into some minutes, and keep what there is after every row.

A process of its own measures. It is ended when a measurement takes far longer than it should, and
at the end of the time; the next measurement starts a new one. So a kernel that hangs, or breaks the
device's context, costs its own numbers alone.
"""

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from lorax.bench.gpu.measurements import JAX, Measurement, measurements
from lorax.bench.gpu.sizes import FULL, SMALL

START = 20  # seconds in which a process starts; a guess until one has been measured
PATIENCE = (30, 3)  # seconds, and times its own estimate, that a measurement may take
WORKER = (sys.executable, "-m", "lorax.bench.gpu.worker")
DONE, FAILED, SKIPPED, NO_TIME = "done", "failed", "skipped", "no time"


class Worker:
    """A process that measures, `lorax.bench.gpu.worker`."""

    def __init__(self, side: str, sizes: str):
        self.side, self.errors = side, tempfile.TemporaryFile()
        # Two frameworks share the memory, so neither may take it all.
        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_WAIT_POLICY": "PASSIVE"} | os.environ
        self.process = subprocess.Popen(
            [*WORKER, side, sizes], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, env=env, text=True, bufsize=1,
        )  # fmt: skip
        self.lines = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(json.loads(line))
        self.lines.put(None)

    def ask(self, name: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{name}\n")

    def line(self, until: float) -> dict:
        """The next line; {"end": FAILED, "why": ..., "broken": True} if none comes in time."""
        try:
            line = self.lines.get(timeout=max(until - time.monotonic(), 0))
        except queue.Empty:
            return {"end": FAILED, "why": "", "broken": True, "late": True}
        if line is None:
            code = self.process.wait()
            died = f"signal {-code}" if code < 0 else f"exit code {code}"
            why = f"the process ended with {died}{self._last_words()}"
            return {"end": FAILED, "why": why, "broken": True}
        return line

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {last[:200]}" if last else ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


def run(
    minutes: float,
    small: bool,
    only: str,
    keep: Callable[[dict], None],
    say: Callable[[str], None],
) -> dict:
    """The results: {"machine": ..., "small": bool, "minutes": ..., "measurements": [{"name",
    "side", "status", "why", "estimate", "took", "rows"}]}, times in seconds.

    only: text that the names of what is measured hold. keep(results): called after every row.
    say(line): called after every measurement. Raises RuntimeError if the device doesn't start,
    ValueError if nothing has such a name.
    """
    begin = time.monotonic()
    end = begin + 60 * minutes
    worker, hello = _started(JAX, small, end)
    results = {"minutes": minutes, "machine": hello["machine"], "small": hello["small"]}
    small = hello["small"]
    every = measurements(SMALL if small else FULL)
    listed = [m for m in every if only in m.name]
    if not listed:
        worker.close()
        names = ", ".join(m.name for m in every)
        raise ValueError(f"--only: {only!r} is in no name; there is {names}")
    results["measurements"] = [
        {"name": m.name, "side": m.side, "status": "waiting", "why": "", "estimate": m.seconds,
         "took": None, "rows": []}
        for m in listed
    ]  # fmt: skip
    said = lambda text: say(f"{_clock(time.monotonic() - begin)}, {_clock(end - time.monotonic())} "
                            f"left: {text}")  # fmt: skip
    try:
        keep(results)
        for m, result in zip(listed, results["measurements"], strict=True):
            if worker and worker.side != m.side:
                worker.close()
                worker = None
            needed = m.seconds + (0 if worker else START)
            left = end - time.monotonic()
            if left < (1 if small else needed):  # estimates are those of an accelerator
                why = f"takes about {needed:.0f} s, {max(left, 0):.0f} s left"
                result.update(status=NO_TIME, why=why)
            else:
                if worker is None:
                    said(f"a process for {m.side} starts")
                    worker = _restarted(m, small, end, result)
                if worker:
                    patience = math.inf if small else PATIENCE[0] + PATIENCE[1] * m.seconds
                    worker = _measure(m.name, result, worker, end, patience, lambda: keep(results))
            said(f"{m.name}: {_short(result)}")
            keep(results)
    finally:
        if worker:
            worker.close()
    return results


def _started(side: str, small: bool, end: float) -> tuple[Worker, dict]:
    """A process and its first line. Raises RuntimeError."""
    worker = Worker(side, "small" if small else "auto")
    try:
        hello = worker.line(min(end, time.monotonic() + 10 * START))
        if "machine" not in hello:
            raise RuntimeError(hello["why"] or "the process did not start in time")
    except BaseException:  # Ctrl-C too
        worker.close()
        raise
    return worker, hello


def _restarted(m: Measurement, small: bool, end: float, result: dict) -> Worker | None:
    try:
        return _started(m.side, small, end)[0]
    except RuntimeError as error:
        result.update(status=FAILED, why=str(error))
        return None


def _measure(
    name: str, result: dict, worker: Worker, end: float, patience: float, keep: Callable[[], None]
) -> Worker | None:
    """Fill in the result. Returns the process, None if it had to be ended."""
    begin = time.monotonic()
    until = min(end, begin + patience)
    result["status"] = "running"
    worker.ask(name)
    while "end" not in (line := worker.line(until)):
        result["rows"].append(line["row"])
        keep()
    took = time.monotonic() - begin
    result.update(status=line["end"], why=line["why"], took=round(took, 2))
    if line.get("late"):
        over = until >= end
        why = "the time was over" if over else "ended"
        result.update(status=NO_TIME if over else FAILED, why=f"{why} after {took:.0f} s")
    if line["broken"]:
        worker.close()
        return None
    return worker


def _short(result: dict) -> str:
    """A result in a line."""
    times = [f"{row['path']} {duration(row['ms'])}" for row in result["rows"] if "ms" in row]
    said = ", ".join(times)
    if result["status"] != DONE:
        said = f"{result['status']}: {result['why']}" + (f" ({said})" if said else "")
    return said


def duration(ms: float) -> str:
    """In three digits, with its unit."""
    for least, scale, unit in ((1e3, 1e-3, "s"), (1, 1, "ms"), (0, 1e3, "us")):
        if ms >= least:
            return f"{ms * scale:.3g} {unit}" if ms * scale < 999.5 else f"{ms * scale:.0f} {unit}"
    raise ValueError(f"ms: {ms} given, must be at least 0")


def _clock(seconds: float) -> str:
    seconds = max(int(seconds), 0)
    return f"{seconds // 60}:{seconds % 60:02}"


def exit_code(results: dict) -> int:
    """1 if something failed, otherwise 3 if time was short, otherwise 0."""
    statuses = {result["status"] for result in results["measurements"]}
    return 1 if FAILED in statuses else 3 if NO_TIME in statuses else 0
