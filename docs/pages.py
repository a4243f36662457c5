"""What mkdocs.yml needs beyond its plugins: README and the pages outside docs/, and docstrings.

The pages link to each other as files of the repository, so that they work there as well. On the
site docs/ is the root: the links are rewritten, and README.md, CONTRIBUTING.md, LOG.md,
CHANGELOG.md, experiments/, configs/ and notebooks/ are added beside what docs/ holds.
"""

import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
ADDED = ("*.md", "*.cff", "configs/*.py", "experiments/**/*.*", "notebooks/*.ipynb")
SKIPPED = (".pyc",)
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config) -> Files:
    """Adds the pages and files outside docs/."""
    for pattern in ADDED:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            if path.is_file() and path.suffix not in SKIPPED:
                file = File.generated(config, uri, abs_src_path=str(path))
                if uri.startswith("experiments/"):  # reached from its README, not from the menu
                    file.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(file)
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """The page with links between files of the site in place of files of the repository."""
    added = Path(page.file.abs_src_path).relative_to(ROOT).parts[0] != "docs"
    here = posixpath.dirname(page.file.src_uri if added else f"docs/{page.file.src_uri}")
    return LINK.sub(lambda link: link[1] + site_link(here, link[2]), markdown)


def site_link(here: str, link: str) -> str:
    """A link from a page in the folder `here` of the repository, as the site needs it."""
    target = posixpath.normpath(posixpath.join(here, link)).removeprefix("docs/")
    return posixpath.relpath(target, here.removeprefix("docs").lstrip("/") or ".")


class Docstrings(griffe.Extension):
    """Docstrings as Markdown; NamedTuples with their fields, `SHOWN` functions with their code
    and that of the functions that make their parts."""

    #: Functions that are read for their code.
    SHOWN = ("lorax.config.default",)

    def on_object(self, *, obj, **_) -> None:
        if obj.is_alias or not obj.docstring:
            return
        text = as_markdown(obj.docstring.value)
        if obj.is_class and any("NamedTuple" in str(base) for base in obj.bases):
            text += code(obj, [m for m in obj.members.values() if m.is_attribute])
        if obj.path in self.SHOWN:
            parts = [obj.parent[name] for name in re.findall(r" = (_\w+)\(\)", obj.source)]
            text += "\n\n```python\n" + "\n\n".join(f.source for f in (obj, *parts)) + "\n```"
        obj.docstring.value = text


def code(obj, attributes) -> str:
    """The lines of a class that define attributes, with their comments, as a block of code."""
    lines = obj.source.split("\n")
    ranges = [(a.lineno - obj.lineno, a.endlineno - obj.lineno + 1) for a in attributes]
    fields = [line[4:] for start, end in ranges for line in lines[start:end]]
    return "\n\n```python\n" + "\n".join(fields) + "\n```" if fields else ""


#: A line that begins with a field: "name: what it is", "name(x) -> what it returns".
FIELD = re.compile(r"[`\w.]+(, [`\w.]+)*(: |\(.*\)(:| ->) )")


def as_markdown(text: str) -> str:
    """A docstring with a list item for each field's line, which Markdown would join to one line,
    and with "<" and "#" for what they say."""
    paragraphs = [paragraph.split("\n") for paragraph in text.split("\n\n")]
    for lines in paragraphs:
        starts = [i for i, line in enumerate(lines) if FIELD.match(line)]
        if len(starts) > 1 and starts[0] == 0:
            for i, line in enumerate(lines):
                lines[i] = f"- {line}" if i in starts else f"    {line.strip()}"
    text = "\n\n".join("\n".join(lines) for lines in paragraphs)
    return re.sub("^#", r"\\#", text, flags=re.M).replace("<", "&lt;")
