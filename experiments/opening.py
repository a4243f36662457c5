"""What experiments/README.md opens with: what is known here about rank, a sentence each.

A sentence is written for certain verdicts. `lines` fills in the committed numbers, and refuses a
sentence whose verdicts have changed, as its words may be wrong by then.
"""

from collections.abc import Mapping
from typing import NamedTuple

from experiments.verdicts import CONTRADICTED, HERE, REPRODUCED, UNDECIDED, Verdict


class Sentence(NamedTuple):
    """text: with {0}, {1}... for the numbers of the verdicts. verdicts: (part, base, verdict) of
    the claim. figure: in the claim's folder."""

    claim: str
    text: str
    verdicts: tuple[tuple[str, str, str], ...]
    figure: str


SENTENCES: tuple[Sentence, ...] = ()


def lines(of_each: Mapping[str, list[Verdict]]) -> str:
    """The numbered sentences in Markdown, each with links to its claim and its figure.

    Raises ValueError for a sentence whose verdicts are not those that it was written for.
    """
    found = []
    for n, sentence in enumerate(SENTENCES, 1):
        known = {(v.part, v.base): v for v in of_each[sentence.claim]}
        numbers = []
        for part, base, verdict in sentence.verdicts:
            now = known[part, base]
            if now.verdict != verdict:
                raise ValueError(
                    f"experiments/opening.py: {sentence.claim}: {part} ({base}) is {now.verdict}; "
                    f"the sentence was written for {verdict}"
                )
            numbers.append(now.number)
        page, figure = f"{sentence.claim}/README.md", f"{sentence.claim}/{sentence.figure}"
        text = sentence.text.format(*numbers)
        found.append(f"{n}. {text} ([claim]({page}), [figure]({figure}))")
    return "\n".join(found)
