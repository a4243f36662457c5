"""Write a report: one page on runs or adapters.

    python -m lorax.report RUN                the run's own report, in its directory
    python -m lorax.report RUN RUN...         a page that compares runs
    python -m lorax.report ADAPTER            an adapter from anywhere, as lorax.xray reads it
    python -m lorax.report ADAPTER ADAPTER... adapters compared

Writes report.html, a single file that a browser opens from disk; all numbers shown, as
analysis/*.csv and *.npz; and the plotted numbers as figures/*.csv, with --figures=png,pdf beside
images of the figures. It reads only the named directories and, if it is available, the base model,
so a report can be redrawn at any time.
"""

import argparse
import pathlib
import sys
import warnings
from collections.abc import Sequence

from lorax import rundir
from lorax.analysis import answer, runs
from lorax.errors import nearest
from lorax.interop import formats, reading
from lorax.report import bases, images, page
from lorax.report.pages import adapters, one_run, several_runs

RUN, ADAPTER = "a run", "an adapter"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0; 1 if a section or the report failed; 2 for wrong input."""
    given = _parser().parse_args(arguments)
    if page.CONSOLE.is_terminal:
        words = f"analysing {' and '.join(given.what)}"
        page.CONSOLE.print(words)
    failures = []

    def say(message, category, *_, **__) -> None:
        print(f"lorax.report: {message}", file=sys.stderr)
        failures.extend([message] * issubclass(category, page.SectionFailed))

    try:
        with warnings.catch_warnings():
            warnings.showwarning = say
            options = (given.base, given.out, given.alpha, given.layers, given.also, given.share)
            written = write(given.what, *options, given.figures)
            if len(given.what) == 1 and (found := answer.read(given.what[0])):
                print(*answer.lines(found), "", sep="\n")
            print(written)
    except (FileNotFoundError, ValueError) as error:
        return _fail(error, 2)
    except (OSError, MemoryError) as error:
        return _fail(error, 1)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m lorax.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", nargs="+", help="run directories, or adapters")
    parser.add_argument(
        "--base",
        help="the base model of an adapter or a run: a shipped model, a directory or a Hub id "
        "(default: the one that the adapter or run names)",
    )
    parser.add_argument(
        "--out", help="directory of the page (default: runs/compare-..., runs/adapter-...)"
    )
    parser.add_argument(
        "--alpha", type=float, help="lora_alpha of a loralib checkpoint, which doesn't store it"
    )
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="compare the updates with the base in N evenly spaced layers (default: all); each "
        "matrix of these layers is decomposed once, which takes a while if it is wide",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="FILE.py:function",
        help="a function of yours that computes a statistic of every update; may be repeated",
    )
    parser.add_argument(
        "--share",
        metavar="OUT.html",
        help="write one file to hand on instead: the page with its figures, their numbers and the "
        "config in it, without paths of this machine",
    )
    parser.add_argument(
        "--figures",
        default=(),
        metavar="png,pdf",
        help="draw every figure as an image in figures/ as well, in one or both of these formats",
    )
    return parser


def write(
    what: Sequence[str],
    base: str | None = None,
    out: str | None = None,
    alpha: float | None = None,
    layers: int | None = None,
    also: Sequence[str] = (),
    share: str | None = None,
    figures: str | Sequence[str] = (),
) -> pathlib.Path:
    """Write the report of the named runs or adapters. Returns the path of its page.

    The arguments are those of the command line. Raises FileNotFoundError or ValueError that says
    what was given and what is expected.
    """
    formats = images.read_formats(figures)
    if formats and share is not None:
        raise ValueError("--figures: files beside a page; --share writes one file, so leave it out")
    written = _write(what, base, out, alpha, layers, also, share)
    if formats:
        images.add(written, formats)
    return written


def _write(what, base, out, alpha, layers, also, share) -> pathlib.Path:
    """`write` without images."""
    bases.check(None, layers)
    if share is not None and not share.endswith(".html"):
        raise ValueError(f"--share={share}: the name of a file that ends with .html")
    if share is not None and out is not None:
        raise ValueError("--out: a directory; --share writes one file, so leave --out away")
    shared = None if share is None else pathlib.Path(share)
    sorts = {name: sort(name) for name in what}
    if len(set(sorts.values())) > 1:
        listed = ", ".join(f"{name} is {kind}" for name, kind in sorts.items())
        raise ValueError(f"{listed}: give runs or adapters, not both")
    if ADAPTER in sorts.values():
        return adapters.write(what, base, out, alpha, layers, also, shared)
    if alpha is not None:
        raise ValueError("--alpha is for loralib's checkpoints; a run's adapters store their scale")
    if len(what) > 1:
        if layers is not None:
            raise ValueError("--layers is for adapters or one run; comparing runs needs no base")
        if base is not None:
            raise ValueError("--base is for adapters or one run; comparing runs needs no base")
        if also:
            raise ValueError("--also is for adapters or one run; give one of these runs")
        return several_runs.write(what, out, shared)
    if out is not None:
        raise ValueError(f"--out: the report of one run goes into its directory, here {what[0]}")
    config = runs.load(what[0]).config
    kernels = bases.of_config(config) if base is None else (bases.load(base), "")
    return one_run.write(what[0], *kernels, layers, base, also, shared)


def sort(name: str) -> str:
    """Whether a path is a run or an adapter.

    Raises FileNotFoundError if the path doesn't exist, ValueError if it is something else.
    """
    path = pathlib.Path(name)
    if not path.exists():
        names = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{name}: no such run directory or adapter{nearest(name, names)}")
    if reading.is_here(path):
        return ADAPTER
    if rundir.is_run(path):
        return RUN
    if path.is_file() or _holds_adapter(path):
        return ADAPTER
    hint = ""
    if (path / "method.json").exists():
        hint = "; it is in lorax's own format: report on its run instead"
    elif (path / "config.json").exists():
        hint = "; it looks like a model: pass it as --base"
    raise ValueError(
        f"{name}: neither a run directory (with {rundir.MEMBERS}) nor an adapter (with "
        f"adapter_config.json or delta.safetensors){hint}"
    )


def _holds_adapter(directory: pathlib.Path) -> bool:
    """Whether a directory holds an adapter in another program's format."""
    try:
        return formats.recognised(directory)
    except (FileNotFoundError, ValueError):
        return False


def _fail(error: Exception, code: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"lorax.report: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
