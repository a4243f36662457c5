"""How updates grow: their size, their ranks and their directions at every evaluation.

Training leaves trajectory/<group>-<part>/<step>.safetensors where `config.analysis.trajectory` asks
for it: the singular values and the leading input directions of every update at that step.
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
    """A row a member, step and matrix, with the `COLUMNS`; None where the run has no trajectory.

    norm: ||dW||_F. effective, stable, energy90: ranks (`lorax.analysis.spectrum`), 0 of no update.
    overlap_final: phi(k, k) of the k leading input directions and those of the member's last step,
    from 0 (none in common, or no update yet) to 1; k is as many as there are in the end, at most 4;
    NaN where there are none. A matrix that a member does not adapt has no rows.
    """
    kept: dict[tuple[int, str], dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    adapted = set()
    for file in rundir.spectra_files(run.directory):
        arrays = read_arrays(file)
        members = arrays.pop("members").tolist()
        for path in [key.removesuffix("/used") for key in arrays if key.endswith("/used")]:
            sigma, directions, used = (
                arrays[f"{path}/{kind}"] for kind in ("sigma", "directions", "used")
            )
            for i, member in enumerate(members):
                steps = kept.setdefault((member, path), {})
                steps[int(file.stem)] = sigma[i], directions[i]
                if used[i]:
                    adapted.add((member, path))
    rows = [row for key in adapted for row in _rows(*key, kept[key])]
    if not rows:
        return None
    found = pd.DataFrame(rows, columns=COLUMNS)
    return found.sort_values(["member", "step", "layer", "path"], ignore_index=True)


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
    """A row a member and layer (member, layer from 0, cka) of a run that `config.analysis.cka` had
    compared with its base; None of another.

    The examples are the real tokens of so many evaluation rows, the activations the residual stream
    after the layer, adapted and without any adapter. A diverged member has no rows.
    """
    rows = [
        {"member": member, "layer": layer, "cka": value}
        for member in run.members.index
        for layer, value in enumerate(
            run.status.get("members", {}).get(str(member), {}).get("cka", [])
        )
    ]
    return pd.DataFrame(rows) if rows else None
