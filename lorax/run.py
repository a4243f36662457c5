"""Run a sweep: config -> run directory with metrics, adapters, analysis and a report.

    python -m lorax.run --config=configs/gpt2_rank_sweep.py
    python -m lorax.run --config=configs/gpt2_rank_sweep.py --config.sweep.rank="(1, 4, 16)" \\
        --config.train.steps=50
    python -m lorax.run --config=configs/gpt2_rank_sweep.py --config.task.name=e2e \\
        --config.task.path=e2e-dataset.zip
    python -m lorax.run --config=configs/gpt2_rank_sweep.py --config.method.targets="('attention',)"

Any key of the config can be set this way, to None where that is its default; lorax/config.py lists
them all, lorax/catalogue.py those of the methods. Repeating the command resumes an unfinished run
from its last checkpoint, and leaves a finished one alone.

With `config.search.threshold` (0.9 for d90) the run searches for the intrinsic dimension: it trains
`config.sweep.dim` and full fine-tuning, then dimensions in between in further rounds.
"""

import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from lorax import (
    __version__,
    catalogue,
    command_line,
    config,
    hosts,
    memory,
    run_names,
    rundir,
    search,
    sequence,
    together,
)
from lorax.callable import make_callable
from lorax.errors import fail, of_machine, reason
from lorax.resume import check_same_config
from lorax.together import End


def main(argv: list[str]) -> int:
    """The command line. Exit code 0; 1 for a failure of the run; 2 for a mistake in the input."""
    if {"--help", "-h", "-help"} & set(argv[1:]):
        _help()
        return 0
    try:
        coordinator, argv = hosts.flags(argv)
        hosts.start(coordinator)
    except (ValueError, RuntimeError) as error:
        return fail(error)
    command = "python -m lorax.run " + shlex.join(argv[1:])
    end = together.run(lambda: carry_out(argv, command, _train))
    if end.line:
        print(f"lorax: {end.line}", file=sys.stderr)
    return end.code


def carry_out(argv: list[str], command: str, train: Callable, launched: bool = False) -> End:
    """A command line in each process of the program. command: the same as text. train(settings,
    members, workdir, command) -> {what failed after training: why}. launched: by workers."""
    try:
        settings, members, workdir = command_line.read(argv)
        if settings.sequence and launched:
            raise ValueError(
                "config.sequence: python -m lorax.run trains it, lorax.launch does not"
            )
    except Exception as error:  # a config script may raise anything
        return End(2, reason(error), whole=False)
    if settings.sequence:
        one = lambda *of_task: _carry_out(*of_task, command, train, launched)
        return sequence.carry_out(settings, workdir, one)
    return _carry_out(settings, members, workdir, command, train, launched)


def _carry_out(
    settings: ConfigDict, members, workdir: Path, command: str, train: Callable, launched: bool
) -> End:
    """One run."""
    try:
        rundir.check_paths(workdir)
        changed = check_same_config(workdir, settings, launched)
    except (ValueError, OSError) as error:
        return End(2, reason(error), whole=False)
    print(f"lorax {__version__}: {command_line.summary(settings, members)}", flush=True)
    if hosts.agreed(rundir.has_finished(workdir)) and not changed:
        report = workdir / rundir.REPORT
        print(f"{workdir} is finished." + f" Report: {report}" * report.exists())
        show_answer(workdir, settings)
        return End(0)
    try:
        failed = train(settings, members, workdir, command)
    except KeyboardInterrupt:
        return End(130, "stopped. Run the same command to continue.", whole=False, stopped=True)
    except (ValueError, FileNotFoundError, BlockingIOError) as error:
        return End(2, reason(error), whole=False)
    except Exception as error:
        if not of_machine(error):
            raise
        line = (
            f"stopped: {reason(of_machine(error))}. Fix that and run the same command to continue."
        )
        return End(1, line, whole=False, stopped=True)
    if not hosts.first():
        return End(0)
    show_places(workdir, settings.analysis.report and "report" not in failed)
    show_answer(workdir, settings)
    return End(1, what_failed(failed, workdir)) if failed else End(0)


