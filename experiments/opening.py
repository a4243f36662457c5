"""What experiments/README.md opens with: what is known here about rank, a sentence each.

A sentence is written for certain verdicts. `lines` fills in the committed numbers, and refuses a
sentence whose verdicts have changed, as its words may be wrong by then.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.verdicts import CONTRADICTED, REPRODUCED, UNDECIDED, Verdict


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
        "On a pretrained model of 135 million parameters a small rank is enough, as the LoRA paper "
        "says: SmolLM2-135M's r = 8 on q and v is {0}, and r = 1 {1}.",
        (
            ("r = 8 is enough (q, v)", SMOLLM2, REPRODUCED),
            ("r = 1 is enough (q, v)", SMOLLM2, CONTRADICTED),
        ),
        "rank.png",
    ),
    Sentence(
        "rank",
        "On gpt2-nano (1 million), which learns its task through q and v alone, none is: r = 8 is "
        "{0}.",
        (("r = 8 is enough (q, v)", NANO, CONTRADICTED),),
        "rank.png",
    ),
    Sentence(
        "rank",
        "What is adapted matters at both sizes: q alone stays behind q and v at every rank, on "
        "gpt2-nano {0}, on SmolLM2-135M {1}.",
        tuple(("q alone stays behind q and v", base, REPRODUCED) for base in (NANO, SMOLLM2)),
        "rank.png",
    ),
    Sentence(
        "subspaces",
        "Two ranks share their first direction on SmolLM2-135M, phi(1, 1) of r = 8 and 64 is {0}, "
        "and do not on gpt2-nano: {1}.",
        (
            ("two ranks share the top direction: phi(1, 1) > 0.5", SMOLLM2, REPRODUCED),
            ("two ranks share the top direction: phi(1, 1) > 0.5", NANO, CONTRADICTED),
        ),
        "ranks.png",
    ),
    Sentence(
        "learning_rate",
        "The best learning rate hardly depends on the rank: from r = 4 to the largest it moves "
        "{0} on gpt2-nano and {1} on stories-llama-260k (0.26 million).",
        tuple(
            ("within a factor of two from r = 4 to the largest", base, REPRODUCED)
            for base in (NANO, STORIES)
        ),
        "learning_rate.png",
    ),
    Sentence(
        "rank_grows",
        "dW gains directions while it trains (gpt2-nano): the number that holds 90% of its energy "
        "grows for LoRA of rank 64 {0}, for full fine-tuning {1}.",
        tuple((f"{method}: grows", NANO, REPRODUCED) for method in ("LoRA", "full fine-tuning")),
        "rank_grows.png",
    ),
    Sentence(
        "drift_to_principal",
        "dW lies in the 8 leading directions of a pretrained W far above chance (gpt2-nano, LoRA, "
        "the share of its energy beyond chance: {0}), and leaves them over training: the share "
        "rises {1}.",
        (
            ("LoRA: principal share above chance", NANO, REPRODUCED),
            ("LoRA: principal share rises", NANO, CONTRADICTED),
        ),
        "drift_to_principal.png",
    ),
    Sentence(
        "intruders",
        "LoRA has intruder dimensions where full fine-tuning has hardly any ({0} directions on "
        "gpt2-nano), but hardly more than random directions of the same singular values ({1}).",
        (
            ("LoRA has intruders, full fine-tuning hardly any", NANO, REPRODUCED),
            ("more than random directions of the same singular values", NANO, UNDECIDED),
        ),
        "intruders.png",
    ),
    Sentence(
        "first_gradient",
        "A start in the leading directions of the first gradient pays (gpt2-nano, 25 steps): "
        "LoRA-One's loss is lower than the default's {0}, and LoRA-GA's lower still (LoRA-One is "
        "ahead {1}).",
        (
            ("LoRA-One ahead of the default", NANO, REPRODUCED),
            ("LoRA-One ahead of LoRA-GA", NANO, CONTRADICTED),
        ),
        "first_gradient.png",
    ),
    Sentence(
        "lora_plus",
        "A larger rate for b than for a gains little once both have their best (gpt2-nano, r = 8): "
        "ratio 16 is ahead of 1 {0}, which six seeds leave undecided.",
        (("ratio 16 beats 1", NANO, UNDECIDED),),
        "lora_plus.png",
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
