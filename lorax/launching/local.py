"""The engine of one machine: a process per GPU, or per share of the cores of a CPU.

An engine is a module with three functions:

add_options(parser)      adds its options to the `argparse.ArgumentParser` of `lorax.launch`
machine(options)         the `parts.Machine` whose numbers the run has; raises ValueError, before
                         anything starts, for options that can't be met
run(parts, options)      runs the parts, tries those whose workers die again, and yields (part, None
                         or why it failed for good) as each ends
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorax import rundir
from lorax.launching import parts, state, worker

SECONDS = 0.2  # between two looks at the workers


def add_options(parser) -> None:
    """The options of this engine."""
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: one for each GPU, or for each of up to 8 cores)",
    )


def machine(options) -> parts.Machine:
    """This machine, as `lorax.run` would use it."""
    here = parts.here()
    most = here.devices if here.platform != "cpu" else os.cpu_count() or 1
    if options.workers is not None and not 1 <= options.workers <= max(most, here.devices):
        kind = "cores" if here.platform == "cpu" else f"{here.platform.upper()}s"
        raise ValueError(f"--workers: {options.workers} given, this machine has {most} {kind}")
    return here


def run(directories: Sequence[Path], options) -> Iterator[tuple[Path, str | None]]:
    """Run the parts, as many at a time as there are workers."""
    here = machine(options)
    free = list(range(options.workers or here.devices))
    for part in directories:
        state.launch(part)
    waiting, running, attempts = list(directories), {}, parts.Attempts()
    try:
        while waiting or running:
            while waiting and free:
                part, slot = waiting.pop(0), free.pop(0)
                running[part] = slot, _start(part, here.platform, slot)
            time.sleep(SECONDS)
            ended = {part: slot for part, (slot, process) in running.items() if _ended(process)}
            for part, slot in ended.items():
                code = running.pop(part)[1].returncode
                free.append(slot)
                if code not in (0, 2) and attempts.again(part):
                    waiting.insert(0, part)
                    continue
                why = (parts.failure(part) or _how_it_ended(code, part)) if code else None
                state.end(part, why)
                yield part, why
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _start(part: Path, platform: str, slot: int) -> subprocess.Popen:
    """Start a worker. Its standard input stays open as long as this process lives."""
    environment = dict(os.environ)
    if platform == "gpu":
        known = environment.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = known.split(",")[slot] if known else str(slot)
    with open(part / state.LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "lorax.launching.local", str(part)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _ended(process: subprocess.Popen) -> bool:
    return process.poll() is not None


def _how_it_ended(code: int, part: Path) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"its worker {how}; see {part / state.LOG}"


def _end_with_launcher() -> None:
    """End this process as soon as its standard input ends: the launcher is gone."""
    with contextlib.suppress(OSError):
        sys.stdin.buffer.read()
    os._exit(1)


def _main(argv: list[str]) -> int:
    """A worker that does not outlive its launcher."""
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    part = Path(argv[1])
    while rundir.is_locked(part):  # by the worker of a launcher that was killed just now
        time.sleep(SECONDS)
    return worker.main(argv)


if __name__ == "__main__":
    sys.exit(_main(sys.argv))
