"""Parts as jobs of SLURM, by submitit: an array, requeued when preempted or out of time.

    python -m lorax.launch --config=FILE --on=slurm --partition=gpu --gpus=1 --time=4:00:00

submitit writes and submits the jobs; `squeue` says which are left, as clusters without accounting
have no `sacct`, which submitit would ask. submitit pickles what a job calls (`job.Job`, which
holds a path) to submitit/ in the run directory, and the job unpickles that. The launcher unpickles
nothing: a part's JSON says how it ended. All nodes must see the run directory.

`--cluster=local` makes processes on this machine's CPU of the same jobs, `--cluster=debug` runs
them in this process, one after another. A launcher may stop while SLURM's jobs go on: the same
command follows them again.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lorax import errors
from lorax.launching import parts, state
from lorax.launching.options import at_least

CLUSTERS = ("slurm", "local", "debug")
FOLDER = "submitit"  # in the run directory
SECONDS = 0.2  # between two looks at the jobs' files
SQUEUE = 30.0  # seconds between two questions to SLURM
DAY = 24 * 60
MISSING = "--on=slurm needs submitit: pip install lorax-research[slurm]"
#: Options that only sbatch reads; submitit's local executor would give all parts the same GPUs.
SBATCH = ("partition", "gpus", "account", "constraint", "cpus", "memory", "sbatch", "setup")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--on=slurm`. What is not given is the cluster's to choose."""
    add = parser.add_argument_group("--on=slurm").add_argument
    add("--cluster", choices=CLUSTERS, default="slurm", help="local: processes on this CPU")
    add("--partition", help="as sbatch --partition")
    add("--time", default="1-0", help="of a job: minutes, H:MM:SS or D-HH:MM:SS (default: a day)")
    add("--gpus", type=int, metavar="N", help="of each part (0)")
    add("--cpus", type=int, metavar="N", help="of each part")
    add("--memory", type=float, metavar="GB", help="of each part")
    add("--account", help="as sbatch --account")
    add("--constraint", help="as sbatch --constraint")
    add("--sbatch", action="append", metavar="NAME=VALUE", help="another option of sbatch")
    add("--setup", action="append", metavar="LINE", help="of shell, before each part")
    add("--workers", type=int, metavar="N", help="about how many parts to make (8)")
    add("--max-parallel", type=int, metavar="N", help="parts that run at the same time (all)")
    add("--retries", type=int, default=2, metavar="N", help="of a part whose worker dies (2)")
    add("--timeouts", type=int, default=100, metavar="N", help="how often a part may use up --time")


def check(options: argparse.Namespace) -> None:
    """Raises ValueError if this machine can't submit parts with these options."""
    errors.optional("submitit", "submitit", MISSING)
    at_least(options, gpus=0, cpus=1, memory=0, retries=0, timeouts=0, workers=1, max_parallel=1)
    minutes(options.time)
    for given in options.sbatch or ():
        if not re.fullmatch(r"[a-z][a-z-]*=.+", given):
            raise ValueError(f"--sbatch: {given!r} given; expected NAME=VALUE, e.g. qos=high")
    if options.cluster != "slurm":
        for name in SBATCH:
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{name}: only SLURM reads it, not --cluster={options.cluster}; "
                    f"--on=local uses the GPUs of this machine"
                )
    elif not shutil.which("sbatch"):
        raise ValueError(
            "--on=slurm: this machine has no sbatch; start it on a login node of a SLURM cluster, "
            "or run the parts here with --on=local"
        )


