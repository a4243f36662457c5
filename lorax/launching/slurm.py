"""Parts as jobs of SLURM, by submitit: an array, requeued when preempted or out of time.

    python -m lorax.launch --config=FILE --on=slurm --partition=gpu --gpus=1 --time=4:00:00

submitit writes the jobs and asks `sacct` about them. It pickles what a job calls (`job.Job`, which
holds a path) to submitit/ in the run directory, and the job unpickles that. The launcher unpickles
nothing: a part's JSON says how it ended. All nodes must see the run directory.

`--cluster=local` makes processes on this machine's CPU of the same jobs, `--cluster=debug` runs
them in this process, one after another. A launcher may stop while SLURM's jobs go on: the same
command follows them again.
"""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorax import errors
from lorax.launching import parts, state

CLUSTERS = ("slurm", "local", "debug")
FOLDER = "submitit"  # in the run directory
SECONDS = 0.2  # between two looks at the jobs; submitit itself asks sacct ever less often
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
    least = {"gpus": 0, "cpus": 1, "memory": 0, "retries": 0, "timeouts": 0}
    for name, low in (least | {"workers": 1, "max_parallel": 1}).items():
        value = getattr(options, name)
        if value is not None and value < low:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: {value} given, must be at least {low}")
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
    jobs = {part: job for part in directories if (job := _running(part, executor))}
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
            ended = [part for part, job in jobs.items() if _ended(job, options)]
            for part in ended:
                del jobs[part]
                outcome = state.outcome(part)
                if outcome.again and retries.get(part, 0) < options.retries:
                    retries[part] = retries.get(part, 0) + 1
                    waiting.append(part)
                    print(f"part {part.name}: {outcome.reason}. It is tried again.", flush=True)
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
    from submitit import helpers

    from lorax.launching.job import Job

    made = [Job(part.absolute(), log=options.cluster != "debug") for part in some]
    try:
        with helpers.clean_env():  # a launcher that is a job itself gives its parts nothing of that
            jobs = executor.submit_array(made)
    except RuntimeError as error:  # what sbatch said, in several lines
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"--on=slurm: sbatch refused the jobs: {said[-1]}") from error
    for part, job in zip(some, jobs, strict=True):
        state.submitted(part, f"{options.cluster} {job.job_id}")
    return dict(zip(some, jobs, strict=True))


def _running(part: Path, executor):
    """The job of SLURM that an earlier launcher made of a part, if it has not ended; else None."""
    import submitit

    cluster, _, number = state.job(part).partition(" ")
    if (cluster, executor.cluster) != ("slurm", "slurm"):
        return None
    job = submitit.SlurmJob(executor.folder, number)
    if job.done(force_check=True):
        return None
    print(f"part {part.name}: job {number} goes on", flush=True)
    return job


def _ended(job, options: argparse.Namespace) -> bool:
    if options.cluster == "debug":
        job.exception()  # runs it
        return True
    return job.done()


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
