"""Measure lorax on this machine against the alternatives.

    python -m lorax.bench sweep
    python -m lorax.bench step mixed
    python -m lorax.bench load --rounds=3
    python -m lorax.bench sweep --shapes=nano --rounds=5 --json=sweep.json
    python -m lorax.bench members --members=48,200,1000 --rounds=1
    python -m lorax.bench gpu --minutes=8 --json=gpu.json

`gpu` is all that an accelerator can say in a few minutes (docs/speed.md): products in 4 bits,
steps, generation, beside torch where it is installed. Its file has each number as soon as it is
known. Exit codes: 0; 1 if a measurement failed; 2 without a device; 3 if time was too short for
some; 130 after Ctrl-C.

A row of the others has a time, what it is compared with, and the median ratio over rounds (above 1:
faster than the baseline) with its range in brackets. The two sides of a ratio take turns within
each round, because a machine's speed drifts; compare only rows of the same run.
"""

import argparse
import functools
import json
import os
import sys

import jax
from rich.table import Table

from lorax.bench import (
    attention,
    bases,
    decoding,
    four_bits,
    loading,
    members,
    mixed,
    svd,
    timing,
    training,
)
from lorax.bench.gpu import command as gpu
from lorax.console import console
from lorax.files import check_can_write, write_bytes
from lorax.train import layouts

BENCHES = {
    "sweep": training.bench_sweep,
    "step": training.bench_step,
    "attention": attention.bench_attention,
    "dora": training.bench_dora,
    "subspace": training.bench_subspace,
    "mixed": mixed.bench_mixed,
    "texts": decoding.bench_texts,
    "generate": decoding.bench_generate,
    "nf4": four_bits.bench_nf4,
    "svd": svd.bench_svd,
    "load": loading.bench_load,
    "members": members.bench_members,
}

GPU = "gpu"  # measures in a process of its own, so that this one starts no device


def main(arguments: list[str]) -> int:
    """The command line: measure, print a table and, if asked, write its rows as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m lorax.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="+", choices=[*BENCHES, GPU], help="what to measure")
    parser.add_argument("--shapes", help=f"of {', '.join(bases.SHAPES)} (default: all)")
    usual = ",".join(map(str, members.MEMBERS))
    parser.add_argument("--members", help=f"members: how many, multiples of 4 (default: {usual})")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (default: 7)")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--minutes", type=float, help="gpu: when to be done (default: 8)")
    parser.add_argument("--small", action="store_true", help="gpu: small shapes, as on a CPU")
    parser.add_argument("--only", metavar="TEXT", help="gpu: measurements with TEXT in their name")
    args = parser.parse_args(arguments)
    if args.json is not None:
        try:
            check_can_write(args.json, "--json")
        except ValueError as error:
            parser.error(str(error))
    if GPU in args.name:
        others = ("--shapes", args.shapes), ("--rounds", args.rounds), ("--members", args.members)
        if given := [word for word, value in others if value is not None]:
            parser.error(f"{given[0]}: not for {GPU}, whose shapes follow from the device")
        if args.name != [GPU]:
            parser.error(f"{GPU}: must be alone, it measures what the others do as well")
        minutes = 8.0 if args.minutes is None else args.minutes
        if not 0 < minutes < 1e4:
            parser.error(f"--minutes: {minutes:g} given, must be above 0")
        return gpu.main(minutes, args.json, args.small, args.only or "")
    of_gpu = ("--minutes", args.minutes), ("--small", args.small or None), ("--only", args.only)
    if given := [word for word, value in of_gpu if value is not None]:
        parser.error(f"{given[0]}: only for {GPU}")
    shapes = args.shapes.split(",") if args.shapes else list(bases.SHAPES)
    rounds = 7 if args.rounds is None else args.rounds
    if rounds < 1:
        parser.error(f"--rounds: {rounds} given, must be at least 1")
    if set(shapes) - set(bases.SHAPES):
        parser.error(f"--shapes: {args.shapes!r} given; there is {', '.join(bases.SHAPES)}")
    counts = _counts(parser, args.members, "members" in args.name)
    measured = BENCHES | {"members": functools.partial(members.bench_members, counts=counts)}
    layouts.split_cpu()
    # Otherwise torch's threads spin after each call and take cores from the side that runs next.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rows = [row for name in args.name for row in measured[name](shapes, rounds)]
    table = Table(title=f"{timing.machine()}, jax {jax.__version__}", title_justify="left")
    for heading in ("", "time", "against", "its time", "ratio"):
        table.add_column(heading, justify="left" if heading in ("", "against") else "right")
    for row in rows:
        times = (f"{row.value:.2f} {row.unit}", row.against, f"{row.baseline:.2f} {row.unit}")
        table.add_row(row.name, *times, f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]")
    console(width=None if sys.stdout.isatty() else 130).print(table)
    if args.json is not None:
        text = json.dumps([row._asdict() for row in rows], indent=1) + "\n"
        write_bytes(args.json, text.encode())
    return 0


def _counts(parser: argparse.ArgumentParser, given: str | None, used: bool) -> list[int]:
    """Numbers of members from --members."""
    if given is None:
        return list(members.MEMBERS)
    if not used:
        parser.error("--members: only for members")
    words = given.split(",")
    counts = [int(word) for word in words if word.isdecimal()]
    fine = len(counts) == len(words) > 1 and counts == sorted(set(counts))
    if not fine or any(n == 0 or n % 4 for n in counts):
        parser.error(f"--members: {given!r} given, must be ascending multiples of 4, as 48,200")
    return counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