def run(settings: ConfigDict, workdir: str | os.PathLike | None = None):
    """Train what a config asks for, as the command does, and return the `lorax.analysis.runs.Run`.

    workdir: the run directory; by default runs/config-<the keys that differ from
    `lorax.config.default()`>, as `lorax.run_names` names it. A stopped run is continued, a finished
    one is only loaded. After `jax.distributed.initialize()`, all processes call this together. For
    a sequence of tasks (`config.sequence`) the `Run` of each, a list.

    Raises ValueError or FileNotFoundError for a mistake in the config, MemoryError if something
    does not fit in memory. A report that fails only warns.
    """
    members = search.members(settings)
    if workdir is None:
        usual = config.flat(config.default())
        changes = {k: v for k, v in config.flat(settings).items() if v != usual[k]}
        workdir = run_names.workdir("config", "", changes)
    workdir = Path(workdir)
    if settings.sequence:
        return sequence.train(settings, workdir, lambda of_task, _, folder: run(of_task, folder))
    rundir.check_paths(workdir)
    changed = check_same_config(workdir, settings)
    if changed or not hosts.agreed(rundir.has_finished(workdir)):
        failed = _train(settings, members, workdir, f"lorax.run(config, {str(workdir)!r})")
        if failed:
            warnings.warn(what_failed(failed, workdir), stacklevel=2)
        hosts.meet("the first process has written everything")
    from lorax.analysis import runs  # imports pandas, which the command line need not wait for

    return runs.load(workdir)


def _train(settings, members, workdir: Path, command: str) -> dict[str, str]:
    """`lorax.rounds.train` with the run directory locked."""
    over = rundir.UNFINISHED
    together.at_stop.append(lambda end: rundir.record(workdir, end.line, end.stopped, over))
    with rundir.locked(workdir), rundir.recorded(workdir):
        memory.check()
        from lorax import rounds  # imports JAX; the plan line is printed before

        return rounds.train(settings, members, workdir, command)


def what_failed(failed: dict[str, str], workdir: Path) -> str:
    """A line about what failed after training."""
    return (
        f"all members are trained, but {', '.join(sorted(failed))} failed; run the same command "
        f"to try that again, or python -m lorax.report {workdir} to redraw only the report"
    )


def show_places(workdir: Path, has_report: bool) -> None:
    """Print where the results are."""
    if has_report:
        print(f"\nReport       {workdir / rundir.REPORT}")
        print(f"Figures      {workdir / rundir.FIGURES}\nNumbers      {workdir / rundir.ANALYSIS}")
    adapters = workdir / rundir.ADAPTERS
    print(f"Adapters     {adapters} ({formats(adapters)})")


def show_answer(workdir: Path, settings: ConfigDict) -> None:
    """Print the answer in three lines. A search has dimensions instead, which are shown before."""
    if settings.search.threshold:
        return
    from lorax.analysis import answer, runs

    try:
        found = answer.read(workdir) or answer.answer(runs.load(workdir))
    except Exception as error:  # the run is whole without it
        print(f"\nNo answer: {reason(error)}")
        return
    print("", *answer.lines(found), sep="\n")


def _help() -> None:
    print(__doc__)
    own = {name: command_line.FLAGS[name].help for name in ("config", "workdir")}
    for name, text in (own | hosts.FLAGS).items():
        print(f"  --{name:11s} {text}")
    for name, key in catalogue.keys().items():
        usual = "" if key.default is None else f" (default: {key.default})"
        print(f"  --config.method.{name:15s} {key.help}{usual}")


def formats(folder: Path) -> str:
    """The format of a folder's adapters in words: PEFT's, or lorax's own, which PEFT can't read."""
    adapters = [path for path in folder.glob("*") if path.is_dir()]
    without = sum(not (path / "adapter_config.json").exists() for path in adapters)
    if not without:
        return "PEFT format"
    if without == len(adapters):
        return "lorax's own format"
    return f"PEFT format, but {without} of {len(adapters)} in lorax's own format only"


make_callable(__name__, run)

if __name__ == "__main__":
    sys.exit(main(sys.argv))
