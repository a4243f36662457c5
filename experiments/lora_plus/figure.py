"""Draws lora_plus.png from losses.csv.

python -m experiments.lora_plus.figure
"""

from pathlib import Path

from experiments import losses
from experiments.lora_plus.rule import BY, SHARE
from experiments.losses import START, Losses
from experiments.plotting import Row, drawn, intervals, legend, line
from experiments.verdicts import mapped, numbers

HERE = Path(__file__).parent
ONE, FULL = "lora+, 1.0", "full, nan"


def main() -> None:
    tables = dict(list(numbers(HERE, "losses.csv").groupby("base")))
    bases = losses.read(HERE, BY)
    file = HERE / "lora_plus.png"
    with drawn(file, 2, len(bases), size=(3.5, 2.8)) as grid:
        for (rates, gains), (base, of) in zip(grid, bases.items(), strict=True):
            for n, (ratio, own) in enumerate(tables[base].groupby("ratio", dropna=False)):
                values = own.pivot(index="lr", columns="seed", values="validation")
                name = "full fine-tuning" if ratio != ratio else f"ratio {ratio:g}"
                line(rates, n, values, name)
            rates.set_xscale("log")
            rates.set_title(base)
            rates.set_xlabel("learning rate of a")
            rates.set_ylabel("validation loss (nats a token)")
            ratios = sorted(set(tables[base]["ratio"].dropna()) - {1.0})
            intervals(gains, [gain(of, ratio) for ratio in ratios])
            gains.set_xlabel("test loss below ratio 1's,\n% of full fine-tuning's gain")
        legend(grid, 3)


def gain(of: Losses, ratio: float) -> Row:
    """What a ratio takes off ratio 1's test loss; its interval is the rule's, of the difference
    from the margin."""
    more = f"lora+, {ratio}"
    above = {ONE: 1, more: -1, START: -SHARE, FULL: SHARE}
    whole = of.contrast({START: 1, FULL: -1}).value
    percent = lambda nats: 100 * (nats / whole + SHARE)
    found, seeds = mapped(of.contrast(above), percent), percent(of.of_seeds(above))
    return Row(f"ratio {ratio:g}", found, seeds, (100 * SHARE,), of.doubt(ONE, more, FULL))


if __name__ == "__main__":
    main()
