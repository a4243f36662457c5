"""What the members of a run have learned, read from its directory."""

from collections.abc import Iterable

import pandas as pd

from lorax import rundir
from lorax.analysis.runs import Run
from lorax.analysis.tables.matrices import Updates, layer_and_target
from lorax.interop.adapter import shapes_of


def updates(run: Run, members: Iterable[int]) -> tuple[dict[int, Updates], dict[int, str]]:
    """({member: `run.update(member)`} for the members with a weight update, those with factors
    first; {member: the reason} for the others)."""
    factored, dense, missing = {}, {}, {}
    for member in members:
        try:
            of_member = run.update(member)
        except (FileNotFoundError, ValueError) as error:
            missing[member] = str(error)
            continue
        if not of_member:
            missing[member] = "no update: ΔW = 0 in all matrices"
        elif has_factors(of_member):
            factored[member] = of_member
        else:
            dense[member] = of_member
    return factored | dense, missing


def has_factors(updates: Updates) -> bool:
    """Whether a member's updates have factors: all do, or none does."""
    return all(len(shape) == 3 for shape in shapes_of(updates).values())


def sensitivity(run: Run) -> pd.DataFrame | None:
    """One row per member and matrix: its score before training, and the rank chosen by it (member,
    path, layer, target, energy, share, score, rank). None if nothing was chosen."""
    file = rundir.table(run.directory, "sensitivity")
    if not file.exists():
        return None
    table = pd.read_csv(file)
    table[["layer", "target"]] = [layer_and_target(path) for path in table["path"]]
    return table
