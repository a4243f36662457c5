"""NF4 against INT4 and FP4: which is closer to the weights?"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.verdicts import Verdict, by_interval, complete, copied, mapped, numbers
from lorax.analysis import compare

CLAIM = "NF4 is nearer to weights than 4-bit integers and floats; double quantisation costs little"
SOURCE = "QLoRA (arXiv:2305.14314), section 3"
RULE = """\
Mean squared error over that of NF4, as a geometric mean over matrices (of N(0, 1): eight seeds).
NF4 is nearer than a format if the 95% interval of its ratio lies above 1, and is not if it lies
below. Double quantisation costs little if the interval lies below 1.01, and much if it lies above.
INT4 is taken in the plain symmetric way, of 15 levels, and with all 16 levels and the sign of the
largest number."""
BASES = ("gpt2-nano", "stories-llama-260k", "N(0,1)")
COMMANDS = dict.fromkeys(BASES, ("python -m experiments.nf4_error.run",))
MINUTES = dict.fromkeys(BASES, 2)
ABOVE = {
    "nearer than INT4 of 15 levels": "int4, 15 levels",
    "nearer than INT4 of all 16 levels": "int4, 16 levels from -8 to 7",
    "nearer than FP4": "fp4",
}
DOUBLE = "double quantisation costs less than 1%"
PARTS = (*ABOVE, DOUBLE)


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    copied(runs, folder, "numbers.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, table in numbers(folder, "numbers.csv").groupby("base", sort=False):
        ratios = dict(list(table.groupby("format")["over_nf4"]))
        for part, name in ABOVE.items():
            found.append(decided(part, base, ratios[name], "above", 1.0))
        found.append(decided(DOUBLE, base, ratios["nf4, double quantisation"], "below", 1.01))
    return complete(found, PARTS)


def decided(part: str, base: str, ratios: pd.Series, side: str, margin: float) -> Verdict:
    x = mapped(compare.interval(np.log(ratios)), np.exp)
    number = f"{x.value:.4g} times ({x.low:.4g} to {x.high:.4g})"
    return Verdict(part, base, by_interval(x, side, margin), number, x)
