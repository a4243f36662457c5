"""How updates grow: their size, ranks and directions at every evaluation.

With `config.analysis.trajectory`, training writes trajectory/<group>-<part>/<step>.safetensors: the
singular values and the leading input directions of every update at that step.
"""

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.analysis import runs
from lorax.analysis.measures import overlap, spectrum
from lorax.analysis.tables.matrices import layer_and_target
from lorax.interop.tensors import read_arrays

COLUMNS = ("member", "step", "path", "layer", "target", "norm", "effective", "stable", "energy90")
COLUMNS += ("overlap_final",)


def trajectory(run: runs.Run) -> pd.DataFrame | None:
    """One row per member, step and matrix, with `COLUMNS`; None if the run has no trajectory.

    norm: ||dW||_F. effective, stable, energy90: ranks (`measures.spectrum`), 0 for no update.
    overlap_final: phi(k, k) between the k leading input directions at this step and at the member's
    last step, from 0 (none in common, or no update yet) to 1. k is the number of directions at the
    last step, at most 4; NaN if there are none. Matrices that a member does not adapt have no
    rows.
    """
    by_step: dict[tuple[int, str], dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    adapted = set()
    for file in rundir.spectra_files(run.directory):
        arrays = read_arrays(file)
        members = arrays.pop("members").tolist()
        for path in [key.removesuffix("/used") for key in arrays if key.endswith("/used")]:
            sigma, directions, used = (
                arrays[f"{path}/{kind}"] for kind in ("sigma", "directions", "used")
            )
            for i, member in enumerate(members):
                steps = by_step.setdefault((member, path), {})
                steps[int(file.stem)] = sigma[i], directions[i]
                if used[i]:
                    adapted.add((member, path))
    rows = [row for key in adapted for row in _rows(*key, by_step[key])]
    if not rows:
        return None
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.sort_values(["member", "step", "layer", "path"], ignore_index=True)


def _rows(member: int, path: str, steps: dict) -> list[tuple]:
    order = sorted(steps)
    sigma, directions = (np.stack([steps[step][i] for step in order]) for i in (0, 1))
    k = int(directions[-1].any(axis=0).sum())
    leading = directions[..., :k]
    shared = (
        overlap.basis_similarity(leading, leading[-1])[:, -1, -1] if k else [np.nan] * len(order)
    )
    numbers = (
        np.linalg.norm(sigma.astype(np.float64), axis=-1),
        spectrum.effective_rank(sigma),
        spectrum.stable_rank(sigma),
        spectrum.energy_rank(sigma, 0.9),
        shared,
    )
    place = layer_and_target(path)
    return [
        (member, step, path, *place, *values) for step, *values in zip(order, *numbers, strict=True)
    ]


def cka(run: runs.Run) -> pd.DataFrame | None:
    """One row per member and layer (member, layer from 0, cka); None if the run was not compared
    with its base (`config.analysis.cka`).

    The examples are the real tokens of that many evaluation rows; the activations are the residual
    stream after the layer, with and without the adapter. A diverged member has no rows.
    """
    rows = [
        {"member": member, "layer": layer, "cka": value}
        for member in run.members.index
        for layer, value in enumerate(
            run.status.get("members", {}).get(str(member), {}).get("cka", [])
        )
    ]
    return pd.DataFrame(rows) if rows else None
