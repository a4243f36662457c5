"""Run a sweep on many machines: workers train its parts, and one run directory is made of them.

    python -m lorax.launch --config=configs/gpt2_rank_sweep.py --on=local --workers=2
    python -m lorax.launch --config=configs/gpt2_rank_sweep.py --on=slurm --partition=gpu --gpus=1
    python -m lorax.launch --on=ray --help

--on says who starts the workers: local, slurm, ray or elsewhere; --help with it lists the options.
Any key of the config can be set as with lorax.run, and the run directory has the members, metrics
and adapters that lorax.run writes on one machine, bit for bit (docs/many_machines.md). Tables,
answer and report are made once, when all parts are trained.

Repeating the command continues a run: parts that are trained are kept, the others go on from their
checkpoints. A part that fails for good is named with its reason; the others are kept and merged.
"""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from lorax import memory, run, rundir
from lorax.errors import fail, nearest
from lorax.resume import check_same_config

ENGINES = ("local", "slurm", "ray", "elsewhere")


def main(argv: list[str]) -> int:
    """The command line. Exit code 0; 1 for a failure of the run or of a part; 2 for a mistake in
    the input."""
    try:
        engine, options, flags = read(argv[1:])
        if options is None:
            return 0
        engine.check(options)
    except ValueError as error:
        return fail(error)

    def train(settings, members, workdir: Path, command: str) -> dict[str, str]:
        return _train(settings, members, workdir, command, engine, options, flags)

    command = "python -m lorax.launch " + shlex.join(argv[1:])
    end = run.carry_out([*argv[:1], *flags], command, train, launched=True)
    if end.line:
        print(f"lorax: {end.line}", file=sys.stderr)
    return end.code


def read(arguments: list[str]):
    """(engine, its options, the flags that are lorax.run's); (engine, None, []) for --help, which
    is printed. Raises ValueError for an engine or an option that does not exist."""
    parser = argparse.ArgumentParser(
        prog="python -m lorax.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m lorax.launch --config=FILE --on=ENGINE [options]",
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--on", metavar="ENGINE", help=f"{' | '.join(ENGINES)}")
    parser.add_argument("--help", "-h", action="store_true", help="also of an engine's options")
    name = parser.parse_known_args(arguments)[0].on
    if name is not None and name not in ENGINES:
        right = ", ".join(ENGINES)
        raise ValueError(f"--on: {name!r} given; expected {right}{nearest(name, ENGINES)}")
    engine = importlib.import_module(f"lorax.launching.{name or 'local'}")
    parser.error = _refuse
    engine.add_options(parser)
    if {"--help", "-h"} & set(arguments):
        parser.print_help()
        return engine, None, []
    try:
        options, flags = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from None
    if name is None:
        raise ValueError(f"--on is missing; expected --on={', --on='.join(ENGINES)}")
    for flag in flags:
        word = flag.split("=")[0].lstrip("-")
        if flag.startswith("-") and not word.startswith(("config", "noconfig", "workdir")):
            near = nearest(word, vars(options))
            raise ValueError(f"--{word}: no option of --on={name}{near}; --help --on={name} lists")
    return engine, options, flags


def _refuse(message: str):
    raise ValueError(message)


def _train(settings, members, workdir: Path, command: str, engine, options, flags):
    """`lorax.rounds.train` by workers, with the run directory locked."""
    revised = bool(check_same_config(workdir, settings, launched=True))
    with rundir.locked(workdir), rundir.recorded(workdir):
        memory.check()
        from lorax.launching import launcher, machines

        machine, workers = machines.choose(options)
        if machine.platform != "cpu":
            import jax

            # The workers have the accelerators; the base is divided here as it is there.
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", machine.each)
        from lorax import rounds  # imports JAX; the plan line is printed before

        by_workers = launcher.Launcher(engine, options, machine, workers, flags, revised)
        return rounds.train(settings, members, workdir, command, by_workers)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
