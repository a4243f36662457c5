"""Processes of one program (`lorax.hosts`) end together, with one line that says why.

A thread in each process meets the others every few seconds, through JAX's coordination service. A
process that has an error says so there; one that has died does not come. All the others are then
ended, also from the middle of a computation that would wait for it forever.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NamedTuple

from lorax import hosts
from lorax.errors import reason

PERIOD = 1.0  # seconds between two meetings
LIMIT = 60.0  # seconds after which a process that has not come is dead; JAX itself waits for 100
MEETING, ENDS = "lorax/meeting", "lorax/ends"
AGAIN = "run the same command to continue"


class End(NamedTuple):
    """How a program ends. line: what to print about it, "" for nothing. whole: it has come to its
    end. process: that says so. stopped: the same command can continue it."""

    code: int
    line: str = ""
    whole: bool = True
    process: int = 0
    stopped: bool = False


#: Called with the `End` of a program that stops on its way, by the first process, in any thread.
at_stop: list[Callable[[End], None]] = []


def run(work: Callable[[], End]) -> End:
    """work(), and how all processes end: with an error of any of them, or as the first one does.

    With several processes, only the first one writes to the terminal. If the program does not come
    to its end, this function does not return, but ends the process, perhaps in the middle of
    work().
    """
    if not hosts.are_many():
        return work()
    from lorax.train import layouts  # imports much that a first look at a run need not wait for

    layouts.split_cpu()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to stop it
    meetings = _Meetings()
    with _silent() if not hosts.first() else contextlib.nullcontext():
        try:
            return meetings.leave(work())
        except BaseException as error:  # the others must hear of everything
            meetings.leave(End(1, reason(error), whole=False), error)


class _Meetings:
    """The thread that meets the others, and what came out of it."""

    def __init__(self):
        from orbax.checkpoint import multihost

        self.client, self.process = multihost.get_jax_distributed_client(), hosts.process()
        self.said, self.end = None, None
        self.left, self.over = threading.Event(), threading.Event()
        other = ", or process 0 was, which ends all" if self.process else ""
        self.last_words = hosts.last_words(f"process {self.process} was killed{other}; {AGAIN}")
        threading.Thread(target=self._meet, daemon=True).start()

    def leave(self, end: End, error: BaseException | None = None) -> End:
        """Say how this process ends, and wait for how all do. error: to be shown with its traceback
        if it is what ends them, and no consequence of another's end."""
        self.left.set()
        if hosts.first() or not end.whole:
            self.said = end._replace(process=self.process)
        self.over.wait()
        if self.end.whole:
            self.last_words.communicate(b"whole\n")
            return self.end
        mine = self.end.process == self.process and self.end.line == end.line
        self._exit(error if mine else None)

    def _meet(self) -> None:
        """Meet until it is known how all end; then end a process that does not leave by itself."""
        while not self.end:
            try:
                self.end = self._once()
            except Exception as error:  # not all have come
                self.end = End(1, f"{_lost(str(error))}; {AGAIN}", whole=False, stopped=True)
            time.sleep(0 if self.end else PERIOD)
        if not self.end.whole and not self.left.is_set():
            self._exit()
        self.over.set()

    def _once(self) -> End | None:
        """One meeting. What a process says before it is known to all after it."""
        if self.said:
            said = json.dumps(self.said)
            self.client.key_value_set(f"{ENDS}/{self.process}", said, allow_overwrite=True)
        self.client.wait_at_barrier(MEETING, int(1000 * LIMIT))
        ends = [End(*json.loads(said)) for _, said in self.client.key_value_dir_get(ENDS)]
        return min(ends, key=lambda end: (end.whole, end.process), default=None)

    def _exit(self, error: BaseException | None = None) -> None:
        """End this process in the middle of whatever it does."""
        try:
            with contextlib.suppress(OSError):  # nobody may read stderr any more
                if error:
                    traceback.print_exception(error)
                where = f"process {self.end.process}: " if self.end.process else ""
                print(f"lorax: {where}{self.end.line}", file=sys.stderr, flush=True)
            self.last_words.communicate(b"said\n")
            if hosts.first():
                time.sleep(2 * PERIOD)  # JAX ends the others wordless once this process is gone
                for call in at_stop:
                    call(self.end)
        finally:
            os._exit(self.end.code)


def _lost(text: str) -> str:
    """Which processes a meeting's error misses, in words."""
    absent = re.findall(r"^(?:.*task:)?(\d+)$", text.partition("task names:")[2], re.MULTILINE)
    if not absent:
        return f"lost the other processes ({' '.join(text.split())[:200]})"
    return f"process {' and '.join(absent)} has died or does not answer"


@contextlib.contextmanager
def _silent():
    """Context without output of this process, besides errors."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
