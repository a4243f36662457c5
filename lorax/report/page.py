"""One self-contained page of HTML: its tables, figures and sections, and how it is saved.

A report directory holds report.html, figures/NAME.csv (the plotted numbers) and analysis/ (all
numbers: .csv tables, .npz arrays). .report.json lists the files that the page wrote. The page has
its charts and what draws them in it; only the links below a figure lead to files.
`lorax.report.images` adds figures/NAME.png and NAME.pdf.
"""

import html
import io
import itertools
import json
import math
import pathlib
import re
import shlex
import string
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.progress import track

from lorax import rundir
from lorax.analysis.figures import vega
from lorax.analysis.runs import is_missing
from lorax.console import console
from lorax.errors import reason
from lorax.files import read_json, write_bytes, write_json
from lorax.report import charts, sharing

CONSOLE = console(stderr=True)  # shows progress on a terminal
MANIFEST = ".report.json"  # lists what a page wrote


class Picture(NamedTuple):
    """A figure and the numbers that it draws."""

    figure: vega.Chart
    numbers: pd.DataFrame


class Section(NamedTuple):
    """A part of a page, with its figures and files."""

    title: str
    content: str  # HTML
    pictures: dict[str, Picture] = {}
    # Of analysis/: NAME.csv or NAME.npz; bytes for any other.
    files: dict[str, pd.DataFrame | dict[str, np.ndarray] | bytes] = {}
    error: Exception | None = None  # why the section failed


class Link(NamedTuple):
    """A value of a table that leads to a file or folder beside the page."""

    value: Any
    address: str


class Fixed(NamedTuple):
    """A number, and how many digits after the point to show."""

    value: Any
    digits: int = 4
    half: float = math.nan  # half the width of its interval: "2.31 ± 0.12"


# ------------------------------------------------------------------------------------------ saving


def save(
    directory: pathlib.Path,
    title: str,
    lead: str,
    sections: Sequence[Section],
    command: str,
    share: pathlib.Path | None = None,
) -> pathlib.Path:
    """Draw all figures, then write them, the numbers and the page. Returns the path of report.html.

    Removes files that an earlier page wrote here and this one doesn't. All other files (the run's,
    the user's) stay.

    share: write only this file instead: the page with the figures, their numbers and the
    directory's config.json in it, without paths of this machine.

    If a section or figure fails, the page shows a note in its place with the command that redraws
    the page (`command`), a `SectionFailed` warning is issued, and errors.txt gets the traceback.
    Everything else is written.
    """
    files, images, failed = _draw(sections)
    if share is not None:
        written = _write_shared(share, directory, (title, lead, sections, images, command), files)
    else:
        written = _write(directory, put_together(title, lead, sections, images, command), files)
    for part_name, error in failed.items():
        warnings.warn(
            f"{part_name}: {rundir.keep_error(directory, error)}", SectionFailed, stacklevel=2
        )
    return written


def _draw(
    sections: Sequence[Section],
) -> tuple[dict[str, bytes], dict[str, dict | Exception], dict[str, Exception]]:
    """(all files but the page, by their paths; every figure, for `put_together`; what failed)."""
    failed = {section.title: section.error for section in sections if section.error is not None}
    files: dict[str, bytes] = {}
    images: dict[str, dict | Exception] = {}
    pictures = [(part.title, *picture) for part in sections for picture in part.pictures.items()]
    for heading, name, picture in progress(pictures, "drawing", len(pictures)):
        files[f"{rundir.FIGURES}/{name}.csv"] = as_csv(picture.numbers)
        try:
            images[name] = picture.figure.to_dict()
        except Exception as error:  # draw the other figures
            failed[f"{heading}, figure {name}"] = images[name] = error
    for section in sections:
        files |= {
            f"{rundir.ANALYSIS}/{name}": _data(value) for name, value in section.files.items()
        }
    return files, images, failed


