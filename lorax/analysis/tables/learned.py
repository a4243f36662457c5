"""What the members of a run have learned, read from its directory."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.analysis.runs import Run
from lorax.analysis.tables.matrices import layer_and_target
from lorax.interop.peft import Factors


def adapters(
    run: Run, members: Iterable[int]
) -> tuple[dict[int, dict[str, Factors]], dict[int, str]]:
    """The factors of those members that have any, and for the others the reason."""
    found, missing = {}, {}
    for member in members:
        try:
            found[member] = run.adapter(member)
        except (FileNotFoundError, ValueError) as error:
            missing[member] = str(error)
    return found, missing


def deltas(run: Run, members: Iterable[int]) -> dict[int, dict[str, np.ndarray]]:
    """The dense updates of those members that have left one, for those without factors."""
    found = {}
    for member in members:
        try:
            found[member] = run.delta(member)
        except FileNotFoundError:
            continue
    return found


def sensitivity(run: Run) -> pd.DataFrame | None:
    """A row a member and matrix: what evidence said before training, and the rank it chose (member,
    path, layer, target, energy, share, score, rank). None where it chose nothing."""
    file = rundir.table(run.directory, "sensitivity")
    if not file.exists():
        return None
    table = pd.read_csv(file)
    table[["layer", "target"]] = [layer_and_target(path) for path in table["path"]]
    return table
