"""README, CONTRIBUTING and docs/ as their readers see them: blocks of code, links, headings."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
#: Histories: their commands were right on their dates.
DATED = ("LOG.md", "CHANGELOG.md")


class Block(NamedTuple):
    """Code on a page. where: "docs/data.md:12"; language: "sh" for indented commands."""

    where: str
    language: str
    text: str


def blocks() -> list[Block]:
    """The blocks of code of all pages but the dated ones."""
    return [block for page in PAGES if page.name not in DATED for block in of_page(page)]


def of_page(page: Path) -> list[Block]:
    """Fenced blocks, and lines indented by four after a blank line."""
    name, text = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(
        r"^```(\w*)\n(.*?)^```$|(?<=\n\n)((?: {4}[^\n]*\n)+)", text, re.M | re.S
    ):
        where = f"{name}:{text.count(chr(10), 0, match.start()) + 1}"
        language, fenced, indented = match.groups()
        if indented:
            language, fenced = "sh", re.sub("^ {4}", "", indented, flags=re.M)
        found.append(Block(where, language, fenced))
    return found


def commands() -> list[tuple[str, str]]:
    """(where, command) of every line of the shell blocks, continued lines joined."""
    shell = [block for block in blocks() if block.language == "sh"]
    lines = [(b.where, line) for b in shell for line in b.text.replace("\\\n", " ").splitlines()]
    return [(where, " ".join(line.split())) for where, line in lines if line.strip()]


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def links(page: Path) -> list[str]:
    """The targets of the links and pictures of a page, those to other servers left out."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in link]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}
