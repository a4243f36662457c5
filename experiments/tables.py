"""Writes the verdicts, as the committed numbers give them, into the READMEs.

    python -m experiments.tables

For every claim with a rule: into the README of its folder and into the table of
experiments/README.md, between the lines MARKS; there also the sentences of experiments/opening.py.
tests/test_verdicts.py asserts that they are there.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import opening, verdicts
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


def filled(text: str, parts: Sequence[str]) -> str:
    """A README with the nth of these parts between its nth pair of MARKS. Raises ValueError if it
    has another number of pairs."""
    begin, end = MARKS
    pieces = re.split(f"{re.escape(begin)}.*?{re.escape(end)}", text, flags=re.DOTALL)
    if len(pieces) != len(parts) + 1:
        raise ValueError(
            f"{len(pieces) - 1} pairs of the lines {begin!r} and {end!r}; {len(parts)} expected"
        )
    marked = [f"{begin}\n\n{part}\n\n{end}" for part in parts]
    return "".join(itertools.chain(*zip(pieces, [*marked, ""], strict=True)))


def recomputed() -> dict[str, list[Verdict]]:
    """{claim: its verdicts}, from the committed numbers."""
    return {claim: verdicts.rule(claim).verdicts(HERE / claim) for claim in verdicts.claims()}


def pages(of_each: Mapping[str, list[Verdict]]) -> dict[Path, tuple[str, ...]]:
    """{README: what stands between its marks}: of all claims, of each, and of the LoRA paper's
    tables beside ours."""
    found = {HERE / claim / "README.md": (of_claim(of),) for claim, of in of_each.items()}
    found[HERE / "lora_paper" / "README.md"] = (lora_paper(),)
    return {HERE / "README.md": (opening.lines(of_each), of_all(of_each)), **found}


def main() -> None:
    for page, parts in pages(recomputed()).items():
        text = files.read_text(page)
        try:
            new = filled(text, parts)
        except ValueError as error:
            raise SystemExit(f"{page}: {error}") from None
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(HERE.parent))


if __name__ == "__main__":
    main()
