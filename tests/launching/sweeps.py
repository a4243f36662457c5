"""A small sweep on one machine and launched, and what kills its workers: for all engines."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from lorax import rundir
from lorax.launching import state

ROOT = Path(__file__).parents[2]
#: Six members in two groups, on a model that compiles in a second.
STUDY = """
from lorax.config import default

def get_config(arg=None):
    c = default()
    c.base, c.task.name, c.method.targets = "random:mlp-64-10", "digits", ("re:.*/kernel",)
    c.train.update(steps=60, batch_size=8, warmup=0)
    c.eval.update(every=10, examples=50, test=50, batch_size=50)
    c.analysis.report = False
    c.sweep.update(rank=(1, 2), seed=(0, 1), full_lr=(1e-3,))
    return c
"""
#: The study of the README with all its members, in four steps.
DEFAULT = "configs/gpt2_rank_sweep.py"
SHORT = (
    *("--config.train.steps=4", "--config.train.batch_size=4", "--config.train.warmup=0"),
    *("--config.eval.every=2", "--config.eval.examples=8", "--config.eval.test=8"),
    *("--config.eval.batch_size=8", "--config.eval.generate=0", "--config.task.n_train=32"),
    "--config.analysis.report=False",
)
FILES = ("members.jsonl", "metrics.jsonl")
#: Flags of `lorax.launch` for the engines of other packages, on this machine.
ENGINES = {
    "ray": ("--on=ray", "--address=local", "--workers=2"),
    "slurm": ("--on=slurm", "--cluster=local", "--workers=2"),
}


def study(folder: Path) -> Path:
    """The sweep as a config script."""
    file = folder / "study.py"
    file.write_text(STUDY)
    return file


def lorax(command: str, config: Path | str, workdir: Path, *words: str) -> str:
    """What `python -m lorax.COMMAND` prints, of processes with the devices that a person has."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # workers compile the same
    flags = [f"--config={config}", f"--workdir={workdir}", *words]
    done = subprocess.run(
        [sys.executable, "-m", f"lorax.{command}", *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def same(one: Path, other: Path) -> None:
    """Asserts that two run directories have the same members, metrics and adapters, each byte."""
    files = [path for path in (one / "adapters").rglob("*") if path.is_file()]
    names = sorted(str(path.relative_to(one)) for path in files)
    assert names == sorted(
        str(path.relative_to(other)) for path in (other / "adapters").rglob("*") if path.is_file()
    )
    assert names
    for name in (*FILES, *names):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@contextlib.contextmanager
def killed(run: Path, seed: int, times: int, seconds: float):
    """Context beside which workers of a run are killed by signal 9, up to `times` of them, each at
    a random moment of its first `seconds`; the list that it returns has the parts that were hit."""
    draw, hits, over = random.Random(seed), [], threading.Event()
    print(f"seed of the moments: {seed}")

    def kill() -> None:
        while len(hits) < times and not over.is_set():
            running = [part for part in (run / "parts").glob("[0-9]*") if state.is_alive(part)]
            if not running:
                time.sleep(0.01)
                continue
            part, moment = draw.choice(running), draw.uniform(0, seconds)
            pid = json.loads((part / state.WORKER).read_text())["pid"]
            over.wait(moment)
            worker = json.loads((part / state.WORKER).read_text())
            if worker["pid"] == pid and state.is_alive(part):
                os.kill(pid, signal.SIGKILL)
                hits.append(part)
                print(f"part {part.name}: worker {worker['tries']} killed after {moment:.2f} s")

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield hits
    finally:
        over.set()
        thread.join()


def repeated_while_killed(single, folder: Path, *words: str, times: int) -> None:
    """Asserts that launched runs are that of one machine though `times` of their workers are
    killed, each at a random moment. words: of `lorax.launch`, without retries."""
    config, expected = single
    seconds = rundir.read_status(expected)["wall_seconds"]  # at most as long as a worker lives
    seed, hits, launches = random.SystemRandom().randrange(2**32), 0, 0
    while hits < times:
        run = folder / str(launches)
        with killed(run, seed + launches, times - hits, seconds) as hit:
            lorax("launch", config, run, *words, f"--retries={times}")
        same(expected, run)
        hits, launches = hits + len(hit), launches + 1
        seconds = seconds if hit else seconds / 2
        assert launches < 3 * times, "workers end before they are killed"
