"""What runs or adapters have learned, as one page to look at.

    python -m lorax.report RUN                its own report, in the run directory
    python -m lorax.report RUN RUN...         a page that compares them
    python -m lorax.report ADAPTER            a PEFT adapter from anywhere
    python -m lorax.report ADAPTER ADAPTER    two of them, and what they have in common

Writes report.html, a single file that opens from disk; analysis/*.csv and *.npz, every number
shown; figures/ with each figure as PNG, PDF and the CSV that it draws. It reads nothing but the
directories named, and the base model where it can be loaded; so a report can be redrawn at any
time.
"""

import argparse
import sys
from collections.abc import Sequence

from lorax.analysis import runs
from lorax.report import bases, run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0; 1 for a failure under way; 2 for a mistake in the input."""
    parser = argparse.ArgumentParser(prog="python -m lorax.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", nargs="+", help="a run directory")
    for directory in parser.parse_args(arguments).run:
        try:
            config = runs.load(directory).config
            print(run.write(directory, *bases.of_config(config)))
        except (FileNotFoundError, ValueError) as error:
            print(f"lorax.report: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
