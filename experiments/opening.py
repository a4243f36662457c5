"""What experiments/README.md opens with: what is known here about rank, a sentence each.

A sentence is written for certain verdicts. `lines` fills in the committed numbers, and refuses a
sentence whose verdicts have changed, as its words may be wrong by then.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.verdicts import CONTRADICTED, REPRODUCED, Verdict


class Sentence(NamedTuple):
    """text: with {0}, {1}... for the numbers of the verdicts. verdicts: (part, base, verdict) of
    the claim. figure: in the claim's folder."""

    claim: str
    text: str
    verdicts: tuple[tuple[str, str, str], ...]
    figure: str


NANO, STORIES, SMOLLM2 = "gpt2-nano", "stories-llama-260k", "SmolLM2-135M"
SENTENCES = (
    Sentence(
        "rank",
        "On gpt2-nano (1 million parameters), where q and v learn a new task from little, no small "
        "rank is enough: r = 8 is {0}.",
        (("r = 8 is enough (q, v)", NANO, CONTRADICTED),),
        "rank.png",
    ),
    Sentence(
        "learning_rate",
        "The best learning rate hardly depends on the rank: from r = 4 to the largest it moves "
        "{0} on gpt2-nano (1 million) and {1} on stories-llama-260k (0.26 million).",
        tuple(
            ("within a factor of two from r = 4 to the largest", base, REPRODUCED)
            for base in (NANO, STORIES)
        ),
        "learning_rate.png",
    ),
)


def lines(of_each: Mapping[str, list[Verdict]], sentences: Sequence[Sentence] = SENTENCES) -> str:
    """The numbered sentences in Markdown, each with links to its claim and its figure.

    Raises ValueError for a sentence whose verdicts are not those that it was written for.
    """
    found = []
    for n, sentence in enumerate(sentences, 1):
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
