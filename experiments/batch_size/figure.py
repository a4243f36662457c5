"""Draws batch_size.png from losses.csv.

python -m experiments.batch_size.figure
"""

from pathlib import Path

from experiments import losses
from experiments.batch_size.rule import BY, LARGE, SMALL
from experiments.plotting import GREY, drawn, legend, line, ticks

HERE = Path(__file__).parent


def main() -> None:
    bases = losses.read(HERE, BY)
    with drawn(HERE / "batch_size.png", len(bases)) as grid:
        for axes, (base, of) in zip(grid[0], bases.items(), strict=True):
            at = ["batch_size", "seed"]
            of_method = dict(list(of.members.set_index(at).groupby("method")[of.split]))
            rank = of.members.set_index(at)["rank"]
            for n, r in enumerate((SMALL, LARGE)):
                gap = of_method["lora"][rank[rank > 0].eq(r)] - of_method["full"]
                line(axes, n, gap.unstack("seed"), f"LoRA, r = {r}")
            axes.axhline(0, color=GREY, linewidth=1)
            ticks(axes, sorted(set(of.members["batch_size"])))
            axes.set_title(base)
            axes.set_xlabel("batch size (examples)")
            axes.set_ylabel("loss less full fine-tuning's (nats)")
        legend(grid)


if __name__ == "__main__":
    main()
