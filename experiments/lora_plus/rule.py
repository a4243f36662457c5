"""Should b have a larger learning rate than a? See `experiments`."""

from pathlib import Path

from experiments import losses
from experiments.losses import START, Losses
from experiments.verdicts import WITHDRAWN, Verdict, by_interval, commands, complete, shown

CLAIM = "a rate of b of about 16 times that of a beats equal rates"
SOURCE = "LoRA+ (arXiv:2402.12354), section 4"
SHARE = 0.005  # of full fine-tuning's gain
RULE = (
    "Every ratio has five rates and stands at its best on the validation rows. Ratio 16 beats "
    "ratio 1 if loss(1) - loss(16) on the test rows exceeds 0.5% of what full fine-tuning gains "
    "over the base: by the 95% interval of loss(1) - loss(16) - 0.005 (start - loss(full)) over "
    "seeds and test rows, which lies above 0; not if it lies below. The same for ratio 4. A best "
    "rate at the edge of its grid withdraws the number."
)
STUDY, BY = "lora_plus", ["method", "ratio"]
COMMANDS = commands(STUDY, "gpt2-nano", "stories-llama-260k")
PARTS = ("ratio 16 beats 1", "ratio 4 beats 1")


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    losses.collect(runs, folder, BY, STUDY)


def verdicts(folder: Path) -> list[Verdict]:
    return complete(
        [
            beats(base, of, part, ratio)
            for base, of in losses.read(folder, BY).items()
            for part, ratio in zip(PARTS, (16.0, 4.0), strict=True)
        ],
        PARTS,
    )


def beats(base: str, of: Losses, part: str, ratio: float) -> Verdict:
    one, more, full = "lora+, 1.0", f"lora+, {ratio}", "full, nan"
    if doubt := of.doubt(one, more, full):
        return Verdict(part, base, WITHDRAWN, doubt)
    gain = of.contrast({one: 1, more: -1})
    above = of.contrast({one: 1, more: -1, START: -SHARE, full: SHARE})
    share = gain.value / of.contrast({START: 1, full: -1}).value
    number = f"by {shown(gain)} nats, {share:.2%} of full fine-tuning's gain"
    return Verdict(part, base, by_interval(above, "above"), number, gain)
