"""Show what is in adapters of any format: ranks, sizes, defects; compare and add several.

    python -m lorax.xray FILE                  ranks and singular values of every matrix
    python -m lorax.xray FILE FILE...          also the directions that files share, and their sum
    python -m lorax.xray FILE --base BASE      also amplification and intruders in its weights
    python -m lorax.xray FILE --out DIR        also a page, report.html, and tables in analysis/

FILE is a file, a directory with one, or a Hub id (owner/name, or owner/name/file.safetensors).
Formats: PEFT, kohya and LyCORIS, diffusers, ComfyUI, MLX, GGUF and others; pickles are never read.
No base is needed. dW is the update of a matrix with its scale s in it: s a b for LoRA.

    r           rank in the file           numerical   singular values above rounding
    effective   exp of the entropy of the singular values
    stable      ||dW||^2 / sigma_1^2       90%         singular values that hold 90% of ||dW||^2
    share       of ||dW||^2 of all matrices
    phi         of two updates' directions: 1 in common, 0 orthogonal
    kept        of an update in the sum of all files: below 1, the others cancel a part of it
    disturbed   what the others add on the inputs that an update reads, relative to the update
"""

import argparse
import sys
from collections.abc import Sequence

from lorax.errors import fail


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0; 1 if a section of the page failed; 2 for wrong input."""
    given = _parser().parse_args(arguments)
    from lorax.console import console
    from lorax.xray import command  # slow to import

    screen = console(width=None if sys.stdout.isatty() else 1000)
    try:
        return command.show(given, screen)
    except (ValueError, OSError) as error:
        return fail(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lorax.xray", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", metavar="FILE", help="adapters of any format")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="directory for the page that lorax.report draws",
    )
    parser.add_argument(
        "--base",
        help="compare the updates with the weights of this model (a shipped one, a directory, a "
        "Hub id or a .safetensors file)",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="compare with the base in N evenly spaced layers"
    )
    parser.add_argument("--all", action="store_true", help="a row for every matrix, however many")
    return parser


if __name__ == "__main__":
    sys.exit(main())
