"""Do LoRA's variants tie once each has its own rate? See `experiments`."""

from pathlib import Path

from experiments import losses
from experiments.losses import START, Losses
from experiments.verdicts import (
    WITHDRAWN,
    Verdict,
    all_of,
    by_equivalence,
    commands,
    complete,
    shown,
)

CLAIM = "LoRA's variants tie once each has its own learning rate"
SOURCE = "Lee et al. (arXiv:2602.04998)"
SHARE = 0.02  # of full fine-tuning's gain
RULE = (
    "Every variant has six rates, a factor of two apart, and stands at its best. It ties with "
    "LoRA if the 90% interval over seeds and test rows of loss - loss(LoRA) lies within 2% of "
    "what full fine-tuning gains over the base, and does not if none of the interval does. The "
    "claim is reproduced if all seven tie, contradicted if one does not, undecided else. A best "
    "rate at the edge of its grid withdraws the variant, and the claim unless another contradicts "
    "it."
)
STUDY, BY = "variants", ["method", "init"]
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k", "SmolLM2-135M")
LORA, FULL = "lora, kaiming", "full, nan"
ALL = "all seven tie"
VARIANTS = {
    "rsLoRA": "rslora, kaiming",
    "DoRA": "dora, kaiming",
    "LoRA+": "lora+, kaiming",
    "PiSSA": "lora, pissa",
    "MiLoRA": "lora, milora",
    "OLoRA": "lora, olora",
    "LoRA-GA": "lora, lora-ga",
}


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY)


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, of in losses.read(folder, BY).items():
        of_each = [ties(base, of, name) for name in VARIANTS]
        found += [whole(base, of_each), *of_each]
    return complete(found, (ALL, *VARIANTS))


def ties(base: str, of: Losses, name: str) -> Verdict:
    """Whether a variant's loss is LoRA's within the margin."""
    if doubt := of.doubt(VARIANTS[name], LORA):
        return Verdict(name, base, WITHDRAWN, doubt)
    margin = SHARE * of.contrast({START: 1, FULL: -1}).value
    behind = of.contrast({VARIANTS[name]: 1, LORA: -1}, level=0.9)
    number = f"{shown(behind)} nats behind LoRA, 90%, margin {margin:.3f}"
    return Verdict(name, base, by_equivalence(behind, -margin, margin), number, behind)


def whole(base: str, of_each: list[Verdict]) -> Verdict:
    words = [v.verdict for v in of_each]
    verdict = all_of(words)
    if verdict != "contradicted" and WITHDRAWN in words:
        return Verdict(ALL, base, WITHDRAWN, f"{words.count(WITHDRAWN)} of 7 withdrawn")
    tied = words.count("reproduced")
    return Verdict(ALL, base, verdict, f"{tied} of 7 tie, {words.count('contradicted')} do not")
