"""Writes the verdicts, as the committed numbers give them, into the READMEs.

    python -m experiments.tables

For every claim with a rule: into the README of its folder and into the table of
experiments/README.md, between the lines MARKS. tests/test_verdicts.py asserts that they are there.
"""

from collections.abc import Mapping
from pathlib import Path

from experiments import verdicts
from experiments.lora_paper.page import tables as lora_paper
from experiments.sweeps import markdown
from experiments.verdicts import HERE, LADDER, NOT_RUN, Verdict
from lorax import files

MARKS = "<!-- verdicts: python -m experiments.tables -->", "<!-- end of the verdicts -->"
RANDOM, OTHERS = "random weights", "others"


def of_claim(found: list[Verdict]) -> str:
    """The table of a claim's folder: a row a part and base; bases that were not run in one line."""
    rows = [v for v in found if v.verdict != NOT_RUN]
    cells = [(v.part, v.base, f"**{v.verdict}**", v.number) for v in rows]
    heads = ("", "base", "verdict", "number (95% interval)")
    lines = [markdown(heads, cells)] if rows else []
    missing = {base: None for base in (v.base for v in found if v.verdict == NOT_RUN)}
    every = [base for base in missing if not any(v.base == base for v in rows)]
    if every:
        lines += ["", f"Not run: {', '.join(every)}."]
    some = [f"{v.part} ({v.base})" for v in found if v.verdict == NOT_RUN and v.base not in every]
    if some:
        lines += ["", f"Not run: {'; '.join(some)}."]
    return "\n".join(lines).strip()


def of_all(of_each: Mapping[str, list[Verdict]]) -> str:
    """The table of experiments/README.md: a row a part of a claim, a column a base."""
    heads = ["claim", "source", *LADDER, RANDOM, OTHERS]
    rows = []
    for claim, found in of_each.items():
        rule = verdicts.rule(claim)
        for n, part in enumerate(dict.fromkeys(v.part for v in found)):
            first = f"[{rule.CLAIM}]({claim}/README.md)" if n == 0 else ""
            cells = [f"{first}{': ' if first else ''}{part}", rule.SOURCE if n == 0 else ""]
            own = [v for v in found if v.part == part]
            cells += [_cell([v for v in own if column(v.base) == name]) for name in heads[2:]]
            rows.append(cells)
    return markdown(heads, rows)


def column(base: str) -> str:
    """The column of a base: its own on the ladder, that of random weights, or of all others."""
    model, *further = base.split(" ")
    return RANDOM if "random" in further else model if model in LADDER else OTHERS


def _cell(own: list[Verdict]) -> str:
    """Verdicts of one part in one column; whose they are where the column does not say it."""
    cells = []
    for v in own:
        label = "" if v.base in LADDER else f"{v.base.replace(' random', '')}: "
        verdict = NOT_RUN if v.verdict == NOT_RUN else f"**{v.verdict}** {v.number}".strip()
        cells.append(label + verdict)
    return "; ".join(cells)


def filled(text: str, table: str) -> str:
    """A README with this table between MARKS. Raises ValueError if the marks are not there."""
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise ValueError(f"the lines {MARKS[0]!r} and {MARKS[1]!r} are missing")
    return f"{before}{mark}\n\n{table}\n\n{end}{after}"


def recomputed() -> dict[str, list[Verdict]]:
    """{claim: its verdicts}, from the committed numbers."""
    return {claim: verdicts.rule(claim).verdicts(HERE / claim) for claim in verdicts.claims()}


def pages(of_each: Mapping[str, list[Verdict]]) -> dict[Path, str]:
    """{README: its table}: of all claims, of each, and of the LoRA paper's tables beside ours."""
    tables = {HERE / claim / "README.md": of_claim(found) for claim, found in of_each.items()}
    tables[HERE / "lora_paper" / "README.md"] = lora_paper()
    return {HERE / "README.md": of_all(of_each), **tables}


def main() -> None:
    for page, table in pages(recomputed()).items():
        text = files.read_text(page)
        try:
            new = filled(text, table)
        except ValueError as error:
            raise SystemExit(f"{page}: {error}") from None
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(HERE.parent))


if __name__ == "__main__":
    main()