def _write(directory: pathlib.Path, page: str, files: dict[str, bytes]) -> pathlib.Path:
    """Write the page and its files, and remove those that an earlier page left."""
    earlier = _written(directory)
    _write_manifest(directory, earlier | set(files))
    for name, data in files.items():
        write_bytes(directory / name, data)
    written = write_bytes(directory / rundir.REPORT, page.encode())
    for name in earlier - set(files):
        (directory / name).unlink(missing_ok=True)
    _write_manifest(directory, set(files))
    return written


def _write_shared(
    out: pathlib.Path, directory: pathlib.Path, page: tuple, files: dict[str, bytes]
) -> pathlib.Path:
    """Write the page as one file. page: the arguments of `put_together`."""
    title, lead, sections, images, command = page
    config = directory / rundir.CONFIG
    known = sharing.named_in(read_json(config)) if config.exists() else []
    shown = sharing.without_paths([directory, out, *known])
    if config.exists():
        files = {**files, rundir.CONFIG: config.read_bytes()}
    sections = [part._replace(content=shown(part.content)) for part in (*sections, _tables(files))]
    images = {
        name: json.loads(shown(json.dumps(image))) if isinstance(image, dict) else image
        for name, image in images.items()
    }
    text = put_together(shown(title), shown(lead), sections, images, shown(command))
    inside = {
        name: shown(data.decode()).encode() if name.endswith((".csv", ".json")) else data
        for name, data in files.items()
    }
    return write_bytes(out, sharing.one_file(text, inside).encode())


def _tables(files: Iterable[str]) -> Section:
    """The section that leads to the files that no figure leads to."""
    names = [name for name in files if not name.startswith(rundir.FIGURES)]
    links = (f'<li><a href="{name}">{name}</a></li>' for name in names if name[-4:] != ".npz")
    said = "The config and all tables. Large ones are compressed. Arrays are left out."
    return Section("Files", f"{paragraph(said)}<ul>{''.join(links)}</ul>")


class SectionFailed(UserWarning):
    """A section or a figure of a page failed; the others were made."""


def attempt(title: str, make: Callable[..., Section | list[Section]], *arguments) -> list[Section]:
    """The sections that `make(*arguments)` returns; if it fails, one with the error."""
    try:
        sections = make(*arguments)
    except Exception as error:  # show the rest of the page
        return [Section(title, "", error=error)]
    return [sections] if isinstance(sections, Section) else sections


def command(what: Iterable[object], **options: object) -> str:
    """The shell command that redraws a page. Options that are None are left out; those with several
    values are repeated."""
    flags = [
        f"--{name}={value}"
        for name, values in options.items()
        for value in (values if isinstance(values, tuple | list) else (values,))
        if value is not None
    ]
    names = [f"./{name}" if str(name).startswith("-") else str(name) for name in what]
    return shlex.join(["python", "-m", "lorax.report", *names, *flags])


def _written(directory: pathlib.Path) -> set[str]:
    """The files that an earlier page wrote here."""
    file = directory / MANIFEST
    listed = read_json(file).get("files", []) if file.exists() else []
    # The directory may come from elsewhere: remove only names that a page writes.
    folders = f"{rundir.FIGURES}|{rundir.ANALYSIS}"
    return {name for name in listed if re.fullmatch(rf"({folders})/[^/\0]+", str(name))}


def _write_manifest(directory: pathlib.Path, names: set[str]) -> None:
    write_json(directory / MANIFEST, {"files": sorted(names)})


def add_to_manifest(directory: pathlib.Path, names: Iterable[str]) -> None:
    """Note that the page has further files."""
    _write_manifest(directory, _written(directory) | set(names))


def progress(steps: Iterable, doing: str, total: int) -> Iterable:
    """The steps, with a progress bar on a terminal."""
    if not CONSOLE.is_terminal:
        return steps
    return track(steps, doing, total, console=CONSOLE, transient=True)


def save_files(
    directory: pathlib.Path, files: dict[str, pd.DataFrame | dict[str, np.ndarray]]
) -> None:
    """Write tables (NAME.csv) and dictionaries of arrays (NAME.npz) into analysis/."""
    for name, value in files.items():
        write_bytes(directory / rundir.ANALYSIS / name, _data(value))


