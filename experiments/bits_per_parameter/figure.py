"""Draws bits_per_parameter.png from bits.csv.

python -m experiments.bits_per_parameter.figure
"""

from pathlib import Path

from experiments.bits_per_parameter.rule import BY, PARTS, ratio
from experiments.plotting import Row, drawn, intervals
from experiments.verdicts import WITHDRAWN, Tuned, numbers, tuned
from lorax.analysis import compare

HERE = Path(__file__).parent


def main() -> None:
    bases = list(numbers(HERE, "bits.csv").groupby("base", sort=False))
    file = HERE / "bits_per_parameter.png"
    with drawn(file, 2, len(bases), size=(3.5, 3)) as grid:
        for (bits, ratios), (base, table) in zip(grid, bases, strict=True):
            best = tuned(table.assign(less=-table["bits_per_parameter"]), BY, "less")
            intervals(bits, of_settings(best))
            bits.set_title(base)
            bits.set_xlabel("bits a trainable parameter")
            run = set(best.members["setting"])
            parts = [part for part, (*pair, _) in PARTS.items() if set(pair) <= run]
            intervals(ratios, [of_part(base, best, part) for part in parts])
            ratios.set_xlabel("ratio of bits")


def of_settings(best: Tuned) -> list[Row]:
    """The settings at their best rates."""
    found = []
    for setting, members in best.members.groupby("setting", sort=False):
        weights, method, targets = setting.split(", ")
        name = ("full" if method == "full" else "LoRA") + f", {targets}"
        name += ",\nrandom base" if weights == "random" else ""
        bits = members["bits_per_parameter"]
        found.append(Row(name, compare.interval(bits), bits, doubt=best.doubt(setting)))
    return found


def of_part(base: str, best: Tuned, part: str) -> Row:
    above, below, margin = PARTS[part]
    bits = best.members.pivot(index="seed", columns="setting", values="bits_per_parameter")
    seeds = bits[above] / bits[below]
    verdict = ratio(base, best, part)
    doubt = verdict.number if verdict.verdict == WITHDRAWN else ""
    return Row(
        part.replace(" above ", "\nabove "), compare.interval(seeds), seeds, (margin,), doubt
    )


if __name__ == "__main__":
    main()
