"""A page's charts as images for papers: figures/NAME.png and NAME.pdf, drawn from the page itself.

A page draws its charts in the browser, and drawing them as files takes longer than the analysis, so
they are drawn only where they are asked for.
"""

import pathlib
import re
import warnings
from collections.abc import Sequence

from lorax import rundir
from lorax.files import read_text, write_bytes
from lorax.report import charts, page

FORMATS = {"png": charts.png, "pdf": charts.pdf}


def read_formats(given: str | Sequence[str]) -> tuple[str, ...]:
    """The formats of a list, or of words with commas between them, as --figures has them. Raises
    ValueError for another one."""
    words = given.split(",") if isinstance(given, str) else given
    formats = tuple(dict.fromkeys(word.strip() for word in words))
    unknown = [word for word in formats if word not in FORMATS]
    if unknown:
        known = ", ".join(FORMATS)
        raise ValueError(f"--figures: {', '.join(unknown)!r} given, must be some of {known}")
    return formats


def add(written: pathlib.Path, formats: Sequence[str]) -> None:
    """Draw every chart of a page that `page.save` has written, in these formats, and lead to the
    files below it. The next page that is written there removes them. One that can't be drawn is
    left out with a `page.SectionFailed` warning."""
    directory, text = written.parent, read_text(written)
    specs = charts.read(text)
    for name, spec in page.progress(specs.items(), "drawing", len(specs)):
        try:
            drawn = {f"{rundir.FIGURES}/{name}.{kind}": FORMATS[kind](spec) for kind in formats}
        except Exception as error:  # draw the other figures
            failed = f"figure {name}: {rundir.keep_error(directory, error)}"
            warnings.warn(failed, page.SectionFailed, stacklevel=2)
            continue
        page.add_to_manifest(directory, drawn)
        for file, data in drawn.items():
            write_bytes(directory / file, data)
        links = "".join(f'<a href="{file}">{file[-3:].upper()}</a>, ' for file in drawn)
        to_numbers = f'<a href="{rundir.FIGURES}/{name}.csv">'
        text = re.sub(re.escape(to_numbers), lambda match, more=links: more + match[0], text)
    write_bytes(written, text.encode())
