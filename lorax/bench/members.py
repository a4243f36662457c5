"""Planning, starting, training, reading and reporting of many tiny members."""

import functools
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from lorax.bench import timing

MEMBERS = (48, 200, 1000)
PHASES = ("plan", "start", "train", "resume", "export", "read", "answer", "report")


def bench_members(
    shapes: list[str], rounds: int, counts: Sequence[int] = MEMBERS
) -> list[timing.Row]:
    """CPU time and peak memory, a member, of what a run does besides its steps
    (`lorax.bench.member_costs`), against the same of the next smaller number of members: a ratio
    below 1 says that it grows faster than they do. Each run is a process of its own; its programs
    are compiled before the first round that counts.

    counts: of members, ascending multiples of four.
    """
    sides = {n: functools.partial(_costs, n) for n in counts}
    found = timing.measure(sides, rounds)  # of each count (rounds, phases, 2)
    rows = []
    for i, phase in enumerate(PHASES):
        for j, (what, unit) in enumerate((("CPU time", "ms"), ("memory", "kB"))):
            for fewer, n in itertools.pairwise(counts):
                ours, theirs = (found[m][:, i, j] / m for m in (n, fewer))
                row = timing.row(f"{phase}, {what} a member of {n}", ours, theirs, f"of {fewer}")
                rows.append(row._replace(unit=unit))
    return rows


def _costs(members: int) -> np.ndarray:
    """(phases, 2): CPU seconds and MB of one process."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "lorax.bench.member_costs", str(members), directory]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return np.array([found[phase] for phase in PHASES])
