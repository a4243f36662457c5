"""Parts whose worker trains nothing: it does what the part's plan says, one word a try.

ok       trains
kill     dies of signal 9
error    raises an error that another try may not meet
mistake  raises an error that every try will meet
wait     waits for its end, once; the next try goes on with the following word
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import lorax.launching
from lorax import rundir
from lorax.launching import state

HERE = Path(__file__).parent
#: What Python imports first, in a folder of PYTHONPATH: the worker below is lorax's.
SITE = f"""
import sys
sys.path.append({str(HERE)!r})
import fakes
sys.modules["lorax.launching.worker"] = fakes
sys.path.remove({str(HERE)!r})
"""


def run(part: Path) -> None:
    """In place of `lorax.launching.worker.run`."""
    with rundir.locked(part), state.recorded(part):
        tries = json.loads((part / state.WORKER).read_text())["tries"]
        word = json.loads((part / "plan.json").read_text())[tries - 1]
        print(f"try {tries}: {word} in {os.getcwd()}", flush=True)
        if word == "kill":
            os.kill(os.getpid(), 9)
        if word == "error":
            raise RuntimeError("device lost")
        if word == "mistake":
            raise ValueError("train.lr: 0 given")
        if word == "wait":
            time.sleep(60)


def make(workdir: Path, monkeypatch, *plans: list[str]) -> list[Path]:
    """Parts of a run with these plans, for processes that are begun from now on."""
    site = workdir.parent / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setitem(sys.modules, "lorax.launching.worker", sys.modules[__name__])
    monkeypatch.setattr(lorax.launching, "worker", sys.modules[__name__], raising=False)
    parts = [workdir / "parts" / str(i) for i in range(len(plans))]
    for part, plan in zip(parts, plans, strict=True):
        part.mkdir(parents=True)
        (part / "plan.json").write_text(json.dumps(plan))
    return parts


def options(engine, *words: str):
    """An engine's options as from a command line, checked."""
    parser = argparse.ArgumentParser()
    engine.add_options(parser)
    given = parser.parse_args(words)
    engine.check(given)
    return given


def states(parts):
    return [(found["state"], found["tries"]) for found in map(state.read, parts)]


def until(condition):
    """Wait until it is true."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextlib.contextmanager
def then(do):
    """Context beside which `do` runs in a thread, and Ctrl-C raises KeyboardInterrupt: a shell has
    what it runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=do)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


def worker(part):
    file = part / state.WORKER
    return json.loads(file.read_text()) if file.exists() else {}


def runs(part):
    return worker(part).get("state") == "running"


def preempt(part):
    until(lambda: runs(part))
    os.kill(worker(part)["pid"], signal.SIGUSR2)


def stop(part):
    """Ctrl-C in this process, once the part is running."""
    until(lambda: runs(part))
    os.kill(os.getpid(), signal.SIGINT)