def _data(value: pd.DataFrame | dict[str, np.ndarray] | bytes) -> bytes:
    """A table as CSV, arrays as npz; bytes as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, pd.DataFrame):
        return as_csv(value)
    buffer = io.BytesIO()
    np.savez(buffer, **value)  # compressing random digits takes long and saves a tenth
    return buffer.getvalue()


def as_csv(table: pd.DataFrame) -> bytes:
    """The table as CSV, without its index."""
    return table.to_csv(index=False).encode()


def put_together(
    title: str,
    lead: str,
    sections: Sequence[Section],
    images: dict[str, dict | Exception],
    command: str,
) -> str:
    """The page's HTML.

    Args:
      images: by the figure's name, the chart's specification (`vega.Chart.to_dict`), or the
        error that prevented it.
      command: redraws the page; shown where something failed.
    """
    lost = lambda what, error: (
        f'<p class="note">{what} could not be made: {escape(reason(error))}. {rundir.ERRORS}, '
        "next to this page, has the traceback. To redraw the page: "
        f"<code>{escape(command)}</code></p>"
    )
    sections = [
        section._replace(content=lost("This section", section.error) + section.content)
        if section.error is not None
        else section
        for section in sections
    ]
    contents = "".join(
        f'<li><a href="#{slug(section.title)}">{escape(section.title)}</a></li>'
        for section in sections
    )
    body = "".join(
        f'<section aria-labelledby="{slug(section.title)}">'
        f'<h2 id="{slug(section.title)}">{escape(section.title)}</h2>{section.content}</section>\n'
        for section in sections
    )
    for name, image in images.items():
        if isinstance(image, Exception):
            shown = rf'<figure id="figure-{re.escape(name)}">.*?</figure>'
            text = lost(f"Figure {escape(name)}", image)
            body = re.sub(shown, lambda _, text=text: text, body, flags=re.DOTALL)
    numbers = itertools.count(1)
    body = re.sub("<figcaption>", lambda _: f"<figcaption><b>Figure {next(numbers)}.</b> ", body)
    specs = {name: image for name, image in images.items() if isinstance(image, dict)}
    return string.Template(_file("page.html.tmpl")).substitute(
        css=charts.css() + "\n" + _file("page.css"),
        library=_library(specs),
        script=_file("page.js"),
        title=escape(title),
        lead=escape(lead),
        contents=contents,
        sections=body,
        footer="Written by lorax.report. All numbers are in analysis/, those that figures plot in "
        f"figures/. Figures as images: <code>{escape(command)} --figures=png,pdf</code>",
    )


def _file(name: str) -> str:
    """A file next to this one: a part of every page."""
    return pathlib.Path(__file__).with_name(name).read_text(encoding="utf-8")


def _library(specs: dict[str, dict]) -> str:
    """The scripts with the charts of a page and with what draws them, if it has any."""
    data = f'<script type="application/json" id="charts">{charts.embedded(specs)}</script>'
    return data + (f"<script>{charts.library()}</script>" if specs else "")


def slug(title: str) -> str:
    """A title as an HTML id or a part of a file's name: lower case, with hyphens between words."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def unused(name: str, taken: Container[str]) -> str:
    """The name, or name_2, name_3... if it is taken: runs "a/b" and "a_b" share a file name."""
    others = (f"{name}_{n}" for n in itertools.count(2))
    return name if name not in taken else next(other for other in others if other not in taken)


