"""Draws variants_tie.png from losses.csv.

python -m experiments.variants_tie.figure
"""

from pathlib import Path

from experiments import losses
from experiments.losses import START, Losses
from experiments.plotting import Row, drawn, intervals
from experiments.variants_tie.rule import BY, FULL, LORA, SHARE, VARIANTS

HERE = Path(__file__).parent


def main() -> None:
    bases = losses.read(HERE, BY)
    with drawn(HERE / "variants_tie.png", len(bases), size=(3.5, 3.2)) as grid:
        for axes, (base, of) in zip(grid[0], bases.items(), strict=True):
            intervals(axes, rows(of))
            axes.set_title(base)
            axes.set_xlabel(f"{of.split} loss less LoRA's (nats, 90%)")


def rows(of: Losses) -> list[Row]:
    margin = SHARE * of.contrast({START: 1, FULL: -1}).value
    found = []
    for name, variant in VARIANTS.items():
        weights = {variant: 1, LORA: -1}
        behind, seeds = of.contrast(weights, level=0.9), of.of_seeds(weights)
        found.append(Row(name, behind, seeds, (-margin, margin), of.doubt(variant, LORA)))
    return found


if __name__ == "__main__":
    main()
