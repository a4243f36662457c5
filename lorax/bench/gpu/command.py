"""`python -m lorax.bench gpu`: the arguments, the file, what is printed. It starts no device."""

import signal
import sys

from lorax.bench.gpu import schedule, tables
from lorax.console import console
from lorax.errors import fail
from lorax.files import write_json


def main(minutes: float, json: str | None, small: bool, only: str) -> int:
    """Measure, keep, print. Exit codes: 0; 1 if a measurement failed; 2 without a device or with a
    file that can't be written; 3 if time was too short for some; 130 after Ctrl-C."""
    screen = console(width=None if sys.stdout.isatty() else 150)
    # So that the process that measures ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    measured = ""

    def keep(results: dict) -> None:
        nonlocal measured
        if json is not None:
            classes = tables.classes(tables.rows_of(results))
            paths = [
                {"rows": c.rows, "takes": c.takes, "hint": c.hint,
                 "fastest": {f"{shape}, {n} rows": path for (shape, n), path in c.fastest.items()}}
                for c in classes
            ]  # fmt: skip
            write_json(json, results | {"paths": paths})
            measured = f"; what was measured is in {json}"

    say = lambda line: screen.print(line, soft_wrap=True)
    try:
        results = schedule.run(minutes, small, only, keep, say)
    except KeyboardInterrupt:
        print(f"lorax: stopped{measured}", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        return fail(error)
    for part in tables.summary(results):
        screen.print(part, soft_wrap=isinstance(part, str))
    return schedule.exit_code(results)
