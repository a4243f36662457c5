"""What a run has learned, as tables: the updates of its members, taken apart.

Updates are {member: {path: Factors}}, and {member: {path: dW (in, out)}} where there are no
factors.
"""

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

from lorax.analysis import amplification as table7
from lorax.analysis import spectrum, subspace
from lorax.analysis.runs import Run
from lorax.interop.peft import Factors

KINDS = ("A", "B", "dW in", "dW out")  # whose directions a subspace similarity compares


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
    file = run.directory / "analysis" / "sensitivity.csv"
    if not file.exists():
        return None
    table = pd.read_csv(file)
    table[["layer", "target"]] = [place(path) for path in table["path"]]
    return table


def place(path: str) -> tuple[int, str]:
    """Layer and target of a path: "h/3/attn/q" -> (3, "q"); -1 for what is in no layer."""
    numbers = re.findall(r"(?:^|/)(\d+)(?=/|$)", path)
    return (int(numbers[0]) if numbers else -1), path.rsplit("/", 1)[-1]


def spectra(
    found: dict[int, dict[str, Factors]], dense: dict[int, dict[str, np.ndarray]] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spectra of all updates, and the ranks read off them.

    found: factors of members by path. dense: updates (in, out) of those that have no factors.
    Returns two tables: (member, path, layer, target, index from 1, sigma), and (member, path,
    layer, target, rank, norm = ||dW||_F, effective, stable, energy90, numerical).
    """
    sigmas, ranks = [], []
    for member, updates in (found | (dense or {})).items():
        for path, update in updates.items():
            sigma, shape, rank = _singular_values(update)
            layer, target = place(path)
            row = {"member": member, "path": path, "layer": layer, "target": target}
            sigmas += [{**row, "index": i, "sigma": x} for i, x in enumerate(sigma, 1)]
            ranks.append(
                {
                    **row,
                    "rank": rank,
                    "norm": float(np.linalg.norm(sigma)),
                    "effective": float(spectrum.effective_rank(sigma)),
                    "stable": float(spectrum.stable_rank(sigma)),
                    "energy90": int(spectrum.energy_rank(sigma, 0.9)),
                    "numerical": int(spectrum.numerical_rank(sigma, shape)),
                }
            )
    return pd.DataFrame(sigmas), pd.DataFrame(ranks)


def _singular_values(update: Factors | np.ndarray):
    """(singular values, (in, out), width of the factors or of the matrix)."""
    if isinstance(update, np.ndarray):
        return np.linalg.svd(update, compute_uv=False), update.shape, min(update.shape)
    a, b, s, _ = update
    return spectrum.factor_svd(a, b, s)[1], (a.shape[0], b.shape[1]), a.shape[1]


def bases(factors: dict[str, Factors]) -> dict[str, dict[str, np.ndarray]]:
    """Orthonormal directions by path and kind: of A, of B, and dW's own, input and output side."""
    found = {}
    for path, (a, b, *_) in factors.items():
        inputs, outputs = subspace.update_directions(a, b)
        both = (subspace.directions(a), subspace.directions(b.T), inputs, outputs)
        found[path] = dict(zip(KINDS, both, strict=True))
    return found


def similarity(
    pairs: list[tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]],
) -> dict[str, dict[str, np.ndarray]]:
    """phi (r1, r2) by path and kind, averaged over pairs of `bases`; paths that all have."""
    common = [path for path in pairs[0][0] if all(path in u and path in v for u, v in pairs)]
    return {
        path: {
            kind: np.mean(
                [subspace.basis_similarity(u[path][kind], v[path][kind]) for u, v in pairs], axis=0
            )
            for kind in KINDS
        }
        for path in common
    }


def amplifications(
    found: dict[int, dict[str, Factors]], kernels: dict[str, np.ndarray]
) -> pd.DataFrame:
    """Table 7 for every member and matrix, with the adapter's own rank: member, path, layer,
    target, rank, delta_norm, w_in_delta, w_in_w, w_in_random, factor.

    Args:
      kernels: the frozen (in, out) kernels by path. KeyError names a path that is missing.
    """
    rows = []
    w_sigma: dict[str, np.ndarray] = {}
    for member, factors in found.items():
        for path, factor in factors.items():
            if path not in kernels:
                raise KeyError(f"{path}: adapted, but not among the base's kernels")
            w = np.asarray(kernels[path], np.float64)
            if path not in w_sigma:
                w_sigma[path] = np.linalg.svd(w, compute_uv=False)
            rank = min(factor.a.shape[1], *w.shape)
            numbers = table7(w, factor[:3], rank, w_sigma=w_sigma[path])
            layer, target = place(path)
            row = {"member": member, "path": path, "layer": layer, "target": target, "rank": rank}
            rows.append({**row, **numbers._asdict()})
    return pd.DataFrame(rows)
