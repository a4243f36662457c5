"""What many tiny members cost besides training, in a process of its own:

    python -m lorax.bench.member_costs MEMBERS DIRECTORY

Prints JSON of {phase: [CPU seconds, peak MB above what the process had before it]}. A member is
LoRA of rank 1 to 8 on a network of 8,970 weights that reads digits; it takes four steps. "train"
has its start (drawn and stacked), compiling and the first half of the steps, "resume" all that
comes again and the second half.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

from lorax import config, memory, report, rounds, rundir, xla
from lorax.analysis import answer, runs
from lorax.models import kernels
from lorax.planning import costs
from lorax.train import layouts, loop, prepare

RANKS = (1, 2, 4, 8)


def study(members: int):
    """The config of so many members, a multiple of four."""
    c = config.default()
    c.base, c.task.name = "random:mlp-64-64-64-10", "digits"
    c.method.targets = ("all-linear",)
    c.train.update(batch_size=8, steps=4, warmup=0)
    c.eval.update(every=2, examples=64, test=64, batch_size=64)
    c.sweep.rank, c.sweep.seed = RANKS, tuple(range(members // len(RANKS)))
    return c


def measure(settings, directory: Path) -> dict[str, list[float]]:
    """Do what `lorax.run` does with a config, stopped once half way: {phase: [CPU seconds, MB]}."""
    clock = Clock()
    clock.enter("plan")
    members = config.members(settings)
    costs.plan(members)
    clock.enter("start")
    groups = prepare.groups(members, ignore)
    rundir.write_members(directory, prepare.describe(groups[0]))
    rounds.write_config(directory, settings, groups[0].base, "")
    clock.enter("train")
    with contextlib.suppress(KeyboardInterrupt):
        loop.train(directory, groups, loop.Terminal(ignore, stop, ignore))
    clock.enter("resume")
    export = lambda *_: clock.enter("export")  # after the other half of the steps
    results, _ = loop.train(directory, groups, loop.Terminal(ignore, export, ignore))
    rundir.write_status(directory, "finished", results, 0.0, {})
    clock.enter("read")
    run = runs.load(directory)
    clock.enter("answer")
    answer.answer(run)
    clock.enter("report")
    report.write(directory, kernels(groups[0].base))
    clock.enter("")
    return clock.found


class Clock:
    """CPU seconds and peak MB of phases, each of which ends where the next one begins."""

    def __init__(self):
        self.found: dict[str, list[float]] = {}
        self.phase, self.before, self.began = "", 0, 0.0

    def enter(self, phase: str) -> None:
        """Begin a phase; "" for none."""
        seconds, peak = time.process_time() - self.began, memory.of_process("VmHWM") - self.before
        if self.phase:
            self.found[self.phase] = [seconds, peak / 1e6]
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        self.phase, self.before, self.began = phase, memory.of_process("VmRSS"), time.process_time()


def ignore(*_) -> None:
    """In place of a screen."""


def stop(done: float, total: float) -> None:
    """Progress at which a user stops the run."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    layouts.split_cpu()
    xla.keep_compiled()
    print(json.dumps(measure(study(int(sys.argv[1])), Path(sys.argv[2]))))
