"""Draws little_data.png from losses.csv.

python -m experiments.little_data.figure
"""

from pathlib import Path

from experiments import losses
from experiments.little_data.rule import BY
from experiments.plotting import drawn, legend, line, of_loss

HERE = Path(__file__).parent
NAMES = {"lora": "LoRA, r = 8", "full": "full fine-tuning", "prefix": "prefix"}


def main() -> None:
    bases = losses.read(HERE, BY)
    with drawn(HERE / "little_data.png", len(bases)) as grid:
        for axes, (base, of) in zip(grid[0], bases.items(), strict=True):
            for n, (method, label) in enumerate(NAMES.items()):
                own = of.members[of.members["method"] == method]
                line(axes, n, own.pivot(index="n_train", columns="seed", values=of.split), label)
            axes.set_title(base)
            axes.set_xlabel("training examples")
            axes.set_ylabel(of_loss(of.split, base))
        legend(grid)


if __name__ == "__main__":
    main()
