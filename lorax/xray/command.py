"""What `python -m lorax.xray` does with its arguments, file by file."""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from lorax import naming
from lorax.console import console
from lorax.interop import formats
from lorax.interop.formats.opened import located
from lorax.xray import defects, keeping, terminal, together
from lorax.xray.measured import Measured, measure, unread


def show(given: argparse.Namespace, screen) -> int:
    """Print everything about the files. Raises ValueError or OSError, as `formats.read`."""
    if given.layers is not None and given.base is None and given.out is None:
        raise ValueError("--layers: give --base as well, with whose layers to compare")
    if given.base is not None or given.out is not None:
        from lorax.report import bases

        bases.check(given.base, given.layers)
    names = dict(zip(given.files, named(given.files), strict=True))
    found = {names[file]: formats.read(file) for file in given.files}
    measured = {}
    for name, file in found.items():
        screen.print(terminal.headline(name, file), soft_wrap=True)
        for fact, value in terminal.about(file).items():
            screen.print(f"  {fact}: {value}", soft_wrap=True)
        updates = _progress(measure(file.updates), f"reading {name}", len(file.updates))
        measured[name] = list(updates)
        if measured[name]:
            _show_one(measured[name], given.all, screen)
    if len(found) > 1:
        _show_together(measured, screen)
    if given.out is not None:
        return _write(given, given.out, screen)
    if given.base is not None:
        with tempfile.TemporaryDirectory() as unseen:
            return _write(given, unseen, screen)
    return 0


def _write(given: argparse.Namespace, out: str, screen) -> int:
    """Write the page into the directory `out`, and print what it says of the base; 1 if a part of
    it failed. What failed goes to stderr."""
    from lorax.report import page  # slow to import
    from lorax.report.pages import adapters

    paths = [located(file) for file in given.files]
    failed = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        written = adapters.write(paths, given.base, out, layers=given.layers)
    for warning in said:
        print(f"lorax: {warning.message}", file=sys.stderr)
        failed += [warning] * issubclass(warning.category, page.SectionFailed)
    for line in terminal.against_base(written.parent):
        screen.print(line)
    if given.out is not None:
        screen.print(str(written), soft_wrap=True)
    return 1 if failed else 0


def named(files: Sequence[str]) -> list[str]:
    """Short names of files that can be told apart. Raises ValueError for a file given twice."""
    names = [Path(file).stem if Path(file).suffix else Path(file).name for file in files]
    names = names if len(set(names)) == len(names) and all(names) else naming.names(files)
    return naming.shortened(names)


def _show_one(measured: list[Measured], all_rows: bool, screen) -> None:
    """The table, the defects and the smaller versions of one file."""
    table, omitted = terminal.matrices(measured, all_rows)
    screen.print(table)
    for line in (omitted, terminal.total(measured)):
        screen.print(line, soft_wrap=True) if line else None
    ranks = {one.update.layer: terminal.numerical(one) for one in measured if not one.bad}
    for line in defects.lines(defects.defects(measured, ranks), len(measured)):
        screen.print(line, soft_wrap=True)
    finite = [one for one in measured if not one.bad]
    sigmas = {one.update.layer: one.sigma for one in finite}
    choices = keeping.kept(sigmas, terminal.shapes(finite))
    if choices:
        screen.print(terminal.smaller(choices, sum(one.parameters for one in finite)))


def _show_together(measured: dict[str, list[Measured]], screen) -> None:
    """The directions that files share, and what becomes of them in the sum of all."""
    files = {name: unread([x for x in found if not x.idle]) for name, found in measured.items()}
    matrices = together.common(files)
    if not matrices:
        screen.print("nothing in common: no two files change a matrix of one name and shape")
        return
    compared = _progress(together.compare(files, matrices), "comparing", len(matrices))
    compared = list(compared)
    pairs = [pair for of_matrix, _ in compared for pair in of_matrix]
    added = [of_matrix for _, of_matrix in compared]
    screen.print(terminal.pairs(together.whole(pairs)))
    screen.print(terminal.added(together.in_sum(added)))
    for line in terminal.conflicts(added):
        screen.print(line, soft_wrap=True)


def _progress(steps, doing: str, total: int):
    """The steps, with a bar on a terminal."""
    bar = console(stderr=True)
    if not bar.is_terminal:
        return steps
    from rich.progress import track  # slow to import

    return track(steps, doing, total, console=bar, transient=True)
