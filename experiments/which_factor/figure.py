"""Draws which_factor.png from losses.csv.

python -m experiments.which_factor.figure
"""

from pathlib import Path

from experiments import losses
from experiments.losses import START, Losses
from experiments.plotting import Row, drawn, intervals
from experiments.verdicts import mapped
from experiments.which_factor.rule import ALONE, BY, RANKS, SHARE, TARGETS

HERE = Path(__file__).parent


def main() -> None:
    bases = losses.read(HERE, BY)
    with drawn(HERE / "which_factor.png", len(bases), size=(3.5, 3)) as grid:
        for axes, (base, of) in zip(grid[0], bases.items(), strict=True):
            rows = [lacks(of, words, targets) for words in ALONE for targets in TARGETS]
            intervals(axes, rows)
            axes.set_title(base)
            axes.set_xlabel("lacks, % of what LoRA gains")


def lacks(of: Losses, words: str, targets: str) -> Row:
    """What one factor alone lacks, with the rule's interval: of the difference from the margin."""
    one, both = ([f"{name}, {targets}, {r}" for r in RANKS] for name in (ALONE[words][0], "lora"))
    mean = 1 / len(RANKS)
    lora = dict.fromkeys(both, mean)
    gain = of.contrast({START: 1} | {setting: -share for setting, share in lora.items()}).value
    above = dict.fromkeys(one, mean) | {START: -SHARE}
    above |= {setting: (SHARE - 1) * share for setting, share in lora.items()}
    percent = lambda nats: 100 * (nats / gain + SHARE)
    found, seeds = mapped(of.contrast(above), percent), percent(of.of_seeds(above))
    name = f"{words.partition(' alone')[0]} alone, {targets}"
    return Row(name, found, seeds, (100 * SHARE,), of.doubt(*one, *both))


if __name__ == "__main__":
    main()