def minutes(text: str) -> int:
    """A time as sbatch writes it, in minutes, rounded up. Raises ValueError for another text."""
    days, _, clock = text.rpartition("-")
    numbers = clock.split(":")
    if not all(map(str.isdecimal, numbers + [days] * bool(days))) or len(numbers) > 3:
        raise ValueError(f"--time: {text!r} given; expected minutes, H:MM:SS or D-HH:MM:SS")
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)  # without days: minutes first
    seconds = 86400 * int(days or 0) + sum(int(n) * u for n, u in zip(numbers, units, strict=False))
    if not seconds:
        raise ValueError(f"--time: {text!r} given; must be longer")
    return -(-seconds // 60)


def run(
    directories: Sequence[Path], options: argparse.Namespace
) -> Iterator[tuple[Path, str | None]]:
    """Run the parts of one run; (part, None or why it failed for good) of each as it ends. A part
    whose worker dies is submitted again."""
    executor = _executor(parts.run_of(directories[0]) / FOLDER, options)
    jobs, asked = _running(directories, executor), time.monotonic()
    waiting = [part for part in directories if part not in jobs]
    retries = {}
    for part in waiting:
        state.launch(part)
    here = options.max_parallel or options.workers or 1
    at_once = len(directories) if options.cluster == "slurm" else here
    try:
        while waiting or jobs:
            some, waiting = waiting[: at_once - len(jobs)], waiting[at_once - len(jobs) :]
            jobs |= _submit(some, executor, options)
            ask = time.monotonic() > asked + SQUEUE
            asked = time.monotonic() if ask else asked
            ended = _ended(jobs, options, ask)
            for part in ended:
                del jobs[part]
                outcome = state.outcome(part)
                if state.tries_again(part, outcome, retries, options.retries):
                    waiting.append(part)
                else:
                    state.end(part, outcome.reason)
                    yield part, outcome.reason
            time.sleep(0 if ended else SECONDS)
    except BaseException:  # Ctrl-C in the launcher, above all
        _leave(jobs, options)
        raise


def _executor(folder: Path, options: argparse.Namespace):
    """submitit's executor for jobs with these options."""
    import submitit

    cluster = options.cluster
    more = dict(given.split("=", 1) for given in options.sbatch or ())
    timeouts = {f"{cluster}_max_num_timeout": options.timeouts} if cluster != "debug" else {}
    executor = submitit.AutoExecutor(folder, cluster=cluster, **timeouts)
    executor.update_parameters(
        name=f"lorax-{folder.parent.name}",
        timeout_min=minutes(options.time),
        gpus_per_node=options.gpus,
        cpus_per_task=options.cpus,
        mem_gb=options.memory,
        slurm_partition=options.partition,
        slurm_account=options.account,
        slurm_constraint=options.constraint,
        slurm_array_parallelism=options.max_parallel,
        slurm_setup=options.setup,
        slurm_additional_parameters={"requeue": True} | more,
    )
    return executor


def _submit(some: Sequence[Path], executor, options: argparse.Namespace) -> dict:
    """{part: its job}; several become one array. Raises ValueError if SLURM refuses them."""
    if not some:
        return {}
    from lorax.launching.job import Job

    made = [Job(part.absolute(), log=options.cluster != "debug") for part in some]
    try:
        with outside_of_jobs():
            jobs = executor.submit_array(made)
    except RuntimeError as error:  # what sbatch said, in several lines
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"--on=slurm: sbatch refused the jobs: {said[-1]}") from error
    for part, job in zip(some, jobs, strict=True):
        state.submitted(part, f"{options.cluster} {job.job_id}")
    return dict(zip(some, jobs, strict=True))


@contextlib.contextmanager
def outside_of_jobs():
    """Context without the variables of the job that the launcher itself may be in, such as its
    memory, which sbatch and submitit would read."""
    inside = "SLURM_JOB_ID" in os.environ
    kept = {k: v for k, v in os.environ.items() if inside and re.match("SLURM_(?!CONF$)", k)}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


def _running(directories: Sequence[Path], executor) -> dict:
    """{part: its job} of those that an earlier launcher submitted to SLURM and that have not ended.
    Raises ValueError if SLURM can't be asked."""
    import submitit

    found = {part: state.job(part).partition(" ") for part in directories}
    numbers = {part: number for part, (cluster, _, number) in found.items() if cluster == "slurm"}
    if executor.cluster != "slurm" or not numbers:
        return {}
    queued = _queued(numbers.values())
    if queued is None:
        raise ValueError("--on=slurm: squeue fails, so it is unknown which parts run already")
    jobs = {}
    for part, number in numbers.items():
        if number in queued:
            print(f"part {part.name}: job {number} goes on", flush=True)
            jobs[part] = submitit.SlurmJob(executor.folder, number)
    return jobs


def _ended(jobs: dict, options: argparse.Namespace, ask: bool) -> list[Path]:
    """The parts whose jobs have ended. ask: SLURM too, as a job that dies leaves no result."""
    if options.cluster == "slurm":
        queued = _queued([job.job_id for job in jobs.values()]) if ask and jobs else None
        gone = lambda job: queued is not None and job.job_id not in queued
        return [p for p, job in jobs.items() if job.paths.result_pickle.exists() or gone(job)]
    if options.cluster == "debug":
        for job in jobs.values():
            job.exception()  # runs it
        return list(jobs)
    return [part for part, job in jobs.items() if job.done()]


def _queued(numbers: Iterable[str]) -> set[str] | None:
    """The jobs that SLURM still has to run or runs; None if it can't be asked."""
    arrays = sorted({number.partition("_")[0] for number in numbers})
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(arrays)}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:  # it has forgotten a single one
        return None
    return set(done.stdout.split())


def _leave(jobs: dict, options: argparse.Namespace) -> None:
    """The launcher stops: processes on this machine end with it, jobs of SLURM go on."""
    if options.cluster == "slurm" and jobs:
        numbers = " ".join(sorted({job.job_id.partition("_")[0] for job in jobs.values()}))
        print(
            f"lorax: {len(jobs)} parts go on as jobs of SLURM, and the same command follows them; "
            f"`scancel {numbers}` stops them",
            file=sys.stderr,
        )
    elif options.cluster == "local":
        for job in jobs.values():
            job.cancel()
        while not all(job.done() for job in jobs.values()):
            time.sleep(SECONDS)
