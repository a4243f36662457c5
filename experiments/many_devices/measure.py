"""What a part of a sweep costs before it trains, and what each of its members adds.

    python -m experiments.many_devices.measure

Runs LoRA of rank 32 of configs/gpt2_rank_sweep.py with 1, 2, 4 and 8 seeds, each in a process of
its own on one core, and writes measured.csv beside itself: members, and the processor's seconds
from the start of Python to its end. Nothing compiled is kept between the runs. These are seconds
of work of one core, which others on the machine don't lengthen much.
"""

import csv
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
MEMBERS = (1, 2, 4, 8)
STUDY = [
    *(sys.executable, "-m", "lorax.run", f"--config={ROOT / 'configs/gpt2_rank_sweep.py'}"),
    *("--config.sweep.rank=(32,)", "--config.sweep.full_lr=()"),
    *("--config.train.parallel=none", "--config.analysis.report=False"),
]


def seconds(words: list[str]) -> float:
    """The processor's seconds of a command on one core, with nothing compiled before."""
    one = lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = used()
    subprocess.run(words, check=True, preexec_fn=one, env=environment, stdout=subprocess.DEVNULL)
    return used() - before


def main(directory: pathlib.Path = HERE) -> None:
    rows = []
    for members in MEMBERS:
        with tempfile.TemporaryDirectory() as folder:
            seeds = tuple(range(members))
            words = [*STUDY, f"--config.sweep.seed={seeds}", f"--workdir={folder}/run"]
            rows.append((members, f"{seconds(words):.2f}"))
        print(*rows[-1])
    with open(directory / "measured.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("members", "seconds"), *rows])


if __name__ == "__main__":
    main()
