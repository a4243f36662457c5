"""Train one part of a run: python -m lorax.launching.worker DIR

DIR is parts/I of a run directory, as `lorax.launch` makes it. A part that was begun goes on from
its newest checkpoint; one that is done is left alone. Exit code 0 when all its members are trained;
1 if the worker may be tried again; 2 for a mistake that another try would repeat.
"""

import sys
from pathlib import Path

from lorax import rundir
from lorax.errors import fail, of_machine, reason
from lorax.launching import parts, state


def run(directory: Path) -> None:
    """Train a part from its newest checkpoint, or from the beginning.

    Raises BlockingIOError if another process trains it, ValueError or FileNotFoundError for a
    mistake that another try would repeat, or whatever else stopped it. worker.json and status.json
    say so too (`lorax.launching.state`).
    """
    directory = Path(directory).absolute()
    with rundir.locked(directory), state.recorded(directory), rundir.recorded(directory):
        if not parts.is_done(directory):
            from lorax.launching import training  # imports JAX

            training.train(directory, parts.read(directory))


def main(argv: list[str]) -> int:
    """The command line; see the module."""
    if len(argv) != 2 or argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv[1:] in (["-h"], ["--help"]) else 2
    try:
        run(Path(argv[1]))
    except KeyboardInterrupt:
        return 130
    except state.MISTAKES as error:
        return fail(error)
    except Exception as error:
        if not of_machine(error):
            raise
        print(f"lorax: {reason(of_machine(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
