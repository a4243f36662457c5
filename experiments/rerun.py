"""Runs a claim again and compares its verdicts with the committed ones.

    python -m experiments.rerun --list
    python -m experiments.rerun rank --base=gpt2-nano --dry-run
    python -m experiments.rerun rank --base=gpt2-nano,stories-llama-260k

Runs the commands of the claim's rule.py, computes its verdicts from the new runs, and prints every
committed number beside the new one, with the difference in halves of the committed 95% interval.
Run directories go into --out. A run that is finished there is not repeated, an unfinished one goes
on, and claims that read the same run share it: delete a run's folder to have it anew.

Models and data are found in $LORAX_MODELS and $LORAX_DATA (docs/studies.md). All commands are
checked before the first is run: a wrong config, a missing model or missing data is an error at
once.

Exit code: 0; 1 if a verdict changed or a command failed; 2 for a mistake in the input.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from experiments import verdicts
from experiments.verdicts import HERE, Verdict
from lorax.errors import fail, nearest

ROOT = HERE.parent


class Step(NamedTuple):
    """A command of a claim."""

    base: str
    words: list[str]
    directory: Path  # that it writes


def main(argv: list[str]) -> int:
    """The command line."""
    arguments = _arguments(argv)
    try:
        if arguments.list:
            print(listing())
            return 0
        rule = verdicts.rule(arguments.claim or "")
        bases = chosen(rule, arguments.base)
        steps = plan(rule, arguments.claim, bases, Path(arguments.out))
    except (ValueError, FileNotFoundError) as error:
        return fail(error)
    different = {step.directory: step for step in steps}.values()  # bases may share a command
    for step in different:
        print(f"{step.base}: {shlex.join(step.words)}")
    if arguments.dry_run:
        return 0
    for n, step in enumerate(different, 1):
        print(f"\n{arguments.claim}, {step.base}: command {n} of {len(different)}", flush=True)
        code = subprocess.run(step.words, cwd=ROOT).returncode
        if code:
            print(f"command {n} of {len(different)} failed with exit code {code}", file=sys.stderr)
            return 2 if code == 2 else 1
    runs = {base: [step.directory for step in steps if step.base == base] for base in bases}
    committed = rule.verdicts(HERE / arguments.claim)
    try:
        new = collected(rule, runs, HERE / arguments.claim if arguments.write else None)
    except (ValueError, FileNotFoundError) as error:
        return fail(error)
    changed, text = compared(committed, new, bases)
    print(f"\n{text}")
    if arguments.write:
        print(f"written to {HERE / arguments.claim}; python -m experiments.tables does the READMEs")
    return int(changed)


def collected(rule: ModuleType, runs: dict[str, list[Path]], folder: Path | None) -> list[Verdict]:
    """The verdicts on the numbers of these runs, which go into a folder (None: a temporary one)."""
    if folder is not None:
        rule.collect(runs, folder)
        return rule.verdicts(folder)
    with tempfile.TemporaryDirectory() as temporary:
        return collected(rule, runs, Path(temporary))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.rerun",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("claim", nargs="?", metavar="CLAIM", help="a folder of experiments/")
    parser.add_argument("--base", metavar="BASE,...", help="only these bases; by default all")
    parser.add_argument("--out", default="runs/rerun", help="for run directories (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="check and print the commands only")
    parser.add_argument("--write", action="store_true", help="write the numbers into the folder")
    parser.add_argument(
        "--list", action="store_true", help="all claims, with their bases and times"
    )
    arguments = parser.parse_args(argv)
    if not arguments.list and not arguments.claim:
        parser.error("CLAIM is missing: a folder of experiments/ with a rule.py; see --list")
    return arguments


def listing() -> str:
    """All claims, a line each with the bases it can be run on and how long it takes."""
    lines = []
    for claim in verdicts.claims():
        rule = verdicts.rule(claim)
        lines.append(f"{claim}: {rule.CLAIM}")
        for base in rule.COMMANDS:
            minutes = getattr(rule, "MINUTES", {}).get(base)
            took = "not measured" if minutes is None else f"{minutes:g} min on two cores"
            lines.append(f"    {base}: {took}")
    return "\n".join(lines)


def chosen(rule: ModuleType, given: str | None) -> list[str]:
    """The bases that --base names. Raises ValueError for one that the rule has no commands for."""
    bases = list(rule.COMMANDS) if given is None else given.split(";" if ";" in given else ",")
    for base in bases:
        if base not in rule.COMMANDS:
            known = ", ".join(rule.COMMANDS)
            raise ValueError(f"--base: {base!r}: choose {known}{nearest(base, rule.COMMANDS)}")
    return bases


def plan(rule: ModuleType, claim: str, bases: list[str], out: Path) -> list[Step]:
    """The commands with their directories, checked. Raises ValueError for one that can't run."""
    every = list(dict.fromkeys(c for commands in rule.COMMANDS.values() for c in commands))
    steps = []
    for base in bases:
        directories: list[Path] = []
        for command in rule.COMMANDS[base]:
            earlier = lambda match: str(directories[int(match[1]) - 1])  # noqa: B023
            words = shlex.split(re.sub(r"\{(\d+)\}", earlier, command))
            if words[0] != "python":
                raise ValueError(f"{claim}, {base}: {command}: must begin with python")
            name = f"{claim}-{every.index(command) + 1}"
            if words[1:3] == ["-m", "lorax.run"]:
                name = _checked(words[3:])
            directories.append((out / name).absolute())
            words = [sys.executable, *words[1:], f"--workdir={directories[-1]}"]
            steps.append(Step(base, words, directories[-1]))
    return steps


def _checked(flags: list[str]) -> str:
    """The name of the run directory of `python -m lorax.run` with these flags. Raises ValueError
    with its message if it can't run."""
    words = [sys.executable, "-m", "experiments.preflight", *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(lines[-1].removeprefix("lorax: "))
    return done.stdout.strip().splitlines()[-1]


def compared(committed: list[Verdict], new: list[Verdict], bases: list[str]) -> tuple[bool, str]:
    """(whether a verdict changed, a table of the committed numbers beside the new ones)."""
    before = {(v.part, v.base): v for v in committed}
    lines, changed = [], False
    for v in (v for v in new if v.base in bases):
        old = before.get((v.part, v.base), Verdict(v.part, v.base, verdicts.NOT_RUN, ""))
        changed |= old.verdict != v.verdict
        lines.append(f"{v.part}, {v.base}")
        lines.append(f"  committed  {old.verdict:13}{old.number}")
        lines.append(f"  new        {v.verdict:13}{v.number}{_distance(old, v)}")
    lines.append("a verdict changed" if changed else "no verdict changed")
    return changed, "\n".join(lines)


def _distance(old: Verdict, new: Verdict) -> str:
    """The difference of two numbers, in halves of the committed interval."""
    if old.interval is None or new.interval is None or not old.interval.high > old.interval.low:
        return ""
    half = (old.interval.high - old.interval.low) / 2
    return f"  ({(new.interval.value - old.interval.value) / half:+.2f} half intervals)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
