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


class Fields(griffe.Extension):
    """Docstrings give each field a line ("name: what it is"), which Markdown would join."""

    FIELD = re.compile(r"[`\w.]+(, [`\w.]+)*(: |\(.*\)(:| ->) )")

    def on_instance(self, *, obj, **_) -> None:
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring with a list of its fields in place of lines, and "<" as what it says."""
    paragraphs = [paragraph.split("\n") for paragraph in text.split("\n\n")]
    for lines in paragraphs:
        starts = [i for i, line in enumerate(lines) if Fields.FIELD.match(line)]
        if len(starts) > 1 and starts[0] == 0:
            lines[:] = [
                f"- {line}" if i in starts else f"    {line.strip()}"
                for i, line in enumerate(lines)
            ]
    return "\n\n".join("\n".join(lines) for lines in paragraphs).replace("<", "&lt;")
