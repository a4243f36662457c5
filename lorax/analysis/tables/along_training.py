"""How updates grow: their size, ranks and directions at every evaluation.

With `config.analysis.trajectory`, training writes trajectory/<group>-<part>/<step>.safetensors: the
singular values and the leading input directions of every update at that step.
"""

import numpy as np
import pandas as pd

from lorax import rundir, spectrum
from lorax.analysis import runs
from lorax.analysis.measures import overlap
from lorax.analysis.tables.matrices import layer_and_target
from lorax.interop.tensors import read_arrays

COLUMNS = ("member", "step", "path", "layer", "target", "norm", "effective", "stable", "energy90")
COLUMNS += ("overlap_final",)
#: Columns of a run with `analysis.subspaces`, as `lorax.train.trajectory.Spectrum.energy` has them.
ENERGY = ("energy_top", "energy_top_in", "energy_top_out")
ENERGY += ("energy_bottom", "energy_bottom_in", "energy_bottom_out")
ENERGY += ("chance", "chance_in", "chance_out")
#: Columns of a run with `analysis.first_gradient`.
GRADIENT = ("gradient_overlap", "gradient_chance")


def trajectory(run: runs.Run) -> pd.DataFrame | None:
    """One row per member, step and matrix, with `COLUMNS`; None if the run has no trajectory.

    norm: ||dW||_F. effective, stable, energy90: ranks (`lorax.spectrum`), 0 for no update.
    overlap_final: phi(k, k) between the k leading input directions at this step and at the member's
    last step, from 0 (none in common, or no update yet) to 1. k is the number of directions at the
    last step, at most 4; NaN if there are none. Matrices that a member does not adapt have no
    rows.

    With `analysis.subspaces` k it has `ENERGY`, too, shares of ||dW||_F^2, NaN for no update. U and
    V are W's k leading singular directions (top) or the last k of its min(in, out) (bottom):
    energy_top = ||U^T dW V||_F^2 / ||dW||_F^2, energy_top_in = ||U^T dW||_F^2 / ||dW||_F^2,
    energy_top_out = ||dW V||_F^2 / ||dW||_F^2. chance = k^2 / (in out), chance_in = k / in and
    chance_out = k / out are their means for a dW in random directions.

    With `analysis.first_gradient` it has `GRADIENT`, too, NaN for a method without: phi(r, r)
    between the span of a (in, r) at this step and the r leading left singular vectors of the
    gradient of the loss with respect to W before training, from 0 to 1 (1: the same subspace); and
    r / in, its mean for a random span.
    """
    by_step: dict[tuple[int, str], dict[int, tuple]] = {}
    adapted = set()
    for file in rundir.spectra_files(run.directory):
        arrays = read_arrays(file)
        members = arrays.pop("members").tolist()
        for path in [key.removesuffix("/used") for key in arrays if key.endswith("/used")]:
            sigma, directions, used = (
                arrays[f"{path}/{kind}"] for kind in ("sigma", "directions", "used")
            )
            more = {name: arrays.get(f"{path}/{name}") for name in ("energy", "phi")}
            for i, member in enumerate(members):
                steps = by_step.setdefault((member, path), {})
                of_member = {name: x[i] for name, x in more.items() if x is not None}
                steps[int(file.stem)] = sigma[i], directions[i], of_member
                if used[i]:
                    adapted.add((member, path))
    rows = [row for key in adapted for row in _rows(*key, by_step[key])]
    if not rows:
        return None
    table = pd.DataFrame(rows)
    columns = [name for name in (*COLUMNS, *ENERGY, *GRADIENT) if name in table]
    table = table[columns]
    return table.sort_values(["member", "step", "layer", "path"], ignore_index=True)


def _rows(member: int, path: str, steps: dict) -> list[dict]:
    order = sorted(steps)
    sigma, directions = (np.stack([steps[step][i] for step in order]) for i in (0, 1))
    k = int(directions[-1].any(axis=0).sum())
    leading = directions[..., :k]
    shared = (
        overlap.basis_similarity(leading, leading[-1])[:, -1, -1] if k else [np.nan] * len(order)
    )
    numbers = {
        "norm": np.linalg.norm(sigma.astype(np.float64), axis=-1),
        "effective": spectrum.effective_rank(sigma),
        "stable": spectrum.stable_rank(sigma),
        "energy90": spectrum.energy_rank(sigma, 0.9),
        "overlap_final": shared,
    }
    layer, target = layer_and_target(path)
    place = {"member": member, "path": path, "layer": layer, "target": target}
    return [
        place | {"step": step} | {name: x[i] for name, x in numbers.items()} | _more(steps[step][2])
        for i, step in enumerate(order)
    ]


def _more(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """{column: number} of `ENERGY` and `GRADIENT`, as far as there are arrays."""
    names = {"energy": ENERGY, "phi": GRADIENT}
    return {
        column: float(x)
        for name, array in arrays.items()
        for column, x in zip(names[name], array.ravel(), strict=True)
    }


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


def kept_rank(run: runs.Run) -> pd.DataFrame | None:
    """One row per member and rank k that was kept of its updates (`config.analysis.kept_ranks`):
    member, kept, energy, loss and the task's scores, of the validation rows; None if nothing was
    measured.

    kept: k; 0 (the base, with what was trained in full beside the factors of a method that has
    some), the powers of two, and the largest numerical rank of the member's updates, its last row.
    energy: the share of the squared norm of all updates together. DoRA keeps its column lengths.
    """
    members = run.status.get("members", {})
    rows = [
        {"member": member} | row
        for member in run.members.index
        for row in members.get(str(member), {}).get("kept_rank", [])
    ]
    return pd.DataFrame(rows) if rows else None
