"""Merges parts into the run directory that one machine would have written.

Every file of the run is one of a part's, or made of lines and rows of the parts' files in the order
in which one machine writes them: round by round, leg by leg of a halving, group by group, the
members of a program together, step by step. Lines are copied as they are. Nothing here imports JAX.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from lorax import rundir
from lorax.files import atomically, draft, write_bytes
from lorax.launching import parts

SPLITS = ("train", "eval", rundir.ALSO, "test")  # in the order in which they are written at a step


def merge(workdir: Path, directories: Sequence[Path]) -> dict[int, dict]:
    """Merge parts into their run's directory; {member: its final row} of those that are trained.

    Measurements are also taken of parts that are not done, everything else only of those that are.
    """
    metrics(workdir, directories)
    done = [part for part in directories if parts.is_done(part)]
    results = {}
    for part in done:
        rows = rundir.read_status(part)["members"]
        results |= {int(member): row for member, row in rows.items()}
        for member in map(int, rows):
            for of in (rundir.adapter, rundir.rows, rundir.samples, rundir.texts):
                _put(of(part, member), of(workdir, member))
    _merge_base_texts(workdir, done)
    _merge_base_samples(workdir, done)
    _merge_spectra(workdir, done)
    return results


def metrics(workdir: Path, directories: Sequence[Path]) -> None:
    """Write metrics.jsonl of what the parts have measured so far."""
    lines = [line for part in directories for line in _lines(part)]
    programs = _programs(workdir, lines)
    write_bytes(workdir / rundir.METRICS, b"".join(line.text for p in programs for line in p.lines))


# ---------------------------------------------------------------------------------------- metrics


class Line(NamedTuple):
    """A line of metrics.jsonl. round: of its part; text: as it is in the file."""

    round: int
    member: int
    step: int
    split: str
    text: bytes


class Program(NamedTuple):
    """What the one machine trains together: the name of its files, its members, their lines."""

    name: str
    members: list[int]
    lines: list[Line]


def _lines(part: Path) -> list[Line]:
    number = parts.read(part).round
    if not rundir.metrics_size(part):
        return []
    data = (part / rundir.METRICS).read_bytes()
    found = []
    for text in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        row = json.loads(text)
        found.append(Line(number, row["member"], row["step"], row["split"], text))
    return found


def _programs(workdir: Path, lines: Iterable[Line]) -> list[Program]:
    """The programs of the one machine in the order in which it trains them."""
    of_member = {}
    for line in lines:
        of_member.setdefault((line.round, line.member), []).append(line)
    found = []
    for number in sorted({line_round for line_round, _ in of_member}):
        common, of_legs = parts.read_round(workdir, number), {}
        for group, members in common.groups.items():
            for member in members:
                own = of_member.get((number, member["member"]), [])
                for leg, some in _legs(member["legs"], own).items():
                    of_legs.setdefault((leg, group), {})[member["member"]] = some
        for (leg, group), by_member in sorted(of_legs.items()):
            found += _of_group(group, leg, by_member, common.sizes[group])
    return found


def _legs(legs: list[list[int]], lines: list[Line]) -> dict[int, list[Line]]:
    """{leg: a member's lines in it}. legs: the member's, with their last steps."""
    found = {}
    for line in lines:
        leg = next((leg for leg, last in legs if line.step <= last), legs[-1][0])
        found.setdefault(leg, []).append(line)
    return found


def _of_group(group: int, leg: int, by_member: dict[int, list], size: int) -> list[Program]:
    """The programs of a leg of a group, `size` members each; 0 for all."""
    members, found = list(by_member), []
    size = size or len(members)
    seen = list(dict.fromkeys(line.split for lines in by_member.values() for line in lines))
    kind = lambda split: rundir.ALSO if split.startswith(rundir.ALSO) else split
    place = lambda split: (SPLITS.index(kind(split)), seen.index(split))
    chunks = [members[i : i + size] for i in range(0, len(members), size)]
    for number, chunk in enumerate(chunks):
        at = {member: i for i, member in enumerate(chunk)}
        order = lambda line, at=at: (line.step, *place(line.split), at[line.member])
        lines = sorted((line for member in chunk for line in by_member[member]), key=order)
        found.append(Program(rundir.part(group, number, len(chunks), leg), chunk, lines))
    return found


# ------------------------------------------------------------------------------------ other files


def _put(source: Path, target: Path) -> None:
    """A part's file or folder in the run directory; a link where the disk can."""
    if not source.exists():
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        return
    if target.is_file() and target.samefile(source):  # a link already, which a rename would keep
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = draft(target)
    if source.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=_link)
        shutil.rmtree(target, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)
        _link(source, partial)
    os.replace(partial, target)


def _link(source, target) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _merge_base_texts(workdir: Path, done: list[Path]) -> None:
    """texts/base.jsonl: each base, decoding and prompt once, in the order of the members."""
    of_base, first, lines = lambda row: (row["base"], row["quant"]), {}, {}
    for part in sorted(done, key=lambda part: parts.read(part).members[0]):
        for row in rundir.read_members(part):
            first[of_base(row)] = min(row["member"], first.get(of_base(row), row["member"]))
        file = rundir.texts(part, rundir.BASE)
        if file.exists():
            lines |= dict.fromkeys(file.read_bytes().splitlines(keepends=True))
    target = rundir.texts(workdir, rundir.BASE)
    if lines:
        in_order = sorted(lines, key=lambda line: first[of_base(json.loads(line))])
        write_bytes(target, b"".join(in_order))
    else:
        target.unlink(missing_ok=True)


def _merge_base_samples(workdir: Path, done: list[Path]) -> None:
    """samples/base-GROUP.npz: of one part of a group, as all of them have the same."""
    for part in done:
        for group in {row["group"] for row in rundir.read_members(part)}:
            file = rundir.base_samples(part, group)
            if file.exists():
                _put(file, rundir.base_samples(workdir, group))


def _merge_spectra(workdir: Path, done: list[Path]) -> None:
    """trajectory/: the files of the one machine's programs, of the members' rows in the parts'."""
    files = {}  # {(member, step): (a part's file, the member's row in it)}
    for part in done:
        for file in rundir.spectra_files(part):
            for row, member in enumerate(load_file(file)["members"].tolist()):
                files.setdefault((member, int(file.stem)), (file, row))
    if not files:
        return
    lines = [line for part in done for line in _lines(part)]
    for program in _programs(workdir, lines):
        for step in sorted({line.step for line in program.lines if line.split == "eval"}):
            rows = [files[member, step] for member in program.members if (member, step) in files]
            if rows:
                _write_spectra(rundir.spectra(workdir, program.name, step), rows)


def _write_spectra(target: Path, rows: list[tuple[Path, int]]) -> None:
    """A file of spectra, of rows of others."""
    read = {file: load_file(file) for file in {file for file, _ in rows}}
    names = read[rows[0][0]]
    arrays = {name: np.stack([read[file][name][row] for file, row in rows]) for name in names}
    atomically(target, lambda temporary: save_file(arrays, temporary))