# ------------------------------------------------------------------------------- parts of a section


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    caption: str,
    sortable: bool = False,
    classes: Sequence[str] | None = None,
    attributes: Sequence[Mapping[str, object]] | None = None,
) -> str:
    """A table with right-aligned numbers. sortable: clicking a heading sorts.

    rows: lists of values; `Fixed` sets the digits, a missing value (None, NaN) is shown as "–".
    classes, attributes: of every row, in HTML.
    """
    rows = [list(row) for row in rows]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    cells = []
    for title, number in zip(header, numeric, strict=True):
        text = f'<button type="button">{escape(title)}</button>' if sortable else escape(title)
        sort = ' aria-sort="none"' if sortable else ""
        cells.append(f'<th scope="col"{_class(number)}{sort}>{text}</th>')
    body = []
    more = [_attributes(attribute) for attribute in attributes or [{}] * len(rows)]
    for row, name, given in zip(rows, classes or [""] * len(rows), more, strict=True):
        line = []
        for column, value in enumerate(row):
            tag, scope = ("th", ' scope="row"') if column == 0 else ("td", "")
            # Sort by the full precision; a missing number has no value.
            plain = value.value if isinstance(value, Fixed | Link) else value
            data = f' data-value="{escape(_plain(plain))}"' if sortable else ""
            of_cell = scope + _class(numeric[column]) + data
            line.append(f"<{tag}{of_cell}>{_cell(value)}</{tag}>")
        named = f' class="{escape(name)}"' if name else ""
        body.append(f"<tr{named}{given}>{''.join(line)}</tr>")
    of_table = " ".join(["sortable"] * sortable + ["members"] * (attributes is not None))
    named = f' class="{of_table}"' if of_table else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table{named}><caption>{escape(caption)}</caption>"
        f"<thead><tr>{''.join(cells)}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def figure(name: str, caption: str, alt: str, folded: str = "") -> str:
    """A figure with a link to its numbers. alt: what it shows, in words. folded: the summary line
    to click if the figure starts folded; it is always printed."""
    shown = (
        f'<figure id="figure-{name}"><div class="chart" data-chart="{name}" role="img" '
        f'aria-label="{escape(alt)}"><noscript>This chart is drawn by a script. Its numbers are '
        f"below.</noscript></div><figcaption>{escape(caption)} "
        f'<span class="files"><a href="figures/{name}.csv">CSV</a></span></figcaption></figure>'
    )
    return fold(folded, shown) if folded else shown


def fold(summary: str, content: str) -> str:
    """HTML that is unfolded by clicking the summary."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def aid(text: str) -> str:
    """A sentence on how to read what follows."""
    return f'<p class="aid">{escape(text)}</p>'


def note(text: str) -> str:
    """A caveat on what the page shows, set apart from the text."""
    return f'<p class="note">{escape(text)}</p>'


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def listing(items: Iterable[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def command_block(text: str) -> str:
    """A command or entry that a reader may copy."""
    return f'<pre class="command"><code>{escape(text)}</code></pre>'


def facts(pairs: dict[str, Any], code: Iterable[str] = (), commands: Iterable[str] = ()) -> str:
    """Names and values; empty values are left out. code, commands: names whose values are shown as
    code, or as commands to copy."""
    rows = []
    for name, value in pairs.items():
        if value in (None, "", {}):
            continue
        text = f"<code>{escape(value)}</code>" if name in code else _cell(value)
        text = command_block(value) if name in commands else text
        rows.append(f"<dt>{escape(name)}</dt><dd>{text}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


# ------------------------------------------------------------------------------------------- values


def escape(value: Any) -> str:
    """A value as `show` shows it, with HTML's characters escaped."""
    return html.escape(value if isinstance(value, str) else show(value), quote=True)


def show(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, Fixed):
        if is_missing(value.value):
            return "–"
        half = "" if is_missing(value.half) else f" ± {value.half:.{value.digits}f}"
        return f"{value.value:.{value.digits}f}{half}"
    if is_missing(value):
        return "–"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value) if not isinstance(value, (dict, list)) else json.dumps(value)


def _cell(value: Any) -> str:
    """A value of a table in HTML."""
    if isinstance(value, Link):
        return f'<a href="{escape(value.address)}">{escape(value.value)}</a>'
    return escape(show(value))


def _attributes(values: Mapping[str, object]) -> str:
    return "".join(f' {name}="{escape(str(value))}"' for name, value in values.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, (Fixed, int, float, np.number)) or value is None


def _class(number: bool) -> str:
    return ' class="n"' if number else ""


def _plain(value: Any) -> str:
    return "" if is_missing(value) else str(value)
