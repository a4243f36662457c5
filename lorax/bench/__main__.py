"""Measure lorax on this machine against the alternatives.

    python -m lorax.bench sweep
    python -m lorax.bench step mixed
    python -m lorax.bench load --rounds=3
    python -m lorax.bench sweep --shapes=nano --rounds=5 --json=sweep.json

A row has a time, what it is compared with, and the median ratio over rounds (above 1: faster than
the baseline) with its range in brackets. The two sides of a ratio take turns within each round,
because a machine's speed drifts; compare only rows of the same run.
"""

import argparse
import json
import os
import sys

import jax
from rich.table import Table

from lorax.bench import bases, four_bits, loading, mixed, svd, timing, training
from lorax.console import console
from lorax.files import write_bytes
from lorax.train import layouts

BENCHES = {
    "sweep": training.bench_sweep,
    "step": training.bench_step,
    "dora": training.bench_dora,
    "subspace": training.bench_subspace,
    "mixed": mixed.bench_mixed,
    "nf4": four_bits.bench_nf4,
    "svd": svd.bench_svd,
    "load": loading.bench_load,
}


def main(arguments: list[str]) -> int:
    """The command line: measure, print a table and, if asked, write its rows as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m lorax.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="+", choices=BENCHES, help="what to measure")
    parser.add_argument(
        "--shapes", default=",".join(bases.SHAPES), help=f"of {', '.join(bases.SHAPES)}"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each comparison")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args(arguments)
    shapes = args.shapes.split(",")
    if set(shapes) - set(bases.SHAPES):
        parser.error(f"--shapes: {args.shapes!r} given; there is {', '.join(bases.SHAPES)}")
    layouts.split_cpu()
    # Otherwise torch's threads spin after each call and take cores from the side that runs next.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rows = [row for name in args.name for row in BENCHES[name](shapes, args.rounds)]
    table = Table(title=f"{timing.machine()}, jax {jax.__version__}", title_justify="left")
    for heading in ("", "time", "against", "its time", "ratio"):
        table.add_column(heading, justify="left" if heading in ("", "against") else "right")
    for row in rows:
        times = (f"{row.value:.2f} {row.unit}", row.against, f"{row.baseline:.2f} {row.unit}")
        table.add_row(row.name, *times, f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]")
    console(width=None if sys.stdout.isatty() else 130).print(table)
    if args.json:
        text = json.dumps([row._asdict() for row in rows], indent=1) + "\n"
        write_bytes(args.json, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
