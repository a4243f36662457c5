"""Do larger models need fewer dimensions? See `experiments`."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.dimensions import COLUMNS, as_dimension, compared, log_d90
from experiments.verdicts import UNDECIDED, Verdict, commands, complete, numbers, write
from lorax.analysis import intrinsic, runs

CLAIM = "larger models have a smaller intrinsic dimension"
SOURCE = "Aghajanyan et al. 2020 (arXiv:2012.13255), section 4.2"
RULE = (
    "On E2E, d90 of DID is the dimension with 90% of what full fine-tuning takes off the "
    "validation loss. The claim is reproduced if the 95% interval of log2(d90 / d90 of the "
    "smallest model), of the two as independent, lies below 0, contradicted if it lies above. A "
    "crossing outside the tested dimensions withdraws the number. gpt2-nano learns another task, "
    "so that its number stands beside the others without a verdict."
)
STUDY, SMALLEST = "intrinsic_dimension_ladder", "stories-llama-260k"
COMMANDS = commands(STUDY, "gpt2-nano", SMALLEST, "SmolLM2-135M")
FEWER = "fewer dimensions than stories-llama-260k"


def collect(runs_of: dict[str, list[Path]], folder: Path) -> None:
    """points.csv: a row a member, of `lorax.analysis.intrinsic.points`."""
    tables = []
    for base, (directory,) in runs_of.items():
        table = intrinsic.points(runs.load(directory))[COLUMNS]
        table.insert(0, "base", base)
        tables.append(table)
    write(pd.concat(tables), folder, "points.csv")


def verdicts(folder: Path) -> list[Verdict]:
    table = numbers(folder, "points.csv")
    d90 = {base: log_d90(of, "subspace", "loss") for base, of in table.groupby("base")}
    found = []
    for base, own in d90.items():
        if base == "SmolLM2-135M" and SMALLEST in d90:
            found.append(compared(FEWER, base, own, d90[SMALLEST], "d90"))
        elif np.isfinite(own.value):
            found.append(Verdict(FEWER, base, UNDECIDED, f"d90 {as_dimension(own)}", own))
    return complete(found, (FEWER,))
