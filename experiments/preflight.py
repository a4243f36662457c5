"""Checks a command of `python -m lorax.run` and prints its run directory's name; trains nothing.

    python -m experiments.preflight --config=configs/lora_table6_rank.py:stories

Its flags and its config must be right, and the files of the base and of the task must be there.
`experiments.rerun` asks this for all commands of a claim before it runs the first: in a process
for each, because flags are read once in a process.
"""

import sys
from pathlib import Path

from lorax import command_line
from lorax.errors import fail


def main(argv: list[str]) -> int:
    """The command line. Exit code 0, or 2 for a mistake in the input."""
    try:
        _, members, workdir = command_line.read(argv)
        configs = [member.config for member in members]
        tasks = dict.fromkeys((c.task.name, c.task.path) for c in configs)
        for name, path in tasks:
            if path and name != "instruct" and not Path(path).exists():  # which may be on the Hub
                raise FileNotFoundError(f"task.path: {path!r} does not exist; {name} needs it")
        from lorax.models.load import skeleton  # imports JAX; a wrong flag need not wait for it
        from lorax.train.prepare import base_settings

        for config in {c.base: c for c in configs}.values():
            skeleton(config.base, **base_settings(config))
    except Exception as error:  # a config script may raise anything
        return fail(error)
    print(workdir.name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
